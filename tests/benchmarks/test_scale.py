"""The benchmark's formulas are those of what the strategies do."""

import json
from pathlib import Path

import pytest

from tests.suites.scripts import load_benchmark

bench = load_benchmark("scale")


def test_bytes_memory_and_checkpoints_fit_their_formulas(tmp_path: Path) -> None:
    found = bench.growth(True)
    assert set(found["methods"]) == set(bench.QUICK)
    assert bench.misfits(found["methods"]) == []
    assert {name for *_, name, _ in bench.compared(found["methods"])} == set(bench.TOLERANCES)
    (figure,) = bench.draw(json.loads(json.dumps({"growth": found})), tmp_path)
    assert figure.stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parametrize("method", [method for method in bench.METHODS if method not in bench.QUICK])
def test_the_other_methods_fit_theirs(method: str) -> None:
    measured = bench.measure(bench.Fit(method, 3, 96, 6))
    assert bench.misfits({method: {"w96": {"n3": measured}}}) == []


def test_a_figure_off_its_formula_is_found() -> None:
    found = {"gc": {"w96": {"n3": {"off": {"sent": 0.01, "held": -0.5, "checkpoint": 0.2}}}}}
    assert [name for _, _, name, _ in bench.misfits(found)] == ["held", "checkpoint"]
    assert bench.worst(found | {"ddp": {"w": {"n": {"off": dict.fromkeys(bench.TOLERANCES, 0.0)}}}})["held"] == {
        "above": 0.0,
        "below": -0.5,
    }


def test_formulas_grow_as_the_page_says() -> None:
    few, many = (bench.Size(n, 1e9, 100, 1 / 8, 10 * n) for n in (64, 1000))
    small, large = ({method: bench.formula(method, size) for method in bench.METHODS} for size in (few, many))
    # A ring's traffic hardly grows with the processes; a gather's and the root's do in proportion to the others.
    for method in ("ddp", "diloco", "streaming_scatter", "federated"):
        assert large[method]["sent"] / small[method]["sent"] == pytest.approx(1, abs=0.02)
    assert large["streaming"]["sent"] / small["streaming"]["sent"] == pytest.approx(999 / 63)
    for method in bench.CODED:
        assert large[method]["busiest"] / small[method]["busiest"] == pytest.approx(999 / 63)
        assert large[method]["sent"] == small[method]["sent"]
    assert large["diloco"]["checkpoint"] == 12e9 * 1001
    assert large["federated"]["checkpoint"] == 4e9
    assert large["fedspeed"]["checkpoint"] == 4e9 * (10_000 + 2)


def test_what_is_extrapolated_is_the_formula_at_default_settings() -> None:
    found = bench.extrapolated(True)["sizes"]["n1000"]
    assert found["streaming"]["sent_gb"] == pytest.approx(999 * (65 / 128) / 100)
    assert found["gc"]["link_s"] == pytest.approx(999 * 4e9 * 8 / 10e9)


def test_the_results_that_the_page_shows_fit_the_formulas() -> None:
    results = json.loads((load_benchmark("_record").RESULTS / "scale.json").read_text())
    assert bench.misfits(results["growth"]["methods"]) == []
    # What was extrapolated is of these formulas too; the measured ones were compared with them in the run.
    assert results["extrapolated"]["sizes"] == bench.extrapolated(False)["sizes"]
    for method, widths in results["growth"]["methods"].items():
        for n, found in widths["w408"].items():
            size = bench.Size(int(n[1:]), found["parameters"], 6, 0.5, 2 * int(n[1:]))
            assert found["formula"]["sent"] == pytest.approx(bench.formula(method, size)["sent"])
