"""The YAML trains, and its checkpoints serve."""

import csv
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
RUN = Path("runs/federated")  # in the test's own folder


def command(rounds: int, *more: str) -> list[str]:
    trainer = {"max_epochs": rounds, "check_val_every_n_epoch": 2, "enable_progress_bar": "false"}
    flags = [f"--trainer.{name}={value}" for name, value in trainer.items()]
    return ["fit", f"--config={EXAMPLES / 'federated.yaml'}", *flags, *more]


def column(version: int, name: str) -> list[float]:
    with (RUN / f"version_{version}" / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def check_checkpoint(path: Path, accuracy: float) -> None:
    from digits import Classifier, Digits

    model = Classifier.load_from_checkpoint(path, map_location="cpu")
    images, labels = Digits().held_out.tensors
    with torch.no_grad():
        assert (model(images).argmax(1) == labels).float().mean().item() == pytest.approx(accuracy)


def test_it_trains_writes_checkpoints_and_resumes(example: ModuleType) -> None:
    forked = "--trainer.strategy.init_args.start_method=fork"
    example.main(command(4, forked))
    last = RUN / "version_0" / "checkpoints" / "last.ckpt"
    check_checkpoint(last, column(0, "val/acc")[-1])
    example.main(command(6, forked, f"--ckpt_path={last}"))
    example.main(command(6, forked))
    assert column(1, "fed/round") == [4, 5]
    assert column(1, "fal/robust_acc") == column(2, "fal/robust_acc")[-1:]
    assert column(1, "fed/drift") == column(2, "fed/drift")[-2:]


def test_plain_federated_averaging_by_flags(example: ModuleType) -> None:
    flags = ["--trainer.strategy=fulgurite.strategies.FederatedStrategy", "--trainer.strategy.num_clients=20"]
    flags += ["--trainer.strategy.start_method=fork", "--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0.3"]
    example.main(command(2, *flags))
    assert column(0, "fed/clients") == [20, 20]


@pytest.mark.slow
def test_it_starts_as_its_docstring_says(example: ModuleType) -> None:
    process = [sys.executable, example.__file__, *command(2)]
    done = subprocess.run(process, env=os.environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    check_checkpoint(RUN / "version_0" / "checkpoints" / "epoch=1.ckpt", column(0, "val/acc")[-1])
    assert list(Path("wandb").glob("offline-run-*/run-*.wandb"))
