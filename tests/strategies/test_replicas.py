"""What all strategies of drifting replicas share: buffers, checkpoints, refusals, SIGTERM."""

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment
from packaging.version import Version
from torch import nn
from torch.multiprocessing.spawn import ProcessRaisedException
from torch.utils.data import DataLoader, IterableDataset
from typing_extensions import override

from fulgurite.strategies import StreamingDiLoCoStrategy
from tests.suites.fits import OwnData, assert_refused, assert_same, fit, make, streaming
from tests.suites.models import WIDTH, Normalised, Regressor


class NormalisedOwnData(OwnData, Normalised):
    """Batch norm over rows that differ between workers."""


# ---- what is shown ---------------------------------------------------------------------------------------------------


def test_buffers_are_averaged_in_what_is_shown_and_stay_local_in_training(tmp_path: Path) -> None:
    class Buffers(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                self.local = pl_module.norm.running_mean.clone()

        def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
            state = trainer.strategy.lightning_module_state_dict()
            kept = {"local": pl_module.norm.running_mean.clone(), "shown": state["norm.running_mean"]}
            kept["count"] = state["norm.num_batches_tracked"]
            kept["tied"] = state["blocks.0.weight"]
            kept["embed"] = state["embed.weight"]
            torch.save(kept, tmp_path / f"buffers{trainer.global_rank}.pt")

    fit(tmp_path / "run", NormalisedOwnData(), streaming(sync_every=5), callbacks=[Buffers()])
    first, second = (torch.load(tmp_path / f"buffers{rank}.pt", weights_only=True) for rank in (0, 1))
    assert not torch.equal(first["local"], second["local"])
    torch.testing.assert_close(first["shown"], (first["local"] + second["local"]) / 2)
    assert torch.equal(first["shown"], second["shown"])
    assert first["count"] == 20
    assert torch.equal(first["tied"], first["embed"])


def test_one_choice_of_the_best_checkpoint_though_the_monitored_losses_differ(tmp_path: Path) -> None:
    class Choice(Callback):
        def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            best = trainer.checkpoint_callback
            assert isinstance(best, ModelCheckpoint)
            (tmp_path / f"best{trainer.global_rank}").write_text(best.best_model_path)

    checkpoint = ModelCheckpoint(
        tmp_path, "{step}-{train_loss:.6f}", monitor="train_loss", save_top_k=2, every_n_train_steps=4
    )
    fit(tmp_path / "run", make(), streaming(sync_every=5), max_steps=24, callbacks=[checkpoint, Choice()])
    choices = [(tmp_path / f"best{rank}").read_text() for rank in (0, 1)]
    assert choices[0] == choices[1]
    assert Path(choices[0]).exists()
    assert len(list(tmp_path.glob("*.ckpt"))) == 2


def test_metrics_reach_the_logger_whatever_log_every_n_steps(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, version=0)
    fit(tmp_path / "run", make(), streaming(sync_every=6), logger=logger, log_every_n_steps=1000)
    rows = [line.split(",") for line in Path(logger.log_dir, "metrics.csv").read_text().splitlines()]
    steps = [int(row[rows[0].index("step")]) for row in rows[1:]]
    assert steps == [
        2,
        4,
        6,
        8,
        10,
        12,
        14,
        16,
        18,
        20,
    ]  # sent at 2, 4, ..., received a step later
    assert {
        f"diloco/{name}"
        for name in [
            "bytes_sent",
            "bytes_received",
            "peak_bytes",
            "wait_seconds",
            "syncs",
            "drift",
            "outer_grad_norm",
            "outer_cosine",
        ]
    } < set(rows[0])


def test_logging_over_the_wire_in_each_step_warns(tmp_path: Path) -> None:
    class Talkative(OwnData):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            self.log("everywhere", loss, sync_dist=True)
            return loss

    with pytest.warns(UserWarning, match=r"`self.log\(..., sync_dist=True\)` in `training_step` waits for all workers"):
        fit(tmp_path, Talkative(), StreamingDiLoCoStrategy(sync_every=6), devices=1)


@pytest.mark.skipif(Version(lightning.__version__) < Version("2.6"), reason="there the finder moves any loader on")
@pytest.mark.parametrize("num_sanity_val_steps", [0, 1])
def test_a_trial_fit_leaves_nothing_behind(tmp_path: Path, num_sanity_val_steps: int) -> None:
    class Validated(OwnData):  # on the shared weights, whose loss differs from that of the local ones
        lr = 0.01  # what the finder changes; the optimizer has its own

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            shared = self.trainer.strategy.outer_state_dict()  # type: ignore[attr-defined]
            assert_same({name: value.detach() for name, value in self.named_parameters()}, shared)

    options: dict[str, Any] = {"limit_val_batches": 1, "val_check_interval": 7, "devices": 1}
    options["num_sanity_val_steps"] = num_sanity_val_steps
    found = {}
    for name, callbacks in {"plain": [], "tried": [LearningRateFinder(num_training_steps=12)]}.items():
        torch.manual_seed(7)
        strategy = StreamingDiLoCoStrategy(sync_every=5, overlap_steps=2)
        found[name] = fit(tmp_path / name, Validated(), strategy, callbacks=callbacks, **options).read(0)
    assert_same(found["tried"]["local"], found["plain"]["local"])
    assert_same(found["tried"]["outer"], found["plain"]["outer"])


def test_what_was_loaded_after_the_fit_is_what_is_saved(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=5, save_top_k=-1)
    options = {"logger": False, "enable_progress_bar": False, "limit_val_batches": 0}
    strategy = StreamingDiLoCoStrategy(sync_every=5)
    trainer = Trainer(accelerator="cpu", devices=1, strategy=strategy, max_steps=20, callbacks=[checkpoint], **options)
    module = make()
    trainer.fit(module)
    trainer.test(module, ckpt_path=tmp_path / "step=5.ckpt", verbose=False)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    saved, chosen = (torch.load(tmp_path / name, weights_only=True) for name in ("after.ckpt", "step=5.ckpt"))
    assert_same(saved["state_dict"], chosen["state_dict"])


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"devices_per_worker": 0}, "`devices_per_worker` must be None or at least 1, got 0"),
        ({"worker_state": "all"}, r"`worker_state` must be one of \('gather', 'none'\), got 'all'"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StreamingDiLoCoStrategy(**arguments)


def test_model_averaging_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"`model_averaging_period` averages weights over the world"):
        StreamingDiLoCoStrategy(model_averaging_period=4)


