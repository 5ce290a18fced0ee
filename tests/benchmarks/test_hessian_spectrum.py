"""The benchmark counts and judges what it says; its numbers are not tested."""

from pathlib import Path

import pytest

from tests.suites.scripts import load_benchmark

bench = load_benchmark("hessian_spectrum")


def test_ratios_are_within_a_repetition_and_judged(tmp_path: Path) -> None:
    products = {"hessian": [1.0, 2.0], "hessian curvlinops": [2.0, 4.0], "hessian eigenthings": [1.0, 2.0]}
    products |= {"ggn": [1.0, 1.0], "ggn curvlinops": [4.0, 4.0], "gradient": [1.0, 1.0]}
    event = {"ours": [1.0, 1.0], "eigenthings": [2.0, 2.0], "PyHessian": [1.0, 1.0], "curvlinops": [4.0, 4.0]}
    extremes = {name: {"lambda_max": 1.0, "lambda_min": 0.0, "copies_of_lambda_max": 1} for name in event}
    extremes["curvlinops"]["copies_of_lambda_max"] = 11
    given = {
        "products": {"times": products},
        "event": {"times": event, "found": extremes, "products": 60},
        "versions": {},
    }
    found = bench.peers_results(given)
    assert found["ratios"]["hessian_over_curvlinops"]["median"] == 0.5
    met = {name: each["met"] for name, each in found["targets"].items()}
    assert [name for name, good in met.items() if not good] == [
        "hessian_over_eigenthings_at_most_0.8",
        "event_over_pyhessian_at_most_0.8",
    ]
    curve = [{"lanczos_steps": steps, "parameters": 10, "median": float(steps)} for steps in (1, 2)]
    assert bench.draw({"peers": found}, tmp_path) == []
    growth = {"curves": {"lanczos_steps": curve}}
    (figure,) = bench.draw({"peers": found, "growth": growth}, tmp_path)
    assert figure.stat().st_size > 10_000


def test_events_are_timed() -> None:
    assert bench.event_seconds(hidden=8, lanczos_steps=3, n_probes=1) > 0
    assert bench.orthogonal_seconds(100, 5) > 0
    callback = bench.HessianSpectrum(n_probes=1, k=1, ggn=False, figure=False, lanczos_steps=3)
    assert bench.timed_fit(2, callback) > callback.history[0].scalars["seconds"] > 0


def test_parameters_are_counted() -> None:
    assert bench.parameters(256) == 64 * 256 + 256 + 256 * 256 + 256 + 256 * 10 + 10


@pytest.mark.parametrize("lanczos_steps", [40])
def test_the_peak_is_of_the_basis(lanczos_steps: int) -> None:
    assert 0 < bench.peak_floats(128, lanczos_steps) < 3
