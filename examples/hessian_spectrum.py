"""What the Hessian of a small network on handwritten digits looks like, and whether two solutions share a basin.

First, a network of two hidden layers learns to tell 2, 3, 4 and 6 digits apart, each in full batches: nearly all
eigenvalues are close to zero, and a few stand out. Then one of 10 digits goes on from its large-batch solution in small
batches: the straight line between the two has no barrier, and the one to a solution from other initial weights has.
Leaves a figure, and the records of the trainings with the density over steps, under ``runs/hessian_spectrum``.
"""

from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import showing
import torch
import torch.nn.functional as F
import wandb
from jsonargparse import auto_cli
from lightning.pytorch import LightningModule, Trainer, seed_everything
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fulgurite.callbacks import HessianSpectrum
from fulgurite.plugins.linalg import ModuleLoss, PathResult, SpectrumRecord, connecting_path, spectrum

COLOURS = ("#56b4e9", "#009e73", "#e69f00", "#d55e00")
LARGE, SMALL, OTHER = "#0072b2", "#d55e00", "#6b7280"


class Network(LightningModule):
    """Two hidden layers of rectifiers, in double precision.

    Args:
        classes: digits to tell apart, from 0 on.
        hidden: units of each hidden layer.
        lr: of plain SGD with momentum 0.9.
    """

    def __init__(self, classes: int, hidden: int, lr: float) -> None:
        super().__init__()
        sizes = (64, hidden, hidden, classes)
        layers = [layer for n, m in pairwise(sizes) for layer in (nn.Linear(n, m), nn.ReLU())]
        self.layers, self.lr = nn.Sequential(*layers[:-1]).double(), lr

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.layers(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


@dataclass
class Found:
    """What the example measured.

    Attributes:
        spectra: by the number of classes.
        solutions: of the large-batch solution, and of the small-batch one that training went on to from there.
        paths: loss from the large-batch solution to the small-batch one, and to one from other initial weights.
    """

    spectra: dict[int, SpectrumRecord] = field(default_factory=dict)
    solutions: list[SpectrumRecord] = field(default_factory=list)
    paths: dict[str, PathResult] = field(default_factory=dict)


def images_of(classes: int, size: int, seed: int) -> TensorDataset:
    """So many images of the first digits, at random."""
    digits = load_digits(n_class=classes)
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(seed))[:size]
    return TensorDataset(torch.tensor(digits.data / 16)[order], torch.tensor(digits.target)[order])


def train(
    module: Network, data: TensorDataset, batch_size: int, steps: int, store: Path, watch: HessianSpectrum | None = None
) -> None:
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        max_epochs=-1,
        callbacks=watch,
        logger=showing.loggers("digits", store) if watch is not None and watch.figure else False,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        default_root_dir=store,
    )
    trainer.fit(module, DataLoader(data, batch_size, shuffle=batch_size < len(data)))
    wandb.finish()


def main(
    classes: tuple[int, ...] = (2, 3, 4, 6),
    steps: int = 200,
    large_steps: int = 300,
    small_steps: int = 1500,
    density_every: int = 50,
    seed: int = 0,
    folder: Path = Path(),
) -> Found:
    """Trains, prints two tables and draws the figure.

    Args:
        classes: how many digits to tell apart, one training each.
        steps: of these trainings.
        large_steps: with all images in a batch, in the second experiment; 0 leaves that out.
        small_steps: with 8 images in a batch.
        density_every: steps between figures of the density in the logs of the last of the first trainings.
        seed: of the images, the initial weights and the order of the data.
        folder: where ``runs/hessian_spectrum`` goes.
    """
    showing.quiet()
    console = Console(highlight=False)
    store = folder / "runs" / "hessian_spectrum"
    store.mkdir(parents=True, exist_ok=True)
    console.print("\n[bold]Fulgurite[/]: the Hessian of networks that read digits, few kinds or all ten.\n")
    found = Found()
    for count in classes:
        seed_everything(seed, verbose=False)
        data = images_of(count, 300, seed)
        shown = list(range(density_every, steps, density_every)) if count == classes[-1] else []
        watch = HessianSpectrum(at_steps=[*shown, steps], figure=bool(shown))
        train(Network(count, 24, 0.1), data, len(data), steps, store, watch)
        found.spectra[count] = watch.history[-1]
    console.print(table(found.spectra))
    if large_steps:
        basins(found, large_steps, small_steps, seed, store)
        large, small = (record.scalars["lambda_max"] for record in found.solutions)
        console.print(f"10 digits: largest eigenvalue {large:.2f} after large batches, {small:.2f} after small ones.")
        for name, path in found.paths.items():
            console.print(f"Barrier to the small-batch solution {name}: {path.barrier:.3f}")
    draw(found).savefig(store / "hessian_spectrum.png")
    console.print(f"Figure       {store / 'hessian_spectrum.png'}", f"Records      {store}", sep="\n")
    return found


