"""Fails when a private name of Lightning that strategies need goes away or changes its meaning."""

import inspect
import os
import signal
from datetime import timedelta
from typing import Any

import lightning
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from packaging.version import Version
from torch import nn

from fulgurite.strategies import _lightning
from tests.suites.models import Regressor
from tests.suites.processes import in_processes


def test_the_names_exist() -> None:
    trainer = Trainer(accelerator="cpu", logger=False, barebones=True)
    assert callable(trainer._signal_connector._sigterm_notifier_fn)
    assert isinstance(trainer._signal_connector.received_sigterm, bool)
    assert DDPStrategy()._ddp_kwargs == {}
    assert DDPStrategy()._layer_sync is None
    if Version(lightning.__version__) >= Version("2.6"):
        assert callable(trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor)


def test_checkpoints_within_epochs_are_recognised() -> None:
    within = [ModelCheckpoint(every_n_train_steps=3), ModelCheckpoint(train_time_interval=timedelta(minutes=1))]
    assert all(map(_lightning.saves_within_epochs, within))
    at_ends = [ModelCheckpoint(), ModelCheckpoint(every_n_epochs=2), OnExceptionCheckpoint("folder")]
    assert not any(map(_lightning.saves_within_epochs, at_ends))


def test_an_epoch_gets_the_length_that_it_is_given() -> None:
    class Shorter(Callback):
        seen = 0

        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            _lightning.set_epoch_length(trainer, 3)

        def on_train_batch_end(self, *_: Any) -> None:
            self.seen += 1

        def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            assert trainer.sanity_checking or self.seen == 3

    shorter = Shorter()
    trainer = Trainer(accelerator="cpu", logger=False, max_epochs=1, callbacks=[shorter], enable_checkpointing=False)
    trainer.fit(Regressor())
    assert shorter.seen == 3
    assert trainer.current_epoch == 1


def test_ddp_passes_its_keyword_arguments_to_the_wrapper() -> None:
    assert "self._ddp_kwargs" in inspect.getsource(DDPStrategy._setup_model)


def test_sigterm_is_taken_and_given_back() -> None:
    told = []
    trainer = Trainer(accelerator="cpu", logger=False, barebones=True)
    before = trainer._signal_connector._sigterm_notifier_fn
    restore = _lightning.detach_sigterm(trainer, lambda: told.append(True))
    trainer._signal_connector.register_signal_handlers()
    os.kill(os.getpid(), signal.SIGTERM)
    assert told == [True]
    assert not trainer.received_sigterm
    _lightning.stop_on_sigterm(trainer)
    assert trainer.received_sigterm
    restore.close()
    assert trainer._signal_connector._sigterm_notifier_fn == before
    trainer._signal_connector.teardown()


def batch_norm_ranks(rank: int) -> dict[str, Any]:
    groups = [dist.new_group([0, 1]), dist.new_group([2])]
    strategy = DDPStrategy()
    _lightning.sync_batchnorm_over(strategy, groups[rank // 2])
    assert _lightning.wants_sync_batchnorm(strategy)
    layers = strategy._layer_sync.apply(nn.Sequential(nn.BatchNorm1d(3)))  # type: ignore[union-attr]
    return {"kind": type(layers[0]).__name__, "ranks": dist.get_process_group_ranks(layers[0].process_group)}


def test_batch_norm_averages_over_the_group() -> None:
    results = in_processes(3, batch_norm_ranks)
    assert [result["ranks"] for result in results] == [[0, 1], [0, 1], [2]]
    assert {result["kind"] for result in results} == {"SyncBatchNorm"}


def wrapped_group_size(rank: int) -> int:
    groups = [dist.new_group([0, 1]), dist.new_group([2])]
    strategy = DDPStrategy()
    strategy.parallel_devices = []
    strategy.model = Regressor()
    strategy.determine_ddp_device_ids = lambda: None  # type: ignore[method-assign]
    strategy._register_ddp_hooks = lambda: None  # type: ignore[method-assign]
    _lightning.ddp_over(strategy, groups[rank // 2])
    return dist.get_world_size(strategy.model.process_group)  # type: ignore[union-attr]


def test_gradients_are_averaged_over_the_group() -> None:
    assert in_processes(3, wrapped_group_size) == [2, 2, 1]
