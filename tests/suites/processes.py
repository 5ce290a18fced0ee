"""Runs a function in forked processes that form a gloo group."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def in_processes(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What ``function(rank, *args)`` returns in each of ``world_size`` processes; tensors and plain types."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_entry, (world_size, Path(folder), function, args), nprocs=world_size, start_method="fork")
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=True) for rank in range(world_size)]


def of_survivors(world_size: int, function: Callable[..., Any], *args: Any) -> dict[int, Any]:
    """The same by rank, where some processes die on the way; a process that hangs for a minute is an error."""
    with tempfile.TemporaryDirectory() as folder:
        context = mp.start_processes(
            _entry, (world_size, Path(folder), function, args), nprocs=world_size, start_method="fork", join=False
        )
        for process in context.processes:
            process.join(60)
        hanging = [rank for rank, process in enumerate(context.processes) if process.is_alive()]
        for rank in hanging:
            context.processes[rank].kill()
        assert not hanging, f"ranks {hanging} hang"
        paths = {rank: Path(folder, f"{rank}.pt") for rank in range(world_size)}
        return {rank: torch.load(path, weights_only=True) for rank, path in paths.items() if path.exists()}


def _entry(rank: int, world_size: int, folder: Path, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world_size)
    torch.save(function(rank, *args), folder / f"{rank}.pt")
    dist.destroy_process_group()
