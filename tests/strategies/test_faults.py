"""Faults on purpose: killed processes and damaged checkpoints. A fit ends with an error, and a new one goes on."""

import os
import random
import signal
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from fsspec.implementations.local import LocalFileOpener
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException
from typing_extensions import override

from fulgurite.plugins.optim import FedSpeedServer
from fulgurite.strategies import ReplicaStrategy, SequentialGradientCodingStrategy, UnwrappedStrategy
from tests.strategies.test_federated import Stochastic
from tests.strategies.test_federated_resume import fedspeed
from tests.strategies.test_federated_resume import strategy as federated
from tests.suites.fits import fit, make, streaming

TIMEOUT = timedelta(seconds=60)  # of collectives: what waits for a dead process fails then, where it does not at once
POINTS = 20  # at which a process is killed, for each strategy


@dataclass(frozen=True)
class Case:
    """A strategy under faults.

    Args:
        module: makes what is trained.
        strategy: makes what trains it; gets the start method.
        trainer: its arguments.
        saves: when a checkpoint is written.
        devices: processes.
        tolerance: within which the documentation promises that a resumed fit equals an undisturbed one.
    """

    module: Callable[[], LightningModule]
    strategy: Callable[..., UnwrappedStrategy]
    trainer: Mapping[str, Any]
    saves: Mapping[str, Any] = field(default_factory=dict)
    devices: int = 2
    tolerance: float = 0.0


IN_EPOCHS: dict[str, Any] = {"max_steps": 16, "val_check_interval": 5, "limit_val_batches": 1}
CASES = {
    "streaming_diloco": Case(
        partial(make, batches=10),
        partial(streaming, sync_every=4, num_fragments=2, overlap_steps=2, timeout=TIMEOUT),
        IN_EPOCHS,
        {"every_n_train_steps": 3},
    ),
    "federated": Case(
        partial(Stochastic, make_optimizer=fedspeed),
        partial(federated, server_optimizer=FedSpeedServer, timeout=TIMEOUT),
        {"max_steps": -1, "max_epochs": 4, "limit_val_batches": 1},
    ),
    "gradient_coding": Case(
        partial(make, twins=True, batches=10),
        partial(SequentialGradientCodingStrategy, s=1, start_method="fork", timeout=TIMEOUT),
        IN_EPOCHS,
        {"every_n_train_steps": 3},
        devices=3,
        tolerance=1e-5,
    ),
}
every_strategy = pytest.mark.parametrize("name", CASES)


