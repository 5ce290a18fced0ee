"""The loss of a step, at x and at trial points: that of a closure, or of stored micro-batches."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from pytorch_optimizer.base.exception import NoSparseGradientError
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from fulgurite.plugins.linalg import LossGraph, ModuleLoss, record_loss
from fulgurite.plugins.linalg.curvature import vjp
from fulgurite.plugins.linalg.distributed import Peers
from fulgurite.plugins.linalg.module_loss import SkippedBatch


class Objective(ABC):
    """A loss that is evaluated at x first and then at other points.

    Attributes:
        source: of curvature at x.
        loss: at x, ``()``, in double precision, this rank's.
        gradient: at x, ``(P,)``, the mean over the ranks.
        missing: parameters without a gradient.
        rounding: relative difference of losses that may be rounding.
    """

    source: LossGraph | ModuleLoss
    loss: Tensor
    gradient: Tensor
    missing: int = 0
    rounding: float

    @abstractmethod
    def begin(self, subsample: float) -> Any:
        """Evaluates at x; returns what the closure does.

        Args:
            subsample: the fraction of the batches that ``source`` is of.

        Raises:
            SkippedBatch: where there is no loss.
        """

    @abstractmethod
    def again(self) -> tuple[Tensor, Tensor]:
        """Loss and gradient at the present parameters; the loss is not a number where there is none."""

    def release(self) -> None:
        """Frees the graph at x."""
        self.source.release()

    def end(self) -> None:
        """Leaves what one evaluation at x would."""
        if hasattr(self, "source"):
            self.release()


class ClosureLoss(Objective):
    """The loss of a closure, whose graph at x is kept; its gradients are averaged over the ranks by DDP."""

    def __init__(self, closure: Callable[[], Any], params: list[Tensor], outputs: Any) -> None:
        self.closure, self.params, self.outputs = closure, params, outputs
        self._random = _random_states(params[0].device)
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        self._after: list[tuple[Tensor, Tensor]] = []

    @override
    def begin(self, subsample: float) -> Any:
        if subsample < 1:
            raise ValueError(
                f"`subsample` is {subsample}, but a closure shows no batches: attach "
                "`fulgurite.callbacks.CurvatureBatches()`"
            )
        found = _Gradients(self.params)
        recording = _Recording(self.params, self.outputs)
        with _watch_buffers(self._before), found, recording, torch.enable_grad():
            result = self.closure()
            # Gradients without a `backward` are of a manual `step()`, for which Lightning makes a closure up.
            if result is None and not found.recorded and not _are_there(self.params):
                raise SkippedBatch("the closure returned None and called no `backward`")
        found.refuse_changes()
        self._after = [(buffer, buffer.clone()) for buffer, _ in self._before.values()]
        self.source, self.gradient = recording.graph, found.gradient
        self.loss, self.missing = self._value(result), sum(p.grad is None for p in self.params)
        tensors = [self.source.root, *self.params]
        self.rounding = max(32 * torch.finfo(tensor.dtype).eps for tensor in tensors)
        # Under autocast the loss is the mean of numbers that are rounded more coarsely than it is.
        self.rounding = max([self.rounding, *(torch.finfo(z.dtype).eps for z in self.source.outputs)])
        return result

    @override
    def again(self) -> tuple[Tensor, Tensor]:
        for param in self.params:
            param.grad = None
        _put_back(self._before.values())
        _set_random_states(self._random, self.params[0].device)
        with _Gradients(self.params) as found, torch.enable_grad():
            result = self.closure()
        found.refuse_changes()
        if result is None and not found.recorded:
            return _nothing(self.params)
        return self._value(result), found.gradient

    @override
    def end(self) -> None:
        super().end()
        _put_back(self._after)

    def _value(self, result: Any) -> Tensor:
        if not isinstance(result, Tensor) or result.numel() != 1:
            got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise RuntimeError(f"the closure must return the loss, a scalar tensor, got {got}")
        return result.detach().double().reshape(())


class StoredLoss(Objective):
    """The loss of stored micro-batches; the closure, of the last one, runs once for the Trainer."""

    source: ModuleLoss

    def __init__(self, closure: Callable[[], Any], params: list[Tensor], stored: ModuleLoss, peers: Peers) -> None:
        self.closure, self.params, self.stored, self.peers = closure, params, stored, peers
        self.rounding = 32 * torch.finfo(params[0].dtype).eps

    @override
    def begin(self, subsample: float) -> Any:
        with _Gradients(self.params) as found, torch.enable_grad():
            result = self.closure()
        found.refuse_changes()
        n_batches = len(self.stored.batches)
        count = math.ceil(subsample * n_batches)
        self.source = self.stored.fresh(count)
        loss, gradient = self._evaluate(self.source if count == n_batches else self._passing())
        self.loss, self.gradient = loss, self.peers.mean_(gradient)
        return result

    @override
    def again(self) -> tuple[Tensor, Tensor]:
        try:
            loss, gradient = self._evaluate(self._passing())
        except SkippedBatch:
            loss, gradient = _nothing(self.params)
        return loss, self.peers.mean_(gradient)

    def _passing(self) -> ModuleLoss:
        """The same loss, whose graphs nobody keeps."""
        return self.stored.fresh(keep_graphs=False)

    def _evaluate(self, stored: ModuleLoss) -> tuple[Tensor, Tensor]:
        losses: list[Tensor] = []
        gradients: list[Tensor] = []
        for weight, graph in stored.graphs():
            losses.append(weight * graph.root.detach().double())
            part = _flat(vjp([graph.root], self.params), self.params).mul_(weight)
            gradients = [part if not gradients else gradients[0].add_(part)]
        return torch.stack(losses).sum(), gradients[0]


class _Gradients(TorchFunctionMode):
    """Takes the gradients as ``backward`` leaves them, within the block.

    Attributes:
        gradient: ``(P,)``, from the first ``backward`` on.
        recorded: whether there was one.
    """

    gradient: Tensor

    def __init__(self, params: list[Tensor]) -> None:
        super().__init__()
        self.params, self.recorded = params, False
        self._left: list[tuple[Tensor | None, int]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        if func is torch.Tensor.backward:
            if any(p.grad is not None and p.grad.layout != torch.strided for p in self.params):
                raise NoSparseGradientError("GradientRegularizedNewton", " Use `sparse=False`")
            self.gradient, self._left, self.recorded = self._flat(), self._versions(), True
        return result

    def refuse_changes(self) -> None:
        """Raises where something else than ``backward`` wrote to a gradient, be it the same numbers."""
        if not self.recorded:
            return
        # Versions show what clips below its bound, and numbers what goes through `data`.
        pairs = zip(self._left, self._versions(), strict=True)
        same = all(a is b and before == after for (a, before), (b, after) in pairs)
        if not (same and torch.equal(self._flat().nan_to_num(), self.gradient.nan_to_num())):
            raise RuntimeError(
                "the gradients after the closure are not as `backward` left them: remove `gradient_clip_val`, since "
                "lambda already bounds the step, and what else changes gradients"
            )

    def _flat(self) -> Tensor:
        return _flat([p.grad for p in self.params], self.params)

    def _versions(self) -> list[tuple[Tensor | None, int]]:
        return [(p.grad, 0 if p.grad is None else p.grad._version) for p in self.params]


class _Recording(record_loss):
    """Refuses gradients that are there already."""

    def __init__(self, params: list[Tensor], outputs: Any) -> None:
        super().__init__(outputs)
        self._of = params

    @override
    def _backward(self, *args: Any, **kwargs: Any) -> None:
        if self._root is None and _are_there(self._of):
            raise RuntimeError(
                "there are gradients already where `backward` begins. Without `accumulate_grad_batches`: call "
                "`zero_grad` in the closure. With it: the loss of the last batch would be tested against the gradient "
                "of all; raise the batch size, or attach `fulgurite.callbacks.CurvatureBatches()`"
            )
        super()._backward(*args, **kwargs)


def _are_there(params: list[Tensor]) -> bool:
    return any(p.grad is not None and bool(p.grad.any()) for p in params)


def _nothing(params: list[Tensor]) -> tuple[Tensor, Tensor]:
    """What a batch is worth that is skipped."""
    return torch.tensor(math.nan, dtype=torch.float64, device=params[0].device), _flat([None] * len(params), params)


def _flat(gradients: Sequence[Tensor | None], params: list[Tensor]) -> Tensor:
    """``(P,)``, in single precision at least."""
    dtype = torch.promote_types(params[0].dtype, torch.float32)
    pairs = zip(gradients, params, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g.detach()).reshape(-1).to(dtype) for g, p in pairs])


@contextmanager
def _watch_buffers(found: dict[int, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Notes the buffers of every module that runs within the block, as they are before it does."""

    def note(module: nn.Module, args: Any) -> None:
        for buffer in module._buffers.values():
            if buffer is not None and id(buffer) not in found:
                found[id(buffer)] = (buffer, buffer.detach().clone())

    handle = register_module_forward_pre_hook(note)
    try:
        yield
    finally:
        handle.remove()


def _put_back(buffers: Iterable[tuple[Tensor, Tensor]]) -> None:
    for buffer, value in buffers:
        buffer.data.copy_(value)


def _random_states(device: torch.device) -> list[Tensor]:
    """Of torch's generators on the host and on the device."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _set_random_states(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)
