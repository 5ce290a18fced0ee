"""The example's promises, to a coarser target."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType


def test_three_trainings_a_table_a_figure_and_their_logs(
    example: ModuleType, tmp_path: Path, printed: Callable[[], str]
) -> None:
    runs = example.main(target=0.03, seconds=30.0, folder=tmp_path)
    adam, lbfgs, newton = runs
    assert [run.name for run in runs] == list(example.COLOURS)
    assert all(min(run.norms) <= 0.03 for run in (adam, lbfgs, newton))
    assert newton.steps < 20
    assert adam.units == [*range(1, len(adam.units) + 1)]  # one gradient a step
    assert newton.units == sorted(newton.units)
    assert newton.units[-1] > len(newton.units) + 2 * newton.steps  # products count

    out = printed()
    for run in runs:
        (row,) = (row for row in out.splitlines() if row.startswith(f" {run.name} "))
        assert f" {run.steps:,} " in row
    store = tmp_path / "runs" / "gradient_regularized_newton"
    assert (store / "gradient_regularized_newton.png").read_bytes().startswith(b"\x89PNG")
    logged = (store / "gradientregularizednewton" / "version_0" / "metrics.csv").read_text().splitlines()[0]
    assert "grn/gamma" in logged.split(",")
