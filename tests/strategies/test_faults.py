"""Faults on purpose: killed processes and damaged checkpoints. A fit ends with an error, and a new one goes on."""

import os
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning
import pytest
import torch
from fsspec.implementations.local import LocalFileOpener
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from packaging.version import Version
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException
from typing_extensions import override

from fulgurite.plugins.optim import FedSpeedServer
from fulgurite.strategies import (
    ReplicaStrategy,
    SequentialGradientCodingStrategy,
    StreamingDiLoCoStrategy,
    UnwrappedStrategy,
)
from tests.strategies.test_federated import Stochastic
from tests.strategies.test_federated_resume import fedspeed
from tests.strategies.test_federated_resume import strategy as federated
from tests.suites.fits import fit, make

TIMEOUT = timedelta(seconds=60)  # of collectives: what waits for a dead process fails then, where it does not at once
POINTS = 20  # at which a process is killed, for each strategy


@dataclass(frozen=True)
class Case:
    """A strategy under faults.

    Args:
        module: makes what is trained.
        kind: makes what trains it.
        trainer: its arguments.
        saves: when a checkpoint is written.
        devices: processes.
        tolerance: within which the documentation promises that a resumed fit equals an undisturbed one.
    """

    module: Callable[[], LightningModule]
    kind: Callable[..., UnwrappedStrategy]
    trainer: Mapping[str, Any]
    saves: Mapping[str, Any] = field(default_factory=dict)
    devices: int = 2
    tolerance: float = 0.0

    def strategy(self, **options: Any) -> UnwrappedStrategy:
        return self.kind(**{"start_method": "fork", "timeout": TIMEOUT, **options})


