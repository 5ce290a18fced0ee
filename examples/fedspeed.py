"""Fifty clients with 28 digits each, five of whom train in a round: FedAvg, and FedSpeed in its place.

The clients' digits differ much, and each takes many steps of its own, so that plain averages of their models swing.
FedSpeed keeps a client near the global model, and remembers how its own data pull it away from there. One seed: the
benchmark has more, and more methods. Leaves a figure, and the record of each training, under ``runs/fedspeed``.
"""

from functools import partial
from pathlib import Path
from typing import Any

import showing
from digits import DEVICES, Classifier, Digits, Recorder, Run, against_rounds, line
from jsonargparse import auto_cli
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.cli import OptimizerCallable
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table
from torch.optim import SGD

from fulgurite.plugins.federated import dirichlet_partition
from fulgurite.plugins.optim import FedSpeed, FedSpeedServer
from fulgurite.strategies import FederatedStrategy

COLOURS = {"FedAvg": "#6b7280", "FedSpeed": "#ea580c"}
SHOWN = {"val/acc": "accuracy"}
LAST = 10  # validations of which the table has the mean: single rounds of FedAvg swing


def main(
    rounds: int = 100,
    clients: int = 50,
    clients_per_round: int = 5,
    local_epochs: int = 5,
    alpha: float = 0.1,
    lr: float = 0.3,
    lr_decay: float = 0.998,
    weight_decay: float = 1e-3,
    lam: float = 10.0,
    rho: float = 0.1,
    validate_every: int = 1,
    seed: int = 0,
    folder: Path = Path(),
) -> list[Run]:
    """Trains, prints a table and draws the figure.

    Args:
        rounds: of each training.
        clients: among whom the digits are dealt out.
        clients_per_round: who trains in a round.
        local_epochs: passes of a client over its images in a round, in batches of 10.
        alpha: concentration of the clients' shares of the ten digits; the smaller, the more the clients differ.
        lr: of the clients' steps.
        lr_decay: factor of ``lr`` from round to round.
        weight_decay: of the clients' steps.
        lam: length of FedSpeed's proximal term.
        rho: radius of FedSpeed's ascent step.
        validate_every: rounds from one validation to the next.
        seed: of the split, the clients, the initial weights and the order of the data.
        folder: where ``runs/fedspeed`` goes.
    """
    showing.quiet()
    console = Console(highlight=False)
    store = folder / "runs" / "fedspeed"
    store.mkdir(parents=True, exist_ok=True)
    data = Digits(batch_size=10, seed=seed)
    labels = data.train.tensors[1].numpy()
    console.print(
        f"\n[bold]Fulgurite[/]: {clients} clients share {len(labels):,} images of digits; in each round"
        f" {clients_per_round} of them, in {DEVICES} processes, go {local_epochs} times through theirs.\n"
    )
    same: dict[str, Any] = {
        "partition": dirichlet_partition(labels, clients, alpha, seed, balanced=True),
        "clients_per_round": clients_per_round,
        "local_epochs": local_epochs,
        "weighting": "uniform",
        "seed": seed,
        "start_method": "fork",
    }
    sgd = partial(SGD, lr=lr, weight_decay=weight_decay)
    fedspeed = partial(FedSpeed, lr=lr, lam=lam, rho=rho, weight_decay=weight_decay)
    trainings: dict[str, tuple[FederatedStrategy, OptimizerCallable]] = {
        "FedAvg": (FederatedStrategy(**same), sgd),
        "FedSpeed": (FederatedStrategy(server_optimizer=FedSpeedServer, **same), fedspeed),
    }
    runs: list[Run] = []
    for name, (strategy, optimizer) in trainings.items():
        seed_everything(seed, verbose=False)
        recorder = Recorder(name, COLOURS[name], SHOWN, runs, draw, store)
        trainer = Trainer(
            accelerator="cpu",
            devices=DEVICES,
            strategy=strategy,
            max_epochs=rounds,  # an epoch is a round
            check_val_every_n_epoch=validate_every,
            num_sanity_val_steps=0,
            gradient_clip_val=10.0,
            callbacks=recorder,
            logger=showing.loggers(name, store),
            log_every_n_steps=1,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            default_root_dir=store,
        )
        trainer.fit(Classifier(optimizer, lr_decay), data)
        runs = [*runs, recorder.read()]
    draw(runs).savefig(store / "fedspeed.png")
    console.print(table(runs))
    console.print(f"Figure       {store / 'fedspeed.png'}", f"Records      {store}", sep="\n")
    return runs


def table(runs: list[Run]) -> Table:
    result = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    result.add_column("", no_wrap=True)
    for heading in (f"accuracy, last\n{LAST} validations", "rounds to\n90 %", "rounds to\n95 %", "trained,\ns"):
        result.add_column(heading, justify="right", no_wrap=True)
    for run in runs:
        last = run.values["val/acc"][-LAST:]
        result.add_row(
            f"[bold {COLOURS[run.name]}]{run.name}",
            f"{sum(last) / len(last):.3f}",
            *(rounds_to(run, bar) for bar in (0.9, 0.95)),
            f"{run.seconds:.1f}",
        )
    return result


def rounds_to(run: Run, bar: float, window: int = 5) -> str:
    """The first round at which the mean of the last validations reaches the bar."""
    values = run.values["val/acc"]
    for index in range(window, len(values) + 1):
        if sum(values[index - window : index]) >= window * bar:
            return str(run.rounds["val/acc"][index - 1])
    return "never"


def draw(runs: list[Run]) -> Figure:
    figure = Figure(figsize=(9, 3.6), dpi=160, layout="constrained")
    accuracy, drift, residual = figure.subplots(1, 3, width_ratios=(1.6, 1, 1))
    for run in runs:
        for axes, metric in ((accuracy, "val/acc"), (drift, "fed/drift"), (residual, "fedspeed/dual_residual")):
            line(axes, run, metric, COLOURS[run.name])
    against_rounds(accuracy, "Accuracy", ylim=(0.5, 1), ylabel="share of held-out digits read rightly")
    against_rounds(drift, "How far clients end\nfrom their mean", ylim=(0, None), ylabel="fed/drift")
    against_rounds(residual, "Norm of the clients'\nmean dual", ylim=(0, None), ylabel="fedspeed/dual_residual")
    accuracy.legend(frameon=False, loc="lower right")
    return figure


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
