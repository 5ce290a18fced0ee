"""A run in Weights & Biases: the settings of a strategy and of callbacks, their scalars and figures, and a table.

Twenty clients whose handwritten digits differ train one model in rounds, while two callbacks look at its curvature and
at how far the examples of a step agree. No account is needed::

    python examples/wandb_walkthrough.py fit --config examples/wandb_walkthrough.yaml

That run is offline, under ``runs/wandb``; ``wandb sync`` sends it later. It is online where WANDB_API_KEY is set, and
with ``--online``. In the end the example reads the run's file back, and draws what is in it.

The same with TensorBoard, MLflow and CSV files beside it::

    python examples/wandb_walkthrough.py fit --config examples/wandb_walkthrough.yaml \
        --config examples/wandb_side_by_side.yaml

Every argument is a flag, and so may be a parameter of a sweep: ``wandb sweep examples/wandb_sweep.yaml``.
"""

import json
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("WANDB_MODE", "online" if os.environ.get("WANDB_API_KEY") else "offline")

import showing
import wandb
import yaml
from digits import Classifier, Digits
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import WandbLogger
from matplotlib import image
from matplotlib.figure import Figure
from rich.console import Console
from wandb.proto.wandb_internal_pb2 import Record

CHARTS = {
    "val/acc": "right, of held-out digits",
    "fed/drift": "how far apart a round's clients end",
    "hessian/lambda_max": "largest eigenvalue of the Hessian",
    "coherence/alpha_m": "examples that profit from a step on one",
}
FIGURES = ("hessian/density", "coherence/layers")


class LogConfig(SaveConfigCallback):
    """Sends the whole configuration, defaults too, to every logger; the command line saves it as a file besides."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        config = by_class(yaml.safe_load(self.parser.dump(self.config, skip_none=False)))
        for logger in trainer.loggers:
            logger.log_hyperparams(config)


def by_class(config: Any) -> Any:
    """The configuration with lists of objects as dicts by class: loggers give each setting in a dict a name."""
    if isinstance(config, list) and config and all(isinstance(item, dict) and "class_path" in item for item in config):
        config = {item["class_path"].rpartition(".")[2]: item.get("init_args", {}) for item in config}
    return {name: by_class(value) for name, value in config.items()} if isinstance(config, dict) else config


class WalkthroughCLI(LightningCLI):
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--online", action="store_true", help="send the run while it trains")

    def before_instantiate_classes(self) -> None:
        if self.config.fit.online:
            os.environ["WANDB_MODE"] = "online"
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow prefers a database, which mlflow-skinny lacks


@dataclass
class Stored:
    """What a run's file holds.

    Attributes:
        config: the settings, as ``run.config`` has them.
        axes: by pattern of names, the metric that is their x axis.
        history: a dict of values each time that something was logged.
    """

    config: dict[str, Any] = field(default_factory=dict)
    axes: dict[str, str] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)

    def curve(self, name: str) -> list[tuple[int, Any]]:
        """The values of a metric, with ``trainer/global_step``."""
        return [(row["trainer/global_step"], row[name]) for row in self.history if name in row]

    def kinds(self) -> dict[str, list[str]]:
        """The names that were logged, by what they are."""
        kinds: dict[str, set[str]] = {"scalars": set(), "figures": set(), "tables": set()}
        for row in self.history:
            for name, value in row.items():
                if name.startswith("_"):  # W&B's own clock and counter
                    continue
                kind = value["_type"] if isinstance(value, dict) else "scalars"
                kinds[{"images/separated": "figures", "table-file": "tables"}.get(kind, kind)].add(name)
        return {kind: sorted(names) for kind, names in kinds.items()}


def read(path: Path, patience_s: float = 60) -> Stored:
    """Reads ``run-ID.wandb``, which W&B writes whether it is online or not; its end comes a moment after the run's."""
    deadline = time.monotonic() + patience_s
    while not any(record.HasField("exit") for record in records(path.read_bytes())):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path} does not end like that of a finished run")
        time.sleep(0.1)
    stored = Stored()
    for record in records(path.read_bytes()):
        put(stored.config, (*record.run.config.update, *record.config.update))
        if record.metric.step_metric:
            stored.axes[record.metric.glob_name or record.metric.name] = record.metric.step_metric
        if record.history.item:
            stored.history.append({})
            put(stored.history[-1], record.history.item)
    return stored


def put(target: dict[str, Any], items: Iterable[Any]) -> None:
    """Values in JSON into a dict of dicts, each at its path."""
    for item in items:
        *folders, name = item.nested_key or [item.key]
        place = target
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = json.loads(item.value_json)


def records(data: bytes) -> Iterator[Record]:
    """The format is LevelDB's log: blocks of 32 KiB, and pieces of records of which none crosses the end of a block."""
    place, record = 7, b""  # behind W&B's own mark
    while place + 7 <= len(data):
        rest = -place % 2**15
        if 0 < rest < 7:  # too little for the head of a piece
            place += rest
            continue
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        place += 7 + size
        if place > len(data):  # still being written
            return
        record += data[place - size : place]
        if kind in (1, 4):  # the whole of a record, and the last of its pieces
            yield Record.FromString(record)
            record = b""


def draw(stored: Stored, files: Path) -> Figure:
    figure = Figure(figsize=(10, 6), dpi=130, layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.1))
    for axes, (name, meaning) in zip(top.subplots(1, len(CHARTS)), CHARTS.items(), strict=True):
        axes.plot(*zip(*stored.curve(name), strict=True), color="#2563eb")
        axes.set(xlabel="trainer/global_step", xlim=(0, None), ylim=(0, None))
        axes.set_title(f"{name}\n", fontsize="medium", loc="left", fontweight="bold")
        axes.text(0, 1.02, meaning, transform=axes.transAxes, fontsize="x-small")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e5e7eb", linewidth=0.6)
    for axes, name in zip(bottom.subplots(1, len(FIGURES)), FIGURES, strict=True):
        step, logged = stored.curve(name)[-1]
        axes.imshow(image.imread(files / logged["filenames"][0]))
        axes.set_title(f"{name}, at step {step}", fontsize="medium", loc="left", fontweight="bold")
        axes.axis("off")
    return figure


def main(args: list[str] | None = None) -> Stored:
    """Runs the command in ``args``, or in the command line where there are none, and returns what W&B has of it."""
    showing.quiet()
    cli = WalkthroughCLI(
        Classifier, Digits, args=args, save_config_callback=LogConfig, save_config_kwargs={"overwrite": True}
    )
    (logger,) = (logger for logger in cli.trainer.loggers if isinstance(logger, WandbLogger))
    files = Path(logger.experiment.dir)
    wandb.finish()
    (path,) = files.parent.glob("run-*.wandb")
    stored = read(path)
    console = Console(highlight=False)
    for kind, names in stored.kinds().items():
        console.print(f"[bold]{kind.capitalize():<9}[/]", ", ".join(names))
    draw(stored, files).savefig("runs/wandb_walkthrough.png")
    console.print("[bold]Figure   [/] runs/wandb_walkthrough.png", f"[bold]Run      [/] {files.parent}", sep="\n")
    return stored


if __name__ == "__main__":
    main()
