"""Runs a module's own step on stored batches, as often as curvature needs it, and leaves no trace."""

import copy
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fulgurite.plugins.linalg.record import LossGraph, Outputs, record_loss
from fulgurite.plugins.quiet import quiet
from fulgurite.plugins.seeds import derived_seed


class SkippedBatch(ValueError):
    """The step returned None for a batch, which training skips."""


class ModuleLoss:
    """The mean over stored batches of the loss that a step of ``module`` returns, as often as it is asked for.

    The step sees the same random numbers each time, so that dropout masks repeat, and the modes that the module is in.

    Args:
        module: has the step; not wrapped, not compiled.
        batches: ``(batch, batch_idx)``, on the module's device; indexed once for each recording.
        step: the method that gets ``(batch, batch_idx)`` and returns the loss, or a dict with it under ``"loss"``.
        outputs: for :class:`~fulgurite.plugins.linalg.record_loss`.
        weights: one a batch; None for ``1 / len(batches)`` each.
        keep_graphs: record once and keep the graphs until :meth:`release`: a product costs half as much, and memory
            holds the activations of all batches. ``"auto"`` keeps them where there is one batch.
        frozen: put back what the step changes: buffers, metrics, generators; logs are muted.
        context: entered around each step, such as autocast.
        seed: other random numbers for another one, such as the number of the optimizer's step.

    Raises:
        ValueError: for a compiled module, or one without the step; for no batches, or weights of another number; where
            the step is run, and returns no loss.
    """

    def __init__(
        self,
        module: nn.Module,
        batches: Sequence[tuple[Any, int]],
        *,
        step: str = "training_step",
        outputs: Outputs = "loss_input",
        weights: Sequence[float] | None = None,
        keep_graphs: bool | Literal["auto"] = "auto",
        frozen: bool = True,
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
        seed: int = 0,
    ) -> None:
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            raise ValueError(
                "`module` went through `torch.compile`, which has no double backward: pass the uncompiled module, "
                "`module._orig_mod`"
            )
        if not callable(getattr(module, step, None)):
            raise ValueError(f"`module` ({type(module).__name__}) has no method `{step}`; DDP's is `module.module`")
        if not len(batches):
            raise ValueError("`batches` is empty: the loss is a mean over at least one")
        if weights is not None and len(weights) != len(batches):
            raise ValueError(f"`weights` has {len(weights)} numbers for {len(batches)} batches")
        self.module, self.batches, self.step, self.outputs = module, batches, step, outputs
        self.weights = list(weights) if weights is not None else [1 / len(batches)] * len(batches)
        self.keep_graphs = len(batches) == 1 if keep_graphs == "auto" else keep_graphs
        self.frozen, self.context = frozen, context
        key = ("ModuleLoss", torch.initial_seed(), seed)
        self._seeds = [derived_seed(*key, index) for index in range(len(batches))]
        self._graphs: dict[int, LossGraph] = {}

    @property
    def params(self) -> list[nn.Parameter]:
        """The module's parameters that require a gradient, in its order."""
        return [param for param in self.module.parameters() if param.requires_grad]

    def graphs(self) -> Generator[tuple[float, LossGraph]]:
        """``(weight, graph)`` of each batch; a graph that is not kept lasts until the next one is asked for."""
        for index, weight in enumerate(self.weights):
            graph = self._graphs.get(index) or self._record(index)
            if self.keep_graphs:
                self._graphs[index] = graph
            try:
                yield weight, graph
            finally:
                if not self.keep_graphs:
                    graph.release()

    def value(self) -> Tensor:
        """The loss, ``()``, without a graph."""
        losses = []
        with torch.no_grad():
            for index in range(len(self.weights)):
                with self._running(index):
                    losses.append(self._loss(index).detach().double().reshape(()))
        return torch.stack(losses) @ torch.tensor(self.weights, dtype=torch.float64, device=losses[0].device)

    def fresh(self, n_batches: int | None = None, keep_graphs: bool | None = None) -> "ModuleLoss":
        """The mean over the first batches, without a graph yet, of steps that see the same random numbers.

        Args:
            n_batches: None for all.
            keep_graphs: None for as it is here.
        """
        other = copy.copy(self)
        other._graphs = {}
        if n_batches is not None:
            total = sum(self.weights[:n_batches])
            other.batches = self.batches[:n_batches]
            other.weights = [weight * sum(self.weights) / total for weight in self.weights[:n_batches]]
        if keep_graphs is not None:
            other.keep_graphs = keep_graphs
        return other

    def release(self) -> None:
        """Frees the kept graphs: before the weights change. What is asked for next is recorded anew."""
        for graph in self._graphs.values():
            graph.release()
        self._graphs = {}

    def _record(self, index: int) -> LossGraph:
        with torch.enable_grad(), self._running(index), _RecordWithoutBackward(self.outputs) as rec:
            rec.finish(self._loss(index))
        return rec.graph

    @contextmanager
    def _running(self, index: int) -> Iterator[None]:
        """Within it the step draws the batch's random numbers, and nothing that it does lasts."""
        devices = sorted({param.device.index for param in self.module.parameters() if param.device.type == "cuda"})
        with ExitStack() as stack:
            if self.frozen:
                stack.enter_context(quiet(self.module))
            stack.enter_context(torch.random.fork_rng(devices))
            torch.default_generator.manual_seed(self._seeds[index])
            for device in devices:
                torch.cuda.default_generators[device].manual_seed(self._seeds[index])
            stack.enter_context(self.context())
            yield

    def _loss(self, index: int) -> Tensor:
        output = getattr(self.module, self.step)(*self.batches[index])
        loss = output["loss"] if isinstance(output, dict) else output
        if not isinstance(loss, Tensor):
            problem = f"`{self.step}` returned {type(output).__name__} for batch {index} instead of a loss"
            raise SkippedBatch(problem) if output is None else ValueError(problem)
        return loss


class _RecordWithoutBackward(record_loss):
    def _backward(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError(
            "`step` calls `backward`, which would write gradients: give the name of a method that returns the loss"
        )
