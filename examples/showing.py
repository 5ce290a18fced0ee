"""How the examples show a training: in a line of the terminal, in loggers, and in figures of one look.

Import it before torch, for the number of threads.
"""

import logging
import os
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported: the processes share the cores

import wandb
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from matplotlib.axes import Axes
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


def quiet() -> None:
    """Silences what a newcomer cannot act on; what the strategies themselves warn of still shows."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers")  # the data are in memory
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated")
    wandb.setup()  # takes WANDB_SILENT to heart before it validates what Lightning passes to it


def line_of(trainer: Trainer, name: str, colour: str) -> Progress:
    """One line a training, which stays: its name, how far it is, the description of its task, and the time.

    Args:
        trainer: of whose processes the first one shows it.
        name: of the training, padded to the width of the longest.
        colour: of the name and the bar.
    """
    return Progress(
        TextColumn(f"[bold {colour}]{name}"),
        BarColumn(bar_width=None, complete_style=colour, finished_style=colour),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        expand=True,
        disable=not trainer.is_global_zero,
    )


def loggers(name: str, store: Path) -> list[Logger]:
    """Weights & Biases, offline unless WANDB_MODE says otherwise, and a table."""
    return [
        WandbLogger(name=name, project="fulgurite", group=store.name, save_dir=store),
        CSVLogger(save_dir=store, name=slug(name)),
    ]


def slug(name: str) -> str:
    return name.lower().replace(" ", "_")


def panel(axes: Axes, title: str, **settings: Any) -> None:
    axes.set(**settings)
    axes.set_title(title, fontsize="medium", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e5e7eb", linewidth=0.6)
