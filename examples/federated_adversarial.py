"""Twenty clients with few digits each learn to read them, under attack or not, in three federated trainings.

FedAvg trains the clients on their images as they are. Federated adversarial learning (FAL) moves each image, within a
small ball, to where the client's loss is high, and trains on that. The third does the same with FedSpeed as the
clients' optimizer. All three see the same clients in the same rounds, and their global models are attacked after every
few rounds. Leaves a figure, and the record of each training, under ``runs/federated_adversarial``.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import showing
from digits import CLASSES, DEVICES, Classifier, Digits, Recorder, Run, against_rounds, line
from jsonargparse import auto_cli
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.cli import OptimizerCallable
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich import box
from rich.console import Console
from rich.table import Table
from torch.optim import SGD

from fulgurite.callbacks import RobustValidation
from fulgurite.plugins.federated import PGD, dirichlet_partition
from fulgurite.plugins.optim import FedSpeed, FedSpeedServer
from fulgurite.strategies import FederatedAdversarialStrategy, FederatedStrategy

COLOURS = {"FedAvg": "#6b7280", "FAL": "#2563eb", "FAL with FedSpeed": "#ea580c"}
SHOWN = {"fal/clean_acc": "clean", "fal/robust_acc": "robust"}


def main(
    rounds: int = 100,
    clients: int = 20,
    clients_per_round: int = 5,
    local_steps: int = 10,
    alpha: float = 0.3,
    eps: float = 0.1,
    lr: float = 0.3,
    lam: float = 10.0,
    rho: float = 0.1,
    validate_every: int = 5,
    seed: int = 0,
    folder: Path = Path(),
) -> list[Run]:
    """Trains, prints a table and draws the figure.

    Args:
        rounds: of each training.
        clients: among whom the digits are dealt out.
        clients_per_round: who trains in a round.
        local_steps: of a client in a round, on 16 images each.
        alpha: concentration of the clients' shares of the ten digits; the smaller, the more the clients differ.
        eps: how far an attack may move a pixel, of which 0 is white and 1 is black.
        lr: of the clients' steps.
        lam: length of FedSpeed's proximal term.
        rho: radius of FedSpeed's ascent step.
        validate_every: rounds from one validation to the next.
        seed: of the split, the clients, the initial weights and the order of the data.
        folder: where ``runs/federated_adversarial`` goes.
    """
    showing.quiet()
    console = Console(highlight=False)
    store = folder / "runs" / "federated_adversarial"
    store.mkdir(parents=True, exist_ok=True)
    data = Digits(seed=seed)
    labels = data.train.tensors[1].numpy()
    parts = dirichlet_partition(labels, clients, alpha, seed, balanced=True)
    counts = np.array([np.bincount(labels[part], minlength=CLASSES) for part in parts])  # (clients, classes)

    console.print(
        f"\n[bold]Fulgurite[/]: {clients} clients share {len(labels):,} images of digits; in each round"
        f" {clients_per_round} of them, in {DEVICES} processes, train for {local_steps} steps.\n"
    )
    same: dict[str, Any] = {"partition": parts, "clients_per_round": clients_per_round, "local_steps": local_steps}
    same |= {"seed": seed, "start_method": "fork"}
    runs: list[Run] = []
    for name, (strategy, optimizer) in trainings(eps, lr, lam, rho, same).items():
        seed_everything(seed, verbose=False)
        recorder = Recorder(name, COLOURS[name], SHOWN, runs, partial(draw, counts=counts), store)
        trainer = Trainer(
            accelerator="cpu",
            devices=DEVICES,
            strategy=strategy,  # the one changed line
            max_epochs=rounds,  # an epoch is a round
            check_val_every_n_epoch=validate_every,
            num_sanity_val_steps=0,
            callbacks=[RobustValidation(PGD(eps, step_size=eps / 10, steps=20)), recorder],
            logger=showing.loggers(name, store),
            log_every_n_steps=1,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            default_root_dir=store,
        )
        trainer.fit(Classifier(optimizer), data)
        runs = [*runs, recorder.read()]
    draw(runs, counts).savefig(store / "federated_adversarial.png")
    console.print(table(runs, eps))
    console.print(f"Figure       {store / 'federated_adversarial.png'}", f"Records      {store}", sep="\n")
    return runs


def trainings(
    eps: float, lr: float, lam: float, rho: float, same: dict[str, Any]
) -> dict[str, tuple[FederatedStrategy, OptimizerCallable]]:
    """By name, what trains, and by which optimizer its clients do."""
    attacked = same | {"attack": PGD(eps, step_size=eps / 4, steps=7)}
    sgd, fedspeed = partial(SGD, lr=lr), partial(FedSpeed, lr=lr, lam=lam, rho=rho)
    return {
        "FedAvg": (FederatedStrategy(**same), sgd),
        "FAL": (FederatedAdversarialStrategy(**attacked), sgd),
        "FAL with FedSpeed": (FederatedAdversarialStrategy(server_optimizer=FedSpeedServer, **attacked), fedspeed),
    }


def table(runs: list[Run], eps: float) -> Table:
    result = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    result.add_column("", no_wrap=True)
    for heading in ("accuracy,\nclean", f"accuracy,\nattacked by {eps:g}", "drift of\nthe clients", "trained,\ns"):
        result.add_column(heading, justify="right", no_wrap=True)
    for run in runs:
        figures = [f"{run.values[name][-1]:.3f}" for name in (*SHOWN, "fed/drift")]
        result.add_row(f"[bold {COLOURS[run.name]}]{run.name}", *figures, f"{run.seconds:.1f}")
    return result


def draw(runs: list[Run], counts: "np.ndarray[Any, Any]") -> Figure:
    figure = Figure(figsize=(9, 6.6), dpi=160, layout="constrained")
    (robust, clean), (dealt, drift) = figure.subplots(2, 2)
    clean.sharey(robust)
    for run in runs:
        line(robust, run, "fal/robust_acc", COLOURS[run.name])
        line(clean, run, "fal/clean_acc", COLOURS[run.name])
        line(drift, run, "fed/drift", COLOURS[run.name], linewidth=1)
    against_rounds(robust, "Accuracy under attack", ylim=(0, 1), ylabel="share of held-out digits read rightly")
    against_rounds(clean, "Accuracy without an attack")
    against_rounds(drift, "How far clients end from their mean", ylim=(0, None), ylabel="fed/drift")
    robust.legend(frameon=False, loc="lower right")
    histogram(dealt, counts)
    return figure


def histogram(axes: Axes, counts: "np.ndarray[Any, Any]") -> None:
    """How many images of each digit a client has, ``(clients, classes)``."""
    image = axes.imshow(counts, cmap="Blues", aspect="auto", interpolation="nearest", vmin=0)
    axes.set(xlabel="digit", ylabel="client", xticks=range(CLASSES))
    axes.set_title("What the clients have", fontsize="medium", loc="left")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.figure.colorbar(image, ax=axes, label="images")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
