"""Checkpoints of rounds: exact, whole, and on any number of processes."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch.optim import SGD
from typing_extensions import override

from fulgurite.plugins.federated import PGD
from fulgurite.plugins.optim import FedSpeed, FedSpeedServer
from fulgurite.strategies import FederatedAdversarialStrategy, FederatedStrategy
from tests.strategies.test_federated import Clients, Stochastic, quiet_trainer, whole_batches
from tests.suites.fits import assert_same
from tests.suites.models import adamw


def fedspeed(parameters: Any) -> FedSpeed:
    return FedSpeed(parameters, lr=0.02)


class Saves(ModelCheckpoint):
    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(folder, **{"filename": "{epoch}", "save_top_k": -1, **options})


def strategy(**options: Any) -> FederatedStrategy:
    """Four of seven clients a round."""
    setting = {"partition": whole_batches(7), "clients_per_round": 4, "start_method": "fork", **options}
    kind = FederatedAdversarialStrategy if "attack" in setting else FederatedStrategy
    return kind(**setting)


def run(folder: Path, given: FederatedStrategy, rounds: int, make_optimizer: Any = fedspeed, **options: Any) -> Any:
    """Trains the stochastic module; ``ckpt_path`` and ``saves`` among the options."""
    module = Stochastic(make_optimizer=make_optimizer)
    path, saves = options.pop("ckpt_path", None), options.pop("saves", None)
    quiet = {"callbacks": [saves] if saves else [], "enable_checkpointing": bool(saves), "max_epochs": rounds}
    trainer = quiet_trainer(folder, given, **quiet | options)
    trainer.fit(module, ckpt_path=path)
    return {name: value.clone() for name, value in module.state_dict().items()}


VARIANTS: dict[str, tuple[dict[str, Any], Any]] = {
    "fedspeed": ({"server_optimizer": FedSpeedServer}, fedspeed),
    "momentum": ({"server_optimizer": lambda parameters: SGD(parameters, lr=1, momentum=0.9)}, adamw),
    "adversarial": ({"server_optimizer": FedSpeedServer, "attack": PGD(eps=0.1, steps=2, clip=None)}, fedspeed),
    "plain": ({"weighting": "uniform", "local_steps": 3}, adamw),
}


@pytest.mark.parametrize("validates", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_three_rounds_and_three_more_are_six(variant: str, validates: bool, tmp_path: Path) -> None:
    options, make_optimizer = VARIANTS[variant]
    common = {"limit_val_batches": 1.0 if validates else 0, "make_optimizer": make_optimizer}
    whole = run(tmp_path, strategy(**options), 6, **common, saves=Saves(tmp_path))
    resumed = run(tmp_path, strategy(**options), 6, **common, ckpt_path=tmp_path / "epoch=2.ckpt")
    assert_same(resumed, whole)


def test_resumes_by_steps_too(tmp_path: Path) -> None:
    steps = 6 * 4 * 3
    options: dict[str, Any] = {"server_optimizer": FedSpeedServer, "local_steps": 3}
    common = {"max_steps": steps, "limit_val_batches": 0}
    whole = run(tmp_path, strategy(**options), -1, saves=Saves(tmp_path), **common)
    resumed = run(tmp_path, strategy(**options), -1, ckpt_path=tmp_path / "epoch=2.ckpt", **common)
    assert_same(resumed, whole)


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 3)])
def test_another_number_of_processes_goes_on_alike(before: int, after: int, mapped: bool, tmp_path: Path) -> None:
    options: dict[str, Any] = {"server_optimizer": FedSpeedServer}
    if mapped:
        options["client_state_dir"] = str(tmp_path / "states")
    whole = run(tmp_path, strategy(**options), 5, devices=before, saves=Saves(tmp_path))
    resumed = run(tmp_path, strategy(**options), 5, devices=after, ckpt_path=tmp_path / "epoch=2.ckpt")
    assert_same(resumed, whole)
    assert mapped == (tmp_path / "states").exists()


def test_a_folder_of_states_changes_nothing(tmp_path: Path) -> None:
    mapped = {"client_state_dir": str(tmp_path / "states")}
    in_memory, on_disk = (
        run(tmp_path, strategy(server_optimizer=FedSpeedServer, **given), 4) for given in ({}, mapped)
    )
    assert_same(on_disk, in_memory)


def test_a_checkpoint_is_plain_and_its_states_go_with_it(tmp_path: Path) -> None:
    given = strategy(server_optimizer=FedSpeedServer)
    run(tmp_path, given, 4, saves=Saves(tmp_path, save_top_k=2, monitor="fed/round", mode="max", save_last="link"))
    kept = sorted(path.name for path in tmp_path.iterdir() if "ckpt" in path.name)
    expected = ["epoch=2.ckpt", "epoch=2.ckpt.clients", "epoch=3.ckpt", "epoch=3.ckpt.clients", "last.ckpt"]
    assert kept == expected  # those of the removed ones are gone
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    rule = checkpoint["fulgurite_federated"]
    assert rule["num_clients"] == 7
    assert checkpoint["optimizer_states"][0]["state"] == {}
    files = sorted(path.name for path in (tmp_path / "epoch=3.ckpt.clients").iterdir())
    assert files == sorted(f"{client}-4.pt" for client in rule["clients"])
    duals = torch.load(tmp_path / "epoch=3.ckpt.clients" / files[0], weights_only=True)
    shapes = [tuple(parameter.shape) for parameter in Stochastic(make_optimizer=fedspeed).parameters()]
    assert [tuple(dual.shape) for dual in duals] == shapes
    resumed = run(tmp_path, strategy(server_optimizer=FedSpeedServer), 5, ckpt_path=tmp_path / "last.ckpt")
    whole = run(tmp_path, strategy(server_optimizer=FedSpeedServer), 5)
    assert_same(resumed, whole)


def test_optimizers_without_state_leave_no_files(tmp_path: Path) -> None:
    run(tmp_path, strategy(), 2, make_optimizer=adamw, saves=Saves(tmp_path))
    assert not list(tmp_path.glob("*.clients"))


class SaveWithin(Callback):
    """Saves in the midst of the second round."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.current_epoch == 1 and not self.path.exists():
            trainer.save_checkpoint(self.path)


