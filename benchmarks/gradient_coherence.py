"""What per-example norms cost beside a plain backward, Opacus and vmap; and what coherence shows of random labels.

    python benchmarks/gradient_coherence.py [cost|memory|fit|labels|figure|all] [--quick]

``cost`` times a step on a conv net, a perceptron and a transformer block, all methods in turn; ``memory`` reads the
peak of a batch of 4096 on a million parameters; ``fit`` times a fit with the callback and without; ``labels`` trains on
true and on random labels. Each replaces its part of ``results/gradient_coherence.json``.
"""

import json
import subprocess
from multiprocessing import get_context
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from tempfile import TemporaryDirectory
from time import process_time
from typing import Any

import matplotlib.pyplot as plt
import torch
from _plots import PAGE, mpl
from _record import spread
from _sections import main, python_with, ratio, say, summary, target
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from fulgurite.callbacks import GradientCoherence
from fulgurite.plugins.linalg import per_example_sq_norms

OPACUS = "opacus==1.6.0"
TARGETS = {"conv": 1.6, "transformer": 1.3, "mlp": 1.15}  # of a plain step
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}


def cost(quick: bool) -> dict[str, Any]:
    """CPU seconds of a step, and of what the peers do for the same norms."""
    with TemporaryDirectory() as folder:
        try:
            python = python_with(Path(folder), OPACUS, f"torch=={torch.__version__}")
        except subprocess.CalledProcessError as error:
            return {"skipped": f"pip could not install {OPACUS}: {error.stderr[-200:]}"}
        file = Path(folder, "rows.json")
        script = str(Path(__file__).with_name("_opacus.py"))
        subprocess.run([python, script, str(file), "3" if quick else "40"], check=True)
        found = json.loads(file.read_text())
    result: dict[str, Any] = {"peer_versions": found["versions"]}
    for case, rows in found["rows"].items():
        ratios = {f"{name}_over_plain": ratio(rows, name, "plain", "seconds") for name in rows if name != "plain"}
        for peer in ("opacus_ghost", "opacus_samples", "vmap"):
            ratios[f"fulgurite_over_{peer}"] = ratio(rows, "fulgurite", peer, "seconds")
        say(case, {name: figures["median"] for name, figures in ratios.items()})
        measured = ratios["fulgurite_over_plain"]["median"]
        result[case] = {
            "methods": summary(rows),
            "ratios": ratios,
            "largest_relative_error": found["largest_relative_error"][case],
            "target": target(measured, measured <= TARGETS[case]) | {"at_most": TARGETS[case]},
        }
    return result


def memory(quick: bool) -> dict[str, Any]:
    """Peak of the process above that of a plain backward, each in a process of its own."""
    batch = 512 if quick else 4096
    context = get_context("spawn")
    peaks = {}
    for watched in (False, True):
        with context.Pool(1) as pool:
            peaks["watched" if watched else "plain"] = pool.apply(_peak, (batch, watched))
    params = sum(param.numel() for param in _million().parameters())
    above = peaks["watched"] - peaks["plain"]
    say("memory", {"MiB above plain": above / 2**20})
    return {
        "batch": batch,
        "params": params,
        "bytes": peaks,
        "mib_above_plain": above / 2**20,
        "gib_of_all_gradients": 4 * batch * params / 2**30,
        "target": target(above, above <= 2**30) | {"at_most": 2**30},
    }


def _million() -> nn.Module:
    return nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 700), nn.ReLU(), nn.Linear(700, 10))


def _peak(batch: int, watched: bool) -> int:
    torch.set_num_threads(1)
    module, x = _million(), torch.randn(batch, 256)
    for _ in range(2):
        if watched:
            with per_example_sq_norms(module):
                module(x).square().mean().backward()
        else:
            module(x).square().mean().backward()
    return getrusage(RUSAGE_SELF).ru_maxrss * 1024


