"""The example's promises."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_most_eigenvalues_are_near_zero_and_as_many_stand_out_as_classes_less_one(
    example: ModuleType, tmp_path: Path, seed: int
) -> None:
    found = example.main(classes=(6,), large_steps=0, density_every=200, seed=seed, folder=tmp_path)
    scalars = found.spectra[6].scalars
    assert scalars["outliers"] == 5
    assert scalars["outlier_gap"] > 1.8
    assert scalars["near_zero_fraction"] > 0.98
    assert scalars["negative_mass"] < 0.1


def test_tables_a_figure_and_the_density_over_steps(
    example: ModuleType, tmp_path: Path, printed: Callable[[], str]
) -> None:
    found = example.main(classes=(2, 3), steps=20, large_steps=60, small_steps=100, density_every=10, folder=tmp_path)
    assert list(found.spectra) == [2, 3]
    near, far = (path.barrier for path in found.paths.values())
    assert near < far / 4
    out = printed()
    assert "Barrier to the small-batch solution trained from it" in out
    store = tmp_path / "runs" / "hessian_spectrum"
    assert (store / "hessian_spectrum.png").stat().st_size > 20_000
    images = sorted(path.name for path in store.rglob("media/images/hessian/*.png"))
    assert len(images) == 2
    assert list(store.rglob("media/table/hessian/*.json"))
    assert list(store.rglob("figures/hessian/density_20.png"))