def test_what_is_saved_within_a_round_has_its_start_and_does_not_resume(tmp_path: Path) -> None:
    alone = {"partition": whole_batches(7), "clients_per_round": 4}
    path = tmp_path / "within.ckpt"
    run(tmp_path, FederatedStrategy(**alone), 2, adamw, callbacks=[SaveWithin(path)])
    start = run(tmp_path, FederatedStrategy(**alone), 1, adamw)
    assert_same(torch.load(path, weights_only=True)["state_dict"], start)
    with pytest.raises(MisconfigurationException, match=r"within\.ckpt was saved within a round"):
        run(tmp_path, FederatedStrategy(**alone), 3, adamw, ckpt_path=path)


class Breaks(Callback):
    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.current_epoch == 2:
            raise KeyError("on purpose")


@pytest.mark.parametrize("name", ["last", "on_exception"])
def test_an_exception_within_a_round_leaves_the_last_checkpoint_that_resumes(name: str, tmp_path: Path) -> None:
    alone = {"partition": whole_batches(7), "clients_per_round": 4}
    saves = [ModelCheckpoint(tmp_path, save_last=True), OnExceptionCheckpoint(tmp_path, name)]
    options: dict[str, Any] = {"enable_checkpointing": True, "limit_val_batches": 0}
    with (
        pytest.warns(UserWarning, match=rf"within a round, and .*{name}\.ckpt is not written"),
        pytest.raises(KeyError, match="on purpose"),
    ):
        run(tmp_path, FederatedStrategy(**alone), 4, adamw, callbacks=[*saves, Breaks()], **options)
    assert not (tmp_path / "on_exception.ckpt").exists()
    resumed = run(tmp_path, FederatedStrategy(**alone), 4, adamw, callbacks=saves, ckpt_path="last", **options)
    assert_same(resumed, run(tmp_path, FederatedStrategy(**alone), 4, adamw, limit_val_batches=0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "`seed` is 1 and was 0 in the checkpoint"),
        ({"partition": whole_batches(6)}, "`num_clients` is 6 and was 7 in the checkpoint"),
    ],
    ids=str,
)
def test_other_clients_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    alone = {"partition": whole_batches(7), "clients_per_round": 4}
    run(tmp_path, FederatedStrategy(**alone), 1, adamw, saves=Saves(tmp_path))
    with pytest.raises(MisconfigurationException, match=message):
        run(tmp_path, FederatedStrategy(**alone | change), 2, adamw, ckpt_path=tmp_path / "epoch=0.ckpt")


