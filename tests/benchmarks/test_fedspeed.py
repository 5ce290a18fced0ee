"""The benchmark trains as the strategy does and counts what it says; its numbers are not tested."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import DataLoader, TensorDataset

from fulgurite.strategies import FederatedStrategy
from tests.suites.fits import assert_same, fit
from tests.suites.scripts import load_benchmark

bench = load_benchmark("fedspeed")


class Classifier(LightningModule):
    """The same model, as a user would write it."""

    def __init__(self, method: str, setting: dict[str, float], seed: int, data: Any) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)).to(torch.float64)
        with torch.no_grad():
            for mine, value in zip(self.parameters(), bench.initial_weights(seed, torch.float64), strict=True):
                mine.copy_(value)
        self.client, self.server = bench.optimizers(method, self.parameters(), setting)
        self.data = data

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.layers(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return {"optimizer": self.client, "lr_scheduler": ExponentialLR(self.client, bench.LR_DECAY)}

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(self.data.inputs, self.data.targets.argmax(1)), batch_size=bench.BATCH_SIZE)

    def make_server(self, parameters: Any) -> Optimizer:
        """The benchmark's server; SCAFFOLD's knows the client optimizer."""
        return self.server


@pytest.mark.parametrize(
    ("method", "setting"),
    [
        ("fedspeed", {"lr": 0.3, "lam": 10.0}),
        ("scaffold", {"lr": 0.3, "server_lr": 1.0}),
        ("fedavg", {"lr": 0.3}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_its_loop_is_the_strategy(method: str, setting: dict[str, float], tmp_path: Path) -> None:
    seed, rounds = 5, 14  # by then clients have come back: 70 draws of 50
    data = bench.federate(seed, validate=True, dtype=torch.float64)
    bare = bench.fit(method, setting, seed, rounds, data)
    module = Classifier(method, setting, seed, data)
    strategy = FederatedStrategy(
        [part.tolist() for part in data.parts],
        clients_per_round=bench.ACTIVE,
        local_epochs=bench.LOCAL_EPOCHS,
        weighting="uniform",
        server_optimizer=module.make_server,
        seed=seed,
        start_method="fork",
    )
    got = fit(tmp_path, module, strategy, devices=1, max_steps=-1, max_epochs=rounds).read(0)["local"]
    assert_same(got, dict(zip(got, (weight.detach() for weight in bare.weights), strict=True)), tolerance=1e-9)
    passes = 2 if method == "fedspeed" else 1
    assert bare.gradients == [passes * 75 * number for number in range(1, rounds + 1)]


def test_validation_is_held_out_of_training_and_the_test_out_of_both() -> None:
    tuned, fresh = bench.federate(3, validate=True), bench.federate(3, validate=False)

    def rows(inputs: Tensor) -> set[bytes]:
        return {row.numpy().tobytes() for row in inputs}

    assert [len(tuned.inputs), len(tuned.judged_labels), len(fresh.inputs)] == [1150, 287, 1437]
    assert rows(tuned.inputs) | rows(tuned.judged_inputs) == rows(fresh.inputs)
    assert len(fresh.judged_labels) == 360
    for data in (tuned, fresh):
        assert not rows(data.inputs) & rows(data.judged_inputs)
        assert sorted(index for part in data.parts for index in part) == list(range(len(data.inputs)))
        assert {-(-len(part) // bench.BATCH_SIZE) for part in data.parts} == {3}
    assert not set(bench.TUNING_SEEDS) & set(bench.SEEDS)
    assert {len(grid) for grid in bench.GRIDS.values()} == {9}


def test_a_bar_is_reached_by_a_mean() -> None:
    accuracy = [0.9, 1.0, 0.9, 1.0, 0.9, 1.0, 0.95]
    assert bench.first_round(accuracy, 95) == 6  # rounds 2 to 6 have 0.96 in the mean, the first five 0.94
    assert bench.first_round(accuracy, 97) is None
    one = bench.Fit(accuracy, [10 * number for number in range(1, 8)], [])
    assert bench.to_bars(one, "gradients") == {"gradients_to_95": 60, "gradients_to_97": None}


def test_who_never_gets_there_counts_as_infinity() -> None:
    assert bench.quartiles([4, None, 1, 2, 3]) == {"median": 3, "q25": 2, "q75": 4}
    assert bench.quartiles([None, 1, None, 2]) == {"median": None, "q25": 1.75, "q75": None}
    assert bench.quartiles([None, None]) == {"median": None, "q25": None, "q75": None}


def made_up() -> dict[str, list[Any]]:
    """FedSpeed is always at 96 percent, FedAvg late and on one seed of two, the others never."""
    high, low = [0.96] * 12, [0.5] * 12
    late = [*low[:8], *high[:4], *high]
    curves = {name: [low * 2, low * 2] for name in bench.METHODS}
    curves |= {"fedspeed": [high * 2, high * 2], "fedavg": [low * 2, late]}
    return {
        name: [
            bench.Fit(accuracy, [(2 if name == "fedspeed" else 1) * number for number in range(1, 25)], [])
            for accuracy in of_seeds
        ]
        for name, of_seeds in curves.items()
    }


def test_methods_are_compared_on_the_same_seeds(tmp_path: Path) -> None:
    found = bench.rounds_results(made_up())
    assert found["methods"]["fedspeed"]["gradients_to_95"]["of_seeds"] == [10, 10]
    assert found["methods"]["fedavg"]["rounds_to_95"]["of_seeds"] == [None, 13]
    assert found["methods"]["fedavg"]["rounds_to_95"]["median"] is None
    assert found["fedspeed_against"]["fedavg"]["rounds_to_95"] == {"ahead": 2, "tied": 0, "behind": 0}
    assert found["fedspeed_against"]["fedavg"]["rounds_to_97"] == {"ahead": 0, "tied": 2, "behind": 0}
    target = found["targets"]["median_rounds_to_95_at_most_half_of_fedavg"]
    assert target == {"measured": pytest.approx(5 / 24), "met": True}
    assert bench.draw({}, tmp_path) == []
    (figure,) = bench.draw({"rounds": found}, tmp_path)
    assert figure.stat().st_size > 10_000


def test_what_is_timed_against_takes_the_same_steps() -> None:
    trained = {}
    for name in ("fedspeed", "flat"):
        model, take = bench.contender(bench.TWO_PASSES[name], (6, 5, 4))
        for _ in range(3):
            take()
        trained[name] = {key: value.detach() for key, value in model.named_parameters()}
    assert_same(trained["fedspeed"], trained["flat"], tolerance=1e-6)


def test_steps_are_timed_in_turn() -> None:
    found = bench.step_times(bench.ONE_PASS, (8, 8), repetitions=3, steps=2)
    assert all(len(times) == 3 and math.isfinite(sum(times)) and min(times) > 0 for times in found.values())
    assert bench.ratio({"a": [2.0, 30.0, 4.0], "b": [1.0, 10.0, 4.0]}, "a", "b")["median"] == 2
