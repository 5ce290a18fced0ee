"""FedAvg and adversarial training by fluke and by Fulgurite, in turn; runs where fluke is installed.

Arguments: a file for the result, repetitions, and 1 to be quick.
"""

import json
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from importlib.metadata import version
from io import StringIO
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

try:
    import torchvision  # noqa: F401
except RuntimeError:  # pip brings one for CUDA, whose kernels a torch without it does not load; nothing here needs them
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from _federated import MILLION, QUIET, SMALL, Classifier, Rounds, Table, apart, digits, loader, mlp
from fluke import DDict, FlukeENV
from fluke.algorithms.fat import FAT
from fluke.algorithms.fedavg import FedAVG
from fluke.data import DataSplitter, DummyDataContainer, FastDataLoader
from fluke.utils import FederationObserver
from lightning.pytorch import Trainer, seed_everything
from torch.nn import CrossEntropyLoss
from torch.optim import SGD
from torch.utils.data import DataLoader

from fulgurite.plugins.federated import PGD
from fulgurite.plugins.federated.partition import iid_partition
from fulgurite.strategies import FederatedAdversarialStrategy, FederatedStrategy

CLIENTS, SAMPLED, EPOCHS, BATCH_SIZE, LR = 100, 10, 5, 10, 0.1
FLUKE_ATTACK = PGD(eps=0.1, step_size=2 / 255, steps=10, random_start=False)  # what its FAT does, whatever it is told


class Stamps(FederationObserver):
    """When each of fluke's rounds begins."""

    def __init__(self) -> None:
        self.started: list[float] = []

    def start_round(self, round: int, global_model: Any) -> None:
        self.started.append(perf_counter())


def theirs(widths: tuple[int, ...], adversarial: bool, rounds: int) -> list[float]:
    """Seconds of each round but the first."""
    FlukeENV().set_seed(0)
    FlukeENV().set_eval_cfg(server=False)
    train, _ = digits(0)
    x, y = train.tensors
    clients = [
        FastDataLoader(x[part], y[part], num_labels=10, batch_size=BATCH_SIZE, shuffle=True, skip_singleton=False)
        for part in map(torch.from_numpy, iid_partition(len(x), CLIENTS))
    ]
    client = {
        "batch_size": BATCH_SIZE,
        "local_epochs": EPOCHS,
        "loss": CrossEntropyLoss,
        "optimizer": {"name": "SGD", "lr": LR},
        "scheduler": {"name": "StepLR", "step_size": 1, "gamma": 1},
    }
    settings = DDict(client=DDict(**client), server=DDict(weighted=True), model=mlp(*widths))
    data = DataSplitter(DummyDataContainer(clients, [None] * CLIENTS, None, 10))
    algorithm = (FAT if adversarial else FedAVG)(CLIENTS, data, settings)
    stamps = Stamps()
    algorithm.set_callbacks([stamps])
    with redirect_stdout(StringIO()):
        algorithm.run(rounds + 2, SAMPLED / CLIENTS)  # a round ends where the next one begins
    return [after - before for before, after in pairwise(stamps.started)][1:]


def ours(widths: tuple[int, ...], adversarial: bool, rounds: int, table: bool = False) -> list[float]:
    """Seconds of each round but the first; with ``table`` a batch is read at once, as fluke does, not row by row."""
    train, _ = digits(0)
    seed_everything(0, verbose=False)
    federation: dict[str, Any] = {"num_clients": CLIENTS, "clients_per_round": SAMPLED, "local_epochs": EPOCHS}
    strategy = (
        FederatedAdversarialStrategy(attack=FLUKE_ATTACK, **federation)
        if adversarial
        else FederatedStrategy(**federation)
    )
    meter = Rounds()
    trainer = Trainer(**QUIET, devices=1, strategy=strategy, max_epochs=rounds + 1, callbacks=[meter])
    batches = loader(Table(*train.tensors), BATCH_SIZE) if table else DataLoader(train, BATCH_SIZE)
    trainer.fit(Classifier(mlp(*widths), partial(SGD, lr=LR)), batches)
    return meter.seconds[1:]


def compare(
    widths: tuple[int, ...], adversarial: bool, repetitions: int, rounds: int
) -> dict[str, list[dict[str, float]]]:
    methods: dict[str, Callable[..., list[float]]] = {
        "fluke": theirs,
        "fulgurite": ours,
        "fulgurite_table": partial(ours, table=True),
    }
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in methods}
    for _ in range(repetitions):
        for name, method in methods.items():
            rows[name].append({"seconds_per_round": median(apart(method, widths, adversarial, rounds))})
    return rows


def main() -> None:
    file, repetitions, quick = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "1"
    torch.set_num_threads(1)
    found = {
        f"{size}_{'fat' if adversarial else 'fedavg'}": compare(
            widths, adversarial, repetitions, 1 if quick else 2 if size == "million" else 8
        )
        for size, widths in (("small", SMALL), ("million", MILLION))
        for adversarial in (False, True)
    }
    Path(file).write_text(json.dumps({"rows": found, "torch": torch.__version__, "fluke-fl": version("fluke-fl")}))


if __name__ == "__main__":
    main()
