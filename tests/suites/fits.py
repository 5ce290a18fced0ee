"""Short fits in forked processes, and what each process had at their end."""

import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader
from typing_extensions import override

from fulgurite.strategies import StreamingDiLoCoStrategy
from tests.suites.models import MakeOptimizer, Regressor, adamw, dataset

BATCH = 4


class Snapshot(Callback):
    """Keeps what each process has when training ends: its own weights, the shared ones and the numbers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        strategy = trainer.strategy
        state: dict[str, Any] = {name: value.detach().clone() for name, value in pl_module.named_parameters()}
        kept = {"local": state, "optimizer": trainer.optimizers[0].state_dict()["state"]}
        if isinstance(strategy, StreamingDiLoCoStrategy):
            kept |= {"outer": strategy.outer_state_dict(), "stats": strategy.stats}
        torch.save(kept, self.folder / f"{trainer.global_rank}.pt")

    def read(self, rank: int) -> dict[str, Any]:
        return torch.load(self.folder / f"{rank}.pt", weights_only=True)


class OwnData(Regressor):
    """Each worker reads rows of its own, in order, from a loader that resumes; ``twins`` read the same."""

    def __init__(self, twins: bool = False, worker: int | None = None, batches: int = 48, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.twins, self.of_worker, self.batches = twins, worker, batches

    def rows(self, worker: int) -> StatefulDataLoader[Any]:
        return StatefulDataLoader(dataset(self.batches * BATCH, seed=0 if self.twins else worker), batch_size=BATCH)

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        return self.rows(self.trainer.global_rank if self.of_worker is None else self.of_worker)


def fit(
    folder: Path,
    module: LightningModule,
    strategy: Any,
    devices: int = 2,
    max_steps: int = 20,
    ckpt_path: Path | None = None,
    callbacks: Any = (),
    **options: Any,
) -> Snapshot:
    """Fits quietly, without validation unless ``limit_val_batches`` is given."""
    folder.mkdir(exist_ok=True)
    snapshot = Snapshot(folder)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0}
    quiet |= {"enable_checkpointing": any(isinstance(callback, Checkpoint) for callback in callbacks), "max_epochs": 99}
    quiet["use_distributed_sampler"] = False
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        max_steps=max_steps,
        callbacks=[snapshot, *callbacks],
        **quiet | options,
    )
    trainer.fit(module, ckpt_path=ckpt_path)
    return snapshot


def streaming(**options: Any) -> StreamingDiLoCoStrategy:
    return StreamingDiLoCoStrategy(start_method="fork", **options)


def make(make_optimizer: MakeOptimizer = adamw, **options: Any) -> OwnData:
    """The module with the same initial weights each time."""
    torch.manual_seed(7)
    return OwnData(make_optimizer=make_optimizer, **options)


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=tolerance, atol=tolerance, check_dtype=False)


def loaded_without_fulgurite(path: Path) -> dict[str, Any]:
    """A checkpoint, as a process without Fulgurite would read it."""
    assert "fulgurite" not in str(torch.serialization.get_safe_globals())  # or it would read what another refuses
    with patch.dict(sys.modules, {name: None for name in sys.modules if name.partition(".")[0] == "fulgurite"}):
        return torch.load(path, weights_only=True)


def assert_refused(
    folder: Path, message: str, module: LightningModule | None = None, trainer: Any = None, **options: Any
) -> None:
    """Checks that a fit by one process does not start, and that the error says why."""
    strategy = StreamingDiLoCoStrategy(**{"sync_every": 5, **options})
    with pytest.raises(MisconfigurationException, match=message):
        fit(folder, module or make(), strategy, **{"devices": 1, **(trainer or {})})
