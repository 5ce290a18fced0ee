"""Six processes read handwritten digits, and now and then one of them is several times as slow as the others.

Without a code each step waits for the slowest process. The first training is that, and records who was late. From its
record a search tells how long training would have taken with codes. The second training bears two late processes a
step, and a third as many as the search found best, if that is another number. All of them end with the weights of DDP,
which a last training shows, without late processes. The processes are not slow in earnest: they sleep. Leaves a figure,
the records of the trainings and the recorded delays under ``runs/sequential_gradient_coding``.
"""

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import showing
import torch
import torch.nn.functional as F
import wandb
from digits import Classifier, Digits
from jsonargparse import auto_cli
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import Strategy
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator
from rich import box
from rich.console import Console
from rich.table import Table

from fulgurite.callbacks import log_figure
from fulgurite.plugins.comm.straggler_sim import DelayProfile, SimResult, search
from fulgurite.strategies import SequentialGradientCodingStrategy

COLOURS = ("#6b7280", "#ea580c", "#2563eb")
MOST_DELAY = 3  # rounds, of the schemes that are searched


class Reader(Classifier):
    """Logs nothing while it trains, as processes that compute unequally often have no common mean to log."""

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        images, digits = batch
        return F.cross_entropy(self(images), digits)


@dataclass
class Run:
    """What a training leaves: the loss of each step, when it was known, and ``(processes, steps)`` arrivals."""

    name: str
    losses: list[float] = field(default_factory=list)
    at_s: list[float] = field(default_factory=list)
    arrivals: list[list[float]] = field(default_factory=list)  # seconds; nan where the step did not wait
    accuracy: float = 0.0


