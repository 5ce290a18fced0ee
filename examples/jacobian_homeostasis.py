"""Digits learned without backpropagation: a network that settles, by equilibrium propagation, with feedback of its own.

Forward and feedback weights are drawn independently, so that the responses the network learns from are not the errors
of backpropagation. Then the same with one callback, which makes the Jacobian symmetric while it learns. Leaves a
figure, and the record of each training, under ``runs/jacobian_homeostasis``.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import showing
import torch
import torch.nn.functional as F
import wandb
from digits import CLASSES, Digits
from jsonargparse import auto_cli
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from fulgurite.callbacks import JacobianHomeostasis, log_figure
from fulgurite.plugins.equilibrium import DenseField, EquilibriumLayer

COLOURS = {"EP": "#6b7280", "EP, homeostasis": "#ea580c"}


class Classifier(LightningModule):
    """112 units in three layers that settle together, and a linear read-out."""

    def __init__(self, lr: float, angle: float) -> None:
        super().__init__()
        self.lr = lr
        field = DenseField(64, {"l1": 64, "l2": 32, "out": 16}, angle=angle)
        self.net = EquilibriumLayer(field, free_steps=40, nudged_steps=20, step_size=0.6)
        self.readout = nn.Linear(16, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """``(B, 8, 8)`` images to ``(B, 10)`` logits."""
        return self.readout(self.net(images))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, digits = batch
        loss = F.cross_entropy(self(images), digits)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, digits = batch
        self.log("val/acc", (self(images).argmax(1) == digits).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.Adam(self.parameters(), self.lr)
        schedule = CosineAnnealingLR(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@dataclass
class Run:
    """Under the name of a metric, the steps and the values."""

    name: str
    steps: dict[str, list[int]] = field(default_factory=dict)
    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, step: int, metrics: dict[str, Any]) -> None:
        for name, value in metrics.items():
            self.steps.setdefault(name, []).append(step)
            self.values.setdefault(name, []).append(float(value))

    def last_third(self, name: str) -> float:
        values = self.values[name][-max(1, len(self.values[name]) // 3) :]
        return sum(values) / len(values)


class Recorder(Callback):
    """Keeps what is logged, and sends the figure to the loggers at the end."""

    def __init__(self, run: Run, earlier: list[Run]) -> None:
        self.run, self.earlier = run, earlier

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step % 10 == 1:
            names = ("homeostasis/alignment", "homeostasis/loss")
            self.run.add(trainer.global_step, {name: trainer.callback_metrics[name] for name in names})

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.run.add(trainer.global_step, {"val/acc": trainer.callback_metrics["val/acc"]})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        log_figure(trainer, "homeostasis/training", draw([*self.earlier, self.run]))


def main(
    epochs: int = 20,
    coef: float = 1.0,
    angle: float = 90.0,
    lr: float = 8e-3,
    batch_size: int = 50,
    seed: int = 0,
    folder: Path = Path(),
) -> list[Run]:
    """Trains twice, prints a table and draws the figure.

    Args:
        epochs: of each training.
        coef: of the homeostatic loss, in the second.
        angle: in degrees, between feedback weights and the transposed forward ones, at first.
        lr: of Adam, falling to 0 along a cosine.
        batch_size: of a step.
        seed: of the split, the weights and the order of the data.
        folder: where ``runs/jacobian_homeostasis`` goes.
    """
    showing.quiet()
    console = Console(highlight=False)
    store = folder / "runs" / "jacobian_homeostasis"
    store.mkdir(parents=True, exist_ok=True)
    data = Digits(batch_size=batch_size, seed=seed)
    console.print("\n[bold]Fulgurite[/]: equilibrium propagation with feedback weights of its own, on digits.\n")
    runs: list[Run] = []
    for name in COLOURS:
        seed_everything(seed, verbose=False)
        run = Run(name)
        homeostasis = JacobianHomeostasis(  # a coefficient of 0 only watches
            coef if name == "EP, homeostasis" else 0.0, log_alignment_every_n_steps=10
        )
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=epochs,
            callbacks=[homeostasis, Recorder(run, runs)],
            logger=showing.loggers(name.replace(",", ""), store),
            log_every_n_steps=10,
            num_sanity_val_steps=0,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            default_root_dir=store,
        )
        trainer.fit(Classifier(lr, angle), data)
        wandb.finish()
        runs = [*runs, run]
        console.print(f"[{COLOURS[name]}]{name:<16}[/] accuracy {run.values['val/acc'][-1]:.3f}")
    draw(runs).savefig(store / "jacobian_homeostasis.png")
    console.print(table(runs))
    console.print(f"Figure       {store / 'jacobian_homeostasis.png'}", f"Records      {store}", sep="\n")
    return runs


def table(runs: list[Run]) -> Table:
    result = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    result.add_column("", no_wrap=True)
    for heading in ("held-out\naccuracy", "cosine with the\nexact error, last third", "homeostatic\nloss"):
        result.add_column(heading, justify="right", no_wrap=True)
    for run in runs:
        result.add_row(
            f"[bold {COLOURS[run.name]}]{run.name}",
            f"{run.values['val/acc'][-1]:.3f}",
            f"{run.last_third('homeostasis/alignment'):.2f}",
            f"{run.values['homeostasis/loss'][-1]:.3f}",
        )
    return result


def draw(runs: list[Run]) -> Figure:
    """Accuracy, alignment and homeostatic loss against steps."""
    figure = Figure(figsize=(9, 3.4), dpi=160, layout="constrained")
    panels = figure.subplots(1, 3)
    metrics = ("val/acc", "homeostasis/alignment", "homeostasis/loss")
    for run in runs:
        for axes, metric in zip(panels, metrics, strict=True):
            axes.plot(run.steps[metric], run.values[metric], color=COLOURS[run.name], label=run.name, linewidth=1.4)
    panels[0].set(ylim=(0, 1))
    panels[1].set(ylim=(min(0, panels[1].dataLim.y0), 1.03))
    panels[2].set(yscale="log")
    titles = ("Held-out accuracy", "Cosine of response and exact error", "Homeostatic loss")
    for axes, title in zip(panels, titles, strict=True):
        showing.panel(axes, title, xlabel="optimizer steps", xlim=(0, 1.03 * panels[0].dataLim.x1))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, steps=[1, 2, 5, 10]))
    panels[0].legend(frameon=False, loc="lower right")
    return figure


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
