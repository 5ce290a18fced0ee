"""Gradients that keep what examples agree on, in place of their mean."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from typing_extensions import override

from fulgurite.callbacks.requirements import (
    averaging_group,
    loss_scale,
    matching_parameters,
    patterns_of,
    require_whole_backward,
    require_whole_parameters,
)
from fulgurite.plugins.linalg import Uses, example_gradients
from fulgurite.plugins.optim.coherent_gradients import median_of_three, winsorized_mean

Rule = Literal["winsorize", "m3", "rm3"]
_MAX_BYTES = 2**28  # for the gradients of all examples of one parameter


class CoherentGradients(Callback):
    """Steps along what examples agree on, which suppresses memorising (arXiv 2002.10657, 2003.07422).

    Each optimizer step, before clipping, the mean gradient is replaced, coordinate by coordinate:

    - ``"winsorize"``: by the mean over examples once their extreme values are clipped, out of the step's own backward;
      one process, no accumulation, and modules that have the batch first.
    - ``"m3"``: by the median of the means of three parts of the batch: of the micro-batches in order where
      ``accumulate_grad_batches`` is divisible by 3, else of three groups of ranks under DDP.
    - ``"rm3"``: by the median of the gradients of this step and the two before.

    List :class:`GradientCoherence` before it, to measure what it gets.

    Args:
        rule: one of these.
        c: of ``"winsorize"``, the share of examples to clip at each end, in ``[0, 0.5)``.
        exclude: patterns of names of parameters or modules that keep their mean, as ``"*.bias"``.

    Raises:
        ValueError: an argument out of its range.
        MisconfigurationException: a fit for which the rule is not defined.
        RuntimeError: ``"winsorize"`` with modules whose gradients are not those of examples, or larger than 256 MB for
            one parameter.
    """

    def __init__(self, rule: Rule, c: float = 0.1, exclude: str | Sequence[str] = ()) -> None:
        if rule not in get_args(Rule):
            raise ValueError(f"`rule` must be one of {get_args(Rule)}, got {rule!r}")
        if not 0 <= c < 0.5:
            raise ValueError(f"`c` is the share of examples to clip at each end, in [0, 0.5), got {c}")
        self.rule, self.c, self.exclude = rule, c, patterns_of(exclude) or ()
        self._names: list[str] = []
        self._open = ExitStack()
        self._parts: list[dict[str, Tensor]] = []  # winsorized gradients, or their sums at the borders of parts
        self._passes = 0
        self._past: list[dict[str, Tensor]] = []

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._past = []  # of an earlier fit; a checkpoint brings its own, later
        require_whole_parameters(self, trainer)
        if not pl_module.automatic_optimization:
            raise MisconfigurationException(
                "`CoherentGradients` replaces gradients between the backward and the step: use automatic optimization"
            )
        if self.rule != "rm3":
            require_whole_backward(f'`CoherentGradients("{self.rule}")`', trainer, 'use "rm3", or `strategy="ddp"`')
        accumulate, ranks = trainer.accumulate_grad_batches, trainer.world_size
        if self.rule == "winsorize" and (accumulate > 1 or ranks > 1):
            raise MisconfigurationException(
                '`rule="winsorize"` orders all examples of a step in one backward, got '
                f"accumulate_grad_batches={accumulate} and {ranks} processes: use one of each, or another rule"
            )
        if self.rule == "m3" and accumulate % 3 and ranks % 3:
            raise MisconfigurationException(
                f'`rule="m3"` takes the median of three parts, got accumulate_grad_batches={accumulate} and {ranks} '
                "processes: make one of them divisible by 3"
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._parts, self._passes = [], 0
        excluded = matching_parameters(pl_module, self.exclude, "exclude") if self.exclude else {}
        named = pl_module.named_parameters()
        self._names = [name for name, param in named if param.requires_grad and name not in excluded]
        if not self._names:
            raise ValueError(f"`exclude` {list(self.exclude)} leaves no parameter: leave the callback out")
        if self._by_ranks(trainer):
            model = trainer.strategy.model
            if not isinstance(model, DistributedDataParallel):
                raise MisconfigurationException(
                    f'`rule="m3"` over ranks needs `strategy="ddp"`, got {type(trainer.strategy).__name__}'
                )
            kept = {id(param) for name, param in pl_module.named_parameters() if name in excluded}
            model.register_comm_hook(kept, median_of_ranks)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.rule == "winsorize":
            self._open.close()
            self._parts = [{}]
            watched = example_gradients(
                pl_module, self._winsorize, only=self._names, otherwise="name these parameters in `exclude`"
            )
            self._open.enter_context(watched)

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._open.close()
        self._passes += 1
        accumulate = trainer.accumulate_grad_batches
        if self.rule == "m3" and not accumulate % 3 and self._passes in (accumulate // 3, 2 * accumulate // 3):
            self._parts.append({name: _grad(param).clone() for name, param in self._chosen(pl_module)})

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        whole = self._passes == trainer.accumulate_grad_batches  # an epoch's last step may have fewer
        parts, self._parts, self._passes = self._parts, [], 0
        scale = loss_scale(trainer)  # of the parts; the gradients are without by now
        chosen = [(name, param) for name, param in self._chosen(pl_module) if param.grad is not None]
        if self.rule == "rm3":
            self._remember(chosen)
        elif self.rule == "winsorize":
            if not parts:
                raise RuntimeError(
                    f'`rule="winsorize"` has one backward a step, and {type(optimizer).__name__} makes several: use '
                    "another optimizer or rule"
                )
            for name, param in chosen:
                _grad(param).copy_(parts[0][name] / scale)
        elif whole and not self._by_ranks(trainer):
            for name, param in chosen:
                first, second = (self._mean(trainer, part[name] / scale) for part in parts)
                total = _grad(param)
                total.copy_(3 * median_of_three(first, second - first, total - second))

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._open.close()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"past": self._past}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._past = state_dict["past"]

    def _mean(self, trainer: Trainer, part: Tensor) -> Tensor:
        """Over the ranks whose mean the gradient is."""
        group = averaging_group(trainer)
        return part if group is None else trainer.strategy.reduce(part, group, reduce_op="mean")

    def _by_ranks(self, trainer: Trainer) -> bool:
        return self.rule == "m3" and trainer.accumulate_grad_batches % 3 != 0

    def _chosen(self, pl_module: LightningModule) -> list[tuple[str, Parameter]]:
        return [(name, param) for name, param in pl_module.named_parameters() if name in self._names]

    def _winsorize(self, name: str, param: Parameter, uses: Uses) -> None:
        examples = uses.calls[0].examples
        size = examples * param.numel() * uses.calls[0].dtype.itemsize
        if size > _MAX_BYTES:
            raise RuntimeError(
                f"the gradients of {examples} examples for `{name}` take {size / 2**20:.0f} MiB: add it to `exclude`, "
                "or use smaller batches"
            )
        self._parts[0][name] = (examples * winsorized_mean(uses.gradients(), self.c)).to(param.dtype)

    def _remember(self, chosen: list[tuple[str, Parameter]]) -> None:
        now = {name: _grad(param).clone() for name, param in chosen}
        if not all(bool(gradient.isfinite().all()) for gradient in now.values()):
            return  # a step that the scaler of mixed precision skips
        if len(self._past) == 2:
            first, second = self._past
            for name, param in chosen:
                if name in first and name in second:
                    before = first[name].to(now[name]), second[name].to(now[name])  # a checkpoint's are on the host
                    _grad(param).copy_(median_of_three(*before, now[name]))
        self._past = [*self._past, now][-2:]


def median_of_ranks(kept: set[int], bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    """DDP's hook: the median of the means over three groups of neighbouring ranks.

    Args:
        kept: ids of parameters that keep their mean.
        bucket: of this rank's gradients, a ``GradBucket``.
    """
    ranks, buffer = dist.get_world_size(), bucket.buffer()
    parts = buffer.new_zeros(3, buffer.numel())
    parts[dist.get_rank() * 3 // ranks] = buffer / (ranks // 3)
    names = [(id(param), param.numel()) for param in bucket.parameters()]

    def reduced(future: Any) -> Tensor:
        (total,) = future.value()
        result = median_of_three(*total)
        start = 0
        for param, size in names:
            if param in kept:
                result[start : start + size] = total[:, start : start + size].mean(0)
            start += size
        return result

    then: Callable[[Any], Any] = dist.all_reduce(parts, async_op=True).get_future().then
    future: torch.futures.Future[Tensor] = then(reduced)
    return future


def _grad(param: Parameter) -> Tensor:
    assert param.grad is not None
    return param.grad
