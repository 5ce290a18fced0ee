"""What every test finds and leaves: offline, one thread, a folder of its own, and nothing left behind."""

import gc
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before anything reads them: matplotlib and OpenMP look once, at import. Child processes inherit them.
os.environ.update(MPLBACKEND="Agg", OMP_NUM_THREADS="1", WANDB_MODE="offline", WANDB_SILENT="true")

import torch
from hypothesis import settings
from lightning.pytorch.utilities import rank_zero_only

torch.set_num_threads(1)
settings.register_profile("shared machine", deadline=None)  # an example may take long
settings.load_profile("shared machine")


@pytest.fixture(autouse=True, scope="module")
def imports_frozen() -> None:
    """Else the first collection in a forked process copies the memory of all modules: half the time of a short fit."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the test in its own folder: what a default Trainer writes does not land in the tree."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def environment_restored() -> Iterator[None]:
    """Takes back the variables and the rank that a Trainer sets (MASTER_PORT and LOCAL_RANK among them)."""
    before, rank = dict(os.environ), rank_zero_only.rank
    yield
    os.environ.clear()
    os.environ.update(before)
    rank_zero_only.rank = rank


@pytest.fixture(autouse=True)
def signal_handlers_restored() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    yield
    for number, handler in before.items():
        if handler is not None and signal.getsignal(number) is not handler:  # None: set outside of Python
            signal.signal(number, handler)


@pytest.fixture(autouse=True)
def process_group_destroyed() -> Iterator[None]:
    """Else the next test would join the group of this one, whatever size it asks for."""
    yield
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        gc.collect()  # a group that is garbage here must not be collected in a forked child, where its threads are not


@pytest.fixture(autouse=True)
def wandb_run_finished() -> Iterator[None]:
    """Else the next test's WandbLogger would write into the run of this one."""
    yield
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.finish()
