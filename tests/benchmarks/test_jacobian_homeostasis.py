"""The benchmark compares like with like; its numbers are not tested."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.suites.scripts import load_benchmark

bench, shared = load_benchmark("jacobian_homeostasis"), load_benchmark("_equilibrium")


def gradients(layer: Any) -> torch.Tensor:
    shared.training_step(layer, shared.batch("digits"))()
    return torch.cat([param.grad.flatten() for param in layer.parameters()])


def test_the_gradients_that_are_timed_are_of_the_same_network() -> None:
    settled = {"nudged_steps": 150}
    exact = gradients(shared.network("digits", "unroll"))
    torch.testing.assert_close(gradients(shared.network("digits", "adjoint", **settled)), exact, rtol=0, atol=1e-3)
    response = gradients(shared.network("digits", "ep", **settled))
    assert 0.5 < torch.cosine_similarity(response, exact, 0) < 0.999


def test_what_is_not_hoisted_is_the_same_field() -> None:
    field = shared.network("digits", "ep").field
    x, r = shared.batch("digits"), torch.rand(shared.BATCH_SIZE, field.n)
    torch.testing.assert_close(bench.unhoisted(field)(r, x), field(r, x))


def test_memory_does_not_grow_with_the_steps() -> None:
    found = bench.memory(quick=True)["digits"]["saved_bytes"]
    assert found["ep"] == found["ep_twice_the_steps"] < found["unroll"] / 20


def test_a_fit_says_how_it_went() -> None:
    found = bench.train("homeostasis", seed=0, epochs=1)
    assert 0.1 < found["accuracy"] < 1
    assert 0 < found["cosine"] < 1
    assert found["symmetry"] > 0.6


def made_up() -> dict[str, Any]:
    rows = {key: {"of_seeds": [0.5, 0.7]} for key in ("accuracy", "cosine")}
    errors = {f"n{points}": [10.0**-points] * len(bench.BETAS) for points in bench.POINTS}
    return {
        "accuracy": {"methods": dict.fromkeys(bench.METHODS, rows)},
        "error": {"setting": {"beta": bench.BETAS}, "relative_error": errors},
    }


def test_the_figure_needs_both_its_parts(tmp_path: Path) -> None:
    assert bench.draw({}, tmp_path) == []
    (figure,) = bench.draw(made_up(), tmp_path)
    assert figure.stat().st_size > 10_000


def test_ratios_are_within_a_repetition() -> None:
    found = bench.shown({"a": [2.0, 30.0, 4.0], "b": [1.0, 10.0, 4.0]}, over="b")
    assert found["over_b"]["a"]["median"] == pytest.approx(2)
