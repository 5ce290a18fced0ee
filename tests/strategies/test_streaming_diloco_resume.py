"""Resuming: bit for bit with exchanges in flight, and with another number of workers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.multiprocessing.spawn import ProcessRaisedException

from fulgurite.strategies import StreamingDiLoCoStrategy
from tests.suites.fits import assert_same, fit, make, streaming

SETTING = {"sync_every": 8, "num_fragments": 4, "overlap_steps": 3}
SAVED_AT = 16  # fragments were sent at steps 14 and 16, and are due at 17 and 19


class SaveAt(Callback):
    """Saves one checkpoint, after a batch."""

    def __init__(self, path: Path, step: int = SAVED_AT) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and not self.path.exists():
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize(
    ("devices", "options"),
    [
        (2, {}),
        (2, {"overlap_steps": [1, 3], "rounding": "stochastic"}),
        (2, {"quantize": "bf16"}),
        (3, {"reduction": "scatter"}),
        (4, {"devices_per_worker": 2, "offload": True}),
    ],
    ids=str,
)
def test_resume_with_two_fragments_in_flight_is_exact(tmp_path: Path, devices: int, options: dict[str, Any]) -> None:
    path = tmp_path / "saved.ckpt"
    setting = {**SETTING, **options}
    whole = fit(tmp_path / "whole", make(), streaming(**setting), devices, 32, callbacks=[SaveAt(path)])
    assert len(torch.load(path, weights_only=True)["streaming_diloco"]["pending"]) == 2
    resumed = fit(tmp_path / "resumed", make(), streaming(**setting), devices, 32, ckpt_path=path)
    for rank in range(devices):
        assert_same(resumed.read(rank)["local"], whole.read(rank)["local"])
        assert_same(resumed.read(rank)["outer"], whole.read(rank)["outer"])
        for mine, theirs in zip(*(run.read(rank)["optimizer"].values() for run in (resumed, whole)), strict=True):
            assert_same(mine, theirs)


def test_saving_changes_nothing(tmp_path: Path) -> None:
    saved = fit(tmp_path / "saved", make(), streaming(**SETTING), callbacks=[SaveAt(tmp_path / "a.ckpt")])
    plain = fit(tmp_path / "plain", make(), streaming(**SETTING))
    assert_same(saved.read(1)["local"], plain.read(1)["local"])


def test_resume_from_the_checkpoint_that_model_checkpoint_wrote_in_validation(tmp_path: Path) -> None:
    options: dict[str, Any] = {"limit_val_batches": 1, "val_check_interval": 16, "check_val_every_n_epoch": None}

    def checkpoint() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path, filename="{step}", monitor="val_loss", save_top_k=-1)

    whole = fit(tmp_path / "whole", make(), streaming(**SETTING), 2, 32, callbacks=[checkpoint()], **options)
    path = tmp_path / "step=16.ckpt"
    resumed = fit(tmp_path / "resumed", make(), streaming(**SETTING), 2, 32, ckpt_path=path, **options)
    for rank in (0, 1):
        assert_same(resumed.read(rank)["local"], whole.read(rank)["local"])


def test_a_checkpoint_saved_after_the_fit_holds_each_worker(tmp_path: Path) -> None:
    class AfterFit(Callback):
        def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            trainer.save_checkpoint(tmp_path / "after.ckpt")

    class Start(Callback):  # the data is another matter: the loader's state ends with the fit, in plain DDP too
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            before = half.read(trainer.global_rank)
            assert_same({name: value.detach() for name, value in pl_module.named_parameters()}, before["local"])
            assert_same(trainer.strategy.outer_state_dict(), before["outer"])  # type: ignore[attr-defined]

    half = fit(tmp_path / "half", make(), streaming(**SETTING), max_steps=SAVED_AT, callbacks=[AfterFit()])
    path = tmp_path / "after.ckpt"
    fit(tmp_path / "resumed", make(), streaming(**SETTING), 2, 32, ckpt_path=path, callbacks=[Start()])


def test_a_finished_fit_that_is_resumed_leaves_the_shared_weights(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=SAVED_AT)
    finished, resumed = make(), make()
    fit(tmp_path / "run", finished, streaming(**SETTING), max_steps=SAVED_AT, callbacks=[checkpoint])
    path = tmp_path / f"step={SAVED_AT}.ckpt"
    fit(tmp_path / "resumed", resumed, streaming(**SETTING), max_steps=SAVED_AT, ckpt_path=path)
    assert_same(resumed.state_dict(), finished.state_dict())


@pytest.mark.parametrize(("devices", "worker_state"), [(3, "gather"), (1, "gather"), (2, "none")])
def test_elastic_resume_starts_from_the_shared_weights(tmp_path: Path, devices: int, worker_state: str) -> None:
    path = tmp_path / "saved.ckpt"
    setting = {**SETTING, "worker_state": worker_state}
    fit(tmp_path / "before", make(), streaming(**setting), callbacks=[SaveAt(path)])
    saved = torch.load(path, weights_only=True)["streaming_diloco"]

    class Start(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            shared = trainer.strategy.outer_state_dict()  # type: ignore[attr-defined]
            assert_same({name: value.detach() for name, value in pl_module.named_parameters()}, shared)
            before = torch.cat([shared[name].flatten() for name in saved["fragments"][3]])
            assert not torch.equal(before, saved["value"][3])  # what was in flight has been applied

    after = fit(tmp_path / "after", make(), streaming(**setting), devices, 28, ckpt_path=path, callbacks=[Start()])
    for rank in range(devices):
        assert_same(after.read(rank)["outer"], after.read(0)["outer"])


def test_elastic_resume_warns(tmp_path: Path) -> None:
    path = tmp_path / "saved.ckpt"
    fit(tmp_path / "before", make(), streaming(**SETTING), callbacks=[SaveAt(path)])
    with pytest.warns(UserWarning, match="state of 2 workers and the run has 1: all start from the shared weights"):
        fit(tmp_path / "after", make(), StreamingDiLoCoStrategy(**SETTING), 1, 28, ckpt_path=path)


def test_a_checkpoint_of_ddp_is_taken_with_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "ddp.ckpt"
    fit(tmp_path / "ddp", make(), "ddp_fork", callbacks=[SaveAt(path)])
    weights = torch.load(path, weights_only=True)["state_dict"]

    class Start(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            assert_same(trainer.strategy.outer_state_dict(), weights)  # type: ignore[attr-defined]

    with pytest.warns(UserWarning, match="not written by StreamingDiLoCoStrategy: all workers start from its weights"):
        fit(tmp_path / "ours", make(), StreamingDiLoCoStrategy(**SETTING), 1, 26, ckpt_path=path, callbacks=[Start()])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sync_every": 6}, "`sync_every` is 6 and was 8 in the checkpoint"),
        ({"num_fragments": 2}, "`num_fragments` is 2 and was 4 in the checkpoint"),
        (
            {"pattern": "sequential"},
            r"`fragment 0` is \['embed.weight', 'embed.bias', .* and was \['embed.weight', .* in the checkpoint",
        ),
    ],
)
def test_another_layout_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    path = tmp_path / "saved.ckpt"
    fit(tmp_path / "before", make(), StreamingDiLoCoStrategy(**SETTING), 1, callbacks=[SaveAt(path)])
    with pytest.raises(MisconfigurationException, match=message):
        fit(tmp_path / "after", make(), StreamingDiLoCoStrategy(**SETTING | options), 1, 28, ckpt_path=path)


def test_a_layer_unfrozen_between_two_fits_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "saved.ckpt"
    frozen = make()
    frozen.embed.requires_grad_(False)
    fit(tmp_path / "before", frozen, StreamingDiLoCoStrategy(**SETTING), 1, callbacks=[SaveAt(path)])
    with pytest.raises(MisconfigurationException, match=r"`fragment 0` is .* in the checkpoint"):
        fit(tmp_path / "after", make(), StreamingDiLoCoStrategy(**SETTING), 1, 28, ckpt_path=path)


def test_processes_at_different_steps_are_refused(tmp_path: Path) -> None:
    class FoundAlone(Callback):
        def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            trainer.strategy._step = 8 * trainer.global_rank  # type: ignore[attr-defined]

    with pytest.raises(
        ProcessRaisedException, match=r"different steps, by rank \[0, 8\]: `ckpt_path` was found on some"
    ):
        fit(tmp_path / "run", make(), streaming(**SETTING), callbacks=[FoundAlone()])
