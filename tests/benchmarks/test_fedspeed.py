"""The benchmark trains as the strategy does and counts what it says; its numbers are not tested."""

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType
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

FOLDER = Path(__file__).parents[2] / "benchmarks"


def _load(name: str, file: str) -> ModuleType:  # a folder of scripts, which find each other beside themselves
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{file}.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


for helper in ("_record", "_plots"):
    _load(helper, helper)
bench = _load("bench_fedspeed", "fedspeed")


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
