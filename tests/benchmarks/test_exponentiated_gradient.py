"""The benchmark times equal steps and keeps its splits apart; its numbers are not tested."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.suites.scripts import load_benchmark

bench = load_benchmark("exponentiated_gradient")


def test_the_loop_takes_the_same_steps() -> None:
    trained = []
    for name in ("loop", "eg"):
        optimizer = bench.make(name, 3, 50)
        for _ in range(4):
            optimizer.step()
        trained.append([p.detach() for p in optimizer.param_groups[0]["params"]])
    torch.testing.assert_close(*trained)


def test_steps_are_timed_in_turn(tmp_path: Path) -> None:
    found = bench.step_results(4, 30, turns=3)
    assert found["parameters"] == 120
    assert all(value["median"] > 0 for value in found["seconds"].values())
    assert math.isfinite(found["ratios"]["loop_over_eg"]["median"])
    assert bench.draw({}, tmp_path) == []
    (figure,) = bench.draw({"step": {"sizes": {"a": found, "b": found}}}, tmp_path)
    assert figure.stat().st_size > 10_000


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads what Linux knows of a process")
def test_memory_is_of_the_momentum() -> None:
    found = bench.memory_of("eg", 4, 4_000_000)
    assert 3 < found["peak_bytes_per_parameter"] < 9


def test_validation_and_test_are_held_out() -> None:
    def rows(inputs: Tensor) -> set[bytes]:
        return {row.numpy().tobytes() for row in inputs}

    tuned, fresh = (bench.split(bench.Job("eg", 0.1, 5, 3, validate)) for validate in (True, False))
    assert [len(part[1]) for part in (tuned, fresh)] == [1197, 1437]
    assert [len(part[3]) for part in (tuned, fresh)] == [240, 360]
    assert rows(tuned[0]) | rows(tuned[2]) == rows(fresh[0])
    for part in (tuned, fresh):
        assert part[0].shape[1] == 69
        assert not rows(part[0]) & rows(part[2])


def test_a_fit_reports_flips() -> None:
    eg, sgd = (bench.fit(bench.Job(method, lr, 0, 0, True), epochs=1) for method, lr in (("eg", 0.3), ("sgd", 0.1)))
    assert eg["flipped"] == 0 < sgd["flipped"] < 0.5
    assert min(eg["accuracy"], sgd["accuracy"]) > 0.3
