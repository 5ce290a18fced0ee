"""Processes that train together without DistributedDataParallel around the module."""

import atexit
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from datetime import timedelta
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from fulgurite.plugins.comm.collectives import broadcast_
from fulgurite.plugins.reading import reading
from fulgurite.strategies._lightning import detach_sigterm, stop_on_sigterm, validates_by_time


class UnwrappedStrategy(DDPStrategy):
    """Trains by a rule of its own how processes meet: no wrapper averages gradients in each backward.

    All processes start from rank 0's weights. A subclass may define ``check``, ``make_groups`` and ``start``.

    Args:
        **kwargs: for :class:`~lightning.pytorch.strategies.DDPStrategy`.

    Raises:
        TypeError: for an argument that neither this class nor DDPStrategy has.
        MisconfigurationException: for ``model_averaging_period``; at setup, for a module or Trainer that cannot train
            this way.
    """

    def __init__(self, **kwargs: Any) -> None:
        if kwargs.get("model_averaging_period") is not None:
            raise MisconfigurationException(
                f"`model_averaging_period` averages weights over the world, and {type(self).__name__} has a rule of its"
                " own for that: remove the argument, or use DDPStrategy with the post-local-SGD hook"
            )
        known = {*signature(DDPStrategy).parameters, *signature(DistributedDataParallel).parameters}
        if unknown := sorted(kwargs.keys() - known):
            raise TypeError(  # DDPStrategy takes anything for the wrapper, which is done without here
                f"{type(self).__name__} and DDPStrategy have no argument {', '.join(f'`{name}`' for name in unknown)}"
            )
        super().__init__(**kwargs)
        self._group_timeout: timedelta = kwargs.get("timeout") or dist.default_pg_timeout
        self._has_comm_hook = kwargs.get("ddp_comm_hook") is not None
        self._restore_sigterm = ExitStack()
        self._stop_requested = False
        self._in_training_step = False
        self._trained: set[int] = set()  # ids of the parameters that were trainable when the fit started

    # ---- what a subclass defines -------------------------------------------------------------------------------------

    def check(self, trainer: Trainer) -> None:
        """Called first in ``setup`` before a fit: raises for what the rule does not support."""
        if validates_by_time(trainer):
            raise MisconfigurationException(
                "`val_check_interval` is a time, and each process would validate by its own clock, in different steps,"
                " and wait for the others until `timeout`: give it in batches"
            )
        if any(isinstance(callback, Timer) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            rank_zero_warn(
                "`max_time` (the Timer callback) asks rank 0 before each batch, over the slow link, and so keeps the"
                " workers in lockstep: use `max_epochs` or `max_steps`"
            )
        self._check_parameters()

    def make_groups(self) -> None:
        """Called in ``setup`` before a fit, on all processes, when the world is known to be complete."""

    def start(self, trainer: Trainer) -> None:
        """Called in ``setup`` before a fit: weights are equal everywhere, optimizers exist, nothing is restored yet."""

    # ---- setup -------------------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: Trainer) -> None:
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting:
            self.check(trainer)
            self._join_world()
            self.make_groups()
            self._stop_requested = False
            self._restore_sigterm = detach_sigterm(trainer, self._request_stop)
        super().setup(trainer)
        if fitting:
            self._trained = {id(parameter) for parameter in self._module.parameters() if parameter.requires_grad}
            self.start(trainer)

    def _join_world(self) -> None:
        if dist.get_world_size() != self.world_size:
            raise MisconfigurationException(
                f"the fit is to have {self.world_size} processes, but an earlier one in this script has left a group"
                f" of {dist.get_world_size()}: give each a script of its own, or a `start_method` that"
                " forks or spawns"
            )
        atexit.register(_leave)

    def _check_parameters(self) -> None:
        module, name = self._module, type(self).__name__
        for key, parameter in module.named_parameters():
            if isinstance(parameter, DTensor):
                raise MisconfigurationException(
                    f"parameter `{key}` is a DTensor (FSDP or tensor parallel); {name} shards nothing: do not wrap the"
                    " module, and let each process hold it whole"
                )
            if parameter.requires_grad and parameter.is_complex():
                raise MisconfigurationException(
                    f"parameter `{key}` is complex, and its imaginary part would not be exchanged: keep it as two real"
                    " parameters (`torch.view_as_real`), or freeze it"
                )
            if nn.parameter.is_lazy(parameter):
                raise MisconfigurationException(
                    f"parameter `{key}` is lazy and has no shape yet, so the workers cannot start equal:"
                    " run one batch through the module in `configure_model`, or give the layer its input size"
                )
        if not any(parameter.requires_grad for parameter in module.parameters()):
            raise MisconfigurationException(
                f"the module has no trainable parameter: {name} would exchange nothing; unfreeze some, or use DDP"
            )

    def refuse_unfrozen(self) -> None:
        """For a rule to call before an exchange: what has become trainable since the start has no part in it."""
        for name, parameter in self._module.named_parameters():
            if parameter.requires_grad and id(parameter) not in self._trained:
                raise MisconfigurationException(
                    f"parameter `{name}` was unfrozen or replaced during the fit and is not exchanged, so the workers'"
                    " values would part: do so before the fit, or start a new fit from a checkpoint"
                )

    @property
    def _module(self) -> LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module

    @override
    def configure_ddp(self) -> None:
        """Without the wrapper no gradient crosses the wire, and neither do the weights: they are made equal here."""
        with torch.no_grad():
            broadcast_([*self._module.parameters(), *self._module.buffers()])

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self._in_training_step = True
        try:
            return super().training_step(*args, **kwargs)
        finally:
            self._in_training_step = False

    @override
    def teardown(self) -> None:
        self._restore_sigterm.close()
        super().teardown()

    @override
    def load_checkpoint(self, checkpoint_path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        with reading(checkpoint_path):
            return super().load_checkpoint(checkpoint_path, *args, **kwargs)

    # ---- SIGTERM -----------------------------------------------------------------------------------------------------

    def _request_stop(self) -> None:
        self._stop_requested = True

    def stop(self) -> None:
        """Ends the fit after this batch, as Lightning does on SIGTERM; to be called by all workers in the same step."""
        stop_on_sigterm(self._module.trainer)

    # ---- logs --------------------------------------------------------------------------------------------------------

    def log_scalars(self, values: Mapping[str, float], prog_bar: Collection[str] = ()) -> None:
        """Logs at once, whatever ``log_every_n_steps``, at ``trainer.global_step``.

        Args:
            values: ``method/quantity -> value``; also found in ``trainer.callback_metrics``.
            prog_bar: the names among them to show in the progress bar.
        """
        self.to_loggers(values)
        self.to_callbacks(values)
        for name in prog_bar:
            self._module.log(name, values[name], logger=False, prog_bar=True, on_step=True, on_epoch=False)

    def to_callbacks(self, values: Mapping[str, float]) -> None:
        """Puts values into ``trainer.callback_metrics``, where callbacks find what they monitor."""
        # Not by `self.log`: each call copies what has been logged before, a quarter of a millisecond.
        self._module.trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})

    def to_loggers(self, values: Mapping[str, float]) -> None:
        """Logs where Lightning takes no metrics any more, such as at the end of training."""
        trainer = self._module.trainer
        for logger in trainer.loggers:
            logger.log_metrics(dict(values), step=trainer.global_step)


def _leave() -> None:
    """Ends the process groups while Python still runs; gloo's threads, left to the C++ exit, abort it now and then."""
    if dist.is_initialized():
        dist.destroy_process_group()
