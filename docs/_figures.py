"""Draws the figures of the pages that no example or benchmark draws: ``python docs/_figures.py``, some seconds.

Curvature: what a number of products tells, on a network small enough to know its whole Hessian. Two sites and Flower:
what stays where, and what is sent. Compatibility: the table of ``make compat`` at one glance.
"""

import json
import sys
from pathlib import Path

import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from fulgurite.plugins.linalg import GGNOperator, HessianOperator, ModuleLoss, cg, lanczos, slq

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))

from _plots import PAGE  # noqa: E402

BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#7f7f7f"


class Net(nn.Module):
    """A perceptron for digits, in double precision."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10)).double()

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return cross_entropy(self.layers(batch[0]), batch[1])


def curvature(steps: int = 300) -> Figure:
    """Lanczos, quadrature and conjugate gradients against the Hessian of 610 parameters, after some training."""
    torch.manual_seed(0)
    pixels, labels = load_digits(return_X_y=True)
    batch = torch.tensor(pixels / 16), torch.tensor(labels)
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        net.training_step(batch, 0).backward()
        optimizer.step()
    loss = ModuleLoss(net, [(batch, 0)])
    hessian, ggn = HessianOperator(loss, net.parameters()), GGNOperator(loss, net.parameters())
    size = hessian.shape[0]
    exact = torch.linalg.eigvalsh(torch.stack([hessian @ row for row in torch.eye(size, dtype=torch.double)]))

    figure = Figure(figsize=(9, 3.1))
    top, density, solve = figure.subplots(1, 3)
    products = range(4, 41, 2)
    runs = [lanczos(hessian, n).ritz().values.sort(descending=True).values for n in products]
    for place, colour in enumerate((BLUE, ORANGE, GREEN)):
        true = exact[-1 - place]
        errors = [float(((values[place] - true) / true).abs()) for values in runs]
        top.plot(products, [max(error, 1e-16) for error in errors], color=colour, label=f"eigenvalue {place + 1}")
    top.set(yscale="log", xlabel="products with the Hessian", ylabel="relative error", title="lanczos: the largest")
    top.legend()

    measure = slq(hessian, n_iter=20, n_probes=4)
    grid = torch.logspace(-6, 1, 400, dtype=torch.double)
    below = [measure.integrate(lambda nodes, x=x: (nodes <= x).double()) for x in grid]
    density.plot(grid, [float((exact <= x).double().mean()) for x in grid], color=GREY, linewidth=4, alpha=0.5)
    density.plot(grid, [share for share, _ in below], color=BLUE)
    density.annotate(f"all {size} eigenvalues", (0.42, 0.3), xycoords="axes fraction", color=GREY)
    density.annotate("80 products", (0.42, 0.18), xycoords="axes fraction", color=BLUE)
    density.set(
        xscale="log", xlabel="eigenvalue x", ylabel="share of eigenvalues up to x", title="slq: the whole spectrum"
    )

    gradient = hessian.gradient
    for shift, colour in ((1e-1, BLUE), (1e-2, ORANGE), (1e-3, GREEN)):
        residuals: list[float] = []

        def keep(x: torch.Tensor, residual: torch.Tensor, norms: list[float] = residuals) -> bool:
            norms.append(float(residual.norm() / gradient.norm()))
            return len(norms) > 60

        cg(ggn, gradient, shift=shift, stop=keep)
        solve.plot(residuals, color=colour, label=f"shift {shift:g}")
    solve.set(
        yscale="log",
        ylim=(1e-10, 1e4),
        xlabel="products with the GGN",
        ylabel="relative residual",
        title="cg: a linear system",
    )
    solve.legend(loc="upper right")
    loss.release()
    return figure


def two_sites() -> Figure:
    """What each site holds, and what crosses the link."""
    figure, axes = canvas(8, 3.2)
    for left, name, rank in ((0, "first site", True), (67, "second site", False)):
        box(axes, left, 1, 33, 38, name, GREY, "#f7f7f7")
        box(axes, left + 1.5, 25, 30, 8, "", BLUE, "white")
        box(axes, left + 1.5, 15.5, 30, 8, "", BLUE, "white")
        axes.text(left + 16.5, 29, "device: local weights, its own\noptimizer, its shard of the data", **TEXT)
        axes.text(left + 16.5, 19.5, "device: the same; within the site\nby DDP, in each step", **TEXT)
        axes.text(left + 16.5, 10.5, "together one worker: the outer\ncopy and its momentum", color=ORANGE, **TEXT)
        axes.text(left + 16.5, 4.3, "rank 0: logs and checkpoints" if rank else "the same code", **TEXT)
    arrow(axes, (34, 27.5), (66, 27.5), ORANGE)
    arrow(axes, (66, 24.5), (34, 24.5), ORANGE)
    axes.text(50, 33, "every H / P steps a fragment,\n4 bits a value, while both compute", color=ORANGE, **TEXT)
    axes.text(50, 21, "internet link, through a VPN", color=GREY, **TEXT)
    arrow(axes, (66, 12), (34, 12), GREY)
    axes.text(50, 15, "metrics of a validation; state of\nthe worker for a checkpoint", color=GREY, **TEXT)
    axes.text(50, 5, "no batch ever crosses", **TEXT)
    return figure


def flower() -> Figure:
    """A round: what the server sends, what a node does and sends, and what stays."""
    figure, axes = canvas(8, 3.2)
    box(axes, 0, 8, 25, 24, "server", ORANGE, "#fdf3ec")
    axes.text(12.5, 18.5, "global model\n\naverages by samples,\nin float32", **TEXT)
    for bottom, name in ((21, "node 0"), (1, "node 1")):
        box(axes, 62, bottom, 38, 18, name, BLUE, "#eef5fa")
        axes.text(81, bottom + 11, "trains one round, then evaluates", **TEXT)
        axes.text(
            81, bottom + 5, "stays here: the data, and the\noptimizer's state between rounds", color=GREEN, **TEXT
        )
    arrow(axes, (26, 26), (61, 33), ORANGE)
    arrow(axes, (61, 28), (26, 22), BLUE)
    arrow(axes, (26, 18), (61, 12), ORANGE)
    arrow(axes, (61, 7), (26, 14), BLUE)
    axes.text(40, 32.5, "1  model, round", color=ORANGE, **TEXT)
    axes.text(47, 20, "2  model, number of\nsamples, metrics", color=BLUE, **TEXT)
    return figure


def compatibility() -> Figure:
    """Which cells of the table are a yes, and which are refused."""
    cells = json.loads((ROOT / "benchmarks" / "results" / "compatibility.json").read_text())["cells"]
    columns = list(next(iter(cells.values())))
    figure = Figure(figsize=(8, 6.2))
    axes = figure.subplots()
    for height, row in enumerate(cells.values()):
        for left, column in enumerate(columns):
            outcome, _ = row[column]
            mark, colour, face = LOOKS[outcome]
            axes.add_patch(Rectangle((left - 0.47, height - 0.43), 0.94, 0.86, facecolor=face))
            axes.text(left, height, mark, color=colour, **TEXT)
    axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(cells) - 0.5, -0.5))
    axes.set_xticks(range(len(columns)), [column.replace("_", "_\n", 1) for column in columns])
    axes.set_yticks(range(len(cells)), [row.replace("`", "") for row in cells])
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    return figure


TEXT = {"ha": "center", "va": "center", "fontsize": 8}
LOOKS = {  # of an outcome: its mark, the mark's colour and the cell's
    "works": ("yes", GREEN, "#e5f4ef"),
    "refused": ("no", ORANGE, "#fbe9dd"),
    "fails": ("fails", "white", ORANGE),
    "untried": ("?", GREY, "#f2f2f2"),
}


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty picture, 100 units wide and of square units."""
    figure = Figure(figsize=(width, height))
    axes = figure.subplots()
    axes.set(xlim=(-0.5, 100.5), ylim=(0, 100 * height / width))
    axes.set_axis_off()
    return figure, axes


def box(axes: Axes, left: float, bottom: float, width: float, height: float, name: str, edge: str, face: str) -> None:
    shape = FancyBboxPatch((left, bottom), width, height, "round,pad=0,rounding_size=1", edgecolor=edge, facecolor=face)
    axes.add_patch(shape)
    if name:
        axes.text(left + width / 2, bottom + height - 2.2, name, color=edge, weight="bold", **TEXT | {"fontsize": 9})


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, color=colour, linewidth=1.4))


FIGURES = {"curvature": curvature, "two_sites": two_sites, "flower": flower, "compatibility": compatibility}


def main(folder: Path = ROOT / "docs" / "assets") -> None:
    with rc_context(PAGE):
        for name, draw in FIGURES.items():
            draw().savefig(folder / f"{name}.png")


if __name__ == "__main__":
    main()