class Recorder(Callback):
    """Shows a training as one line that stays, and writes a ``Run`` to a file: nothing else leaves a forked process.

    Args:
        name: of the training.
        earlier: trainings that the figure shows as well.
        store: the folder of the example's records.
        seconds_per_load: of the recorded delays.
    """

    def __init__(self, name: str, earlier: list[Run], store: Path, seconds_per_load: float) -> None:
        self.run, self.earlier, self.seconds_per_load = Run(name), earlier, seconds_per_load
        self.file, self.delays = (store / f"{showing.slug(name)}.{suffix}" for suffix in ("json", "csv"))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.progress = showing.line_of(trainer, f"{self.run.name:<12}", COLOURS[len(self.earlier)])
        self.task = self.progress.add_task("", total=trainer.estimated_stepping_batches)
        self.progress.start()
        self.started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if "gradient_coding/loss" in trainer.callback_metrics:  # of the whole batch; DDP has none
            self.run.losses.append(trainer.callback_metrics["gradient_coding/loss"].item())
            self.run.at_s.append(time.perf_counter() - self.started)
        self.progress.update(self.task, completed=trainer.global_step)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.run.accuracy = trainer.callback_metrics["val/acc"].item()
        self.progress.update(self.task, description=f"accuracy {self.run.accuracy:.3f}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        strategy = trainer.strategy
        if isinstance(strategy, SequentialGradientCodingStrategy) and trainer.is_global_zero:
            self.run.arrivals = strategy.arrivals().tolist()
            if self.run.name == "uncoded":  # the result of each step is there
                strategy.profile(self.seconds_per_load).to_csv(self.delays)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.progress.stop()
        if trainer.is_global_zero:
            if self.run.arrivals:
                log_figure(trainer, "gradient_coding/arrivals", draw([*self.earlier, self.run]))
            self.file.write_text(json.dumps(asdict(self.run)))
            wandb.finish()  # a forked process ends without the hooks that would do it

    def read(self) -> Run:
        """The run, in the process that started the others."""
        return Run(**json.loads(self.file.read_text()))


def main(
    s: int = 2,
    processes: int = 6,
    mu: float = 0.3,
    epochs: int = 3,
    batch_size: int = 96,
    base_s: float = 0.05,
    slow_share: float = 0.08,
    seconds_per_load: float = 0.06,
    seed: int = 0,
    folder: Path = Path(),
) -> list[Run]:
    """Trains, prints a table and draws the figure.

    Args:
        s: late processes that each step of the coded training bears.
        processes: that train together.
        mu: a step may end ``1 + mu`` times as late as its first result.
        epochs: of each training.
        batch_size: of all processes together, a multiple of their number.
        base_s: seconds that a step takes a process that computes its own share alone.
        slow_share: probability that a result takes 3 to 9 times as long.
        seconds_per_load: what a whole batch would take, of which a process without a code computes its share.
        seed: of delays, split, initial weights and order of the data.
        folder: where ``runs/sequential_gradient_coding`` goes.
    """
    showing.quiet()
    console = Console(highlight=False)
    store = folder / "runs" / "sequential_gradient_coding"
    store.mkdir(parents=True, exist_ok=True)
    data = Digits(batch_size, seed)
    steps = len(data.train) // batch_size  # an epoch; a smaller last batch would not divide among DDP's processes
    delays = delays_of(processes, epochs * steps, base_s, slow_share, seconds_per_load, seed)
    console.print(
        f"\n[bold]Fulgurite[/]: {processes} processes train for {epochs * steps} steps, and {slow_share:.0%} of their"
        " results take 3 to 9 times as long as others.\n"
    )

    weights: list[torch.Tensor] = []

    def train(name: str, strategy: Strategy | str, earlier: list[Run]) -> Run:
        seed_everything(seed, verbose=False)
        recorder = Recorder(name, earlier, store, seconds_per_load)
        trainer = Trainer(
            accelerator="cpu",
            devices=processes,
            strategy=strategy,  # the one changed line
            max_epochs=epochs,
            limit_train_batches=steps,
            num_sanity_val_steps=0,
            callbacks=recorder,
            logger=showing.loggers(name, store),
            log_every_n_steps=1,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            default_root_dir=store,
        )
        model = Reader()
        trainer.fit(model, data)
        weights.append(torch.nn.utils.parameters_to_vector(model.parameters()).detach())
        return recorder.read()

    def code(s: int) -> SequentialGradientCodingStrategy:
        return SequentialGradientCodingStrategy("gc", s=s, mu=mu, delay_injection=delays, start_method="fork")

    runs = [train("uncoded", code(0), [])]
    recorded = DelayProfile.from_csv(store / "uncoded.csv")
    # These delays end with their round, those of a process that is slow in earnest carry over to the next one.
    found = search(recorded, epochs * steps - MOST_DELAY, max_delay=MOST_DELAY, carry_over=False, mu=mu)
    best = next(run for run in found if run.scheme == "gc").params["s"]
    for count in dict.fromkeys((s, best)):
        if count:
            runs.append(train(f"s={count}", code(count), runs))
    data.batch_size //= processes  # DDP's is of each process
    train("DDP", "ddp_fork", [])
    draw(runs).savefig(store / "sequential_gradient_coding.png")
    console.print(table(runs, weights))
    console.print(predictions(found))
    console.print(f"Figure       {store / 'sequential_gradient_coding.png'}", f"Records      {store}", sep="\n")
    return runs


def delays_of(
    processes: int, steps: int, base_s: float, slow_share: float, seconds_per_load: float, seed: int
) -> DelayProfile:
    """Seconds of each process in each step, with its own share of the batch."""
    chance, factor = torch.rand(2, processes, steps, generator=torch.Generator().manual_seed(seed))
    return DelayProfile(base_s * torch.where(chance < slow_share, 3 + 6 * factor, 1.0), 1 / processes, seconds_per_load)


def table(runs: list[Run], weights: list[torch.Tensor]) -> Table:
    """How long the trainings took, and how far their weights are from DDP's, which come last."""
    result = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    result.add_column("", no_wrap=True)
    for heading in ("trained,\ns", "of\nuncoded", "results not\nwaited for", "accuracy", "weights from\nDDP's"):
        result.add_column(heading, justify="right", no_wrap=True)
    for colour, run, vector in zip(COLOURS, runs, weights, strict=False):
        result.add_row(
            f"[bold {colour}]{run.name}",
            f"{run.at_s[-1]:.1f}",
            f"{run.at_s[-1] / runs[0].at_s[-1]:.2f}",
            f"{int(torch.tensor(run.arrivals).isnan().sum())}",
            f"{run.accuracy:.3f}",
            f"{float((vector - weights[-1]).abs().max()):.0e}",
        )
    return result


def predictions(found: list[SimResult]) -> Table:
    """What the search says of training uncoded, and of the best of each scheme."""
    result = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("the search says", "setting", "s"):
        result.add_column(heading, no_wrap=True)
    uncoded = next(run for run in found if run.params == {"s": 0})
    best = [next(run for run in found if run.scheme == scheme) for scheme in ("gc", "sr_sgc", "m_sgc")]
    for run in (uncoded, *best):
        setting = ", ".join(f"{name}={value}" for name, value in run.params.items())
        result.add_row("uncoded" if run is uncoded else run.scheme, setting, f"{run.total_s:.1f}")
    return result


def draw(runs: list[Run]) -> Figure:
    figure = Figure(figsize=(10, 1.2 + 1.3 * max(2, len(runs))), dpi=160, layout="constrained")
    grid = figure.add_gridspec(len(runs), 2, width_ratios=(1.5, 1))
    maps = [figure.add_subplot(grid[row, 0]) for row in range(len(runs))]
    slowest = max(torch.tensor(run.arrivals).nan_to_num(0).max().item() for run in runs)
    fastest = min(torch.tensor(run.arrivals).nan_to_num(slowest).min().item() for run in runs)
    norm = LogNorm(fastest, slowest)
    for axes, run in zip(maps, runs, strict=True):
        image = heat_map(axes, run, norm)
    maps[-1].set_xlabel("step")
    bar = figure.colorbar(image, ax=maps, label="seconds to the result")
    ticks = [value for value in (0.02, 0.05, 0.1, 0.2, 0.5, 1.0) if fastest <= value <= slowest]
    bar.set_ticks(ticks, labels=[f"{value:g}" for value in ticks])
    bar.ax.yaxis.set_minor_locator(NullLocator())
    loss = figure.add_subplot(grid[:, 1])
    for colour, run in zip(COLOURS, runs, strict=False):
        loss.plot(run.at_s, run.losses, color=colour, label=run.name)
    showing.panel(loss, "Loss of the batch", xlabel="seconds", xlim=(0, None), ylim=(0, None))
    loss.legend(frameon=False, loc="upper right")
    return figure


def heat_map(axes: Axes, run: Run, norm: LogNorm) -> Any:
    """When results came, ``(processes, steps)``; black where the step did not wait."""
    axes.set_facecolor("black")
    image = axes.imshow(run.arrivals, cmap="YlOrRd", norm=norm, aspect="auto", interpolation="nearest")
    axes.set(ylabel="process")
    late = "; black: not waited for" if torch.tensor(run.arrivals).isnan().any() else ""
    axes.set_title(f"{run.name}{late}", fontsize="medium", loc="left")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    return image


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
