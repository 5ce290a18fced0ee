"""Robust accuracy after each validation, whatever the model was trained for."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torchmetrics import MeanMetric
from typing_extensions import override

from fulgurite.callbacks.untouched import untouched
from fulgurite.plugins.federated import PGD
from fulgurite.plugins.federated.batch import get_entry
from fulgurite.plugins.metrics import RobustAccuracy


class RobustValidation(Callback):
    """Logs ``fal/robust_acc`` and ``fal/clean_acc``, the accuracy with and without an attack (arXiv 1706.06083).

    Both are of ``pl_module(x)``, which must return ``(N, C, ...)`` logits, over the validation batches of a fit and of
    ``trainer.validate``. A batch costs one forward more than the attack has steps, with as many gradients of its
    input, and one forward. Nothing happens in the sanity check, and the fit stays as it was, bit for bit.

    Args:
        attack: perturbs the input; its ``mode`` plays no part, the module is attacked as it is validated.
        input_key: the input in a batch: an index of a tuple or list, a mapping's key, or a field's name.
        target_key: likewise the classes, ``(N, ...)``.
        limit_batches: attack the first batches of a loader only, at least 1; None for all.

    Raises:
        ValueError: for ``limit_batches`` out of its range; in a validation, as the attack says.
    """

    def __init__(
        self, attack: PGD, input_key: int | str = 0, target_key: int | str = 1, limit_batches: int | None = None
    ) -> None:
        if limit_batches is not None and limit_batches < 1:
            raise ValueError(f"`limit_batches` must be None or at least 1, got {limit_batches}")
        self.attack, self.limit_batches = attack, limit_batches
        self.input_key, self.target_key = input_key, target_key

    @override
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Outside of the module, where no checkpoint sees them.
        self._robust = RobustAccuracy(self.attack).to(pl_module.device)
        self._clean = MeanMetric().to(pl_module.device)

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if trainer.sanity_checking or (self.limit_batches is not None and batch_idx >= self.limit_batches):
            return
        x, target = get_entry(batch, self.input_key), get_entry(batch, self.target_key)
        with untouched(trainer, pl_module):
            self._robust.update(pl_module, x, target)
            self._clean.update((pl_module(x).argmax(1) == target).float())

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        for name, metric in (("fal/robust_acc", self._robust), ("fal/clean_acc", self._clean)):
            pl_module.log(name, metric.compute(), sync_dist=True)  # equal on all ranks