def basins(found: Found, large_steps: int, small_steps: int, seed: int, store: Path) -> None:
    """Sagun's experiment: large batches, and from there small ones."""
    data = images_of(10, 900, seed)
    ends: list[dict[str, Tensor]] = []
    for start in (seed, seed + 100):
        seed_everything(start, verbose=False)
        module = Network(10, 48, 0.05)
        loss = ModuleLoss(module, [(data[:], 0)])
        for lr, batch_size, steps in ((0.05, len(data), large_steps), (0.02, 8, small_steps)):
            module.lr = lr
            train(module, data, batch_size, steps, store)
            ends.append({name: value.clone() for name, value in module.state_dict().items()})
            if start == seed:
                found.solutions.append(spectrum(loss, generator=torch.Generator().manual_seed(seed)))
                loss.release()
    found.paths = {
        "trained from it": connecting_path(loss, ends[0], ends[1]),
        "from other initial weights": connecting_path(loss, ends[0], ends[3]),
    }


def table(spectra: dict[int, SpectrumRecord]) -> Table:
    result = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    result.add_column("digits", no_wrap=True, justify="right")
    for heading in ("out-\nliers", "gap", "near\nzero", "negative\nmass", "largest eigenvalues | next ones"):
        result.add_column(heading, justify="right", no_wrap=True)
    for count, record in spectra.items():
        values, scalars, outliers = record.eigenvalues.tolist(), record.scalars, int(record.scalars["outliers"])
        numbers = [f"{value:.2g}" for value in values[: max(outliers + 1, 4)]]
        result.add_row(
            f"{count}",
            f"{outliers}",
            f"{scalars['outlier_gap']:.1f}",
            f"{scalars['near_zero_fraction']:.1%}",
            f"{scalars['negative_mass']:.1%}",
            f"{' '.join(numbers[:outliers])} | {' '.join(numbers[outliers:])}",
        )
    return result


def draw(found: Found) -> Figure:
    figure = Figure(figsize=(10, 3.4), dpi=160, layout="constrained")
    top, density, line = figure.subplots(1, 3)
    draw_top(top, found.spectra)
    draw_densities(density, found.solutions)
    draw_paths(line, found.paths)
    for axes in (top, density, line):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def draw_top(axes: Axes, spectra: dict[int, SpectrumRecord]) -> None:
    for colour, (count, record) in zip(COLOURS, spectra.items(), strict=False):
        values = record.eigenvalues[:12].clamp(min=0)
        outliers = int(record.scalars["outliers"])
        place = range(1, len(values) + 1)
        axes.plot(place, values, "-", color=colour, linewidth=1, label=f"{count} digits")
        axes.plot(place[:outliers], values[:outliers], "o", color=colour, markersize=5)
        axes.plot(place[outliers:], values[outliers:], "o", color=colour, markersize=4, markerfacecolor="white")
    axes.set(xlabel="place", ylabel="eigenvalue", yscale="log", xticks=range(1, 13), ylim=(1e-5, 20))
    axes.set_title("Top eigenvalues; filled: outliers", fontsize="medium", loc="left")
    axes.legend(frameon=False, loc="upper right", ncols=2)


def draw_densities(axes: Axes, solutions: list[SpectrumRecord]) -> None:
    for record, colour, name in zip(solutions, (LARGE, SMALL), ("large batches", "then small ones"), strict=False):
        nodes, top = record.measure.nodes, record.eigenvalues
        grid = torch.linspace(float(nodes.min()) - 0.3, float(nodes.max()) + 0.3, 2000, dtype=torch.float64)
        axes.plot(grid, record.measure.density(grid, 0.05), color=colour, label=name)
        axes.plot(top, [0.02] * len(top), "|", transform=axes.get_xaxis_transform(), color=colour)
    axes.set(xlabel="eigenvalue", ylabel="density", yscale="log", ylim=(1e-5, 20))
    axes.set_title("10 digits: density, and top eigenvalues", fontsize="medium", loc="left")
    if solutions:
        axes.legend(frameon=False, loc="upper right")


def draw_paths(axes: Axes, paths: dict[str, PathResult]) -> None:
    for (name, path), colour in zip(paths.items(), (SMALL, OTHER), strict=False):
        axes.plot(path.t, path.loss, color=colour, label=name)
    axes.set(xlabel="t, from the large-batch solution", ylabel="loss", xlim=(0, 1))
    axes.set_title("Loss on the line to a solution", fontsize="medium", loc="left")
    if paths:
        axes.set_ylim(0, 1.4 * axes.dataLim.y1)  # room for the legend
        axes.legend(frameon=False, loc="upper left")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
