"""One byte language model, two processes, three ways to train together, and what each of them sends: ``make demo``.

DDP averages the gradients in each step. DiLoCo averages the weights' changes every ``sync_every`` steps. Streaming
DiLoCo does so for one fragment of the model at a time, in four bits a value, while the processes go on computing. All
three see the same tokens. Leaves ``demo.png``, and a Weights & Biases run of each under ``runs/demo``: offline, unless
WANDB_MODE says otherwise.
"""

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import showing
import wandb
from byte_lm import ByteLM, PythonSource
from jsonargparse import auto_cli
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.strategies import Strategy
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from fulgurite.callbacks import log_figure
from fulgurite.strategies import StreamingDiLoCoStrategy

DEVICES = 2
COLOURS = {"DDP": "#6b7280", "DiLoCo": "#2563eb", "Streaming DiLoCo": "#ea580c"}


def strategies(sync_every: int) -> dict[str, str | Strategy]:
    """By name. Both kinds of DiLoCo get an outer optimizer for twenty exchanges; the papers' is for thousands."""
    same: dict[str, Any] = {"sync_every": sync_every, "outer_lr": 0.7, "outer_momentum": 0.5, "start_method": "fork"}
    return {
        "DDP": "ddp_fork",
        "DiLoCo": StreamingDiLoCoStrategy(num_fragments=1, overlap_steps=0, quantize="fp32", **same),
        "Streaming DiLoCo": StreamingDiLoCoStrategy(**same),
    }


@dataclass
class Run:
    """What a training leaves; bytes are those that one process sent."""

    name: str
    steps: list[int] = field(default_factory=list)
    nats: list[float] = field(default_factory=list)  # a held-out byte
    bytes_sent: list[float] = field(default_factory=list)
    peak_bytes: float = 0.0
    wait_seconds: float | None = None  # unknown for DDP, as is what it sends but by formula
    seconds: float = 0.0


class Recorder(Callback):
    """Shows a training as one line that stays, and writes a ``Run`` to a file: nothing else leaves a forked process."""

    def __init__(self, name: str, earlier: list[Run], file: Path) -> None:
        self.run, self.earlier, self.file = Run(name), earlier, file

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.progress = showing.line_of(trainer, f"{self.run.name:<16}", COLOURS[self.run.name])
        self.task = self.progress.add_task(f"{'':<28}", total=trainer.max_steps)
        self.progress.start()
        self.started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.progress.update(self.task, completed=trainer.global_step)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        nats, sent = trainer.callback_metrics["val/nats_per_byte"].item(), traffic(trainer)["diloco/bytes_sent"]
        self.run.steps.append(trainer.global_step)
        self.run.nats.append(nats)
        self.run.bytes_sent.append(sent)
        self.progress.update(self.task, description=f"{nats:.3f} nats {megabytes(sent):>8} MB sent")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.run.seconds = time.perf_counter() - self.started

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.progress.stop()
        sent = traffic(trainer)  # the last exchange has arrived by now
        self.run.bytes_sent[-1] = sent["diloco/bytes_sent"]
        self.run.peak_bytes = sent["diloco/peak_bytes"]
        self.run.wait_seconds = sent.get("diloco/wait_seconds")
        if trainer.is_global_zero:
            log_figure(trainer, "demo/held_out", draw([*self.earlier, self.run]))
            self.file.write_text(json.dumps(asdict(self.run)))
            wandb.finish()  # a forked process ends without the hooks that would do it


def traffic(trainer: Trainer) -> dict[str, float]:
    """The strategy's own numbers; for DDP, which counts none, those of a ring all-reduce in each step."""
    if isinstance(trainer.strategy, StreamingDiLoCoStrategy):
        return trainer.strategy.stats
    gradient_bytes = 4.0 * sum(parameter.numel() for parameter in trainer.lightning_module.parameters())
    ring = 2 * (trainer.world_size - 1) / trainer.world_size
    return {"diloco/bytes_sent": ring * gradient_bytes * trainer.global_step, "diloco/peak_bytes": gradient_bytes}


def train(
    name: str, strategy: str | Strategy, steps: int, every: int, seed: int, earlier: list[Run], store: Path
) -> Run:
    seed_everything(seed, verbose=False)
    file = store / f"{showing.slug(name)}.json"
    trainer = Trainer(
        accelerator="cpu",
        devices=DEVICES,
        strategy=strategy,  # the one changed line
        max_steps=steps,
        val_check_interval=every,
        num_sanity_val_steps=0,
        callbacks=Recorder(name, earlier, file),
        logger=WandbLogger(name=name, project="fulgurite", group="demo", save_dir=store),
        log_every_n_steps=10,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        default_root_dir=store,
    )
    trainer.fit(ByteLM(), PythonSource(seed=seed))
    return Run(**json.loads(file.read_text()))