IN_EPOCHS: dict[str, Any] = {"max_steps": 16, "val_check_interval": 5, "limit_val_batches": 1}
CASES = {
    "streaming_diloco": Case(
        partial(make, batches=10),
        partial(StreamingDiLoCoStrategy, sync_every=4, num_fragments=2, overlap_steps=2),
        IN_EPOCHS,
        {"every_n_train_steps": 3},
    ),
    "federated": Case(
        partial(Stochastic, make_optimizer=fedspeed),
        partial(federated, server_optimizer=FedSpeedServer),
        {"max_steps": -1, "max_epochs": 4, "limit_val_batches": 1},
    ),
    "gradient_coding": Case(
        partial(make, twins=True, batches=10),
        partial(SequentialGradientCodingStrategy, s=1),
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


def run(
    case: Case, folder: Path, checkpoints: Path, *callbacks: Callback, strategy: Any = None, **options: Any
) -> None:
    """A fit that saves now and then, each time twice: in a file of its own, and over ``last.ckpt``."""
    saves = ModelCheckpoint(checkpoints, "{epoch}-{step}", save_top_k=-1, save_last=True, **case.saves)
    options |= {"callbacks": [*callbacks, Ending(folder), saves], "devices": case.devices}
    fit(folder, case.module(), strategy or case.strategy(), **options, **case.trainer)


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
        self.folder, self.point = folder, point
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
        os.kill(os.getpid(), signal.SIGKILL)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.rank = trainer.global_rank
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


def exit_codes(strategy: UnwrappedStrategy) -> list[int | None]:
    """Of its processes by rank; None for one that is left."""
    launcher: Any = strategy.launcher
    return [process.exitcode for process in launcher.procs]


def killed_at(point: Point, case: Case, folder: Path, checkpoints: Path) -> None:
    """A fit of which one process is killed; that all the others end by themselves is checked."""
    folder.mkdir()
    strategy = case.strategy()
    with pytest.raises((ProcessExitedException, ProcessRaisedException)):
        run(case, folder, checkpoints, Fault(folder, point), strategy=strategy)
    raised = 1  # one that hangs is killed by the launcher half a minute later
    expected = [-signal.SIGKILL if rank == point.rank else raised for rank in range(case.devices)]
    assert exit_codes(strategy) == expected


@pytest.mark.parametrize(
    "number", [pytest.param(number, marks=[pytest.mark.slow] * (number % 7 > 0)) for number in range(POINTS)]
)
@every_strategy
def test_a_killed_process_ends_the_fit_and_the_newest_checkpoint_goes_on(
    name: str, number: int, undisturbed: Callable[[str], Path], tmp_path: Path
) -> None:
    case, whole = CASES[name], undisturbed(name)
    killed, restarted, checkpoints = (tmp_path / part for part in ("killed", "restarted", "checkpoints"))
    killed_at(draw(number, whole, case.devices), case, killed, checkpoints)
    run(case, restarted, checkpoints, ckpt_path=newest(checkpoints))
    tolerance = {"rtol": case.tolerance, "atol": case.tolerance}
    torch.testing.assert_close(endings(case, restarted), endings(case, whole), **tolerance)


@pytest.mark.parametrize(("rank", "what"), [(0, WRITES), (1, WRITES), (0, MOVES)])
def test_a_checkpoint_that_was_to_be_overwritten_is_still_whole(
    rank: int, what: str, undisturbed: Callable[[str], Path], tmp_path: Path
) -> None:
    case, whole = CASES["federated"], undisturbed("federated")  # which writes files of clients, too
    killed, restarted, checkpoints = (tmp_path / part for part in ("killed", "restarted", "checkpoints"))
    last_call = torch.load(whole / f"calls{rank}.pt")[what]
    killed_at(Point(rank, what, last_call), case, killed, checkpoints)
    assert torch.load(checkpoints / "last.ckpt", weights_only=True)["epoch"] == 2  # not of the last round
    run(case, restarted, checkpoints, ckpt_path=checkpoints / "last.ckpt")
    torch.testing.assert_close(endings(case, restarted), endings(case, whole), rtol=0, atol=0)


# ---- terminated ------------------------------------------------------------------------------------------------------


class Terminated(Callback):
    """Sends SIGTERM to the last rank, and notes on each how the fit ends."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == 5 and trainer.global_rank == trainer.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        note = f"{type(exception).__name__} {trainer.global_step}"
        (self.folder / f"note{trainer.global_rank}").write_text(note)


SCRIPT = """
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from tests.strategies.test_faults import CASES, Terminated, run

case, folder = CASES[sys.argv[1]], Path(sys.argv[2])
case = replace(case, saves={"save_on_exception": True, **case.saves})
strategy = case.strategy(start_method="popen", timeout=timedelta(minutes=9))  # the other processes import first
run(case, folder / "terminated", folder / "checkpoints", Terminated(folder), strategy=strategy)
"""


@pytest.mark.slow
@pytest.mark.skipif(Version(lightning.__version__) < Version("2.6"), reason="`save_on_exception` came with 2.6")
@every_strategy
def test_sigterm_saves_in_model_checkpoint(name: str, undisturbed: Callable[[str], Path], tmp_path: Path) -> None:
    case, script, checkpoints = CASES[name], tmp_path / "script.py", tmp_path / "checkpoints"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, str(script), name, str(tmp_path)]
    subprocess.run(command, env=environment, timeout=600, check=False, capture_output=True)
    (note,) = {(tmp_path / f"note{rank}").read_text() for rank in range(case.devices)}
    path = newest(checkpoints)
    assert path is not None
    step = torch.load(path, weights_only=True)["global_step"]
    assert note == f"SIGTERMException {step}"
    run(case, tmp_path / "restarted", checkpoints, ckpt_path=path)
    tolerance = {"rtol": case.tolerance, "atol": case.tolerance}
    torch.testing.assert_close(endings(case, tmp_path / "restarted"), endings(case, undisturbed(name)), **tolerance)


# ---- damaged ---------------------------------------------------------------------------------------------------------


class Begun(Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @override
    def on_train_batch_start(self, *_: Any) -> None:
        (self.folder / "begun").touch()


def assert_refused(case: Case, folder: Path, path: Path, message: str, **options: Any) -> None:
    """Checks that a fit in several processes ends before its first batch, in none of them by the launcher's force."""
    strategy = case.strategy()
    with pytest.raises(ProcessRaisedException, match=message):
        run(case, folder, folder, Begun(folder), strategy=strategy, ckpt_path=path, **options)
    # One that waits for the other ends as that leaves, or by SIGTERM, of which Lightning takes no notice yet.
    assert {*exit_codes(strategy)} <= {1, -signal.SIGTERM}
    assert not (folder / "begun").exists()


def copied(folder: Path, checkpoints: Path) -> Path:
    """A checkpoint of an undisturbed fit, to damage."""
    shutil.copytree(folder / "checkpoints", checkpoints)
    return checkpoints / "last.ckpt"


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def scramble(path: Path) -> None:
    path.write_bytes(random.Random(0).randbytes(path.stat().st_size))


@pytest.mark.parametrize("damage", [cut, empty, scramble])
@every_strategy
def test_a_file_that_cannot_be_read_is_named(
    name: str, damage: Callable[[Path], None], undisturbed: Callable[[str], Path], tmp_path: Path
) -> None:
    path = copied(undisturbed(name), tmp_path / "checkpoints")
    damage(path)
    assert_refused(CASES[name], tmp_path, path, r"last\.ckpt cannot be read: if a crash has cut it short")


class OnNodes(TorchCheckpointIO):
    """Processes that each read the file of their own node."""

    @override
    def load_checkpoint(self, path: Any, *args: Any, **options: Any) -> dict[str, Any]:
        return super().load_checkpoint(f"{path}.{os.environ['LOCAL_RANK']}", *args, **options)


@every_strategy
def test_a_file_that_one_process_alone_cannot_read_ends_all(
    name: str, undisturbed: Callable[[str], Path], tmp_path: Path
) -> None:
    case, path = CASES[name], copied(undisturbed(name), tmp_path / "checkpoints")
    for rank in range(case.devices):
        shutil.copy(path, f"{path}.{rank}")
    cut(Path(f"{path}.1"))
    assert_refused(case, tmp_path, path, r"last\.ckpt cannot be read", plugins=[OnNodes()])


def test_a_client_s_file_that_cannot_be_read_is_named(undisturbed: Callable[[str], Path], tmp_path: Path) -> None:
    path = copied(undisturbed("federated"), tmp_path / "checkpoints")
    cut(Path(f"{path}.clients/1-4.pt"))
    assert_refused(CASES["federated"], tmp_path, path, r"last\.ckpt\.clients/1-4\.pt cannot be read")


def without(*keys: Any) -> Callable[[Any], None]:
    """Drops an entry of nested dicts and lists."""

    def damage(state: Any) -> None:
        *way, last = keys
        for key in way:
            state = state[key]
        del state[last]

    return damage


def misshapen(*keys: Any) -> Callable[[Any], None]:
    """Gives a tensor in nested dicts and lists another shape."""

    def damage(state: Any) -> None:
        *way, last = keys
        for key in way:
            state = state[key]
        state[last] = torch.ones(5)

    return damage


DILOCO, FED = "streaming_diloco", "fulgurite_federated"
NOT_DILOCO = "the checkpoint's state under 'streaming_diloco' is not one of StreamingDiLoCoStrategy for this module"
NOT_FED = "the checkpoint's state under 'fulgurite_federated' is not one of FederatedStrategy for this module"


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("streaming_diloco", misshapen("state_dict", "head.weight"), r"size mismatch for head\.weight"),
        ("streaming_diloco", without(DILOCO, "velocity"), rf"{NOT_DILOCO} \(KeyError: 'velocity'\)"),
        ("streaming_diloco", misshapen(DILOCO, "value", 0), rf"{NOT_DILOCO} \(RuntimeError: .* size"),
        ("streaming_diloco", without(DILOCO, "workers", 1, "values", "head.bias"), rf"{NOT_DILOCO} .*'head\.bias'"),
        ("streaming_diloco", without("optimizer_states"), "checkpoint contains only the model"),
        ("federated", misshapen("state_dict", "head.weight"), r"size mismatch for head\.weight"),
        ("federated", without(FED, "server"), rf"{NOT_FED} \(KeyError: 'server'\)"),
        ("federated", without(FED, "server", "param_groups", 0), rf"{NOT_FED} \(ValueError: .* parameter groups"),
        ("gradient_coding", misshapen("state_dict", "head.weight"), r"size mismatch for head\.weight"),
        ("gradient_coding", without("state_dict", "head.weight"), r'Missing key\(s\) in state_dict: "head\.weight"'),
        ("gradient_coding", without("optimizer_states"), "checkpoint contains only the model"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(
    name: str, damage: Callable[[Any], None], message: str, undisturbed: Callable[[str], Path], tmp_path: Path
) -> None:
    path = copied(undisturbed(name), tmp_path / "checkpoints")
    checkpoint = torch.load(path, weights_only=True)
    damage(checkpoint)
    torch.save(checkpoint, path)
    assert_refused(CASES[name], tmp_path, path, message)


def test_coded_training_goes_on_under_another_code(undisturbed: Callable[[str], Path], tmp_path: Path) -> None:
    case, whole = CASES["gradient_coding"], undisturbed("gradient_coding")
    other = replace(case, devices=2, kind=partial(SequentialGradientCodingStrategy, s=0))
    run(other, tmp_path, tmp_path, ckpt_path=whole / "checkpoints" / "epoch=0-step=6.ckpt")
    (expected, *_), endings_of_two = endings(case, whole), endings(other, tmp_path)
    torch.testing.assert_close(endings_of_two, [expected] * 2, rtol=case.tolerance, atol=case.tolerance)