def test_missing_states_are_named(tmp_path: Path) -> None:
    alone: dict[str, Any] = {"partition": whole_batches(7), "server_optimizer": FedSpeedServer}
    run(tmp_path, FederatedStrategy(**alone), 1, saves=Saves(tmp_path))
    (tmp_path / "epoch=0.ckpt.clients" / "3-1.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"epoch=0.ckpt.clients/3-1.pt is missing"):
        run(tmp_path, FederatedStrategy(**alone), 2, ckpt_path=tmp_path / "epoch=0.ckpt")


def test_a_plain_checkpoint_can_be_the_start(tmp_path: Path) -> None:
    module = Clients(make_optimizer=adamw)
    trainer = Trainer(
        accelerator="cpu", logger=False, max_epochs=1, default_root_dir=tmp_path, enable_progress_bar=False
    )
    trainer.fit(module)
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    given = FederatedStrategy(num_clients=5)
    with pytest.warns(UserWarning, match="not written by FederatedStrategy"):
        quiet_trainer(tmp_path, given, max_epochs=3).fit(
            Clients(make_optimizer=adamw), ckpt_path=tmp_path / "plain.ckpt"
        )
    assert given.stats["fed/round"] == 1


TERMINATED = """
import os, signal, sys
from pathlib import Path
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from tests.strategies.test_federated import Stochastic, quiet_trainer
from tests.strategies.test_federated_resume import fedspeed, strategy
from fulgurite.plugins.optim import FedSpeedServer

folder = Path(sys.argv[1])

class Terminates(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch == 1 and batch_idx == 1 and trainer.global_rank == trainer.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_exception(self, trainer, pl_module, exception):
        Path(folder, f"rank{trainer.global_rank}").write_text(f"{type(exception).__name__} {trainer.current_epoch}")

if __name__ == "__main__":
    given = strategy(server_optimizer=FedSpeedServer, start_method="popen")
    callbacks = [Terminates(), OnExceptionCheckpoint(folder, "last")]
    trainer = quiet_trainer(folder, given, devices=int(sys.argv[2]), max_epochs=4, callbacks=callbacks,
                            enable_checkpointing=True, limit_val_batches=float(sys.argv[3]))
    trainer.fit(Stochastic(make_optimizer=fedspeed))
"""


@pytest.mark.parametrize(("devices", "validates"), [(1, 1), (1, 0), pytest.param(2, 1, marks=pytest.mark.slow)])
def test_sigterm_ends_with_the_round_and_the_checkpoint_goes_on(devices: int, validates: int, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(TERMINATED)
    command = [sys.executable, str(script), str(tmp_path), str(devices), str(validates)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run(command, env=environment, timeout=100, check=False, capture_output=True)
    for rank in range(devices):
        assert Path(tmp_path, f"rank{rank}").read_text().startswith("SIGTERMException")
    options: dict[str, Any] = {"server_optimizer": FedSpeedServer}
    limit = {"limit_val_batches": float(validates)}
    resumed = run(tmp_path, strategy(**options), 4, ckpt_path=tmp_path / "last.ckpt", **limit)
    assert_same(resumed, run(tmp_path, strategy(**options), 4, **limit))