def megabytes(count: float) -> str:
    return f"{count / 1e6:,.0f}" if count >= 1e8 else f"{count / 1e6:.3g}"


def table(runs: list[Run]) -> Table:
    result = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    result.add_column("", no_wrap=True)
    headings = ("held out,\nnats\na byte", "sent,\nMB a\nworker", "share\nof\nDDP's", "largest\nmessage,\nMB")
    for heading in (*headings, "waited,\ns", "trained,\ns"):  # narrow: a terminal has 80 columns
        result.add_column(heading, justify="right", no_wrap=True)
    for run in runs:
        formula = run.wait_seconds is None
        result.add_row(
            f"[bold {COLOURS[run.name]}]{run.name}",
            f"{run.nats[-1]:.3f}",
            megabytes(run.bytes_sent[-1]) + ("*" if formula else " "),
            f"1/{runs[0].bytes_sent[-1] / run.bytes_sent[-1]:.0f}" if run is not runs[0] else "1",
            megabytes(run.peak_bytes) + ("*" if formula else " "),
            "n/a" if run.wait_seconds is None else f"{run.wait_seconds:.2f}",
            f"{run.seconds:.1f}",
        )
    return result


def draw(runs: list[Run]) -> Figure:
    figure = Figure(figsize=(9, 3.6), dpi=160, layout="constrained")
    by_step, by_bytes = figure.subplots(1, 2, sharey=True)
    for run in runs:
        style: dict[str, Any] = {"color": COLOURS[run.name], "label": run.name, "marker": "o", "markevery": [-1]}
        sent = [count / 1e6 for count in run.bytes_sent]
        by_step.plot(run.steps, run.nats, **style)
        by_bytes.plot(sent, run.nats, **style)
        end = (sent[-1], run.nats[-1])
        by_bytes.annotate(
            f"{megabytes(run.bytes_sent[-1])} MB",
            end,
            (-7, -5),
            textcoords="offset points",
            ha="right",
            color=style["color"],
        )
    by_step.set(xlabel="optimizer steps", ylabel="held-out loss, nats a byte")
    by_bytes.set(xlabel="MB sent by a worker", xscale="log")
    by_bytes.margins(x=0.08)
    by_bytes.xaxis.set_major_formatter("{x:g}")
    by_step.legend(frameon=False)
    for axes in (by_step, by_bytes):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e5e7eb", linewidth=0.6)
    return figure


def main(steps: int = 400, sync_every: int = 20, seed: int = 0, folder: Path = Path()) -> list[Run]:
    """Trains, prints the table and writes the figure.

    Args:
        steps: optimizer steps of each training, rounded down to a multiple of twice ``sync_every``.
        sync_every: steps between two exchanges of the same weights.
        seed: of the initial weights and the order of the data.
        folder: where ``demo.png`` and ``runs/demo`` go.
    """
    every = 2 * sync_every
    if steps < every:
        raise ValueError(f"`steps` must be at least twice `sync_every` ({sync_every}), got {steps}")
    steps -= steps % every
    showing.quiet()
    console = Console(highlight=False)
    store = folder / "runs" / "demo"
    store.mkdir(parents=True, exist_ok=True)
    data = PythonSource()
    data.setup("fit")
    console.print(
        f"\n[bold]Fulgurite[/]: {DEVICES} processes train a byte language model of"
        f" {sum(parameter.numel() for parameter in ByteLM().parameters()):,} parameters on Python's own source.\n"
        f"Byte frequencies alone would predict held-out code at {data.unigram_nats():.3f} nats a byte.\n"
    )
    runs: list[Run] = []
    for name, strategy in strategies(sync_every).items():
        runs.append(train(name, strategy, steps, every, seed, runs, store))
    draw(runs).savefig(folder / "demo.png")
    console.print(table(runs))
    console.print(
        "* By the formula of a ring all-reduce; the others count what they send.\n"
        f"{steps} steps flatter none of the three: docs/streaming_diloco.md and benchmarks/ have longer runs.\n"
    )
    console.print(f"Figure               {folder / 'demo.png'}", f"Weights & Biases     {store / 'wandb'}", sep="\n")
    return runs


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
