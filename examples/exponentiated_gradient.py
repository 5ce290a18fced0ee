"""Handwritten digits among inputs that mean nothing: SGD, and exponentiated gradient in its place.

Ten times as many random inputs as pixels mislead a perceptron; multiplying weights instead of adding to them finds the
pixels. No weight changes its sign on the way, and log-normal weights stay so. Without random inputs there is nothing to
gain. The learning rates are the best of three for each. Leaves a figure, and the record of each training, under
``runs/exponentiated_gradient``.
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
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fulgurite.callbacks import DaleLaw, log_figure
from fulgurite.plugins.optim import ExponentiatedGradient, dale_groups, dale_init_

COLOURS = {"SGD": "#6b7280", "EG": "#ea580c"}
PIXELS = 64


class Classifier(LightningModule):
    """A perceptron with one hidden layer and log-normal weights.

    Args:
        optimizer: ``"SGD"`` or ``"EG"``.
        lr: learning rate.
        inputs: pixels and irrelevant inputs.
    """

    def __init__(self, optimizer: str, lr: float, inputs: int) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layers = nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, CLASSES))
        dale_init_(self.layers, gain=1.0)
        for layer in (self.layers[0], self.layers[2]):
            nn.init.zeros_(layer.bias)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.layers(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/acc", (self.layers(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.hparams["optimizer"] == "EG":
            # The changed line; the bound, a tenth of a weight a step, is for the first steps, which may be long.
            return ExponentiatedGradient(dale_groups(self), lr=self.hparams["lr"], momentum=0.9, max_log_step=0.1)
        return torch.optim.SGD(self.parameters(), lr=self.hparams["lr"], momentum=0.9)


@dataclass
class Run:
    """What a training leaves, an entry an epoch."""

    name: str
    irrelevant: int
    accuracy: list[float] = field(default_factory=list)
    flips: list[float] = field(default_factory=list)
    first: Tensor = field(default_factory=lambda: torch.empty(0))  # weights of the first layer, before and after
    last: Tensor = field(default_factory=lambda: torch.empty(0))


class Recorder(Callback):
    """Fills a ``Run``, and logs the figure of all at the end."""

    def __init__(self, runs: list[Run]) -> None:
        self.run, self.runs = runs[-1], runs

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.run.first = pl_module.layers[0].weight.detach().clone()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.run.accuracy.append(trainer.callback_metrics["val/acc"].item())
        self.run.flips.append(trainer.callback_metrics["dale/sign_flips"].item())
        self.run.last = pl_module.layers[0].weight.detach().clone()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        log_figure(trainer, "dale/trainings", draw(self.runs))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        wandb.finish()  # else the next training would write into the same run


def main(
    irrelevant: int = 640,
    epochs: int = 30,
    lr_sgd: float = 0.03,
    lr_sgd_alone: float = 0.1,
    lr_eg: float = 0.3,
    seed: int = 0,
    folder: Path = Path(),
) -> list[Run]:
    """Trains, prints a table and draws the figure.

    Args:
        irrelevant: inputs drawn from [0, 1], beside the 64 pixels.
        epochs: of each training.
        lr_sgd: of SGD among irrelevant inputs; 0.1 diverges there.
        lr_sgd_alone: of SGD without them.
        lr_eg: of exponentiated gradient.
        seed: of the split, the initial weights, the irrelevant inputs and the order of the data.
        folder: where ``runs/exponentiated_gradient`` goes.
    """
    showing.quiet()
    console = Console(highlight=False)
    store = folder / "runs" / "exponentiated_gradient"
    store.mkdir(parents=True, exist_ok=True)
    console.print(
        f"\n[bold]Fulgurite[/]: digits of {PIXELS} pixels, alone and among {irrelevant} random inputs, by SGD and by"
        " exponentiated gradient.\n"
    )
    runs: list[Run] = []
    for count in (0, irrelevant):
        train, held_out = digits(count, seed)
        for name, lr in (("SGD", lr_sgd if count else lr_sgd_alone), ("EG", lr_eg)):
            seed_everything(seed, verbose=False)
            runs.append(Run(name, count))
            steps = -(-len(train) // 64)
            trainer = Trainer(
                accelerator="cpu",
                devices=1,
                max_epochs=epochs,
                num_sanity_val_steps=0,
                callbacks=[DaleLaw(every_n_steps=steps), Recorder(runs)],
                logger=showing.loggers(f"{name} {count}", store),
                log_every_n_steps=steps,
                enable_checkpointing=False,
                enable_model_summary=False,
                enable_progress_bar=False,
                default_root_dir=store,
            )
            with console.status(f"{name} with {count} irrelevant inputs"):
                loader = DataLoader(train, 64, shuffle=True)
                trainer.fit(Classifier(name, lr, PIXELS + count), loader, DataLoader(held_out, len(held_out)))
    draw(runs).savefig(store / "exponentiated_gradient.png")
    console.print(table(runs))
    console.print(f"Figure       {store / 'exponentiated_gradient.png'}", f"Records      {store}", sep="\n")
    return runs


def digits(irrelevant: int, seed: int) -> list[TensorDataset]:
    """Images to train on and images held out, with irrelevant inputs beside the pixels."""
    data, generator = Digits(seed=seed), torch.Generator().manual_seed(seed)
    sets = []
    for part in (data.train, data.held_out):
        images, labels = part.tensors
        noise = torch.rand(len(images), irrelevant, generator=generator)
        sets.append(TensorDataset(torch.cat([images.flatten(1), noise], 1), labels))
    return sets


def skewness(weight: Tensor) -> float:
    """Of ``log|w|``: 0 for log-normal weights."""
    logs = weight[weight != 0].abs().double().log()
    deviations = logs - logs.mean()
    return float(deviations.pow(3).mean() / deviations.square().mean() ** 1.5)


def table(runs: list[Run]) -> Table:
    result = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    result.add_column("", no_wrap=True)
    for heading in ("irrelevant\ninputs", "accuracy", "changed\ntheir sign", "skewness of\nlog|w|"):
        result.add_column(heading, justify="right", no_wrap=True)
    for run in runs:
        weights = (PIXELS + run.irrelevant) * 64 + 64 * CLASSES
        result.add_row(
            f"[bold {COLOURS[run.name]}]{run.name}",
            str(run.irrelevant),
            f"{run.accuracy[-1]:.3f}",
            f"{run.flips[-1] / weights:.1%}",
            f"{skewness(run.last):.2f}",
        )
    return result


def draw(runs: list[Run]) -> Figure:
    figure = Figure(figsize=(9, 3.4), dpi=160, layout="constrained")
    accuracy, flips, weights = figure.subplots(1, 3, width_ratios=(1.3, 1, 1.2))
    most = max(run.irrelevant for run in runs)
    for run in runs:
        epochs = range(1, len(run.accuracy) + 1)
        style: dict[str, Any] = {"color": COLOURS[run.name], "linestyle": "-" if run.irrelevant else ":"}
        accuracy.plot(epochs, run.accuracy, label=f"{run.name}, {run.irrelevant} irrelevant inputs", **style)
        flips.plot(epochs, [100 * count / (64 * (PIXELS + run.irrelevant + CLASSES)) for count in run.flips], **style)
    shown = [run for run in runs if run.irrelevant == most]
    for run in shown:
        histogram(weights, run.last, run.name, color=COLOURS[run.name])
    histogram(weights, shown[0].first, "at first", color="black", linewidth=0.8)
    by_epoch: dict[str, Any] = {"xlabel": "epochs", "xlim": (0, None)}
    showing.panel(accuracy, "Accuracy", ylim=(0.7, 1), ylabel="share of held-out digits read rightly", **by_epoch)
    showing.panel(flips, "Weights that changed\ntheir sign", ylim=(-0.5, None), ylabel="%", **by_epoch)
    accuracy.legend(frameon=False, loc="lower right", fontsize="small")
    weights.set_title(f"First layer's weights, {most}\nirrelevant inputs", fontsize="medium", loc="left")
    weights.set(xlabel="log10 |w|", yticks=[])
    weights.legend(frameon=False, loc="upper left", fontsize="small")
    weights.spines[["top", "right", "left"]].set_visible(False)
    return figure


def histogram(axes: Any, weight: Tensor, label: str, **style: Any) -> None:
    logs = weight[weight != 0].abs().log10().flatten().numpy()
    axes.hist(logs, bins=60, range=(-4.5, 0.5), density=True, histtype="step", label=label, **style)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