class Ending(Callback):
    """Keeps what each process has after the fit, also where a checkpoint has left it nothing to do."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        strategy = trainer.strategy
        kept: dict[str, Any] = {"module": pl_module.state_dict(), "optimizer": trainer.optimizers[0].state_dict()}
        if isinstance(strategy, ReplicaStrategy):
            kept["local"] = strategy.local_values()
        torch.save(kept, self.folder / f"ending{trainer.global_rank}.pt")


def run(case: Case, folder: Path, checkpoints: Path, *callbacks: Callback, ckpt_path: Path | None = None) -> None:
    """A fit that saves now and then, each time twice: in a file of its own, and over ``last.ckpt``."""
    saves = ModelCheckpoint(checkpoints, "{epoch}-{step}", save_top_k=-1, save_last=True, **case.saves)
    options = {"callbacks": [*callbacks, Ending(folder), saves], "devices": case.devices, "ckpt_path": ckpt_path}
    fit(folder, case.module(), case.strategy(), **options, **case.trainer)


def endings(case: Case, folder: Path) -> list[Any]:
    return [torch.load(folder / f"ending{rank}.pt", weights_only=True) for rank in range(case.devices)]


def newest(checkpoints: Path) -> Path | None:
    return max(checkpoints.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns, default=None)


# ---- killed ----------------------------------------------------------------------------------------------------------

HOOKS = (
    "on_train_batch_start",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_validation_batch_start",
    "on_save_checkpoint",
)
WRITES = "torch.save"  # half of a file has been written
MOVES = "commit"  # a checkpoint is whole, and not yet in its place


@dataclass(frozen=True)
class Point:
    """The ``call``-th of ``what`` on a rank."""

    rank: int
    what: str
    call: int


class Fault(Callback):
    """Counts on each rank what happens, and kills the process at one point of it."""

    def __init__(self, folder: Path, point: Point | None = None) -> None:
        self.folder, self.point, self.rank = folder, point, -1  # no rank in the process that waits
        self.calls: Counter[str] = Counter()
        self.patches = ExitStack()
        for hook in HOOKS:
            setattr(self, hook, partial(self._kill_if_due, hook))

    def _due(self, what: str) -> bool:
        self.calls[what] += 1
        return self.point == Point(self.rank, what, self.calls[what])

    def _kill_if_due(self, what: str, *_: Any) -> None:
        if self._due(what):
            self._kill()

    def _kill(self) -> None:
        (self.folder / "killed").write_text(str(self.rank))
        os.kill(os.getpid(), signal.SIGKILL)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.rank = trainer.global_rank
        (self.folder / f"{os.getpid()}.pid").touch()
        save, commit = torch.save, LocalFileOpener.commit

        def save_or_die(value: Any, file: Any, *args: Any, **options: Any) -> None:
            if hasattr(file, "write") and self._due(WRITES):
                file.write(b"PK")
                file.flush()
                self._kill()
            save(value, file, *args, **options)

        def commit_or_die(opener: Any) -> None:
            self._kill_if_due(MOVES)
            commit(opener)

        self.patches.enter_context(patch.object(torch, "save", save_or_die))
        self.patches.enter_context(patch.object(LocalFileOpener, "commit", commit_or_die))

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.patches.close()
        torch.save(dict(self.calls), self.folder / f"calls{self.rank}.pt")

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        (self.folder / f"ended{self.rank}").write_text(f"{type(exception).__name__}: {exception}")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a strategy's fit to its end."""

    @cache
    def of(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        run(CASES[name], folder, folder / "checkpoints", Fault(folder))
        return folder

    return of


def draw(number: int, folder: Path, devices: int) -> Point:
    """One of the points that an undisturbed fit passes; what happens there in turns, when and on which rank drawn."""
    draws = random.Random(number)
    whats = (*HOOKS, WRITES, MOVES)
    what = whats[number % len(whats)]
    calls = {rank: torch.load(folder / f"calls{rank}.pt").get(what, 0) for rank in range(devices)}
    rank = draws.choice([rank for rank in calls if calls[rank]])
    return Point(rank, what, draws.randint(1, calls[rank]))


def assert_gone(folder: Path, devices: int) -> None:
    pids = [int(path.stem) for path in folder.glob("*.pid")]
    assert len(pids) == devices
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize(
    "number", [pytest.param(number, marks=[pytest.mark.slow] * (number % 7 > 0)) for number in range(POINTS)]
)
@every_strategy
def test_a_killed_process_ends_the_fit_and_the_newest_checkpoint_goes_on(
    name: str, number: int, undisturbed: Callable[[str], Path], tmp_path: Path
) -> None:
    case, whole = CASES[name], undisturbed(name)
    killed, restarted, checkpoints = (tmp_path / part for part in ("killed", "restarted", "checkpoints"))
    point = draw(number, whole, case.devices)
    print(point)
    killed.mkdir()
    with pytest.raises((ProcessExitedException, ProcessRaisedException)):
        run(case, killed, checkpoints, Fault(killed, point))
    assert (killed / "killed").read_text() == str(point.rank)
    assert_gone(killed, case.devices)
    print({path.name: path.read_text() for path in killed.glob("ended*")}, newest(checkpoints))
    run(case, restarted, checkpoints, ckpt_path=newest(checkpoints))
    tolerance = {"rtol": case.tolerance, "atol": case.tolerance}
    torch.testing.assert_close(endings(case, restarted), endings(case, whole), **tolerance)
