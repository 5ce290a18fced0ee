"""The demo's promises, on a tenth of its steps."""

import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


def test_three_trainings_a_table_a_figure_and_their_records(
    example: ModuleType, tmp_path: Path, printed: Callable[[], str]
) -> None:
    steps, sync_every = 40, 10
    runs = example.main(steps, sync_every, folder=tmp_path)

    assert [run.name for run in runs] == ["DDP", "DiLoCo", "Streaming DiLoCo"]
    for run in runs:
        assert run.steps == [20, 40]
        assert all(0 < nats < math.log(256) for nats in run.nats)
        assert run.nats[-1] < run.nats[0]
        assert run.bytes_sent[0] < run.bytes_sent[-1]
        assert run.seconds > 0

    ddp, diloco, streaming = runs
    assert ddp.wait_seconds is None
    assert ddp.bytes_sent[-1] == 4 * 333_312 * steps  # a ring of two sends each gradient once
    assert diloco.bytes_sent[-1] * sync_every == ddp.bytes_sent[-1]
    # 4.0625 bits for 32; and the fragments but the first send for the first time after `sync_every` steps.
    assert 32 / 4.0625 * 0.95 < diloco.bytes_sent[-1] / streaming.bytes_sent[-1] < 32 / 4.0625 * 4 / 3
    assert 10 * streaming.peak_bytes < diloco.peak_bytes == 4 * 333_312

    out = printed()
    for run in runs:
        (row,) = (line for line in out.splitlines() if line.startswith(f" {run.name} ") and "━" not in line)
        assert f" {run.nats[-1]:.3f} " in row
        assert f" {example.megabytes(run.bytes_sent[-1])}" in row

    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    records = sorted((tmp_path / "runs" / "demo" / "wandb").glob("offline-run-*"))
    assert len(records) == 3
    for record, run in zip(records, runs, strict=True):
        assert list(record.glob("files/media/images/demo/held_out_*.png"))
        (data,) = record.glob("run-*.wandb")
        assert (b"diloco/bytes_sent" in data.read_bytes()) == (run is not ddp)


def test_ddp_sends_by_the_formula_of_a_ring(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.pytorch import LightningModule, Trainer
    from torch import nn

    class Four(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Linear(4, 1, bias=False)

    trainer = Trainer(accelerator="cpu", devices=1, logger=False)
    trainer.strategy.connect(Four())
    for world_size, share in ((1, 0.0), (2, 1.0), (4, 1.5)):
        monkeypatch.setattr(Trainer, "world_size", world_size)
        monkeypatch.setattr(Trainer, "global_step", 3)
        assert example.traffic(trainer) == {"diloco/bytes_sent": share * 16 * 3, "diloco/peak_bytes": 16}
