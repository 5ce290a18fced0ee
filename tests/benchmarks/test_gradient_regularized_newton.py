"""The benchmark counts what it says; its numbers are not tested."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.suites.scripts import load_benchmark

bench = load_benchmark("gradient_regularized_newton")


def coarse(letter: str) -> Any:
    return replace(bench.PROBLEMS[letter], gradient=0.3)


def test_a_task_is_the_penalised_loss_of_its_split() -> None:
    task = bench.Task(bench.PROBLEMS["A"], 3)
    weight, bias = task.model.parameters()
    assert len(task.x) == bench.TRAIN
    assert task.x.max() == 16
    assert not weight.any()
    with torch.no_grad():
        weight.fill_(2.0)
    expected: Tensor = torch.nn.functional.cross_entropy(task.x @ weight.T + bias, task.y)
    torch.testing.assert_close(task.loss(), expected + 0.5e-6 * 640 * 4)
    assert not torch.equal(task.x, bench.Task(bench.PROBLEMS["A"], 4).x)


@pytest.mark.parametrize("name", ["grn_ggn", "grn_hessian", "lbfgs", "adam", "sophia", "adahessian", "soap"])
def test_closures_and_products_are_counted(name: str) -> None:
    make = list(bench.METHODS[name].values())[-1]
    solve = bench.Solve(name, make, coarse("A"), 0, limit=1.0)
    row = solve.row
    assert row["units"] == row["closures"] + 2 * row["products"]
    assert row["closures"] == len(solve.curve)
    assert solve.curve == sorted(solve.curve, key=lambda point: point[:2])
    if name.startswith("grn"):
        done = solve.optimizer.param_groups[0]["n_steps"]
        assert row["reached"] == 1
        assert row["steps"] == done + 1  # the last one is cut off at the target
        assert row["products"] > row["steps"]
    if name == "adahessian":
        assert row["products"] in (row["closures"], row["closures"] - 1)
    if name in ("lbfgs", "adam", "soap"):
        assert row["products"] == 0


def test_the_minimum_is_below_what_a_solve_finds() -> None:
    problem = bench.PROBLEMS["C"]
    solve = bench.Solve("lbfgs", bench.METHODS["lbfgs_100"]["history_size=100, max_iter=20"], problem, 1)
    assert solve.row["reached"] == 1
    assert bench.minimum(problem, 1) < solve.row["last"] <= bench.minimum(problem, 1) + 1e-3


def test_what_did_not_reach_the_target_is_no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench.METHODS, "adam", bench.grid(torch.optim.Adam, lr=[1e-6, 0.03]))
    name, _ = bench.best("adam", coarse("B"))
    assert name == "lr=0.03"
