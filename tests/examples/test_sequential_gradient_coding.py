"""The example's promises, in a few of its steps; ``benchmarks/`` measures how long its trainings take."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fulgurite.plugins.comm.straggler_sim import DelayProfile, simulate


def distances(printed: str) -> list[float]:
    """The last column of the first table: how far the weights are from DDP's."""
    rows = [line.split() for line in printed.splitlines() if line.split()[-1:] and "e-" in line.split()[-1]]
    return [float(row[-1]) for row in rows]


def test_trainings_tables_a_figure_and_their_records(
    example: ModuleType, tmp_path: Path, printed: Callable[[], str]
) -> None:
    runs = example.main(processes=3, s=1, epochs=1, batch_size=96, base_s=0.02, slow_share=0.2, folder=tmp_path)
    uncoded, coded = runs[:2]
    assert [uncoded.name, coded.name] == ["uncoded", "s=1"]
    for run in runs:
        assert torch.tensor(run.arrivals).shape == (3, 14)
        assert run.losses == pytest.approx(uncoded.losses, rel=1e-4)
        assert run.at_s == sorted(run.at_s)
    assert not torch.tensor(uncoded.arrivals).isnan().any()
    assert torch.tensor(coded.arrivals).isnan().any()

    out = printed()
    found = distances(out)
    assert len(found) == len(runs)
    assert max(found) <= 1e-6

    store = tmp_path / "runs" / "sequential_gradient_coding"
    assert (store / "sequential_gradient_coding.png").read_bytes().startswith(b"\x89PNG")
    assert DelayProfile.from_csv(store / "uncoded.csv").times.tolist() == uncoded.arrivals
    assert json.loads((store / "ddp.json").read_text())["accuracy"] == pytest.approx(uncoded.accuracy, abs=0.01)
    records = list((store / "wandb").glob("offline-run-*"))
    assert len(records) == len(runs) + 1
    images = [record for record in records if list(record.glob("files/media/images/gradient_coding/arrivals_*.png"))]
    assert len(images) == len(runs)


def test_the_delays_are_worth_a_code(example: ModuleType) -> None:
    delays = example.delays_of(processes=6, steps=42, base_s=0.05, slow_share=0.08, seconds_per_load=0.06, seed=0)
    uncoded, coded = (simulate("gc", delays, 42, mu=0.3, s=s).total_s for s in (0, 2))
    assert coded < 0.75 * uncoded
