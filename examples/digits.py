"""Handwritten digits for most examples, and for the federated ones a classifier and a record of its rounds."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import showing
import torch
import torch.nn.functional as F
import wandb
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import DataLoader, TensorDataset

from fulgurite.callbacks import log_figure
from fulgurite.strategies import FederatedStrategy

CLASSES = 10
DEVICES = 2


class Classifier(LightningModule):
    """A perceptron with one hidden layer; 2 410 parameters at the defaults.

    Args:
        optimizer: from the parameters, the optimizer of a client.
        lr_decay: factor of the learning rate from epoch to epoch, and so from round to round.
        hidden: units of the hidden layer.
    """

    def __init__(
        self,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.SGD(parameters, lr=0.3),
        lr_decay: float = 1.0,
        hidden: int = 32,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore="optimizer")
        self.make_optimizer, self.lr_decay = optimizer, lr_decay
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, CLASSES))
        for layer in (self.layers[1], self.layers[3]):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)

    def forward(self, images: Tensor) -> Tensor:
        """``(B, 8, 8)`` images to ``(B, 10)`` logits."""
        return self.layers(images)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, digits = batch
        loss = F.cross_entropy(self(images), digits)
        self.log("train/loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, digits = batch
        self.log("val/acc", (self(images).argmax(1) == digits).float().mean(), prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = self.make_optimizer(self.parameters())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": ExponentialLR(optimizer, self.lr_decay)}}


class Digits(LightningDataModule):
    """The 1797 digits of 8 x 8 pixels in [0, 1] that scikit-learn brings along; 360 at random are held out.

    Args:
        batch_size: of a local step.
        seed: of the split.
    """

    def __init__(self, batch_size: int = 16, seed: int = 0) -> None:
        super().__init__()
        self.batch_size = batch_size
        digits = load_digits()
        images, labels = torch.tensor(digits.images / 16, dtype=torch.float32), torch.tensor(digits.target)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        train, held_out = order[:-360], order[-360:]
        self.train = TensorDataset(images[train], labels[train])
        self.held_out = TensorDataset(images[held_out], labels[held_out])

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.held_out, batch_size=180)


@dataclass
class Run:
    """What a training leaves: under the name of a metric its rounds and its values."""

    name: str
    rounds: dict[str, list[int]] = field(default_factory=dict)
    values: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = 0.0

    def add(self, round: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self.rounds.setdefault(name, []).append(round)
            self.values.setdefault(name, []).append(value)


class Recorder(Callback):
    """Shows a training as one line that stays, and writes a ``Run`` to a file: nothing else leaves a forked process.

    Args:
        name: of the training.
        colour: of its line.
        shown: the metrics of a validation to record, and how the line calls them.
        earlier: trainings that the figure shows as well.
        draw: the figure of trainings, to be logged at the end.
        store: the folder of the example's records.
    """

    def __init__(
        self,
        name: str,
        colour: str,
        shown: dict[str, str],
        earlier: list[Run],
        draw: Callable[[list[Run]], Figure],
        store: Path,
    ) -> None:
        self.run, self.colour, self.shown = Run(name), colour, shown
        self.earlier, self.draw, self.file = earlier, draw, store / f"{showing.slug(name)}.json"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.progress = showing.line_of(trainer, f"{self.run.name:<17}", self.colour)
        self.task = self.progress.add_task("", total=trainer.max_epochs)
        self.progress.start()
        self.started = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = {name: trainer.callback_metrics[name].item() for name in self.shown}
        self.run.add(trainer.current_epoch + 1, metrics)
        text = "  ".join(f"{label} {metrics[name]:.3f}" for name, label in self.shown.items())
        self.progress.update(self.task, description=text)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(trainer.strategy, FederatedStrategy)
        self.run.add(trainer.current_epoch + 1, trainer.strategy.stats)
        self.progress.update(self.task, completed=trainer.current_epoch + 1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.run.seconds = time.perf_counter() - self.started

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.progress.stop()
        if trainer.is_global_zero:
            log_figure(trainer, "federated/rounds", self.draw([*self.earlier, self.run]))
            self.file.write_text(json.dumps(asdict(self.run)))
            wandb.finish()  # a forked process ends without the hooks that would do it

    def read(self) -> Run:
        """The run, in the process that started the others."""
        return Run(**json.loads(self.file.read_text()))


def line(axes: Axes, run: Run, metric: str, colour: str, **style: Any) -> None:
    """A metric against rounds, where the training has it."""
    if metric in run.rounds:
        axes.plot(run.rounds[metric], run.values[metric], color=colour, label=run.name, **style)


def against_rounds(axes: Axes, title: str, **settings: Any) -> None:
    showing.panel(axes, title, xlabel="rounds", xlim=(0, None), **settings)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10]))
