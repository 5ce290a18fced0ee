"""Lets a Newton step see all micro-batches of an accumulated batch, and logs what it did."""

import math
from typing import Any, cast

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from typing_extensions import override

from fulgurite.plugins.linalg import ModuleLoss
from fulgurite.plugins.optim import GradientRegularizedNewton


class CurvatureBatches(Callback):
    """Makes a step of ``GradientRegularizedNewton`` one of all batches that ``accumulate_grad_batches`` joins.

    It keeps the micro-batches, so that loss, gradient, curvature and trial losses are of all of them; dropout masks and
    buffers repeat in each evaluation, and what ``training_step`` logs is logged once. It logs the optimizer's
    ``metrics``, ``grn/gamma`` and others, each step. A step is skipped where ``training_step`` skips one of its
    batches. Without accumulation it does the same, and a step costs a gradient more than without the callback. Memory
    holds the micro-batches, and with one of them the graph of its loss.

    Raises:
        MisconfigurationException: with another optimizer, with several, with gradient clipping or manual optimization;
            under a strategy that attacks the inputs; where ``subsample`` can never take a part of the micro-batches.
    """

    def __init__(self) -> None:
        self._batches: list[tuple[Any, int]] = []
        self._step = -1

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._batches, self._step = [], -1
        kinds = [type(optimizer).__name__ for optimizer in trainer.optimizers]
        if kinds != [GradientRegularizedNewton.__name__]:
            raise MisconfigurationException(
                f"`CurvatureBatches` is for one GradientRegularizedNewton, got {kinds}: remove it"
            )
        if getattr(trainer.strategy, "attack", None) is not None:
            raise MisconfigurationException(
                f"`CurvatureBatches` keeps batches as they are loaded, and {type(trainer.strategy).__name__} trains on "
                "attacked ones: remove it, a step is then of what it trains on"
            )
        if not pl_module.automatic_optimization:
            raise MisconfigurationException(
                "`CurvatureBatches` needs automatic optimization: remove it, and log `optimizer.metrics` yourself"
            )
        if trainer.gradient_clip_val:
            raise MisconfigurationException(
                f"`gradient_clip_val` is {trainer.gradient_clip_val}: remove it, lambda already bounds the step"
            )
        self._check_subsample(trainer)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step != self._step:
            self._batches, self._step = [], trainer.global_step
        self._batches.append((batch, batch_idx))
        optimizer = self._optimizer(trainer)
        context = trainer.precision_plugin.forward_context
        loss = ModuleLoss(
            pl_module, self._batches, outputs=optimizer.recorded, context=context, seed=trainer.global_step
        )
        optimizer.use(loss)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step != self._step:
            pl_module.log_dict(self._optimizer(trainer).metrics)
            self._batches = []

    def _optimizer(self, trainer: Trainer) -> GradientRegularizedNewton:
        return cast(GradientRegularizedNewton, trainer.optimizers[0])

    def _check_subsample(self, trainer: Trainer) -> None:
        callbacks = trainer.callbacks  # type: ignore[attr-defined]  # is set elsewhere
        schedules = [c.scheduling for c in callbacks if isinstance(c, GradientAccumulationScheduler)]
        n_batches = max([trainer.accumulate_grad_batches, *(n for schedule in schedules for n in schedule.values())])
        subsample = self._optimizer(trainer).param_groups[0]["subsample"]
        if subsample < 1 and math.ceil(subsample * n_batches) == n_batches:
            raise MisconfigurationException(
                f"`subsample` ({subsample}) takes whole micro-batches, and of {n_batches} that is all: raise "
                "`accumulate_grad_batches`"
            )