class Requeued(SLURMEnvironment):
    """One process, as a job of one task."""

    main_address, main_port = "127.0.0.1", 0

    def world_size(self) -> int:
        return 1

    def global_rank(self) -> int:
        return 0

    local_rank = node_rank = global_rank


def test_workers_that_do_not_divide_the_world(tmp_path: Path) -> None:
    assert_refused(
        tmp_path, "`devices_per_worker` must divide the 1 processes of the world, got 2", devices_per_worker=2
    )


def test_sync_batchnorm_within_single_device_workers(tmp_path: Path) -> None:
    assert_refused(tmp_path, "`sync_batchnorm=True` averages batch statistics", trainer={"sync_batchnorm": True})


def test_comm_hook_without_gradients_to_average(tmp_path: Path) -> None:
    assert_refused(
        tmp_path, "`ddp_comm_hook` changes how gradients are averaged", ddp_comm_hook=lambda state, bucket: None
    )


def test_lazy_parameters(tmp_path: Path) -> None:
    class Lazy(Regressor):
        def __init__(self) -> None:
            super().__init__()
            self.lazy = nn.LazyLinear(2)

    assert_refused(tmp_path, "parameter `lazy.weight` is lazy and has no shape yet", Lazy())


def test_sharded_parameters(tmp_path: Path) -> None:
    class Sharded(OwnData):
        def configure_model(self) -> None:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.tensor import Replicate, distribute_tensor

            weight = distribute_tensor(self.head.weight.detach(), init_device_mesh("cpu", (1,)), [Replicate()])
            self.head.weight = nn.Parameter(weight)

    assert_refused(tmp_path, r"parameter `head.weight` is a DTensor \(FSDP or tensor parallel\)", Sharded())


def test_slurm_requeueing_warns(tmp_path: Path) -> None:
    strategy = StreamingDiLoCoStrategy(sync_every=5, cluster_environment=Requeued())
    with pytest.warns(UserWarning, match="SLURM auto-requeue saves a checkpoint in each process"):
        fit(tmp_path, make(), strategy, devices=1)


def test_misspelt_arguments() -> None:
    with pytest.raises(TypeError, match="have no argument `overlap`, `sync_evry`"):
        StreamingDiLoCoStrategy(sync_evry=5, overlap=3)
    StreamingDiLoCoStrategy(find_unused_parameters=True, timeout=timedelta(seconds=9))  # DDP's own


