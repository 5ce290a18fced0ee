"""Do examples help each other to learn? M-coherence of digits with their labels, and with labels by lot.

A net with two hidden layers learns 900 digits by heart, once with the true labels and once with random ones; a callback
measures, over all 900, how many profit from a step on one of them. Leaves a figure under ``runs/gradient_coherence``,
with what the callback draws and logs: a Weights & Biases run, offline unless WANDB_MODE says otherwise, and a table.
"""

from itertools import pairwise
from pathlib import Path
from typing import Any

import showing
import torch
import torch.nn.functional as F
import wandb
from digits import CLASSES, Digits
from jsonargparse import auto_cli
from lightning.pytorch import LightningModule, Trainer, seed_everything
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fulgurite.callbacks import GradientCoherence

COLOURS = {"true labels": "#0072b2", "random labels": "#d55e00"}
BATCH_SIZE = 90


class Net(LightningModule):
    """A perceptron with two hidden layers; nothing in it knows of coherence.

    Args:
        lr: learning rate.
        hidden: units of each hidden layer.
    """

    def __init__(self, lr: float = 0.05, hidden: int = 256) -> None:
        super().__init__()
        self.save_hyperparameters()
        sizes = [64, hidden, hidden, CLASSES]
        layers = [part for i, o in pairwise(sizes) for part in (nn.Linear(i, o), nn.ReLU())]
        self.layers = nn.Sequential(nn.Flatten(), *layers[:-1])
        self.accuracy: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        logits = self.layers(images)
        self.log("train/acc", (logits.argmax(1) == labels).float().mean(), on_step=False, on_epoch=True)
        return F.cross_entropy(logits, labels)

    def on_train_epoch_end(self) -> None:
        self.accuracy.append(float(self.trainer.callback_metrics["train/acc"]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.hparams["lr"], momentum=0.9)


def main(
    epochs: int = 100, images: int = 900, lr: float = 0.05, seed: int = 0, folder: Path = Path()
) -> dict[str, Any]:
    """Trains, prints a table and draws the figure.

    Args:
        epochs: of each training.
        images: to learn, in batches of 90.
        lr: of SGD with momentum 0.9.
        seed: of the images, the random labels, the initial weights and the order.
        folder: where ``runs/gradient_coherence`` goes.

    Returns:
        For each training its ``history``, an event an epoch, and its training ``accuracy``.
    """
    showing.quiet()
    console = Console(highlight=False)
    store = folder / "runs" / "gradient_coherence"
    store.mkdir(parents=True, exist_ok=True)
    console.print(f"\n[bold]Fulgurite[/]: of {images} images, how many profit from a step on one of them?\n")
    pixels, digits = (tensor[:images] for tensor in Digits(seed=seed).train.tensors)
    lots = torch.randint(CLASSES, (images,), generator=torch.Generator().manual_seed(seed))
    steps = images // BATCH_SIZE
    runs = {}
    for name, labels in (("true labels", digits), ("random labels", lots)):
        seed_everything(seed, verbose=False)
        coherence = GradientCoherence(every_n_steps=steps, source="fixed", n_batches=steps)
        module = Net(lr)
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=epochs,
            callbacks=coherence,
            logger=showing.loggers(name, store),
            log_every_n_steps=steps,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            default_root_dir=store,
        )
        trainer.fit(module, DataLoader(TensorDataset(pixels, labels), BATCH_SIZE, shuffle=True))
        wandb.finish()
        runs[name] = {"history": coherence.history, "accuracy": module.accuracy}
    draw(runs).savefig(store / "gradient_coherence.png")
    console.print(table(runs))
    console.print(f"Figure       {store / 'gradient_coherence.png'}", f"Records      {store}", sep="\n")
    return runs


def table(runs: dict[str, Any]) -> Table:
    result = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    result.add_column("", no_wrap=True)
    for heading in ("at the start", "least", "most", "at the end", "learnt by heart"):
        result.add_column(heading, justify="right")
    for name, run in runs.items():
        values = [event["alpha_m"] for event in run["history"]]
        shown = [f"{value:.1f}" for value in (values[0], min(values), max(values), values[-1])]
        result.add_row(f"[bold {COLOURS[name]}]{name}", *shown, f"{run['accuracy'][-1]:.0%}")
    return result


def draw(runs: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(8, 3.2), dpi=160, layout="constrained")
    coherence, accuracy = figure.subplots(1, 2)
    for name, run in runs.items():
        values = [event["alpha_m"] for event in run["history"]]
        coherence.plot(range(len(values)), values, color=COLOURS[name], label=name)
        accuracy.plot(range(1, len(run["accuracy"]) + 1), run["accuracy"], color=COLOURS[name], label=name)
    coherence.axhline(1, color="#6b7280", linewidth=0.8, linestyle="--")
    title = "Images that profit from a step on one\n(dashed: each is learnt alone)"
    showing.panel(coherence, title, yscale="log", ylabel="m-coherence", xlabel="epoch")
    showing.panel(accuracy, "Learnt by heart", ylim=(0, 1.02), ylabel="share of labels learnt", xlabel="epoch")
    accuracy.legend(frameon=False, loc="lower right")
    return figure


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
