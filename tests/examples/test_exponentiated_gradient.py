"""The example's promises: at two epochs what it leaves, at all of them what it claims."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch


def test_four_trainings_a_table_a_figure_and_their_records(
    example: ModuleType, tmp_path: Path, printed: Callable[[], str]
) -> None:
    runs = example.main(irrelevant=64, epochs=2, folder=tmp_path)

    assert [(run.name, run.irrelevant) for run in runs] == [("SGD", 0), ("EG", 0), ("SGD", 64), ("EG", 64)]
    for run in runs:
        assert len(run.accuracy) == len(run.flips) == 2
        assert run.accuracy[-1] > 0.3  # a guess is right in a tenth
        assert (run.flips[-1] == 0) == (run.name == "EG")
        assert torch.equal(run.first.sign(), run.last.sign()) == (run.name == "EG")
        assert not torch.equal(run.first, run.last)
    assert torch.equal(runs[2].first, runs[3].first)

    printed()
    store = tmp_path / "runs" / "exponentiated_gradient"
    assert (store / "exponentiated_gradient.png").read_bytes().startswith(b"\x89PNG")
    records = list((store / "wandb").glob("offline-run-*"))
    assert len(records) == 4
    assert all(list(record.glob("files/media/images/dale/trainings_*.png")) for record in records)


def test_skewness(example: ModuleType) -> None:
    assert example.skewness(torch.tensor([0.5, -2.0, 1.0, 0.0])) == pytest.approx(0, abs=1e-12)
    logs = torch.tensor([0.0, 0.0, 1.0])  # skewness 1 / sqrt(2)
    assert example.skewness(-logs.exp()) == pytest.approx(0.5**0.5, rel=1e-6)


@pytest.mark.slow
def test_ahead_among_irrelevant_inputs(example: ModuleType, tmp_path: Path) -> None:
    leads = []
    for seed in range(3):
        *_, sgd, eg = example.main(seed=seed, folder=tmp_path / str(seed))
        leads.append(eg.accuracy[-1] - sgd.accuracy[-1])
    assert sum(leads) / 3 >= 0.025
