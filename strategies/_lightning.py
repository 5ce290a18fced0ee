"""The private names of Lightning that strategies need; no other file of Fulgurite touches one.

Seen in lightning 2.5.0 and 2.6.6. ``tests/strategies/test_lightning_private.py`` fails when one of them goes away.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.plugins import TorchSyncBatchNorm
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from typing_extensions import override


def detach_sigterm(trainer: Trainer, on_sigterm: Callable[[], None]) -> ExitStack:
    """Takes SIGTERM out of the world's hands: Lightning 2.6 broadcasts a flag before every batch and in the handler.

    That broadcast keeps replicas in lockstep over the slow link, and one process alone in it hangs.

    Args:
        trainer: the Trainer, before it registers its signal handlers.
        on_sigterm: called in the signal handler, in place of the world's broadcast.

    Returns:
        Closing it gives Lightning its methods back.
    """
    restore = ExitStack()
    connector, loop = trainer._signal_connector, trainer.fit_loop.epoch_loop

    def notify(signum: Any, frame: Any) -> None:
        launcher = trainer.strategy.launcher
        if launcher is not None:
            launcher.kill(signum)
        on_sigterm()

    _replace(connector, "_sigterm_notifier_fn", notify, restore)
    if hasattr(loop, "_broadcast_sigterm_tensor"):  # not yet in 2.5
        _replace(loop, "_broadcast_sigterm_tensor", lambda: None, restore)
    return restore


def stop_on_sigterm(trainer: Trainer) -> None:
    """Lets Lightning end the fit after this batch, as it does on SIGTERM."""
    trainer._signal_connector.received_sigterm = True


def validates_by_time(trainer: Trainer) -> bool:
    """Whether ``val_check_interval`` is a time; not yet possible in 2.5."""
    return getattr(trainer, "_val_check_time_interval", None) is not None


def saves_within_epochs(callback: Checkpoint) -> bool:
    """Whether a ModelCheckpoint counts steps or time instead of epochs."""
    if not isinstance(callback, ModelCheckpoint):
        return False
    return callback._every_n_train_steps > 0 or callback._train_time_interval is not None


def set_epoch_length(trainer: Trainer, batches: int) -> None:
    """Makes this epoch ``batches`` long; Lightning asks a loader for its length only when it is loaded."""
    loader = trainer.fit_loop._combined_loader
    if loader is not None:  # else it is being loaded
        loader.limits = [batches]
        trainer.fit_loop.max_batches = trainer.val_check_batch = batches


def ddp_over(strategy: DDPStrategy, group: dist.ProcessGroup) -> None:
    """Wraps the module in ``DistributedDataParallel`` over ``group`` instead of the world."""
    strategy._ddp_kwargs["process_group"] = group
    DDPStrategy.configure_ddp(strategy)


def wants_sync_batchnorm(strategy: DDPStrategy) -> bool:
    """Whether the Trainer was given ``sync_batchnorm=True``."""
    return strategy._layer_sync is not None


def sync_batchnorm_over(strategy: DDPStrategy, group: dist.ProcessGroup) -> None:
    """Lets batch norm layers average over ``group`` instead of the world."""
    strategy._layer_sync = _GroupSyncBatchNorm(group)


class _GroupSyncBatchNorm(TorchSyncBatchNorm):
    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    @override
    def apply(self, model: nn.Module) -> nn.Module:
        return nn.SyncBatchNorm.convert_sync_batchnorm(model, self.group)  # type: ignore[no-any-return, no-untyped-call]


def _replace(owner: object, name: str, method: Callable[..., None], restore: ExitStack) -> None:
    getattr(owner, name)  # an AttributeError here, not a method that nobody calls
    setattr(owner, name, method)
    restore.callback(delattr, owner, name)
