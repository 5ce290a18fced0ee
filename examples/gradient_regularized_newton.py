"""An ill-conditioned problem to the bottom: softmax regression on digits, by a Newton method without a learning rate.

All images are one batch, their pixels are as they come, from 0 to 16, and the penalty is tiny: the curvature differs by
a factor of millions from one direction to another. Each optimizer trains under the same Trainer, until the gradient is
1e-8 or its time is over. Leaves a figure, and what was logged, under ``runs/gradient_regularized_newton``.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import showing
import torch
import torch.nn.functional as F
import wandb
from digits import CLASSES
from jsonargparse import auto_cli
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import LBFGS, Adam, Optimizer
from torch.utils.data import DataLoader

from fulgurite.callbacks import log_figure
from fulgurite.plugins.optim import GradientRegularizedNewton

COLOURS = {"Adam": "#6b7280", "LBFGS": "#2563eb", "GradientRegularizedNewton": "#ea580c"}
PRODUCT = 2  # units of a product with the curvature, where loss and gradient are one


class SoftmaxRegression(LightningModule):
    """Double precision, from zero, with a penalty on the weights."""

    def __init__(self, optimizer: Callable[[Any], Optimizer], penalty: float = 1e-6) -> None:
        super().__init__()
        self.make_optimizer, self.penalty = optimizer, penalty
        self.linear = nn.Linear(64, CLASSES).double()
        for param in self.parameters():
            nn.init.zeros_(param)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        weights = sum(param.square().sum() for param in self.parameters())
        loss = F.cross_entropy(self.linear(batch[0]), batch[1]) + self.penalty / 2 * weights
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> Optimizer:
        return self.make_optimizer(self.parameters())


@dataclass
class Run:
    """The gradient's norm wherever it was computed, and the seconds and units before it; accuracy at the end."""

    name: str
    seconds: list[float] = field(default_factory=list)
    units: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    steps: int = 0
    accuracy: float = 0.0


class Watch(Callback):
    """Records a run, and ends it."""

    def __init__(self, run: Run, target: float, seconds: float) -> None:
        self.run, self.target, self.limit = run, target, seconds

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.start, self.products, self.first = time.perf_counter(), 0.0, 0

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        # Comes after each gradient: of a line search and of trial points as well.
        norm = torch.cat([param.grad.flatten() for param in pl_module.parameters() if param.grad is not None]).norm()
        self.run.seconds.append(time.perf_counter() - self.start)
        self.run.units.append(len(self.run.norms) + 1 + self.products)
        self.run.norms.append(float(norm))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.run.steps += 1
        (optimizer,) = trainer.optimizers
        if isinstance(optimizer, GradientRegularizedNewton):
            pl_module.log_dict(optimizer.metrics)
            products = PRODUCT * optimizer.metrics["grn/products"]
            for index in range(self.first + 1, len(self.run.units)):  # trials come after the step's products
                self.run.units[index] += products
            self.products += products
        self.first = len(self.run.norms)
        late = time.perf_counter() - self.start > self.limit
        trainer.should_stop = late or min(self.run.norms) <= self.target


def main(
    target: float = 1e-8,
    seconds: float = 12.0,
    max_krylov: int = 50,
    history_size: int = 100,
    lr: float = 0.01,
    seed: int = 0,
    folder: Path = Path(),
) -> list[Run]:
    """Trains, prints a table and draws the figure.

    Args:
        target: norm of the gradient at which a training ends.
        seconds: after which it ends in any case.
        max_krylov: of GradientRegularizedNewton.
        history_size: of LBFGS.
        lr: of Adam.
        seed: of the split.
        folder: where ``runs/gradient_regularized_newton`` goes.
    """
    showing.quiet()
    torch.set_num_threads(1)
    console = Console(highlight=False)
    store = folder / "runs" / "gradient_regularized_newton"
    store.mkdir(parents=True, exist_ok=True)
    images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    train, held_out = order[:-360], order[-360:]
    console.print(f"\n[bold]Fulgurite[/]: softmax regression on all {len(train):,} images at once, to the bottom.\n")
    optimizers: dict[str, Callable[[Any], Optimizer]] = {
        "Adam": partial(Adam, lr=lr),
        "LBFGS": partial(
            LBFGS, history_size=history_size, line_search_fn="strong_wolfe", tolerance_grad=0, tolerance_change=0
        ),
        "GradientRegularizedNewton": partial(GradientRegularizedNewton, max_krylov=max_krylov),
    }
    runs: list[Run] = []
    for name, optimizer in optimizers.items():
        seed_everything(seed, verbose=False)
        runs.append(Run(name))
        module = SoftmaxRegression(optimizer)
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=-1,
            callbacks=Watch(runs[-1], target, seconds),
            logger=showing.loggers(name, store),
            log_every_n_steps=1 if name != "Adam" else 100,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            default_root_dir=store,
        )
        batch = (images[train], labels[train])
        trainer.fit(module, DataLoader([batch] * 100, batch_size=None))
        runs[-1].accuracy = (module.linear(images[held_out]).argmax(1) == labels[held_out]).double().mean().item()
        log_figure(trainer, "newton/gradient_norm", draw(runs))
        wandb.finish()
    draw(runs).savefig(store / "gradient_regularized_newton.png")
    console.print(table(runs))
    console.print(f"Figure       {store / 'gradient_regularized_newton.png'}", f"Logs         {store}", sep="\n")
    return runs


def table(runs: list[Run]) -> Table:
    result = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    result.add_column("", no_wrap=True)
    for heading in ("steps", "gradient\nunits", "seconds", "smallest\ngradient", "held-out\naccuracy"):
        result.add_column(heading, justify="right", no_wrap=True)
    for run in runs:
        result.add_row(
            f"[bold {COLOURS[run.name]}]{run.name}",
            f"{run.steps:,}",
            f"{run.units[-1]:,.0f}",
            f"{run.seconds[-1]:.1f}",
            f"{min(run.norms):.0e}",
            f"{run.accuracy:.3f}",
        )
    return result


def draw(runs: list[Run]) -> Figure:
    figure = Figure(figsize=(9, 3.6), dpi=160, layout="constrained")
    by_seconds, by_units = figure.subplots(1, 2, sharey=True)
    for run in runs:
        smallest = torch.tensor(run.norms).cummin(0).values
        by_seconds.plot(run.seconds, smallest, color=COLOURS[run.name], label=run.name)
        by_units.plot(run.units, smallest, color=COLOURS[run.name], label=run.name)
    showing.panel(by_seconds, "By time, under a Trainer on one core", xlabel="seconds", yscale="log")
    by_seconds.set_ylabel("smallest norm of the gradient so far")
    title = f"By work: a gradient is 1, a product with the curvature {PRODUCT}"
    showing.panel(by_units, title, xlabel="gradient units")
    ends = [run for run in runs if run.name != "Adam"] or runs  # Adam goes on and on
    by_seconds.set_xlim(0, 2.5 * max(run.seconds[-1] for run in ends))
    by_units.set_xlim(0, 1.5 * max(run.units[-1] for run in ends))
    by_units.legend(frameon=False, loc="upper right")
    return figure


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