class Net(LightningModule):
    """A perceptron on digits, and the CPU seconds of its steps."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)]
        self.layers = nn.Sequential(*layers)
        self.seconds: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self.layers(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.seconds.append(process_time())


def _digits(images: int, seed: int, random: bool) -> TensorDataset:
    digits = load_digits()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(digits.target), generator=generator)[:images]
    labels = torch.randint(10, (images,), generator=generator) if random else torch.tensor(digits.target)[order]
    return TensorDataset(torch.tensor(digits.images / 16, dtype=torch.float32)[order], labels)


def fit(quick: bool) -> dict[str, Any]:
    """CPU seconds of whole fits in turn: without the callback; measuring never, at each 50th and at each step."""
    events = {"without": 0, "idle": 10**9, "every_50": 50, "every_step": 1}
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in events}
    for _ in range(2 if quick else 9):
        for name, every in events.items():
            seed_everything(0, verbose=False)
            watch = [GradientCoherence(every, figure=False)] if every else []
            trainer = Trainer(**QUIET, max_steps=100 if quick else 400, callbacks=watch)
            start = process_time()
            trainer.fit(Net(), DataLoader(_digits(960, 0, False), 96, shuffle=True))
            rows[name].append({"seconds": process_time() - start})
    ratios = {f"{name}_over_without": ratio(rows, name, "without", "seconds") for name in events if name != "without"}
    say("fit", {name: figures["median"] for name, figures in ratios.items()})
    return {"methods": summary(rows), "ratios": ratios}


def labels(quick: bool) -> dict[str, Any]:
    """Coherence over 900 digits, each epoch, with true and with random labels."""
    curves: dict[str, list[list[float]]] = {"true": [], "random": []}
    for seed in range(2 if quick else 5):
        for name in curves:
            seed_everything(seed, verbose=False)
            watch = GradientCoherence(10, source="fixed", n_batches=10, figure=False)
            trainer = Trainer(**QUIET, max_epochs=4 if quick else 100, callbacks=[watch])
            trainer.fit(Net(), DataLoader(_digits(900, seed, name == "random"), 90, shuffle=True))
            curves[name].append([event["alpha_m"] for event in watch.history])
    starts = {name: spread([curve[0] for curve in found]) for name, found in curves.items()}
    growth = spread([max(curve) / max(curve[: len(curve) // 10 + 1]) for curve in curves["random"]])
    say("labels", {"true": starts["true"]["median"], "random": starts["random"]["median"], "growth": growth["median"]})
    return {
        "at_start": starts,
        "most": {name: spread([max(curve) for curve in found]) for name, found in curves.items()},
        "true_over_random_at_start": spread([a[0] / b[0] for a, b in zip(*curves.values(), strict=True)]),
        "growth_random": growth,
        "curves": curves,
    }


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """The cost by method, in plain steps."""
    if "skipped" in results.get("cost", {"skipped": ""}):
        return []
    names = {"fulgurite": "Fulgurite", "opacus_ghost": "Opacus, ghost norms", "opacus_samples": "Opacus, samples"}
    names |= {"vmap": "vmap(grad)"}
    colours = ["#d55e00", "#0072b2", "#56b4e9", "#7f7f7f"]
    with mpl.rc_context(PAGE):
        figure, panels = plt.subplots(1, 3, figsize=(7, 2.2), sharey=True, sharex=True)
        for axes, case in zip(panels, TARGETS, strict=True):
            found = [results["cost"][case]["ratios"][f"{name}_over_plain"] for name in names]
            medians = [ratios["median"] for ratios in found]
            whiskers = [[r["median"] - r["q25"] for r in found], [r["q75"] - r["median"] for r in found]]
            axes.barh(list(names.values()), medians, color=colours, xerr=whiskers, ecolor="#333333")
            axes.set_xscale("log")
            axes.set_xticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
            axes.set_xlim(1, 150)
            axes.minorticks_off()
            axes.set_title(case)
            axes.grid(axis="y", visible=False)
        panels[0].invert_yaxis()
        panels[1].set_xlabel("CPU time over that of a plain forward and backward")
        path = folder / "gradient_coherence_cost.png"
        figure.savefig(path)
        plt.close(figure)
    return [path]


if __name__ == "__main__":
    sections = {"cost": cost, "memory": memory, "fit": fit, "labels": labels}
    main("gradient_coherence", __doc__, sections, draw)
