"""The example's promises, in a few of its rounds."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


def test_two_trainings_a_table_a_figure_and_their_records(
    example: ModuleType, tmp_path: Path, printed: Callable[[], str]
) -> None:
    runs = example.main(rounds=4, alpha=1.0, validate_every=2, folder=tmp_path)

    assert [run.name for run in runs] == ["FedAvg", "FedSpeed"]
    for run in runs:
        assert run.rounds["fed/drift"] == [1, 2, 3, 4]
        assert run.rounds["val/acc"] == [2, 4]
        assert run.values["val/acc"][-1] > 0.3  # a guess is right in a tenth
        assert set(run.values["fed/clients"]) == {5}
    fedavg, fedspeed = runs
    assert "fedspeed/dual_residual" not in fedavg.values
    assert min(fedspeed.values["fedspeed/dual_residual"]) > 0

    out = printed()
    for run in runs:
        (row,) = (row for row in out.splitlines() if row.startswith(f" {run.name} ") and "━" not in row)
        assert f" {sum(run.values['val/acc']) / 2:.3f} " in row

    store = tmp_path / "runs" / "fedspeed"
    assert (store / "fedspeed.png").read_bytes().startswith(b"\x89PNG")
    records = list((store / "wandb").glob("offline-run-*"))
    assert len(records) == 2
    assert all(list(record.glob("files/media/images/federated/rounds_*.png")) for record in records)


@pytest.mark.parametrize(
    ("values", "expected"),
    [([0.9] * 5, "10"), ([0.0] + [0.9] * 5, "12"), ([0.9, 1.0] * 2, "never"), ([0.89] * 9, "never")],
    ids=["at once", "later", "too short", "below"],
)
def test_rounds_to_a_bar(example: ModuleType, values: list[float], expected: str) -> None:
    run = example.Run("FedAvg")
    for index, value in enumerate(values):
        run.add(2 * (index + 1), {"val/acc": value})
    assert example.rounds_to(run, 0.9) == expected