def test_complex_parameters(tmp_path: Path) -> None:
    class Complex(OwnData):
        def configure_model(self) -> None:
            self.phase = nn.Parameter(torch.ones(2, dtype=torch.complex64))

    assert_refused(tmp_path, "parameter `phase` is complex", Complex())


@pytest.mark.skipif(
    Version(lightning.__version__) < Version("2.6"), reason="validation by time came with lightning 2.6"
)
def test_validation_by_the_clock(tmp_path: Path) -> None:
    assert_refused(tmp_path, "`val_check_interval` is a time", trainer={"val_check_interval": "00:00:00:02"})


def test_a_timer_warns(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"`max_time` \(the Timer callback\) asks rank 0 before each batch"):
        fit(tmp_path, make(), StreamingDiLoCoStrategy(sync_every=5), devices=1, max_time="00:01:00:00")


def test_nothing_to_train(tmp_path: Path) -> None:
    class Frozen(OwnData):
        def configure_model(self) -> None:
            self.requires_grad_(False)

    assert_refused(tmp_path, "no trainable parameter", Frozen())


def test_a_group_that_an_earlier_fit_has_left(tmp_path: Path) -> None:
    fit(tmp_path, make(), StreamingDiLoCoStrategy(sync_every=5), devices=1)
    second = StreamingDiLoCoStrategy(sync_every=5)
    second.cluster_environment = LightningEnvironment()
    second.cluster_environment.set_world_size(2)
    with pytest.raises(MisconfigurationException, match=r"to have 2 processes, but an earlier one .* a group of 1"):
        second._join_world()


# ---- SIGTERM ---------------------------------------------------------------------------------------------------------

SIGTERM_SETTING = {"sync_every": 6, "num_fragments": 2}  # sent at 9, received at 10
TERMINATED = """
import os, signal, sys
from pathlib import Path
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from fulgurite.strategies import StreamingDiLoCoStrategy
from tests.suites.fits import fit, make

folder = Path(sys.argv[1])

class Terminated(Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 7 and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_exception(self, trainer, pl_module, exception):
        Path(folder, f"rank{trainer.global_rank}").write_text(f"{type(exception).__name__} {trainer.global_step}")

strategy = StreamingDiLoCoStrategy(sync_every=6, num_fragments=2)
fit(folder / "run", make(), strategy, max_steps=40, callbacks=[Terminated(), OnExceptionCheckpoint(folder, "last")])
"""


def test_sigterm_to_one_process_ends_all_in_the_same_step_with_a_checkpoint(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(TERMINATED)
    command = [sys.executable, str(script), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run(command, env=environment, timeout=100, check=False, capture_output=True)
    assert [Path(tmp_path, f"rank{rank}").read_text() for rank in (0, 1)] == ["SIGTERMException 10"] * 2
    resumed = fit(tmp_path / "on", make(), streaming(**SIGTERM_SETTING), 2, 40, ckpt_path=tmp_path / "last.ckpt")
    whole = fit(tmp_path / "whole", make(), streaming(**SIGTERM_SETTING), max_steps=40)
    assert_same(resumed.read(0)["outer"], whole.read(0)["outer"])


# ---- a worker that does not come along -------------------------------------------------------------------------------


class Rows(IterableDataset[Any]):
    def __init__(self, count: int) -> None:
        self.count = count

    @override
    def __iter__(self) -> Any:
        return iter(torch.utils.data.TensorDataset(torch.ones(self.count, WIDTH), torch.ones(self.count, 1)))


def test_loaders_of_unequal_length_end_in_a_message_that_names_the_exchange(tmp_path: Path) -> None:
    class Unequal(Regressor):
        def train_dataloader(self) -> Any:
            return DataLoader(Rows(9 if self.trainer.global_rank else 40), batch_size=1)

    class Message(Callback):
        def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
            Path(tmp_path, f"rank{trainer.global_rank}").write_text(str(exception))

    strategy = streaming(sync_every=4, num_fragments=1, overlap_steps=1, timeout=timedelta(seconds=3))
    with pytest.raises(ProcessRaisedException):
        fit(tmp_path / "run", Unequal(), strategy, max_epochs=1, callbacks=[Message()])
    message = Path(tmp_path, "rank0").read_text()
    assert "the exchange of fragment 0, due at steps [13, 13] and waited for at step 13" in message
    assert "group of ranks [0, 1]" in message
    assert "a worker died, or ran out of batches" in message
