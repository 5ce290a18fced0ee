"""Coded training by the clock: processes that a Trainer starts, on one machine."""

import json
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
from torch.utils.data import DataLoader, TensorDataset

from fulgurite.plugins.comm.straggler_sim import DelayProfile
from fulgurite.strategies import SequentialGradientCodingStrategy

MU = 0.3
SECONDS_PER_LOAD = 0.06
SCHEMES: dict[str, dict[str, Any]] = {
    "uncoded": {"scheme": "gc", "s": 0},
    "gc_1": {"scheme": "gc", "s": 1},
    "gc_2": {"scheme": "gc", "s": 2},
    "sr_sgc": {"scheme": "sr_sgc", "B": 1, "W": 2, "lam": 2},
    "m_sgc": {"scheme": "m_sgc", "B": 1, "W": 2, "lam": 2},
}
WORLDS = {  # kind of delays, and whether a late worker sleeps on when its round is over
    "isolated_stopped": ("isolated", False),
    "isolated_carried_over": ("isolated", True),
    "bursts_stopped": ("bursts", False),
    "bursts_carried_over": ("bursts", True),
}

Row = dict[str, list[float]]  # figure -> of each repetition


class Classifier(LightningModule):
    """Three layers on Gaussian noise of ten labels."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
        )

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Stopwatch(Callback):
    """Writes when each batch of rank 0 was done: a forked process leaves nothing else."""

    def __init__(self, file: Path) -> None:
        self.file, self.at_s = file, list[float]()

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.at_s.append(time.perf_counter())

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.at_s.append(time.perf_counter())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            waits = trainer.callback_metrics.get("gradient_coding/waits", torch.tensor(0.0))
            self.file.write_text(json.dumps({"at_s": self.at_s, "waits": float(waits)}))


@dataclass(frozen=True)
class Fit:
    """What is trained: processes, batches of each and of all together, and the model."""

    processes: int
    batches: int
    batch_size: int  # of all processes
    inputs: int = 64
    width: int = 32
    accumulate: int = 1

    def run(self, strategy: Strategy | str) -> tuple[dict[str, Any], Tensor]:
        """What the stopwatch says, and the weights at the end."""
        seed_everything(0, verbose=False)
        batch_size = self.batch_size // (1 if isinstance(strategy, Strategy) else self.processes)
        data = TensorDataset(
            torch.randn(self.batches * self.batch_size, self.inputs),
            torch.randint(10, (self.batches * self.batch_size,)),
        )
        model = Classifier(self.inputs, self.width)
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        with TemporaryDirectory() as folder:
            watch = Stopwatch(Path(folder) / "watch.json")
            trainer = Trainer(
                accelerator="cpu",
                devices=self.processes,
                strategy=strategy,
                max_epochs=1,
                accumulate_grad_batches=self.accumulate,
                callbacks=watch,
                logger=False,
                enable_checkpointing=False,
                enable_model_summary=False,
                enable_progress_bar=False,
                default_root_dir=folder,
            )
            trainer.fit(model, DataLoader(data, batch_size))
            return json.loads(watch.file.read_text()), parameters_to_vector(model.parameters()).detach().clone()


# ---- injected delays -------------------------------------------------------------------------------------------------


def delays_of(kind: str, carry_over: bool, n: int, rounds: int, seed: int) -> DelayProfile:
    """Of results that take 50 ms: 8 % take 3 to 9 times as long, or workers are slow for two rounds on average."""
    if kind == "isolated":
        chance, factor = torch.rand(2, n, rounds, generator=torch.Generator().manual_seed(seed))
        times = 0.05 * torch.where(chance < 0.08, 3 + 6 * factor, 1.0)
        return DelayProfile(times, 1 / n, SECONDS_PER_LOAD, carry_over)
    drawn = DelayProfile.gilbert_elliott(n, rounds, 0.04, 0.5, seed, base_s=0.05, slowdown=3.0)
    return DelayProfile(drawn.times, 1 / n, SECONDS_PER_LOAD, carry_over)


def with_delays(
    fit: Fit, repetitions: int, worlds: Iterable[str], schemes: Iterable[str], say: Callable[..., None]
) -> dict[str, dict[str, Row]]:
    """Of each world and scheme, per repetition: seconds, waits, and how far the weights are from those uncoded."""
    found = {world: {name: Row(seconds=[], waits=[], apart=[]) for name in schemes} for world in worlds}
    for repetition in range(repetitions):
        for world, rows in found.items():
            uncoded = None
            delays = delays_of(*WORLDS[world], fit.processes, fit.batches, repetition)
            for name, row in rows.items():
                watch, weights = fit.run(
                    SequentialGradientCodingStrategy(
                        **SCHEMES[name], mu=MU, delay_injection=delays, record=False, start_method="fork"
                    )
                )
                uncoded = weights if uncoded is None else uncoded
                row["seconds"].append(watch["at_s"][-1] - watch["at_s"][0])
                row["waits"].append(watch["waits"])
                row["apart"].append(float((weights - uncoded).abs().max()))
            say(f"live {world}", {name: row["seconds"][-1] for name, row in rows.items()})
    return found


# ---- without delays --------------------------------------------------------------------------------------------------


def without_delays(fit: Fit, repetitions: int) -> dict[str, list[dict[str, float]]]:
    """Seconds of DDP's steps, and of a round without a code, in turn."""
    rows: dict[str, list[dict[str, float]]] = {"ddp": [], "uncoded": []}
    for _ in range(repetitions):
        for name in rows:
            coded = SequentialGradientCodingStrategy("gc", s=0, start_method="fork")
            watch, _ = fit.run("ddp_fork" if name == "ddp" else coded)
            at_s = watch["at_s"][2:]  # the first steps set up buffers
            steps = [after - before for before, after in pairwise(at_s)]
            rows[name].append({"median_step_s": median(steps), "mean_step_s": sum(steps) / len(steps)})
    return rows
