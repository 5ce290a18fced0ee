"""What curvature products and spectra cost, against the peers, and what a fit pays for them.

``python benchmarks/hessian_spectrum.py`` takes about ten minutes. Sections: ``peers``, products and spectra of ours and
of curvlinops, hessian-eigenthings and PyHessian in turn, in an environment of their own; ``fit``, a training with and
without the callback; ``growth``, an event's time and memory against its settings.
"""

import json
import logging
import multiprocessing
import resource
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from _plots import PAGE, mpl, plt
from _record import spread
from _sections import main, python_with, say, target
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fulgurite.callbacks import HessianSpectrum
from fulgurite.plugins.linalg import DiagonalOperator, ModuleLoss, lanczos, spectrum

PEERS = ("curvlinops-for-pytorch==3.0.1", "hessian-eigenthings==1.0.0a5", "PyHessian==0.1")
COLOURS = {"ours": "#d55e00", "eigenthings": "#0072b2", "PyHessian": "#009e73", "curvlinops": "#7f7f7f"}
NAMES = {"ours": "Fulgurite", "eigenthings": "hessian-eigenthings"}
NEEDED = (
    *("backpack-for-pytorch", "unfoldNd", "einops", "einconv", "linear_operator"),
    *("jaxtyping", "wadler-lindig", "opt-einsum"),
)
BATCH_SIZE = 512


# ---- against the peers -----------------------------------------------------------------------------------------------


def peers(quick: bool) -> dict[str, Any]:
    """Products and a spectrum, ours and theirs in turn."""
    with TemporaryDirectory() as folder:
        try:
            # With its dependencies pip would take a torchvision that belongs to another torch.
            python = python_with(Path(folder), "--no-deps", *PEERS, *NEEDED)
            file = Path(folder) / "result.json"
            command = [python, str(Path(__file__).with_name("_curvature.py")), str(file), str(int(quick))]
            subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True, timeout=1800, cwd=folder)
        except subprocess.SubprocessError as error:
            output = getattr(error, "stderr", None) or str(error)
            return {"skipped": f"the peers: {output.strip().splitlines()[-1]}"}
        return peers_results(json.loads(file.read_text()))


def peers_results(found: dict[str, Any]) -> dict[str, Any]:
    """Spreads, ratios within a repetition and whether they are what we set out for."""
    products, event = found["products"], found["event"]
    ratios = {
        "hessian_over_curvlinops": within(products["times"], "hessian", "hessian curvlinops"),
        "hessian_over_eigenthings": within(products["times"], "hessian", "hessian eigenthings"),
        "ggn_over_curvlinops": within(products["times"], "ggn", "ggn curvlinops"),
        "hessian_over_gradient": within(products["times"], "hessian", "gradient"),
        "event_over_eigenthings": within(event["times"], "ours", "eigenthings"),
        "event_over_curvlinops": within(event["times"], "ours", "curvlinops"),
        "event_over_pyhessian": within(event["times"], "ours", "PyHessian"),
    }
    bounds = {
        "hessian_over_curvlinops": 0.6,
        "hessian_over_eigenthings": 0.8,
        "ggn_over_curvlinops": 0.6,
        "hessian_over_gradient": 2.2,
        "event_over_eigenthings": 0.6,
        "event_over_curvlinops": 0.45,
        "event_over_pyhessian": 0.8,
    }
    for name, figure in ratios.items():
        say(name, figure)
    targets = {
        f"{name}_at_most_{bound}": target(ratios[name]["median"], ratios[name]["median"] <= bound)
        for name, bound in bounds.items()
    }
    for part in (products, event):
        part["cpu_seconds"] = {name.replace(" ", "_"): spread(times) for name, times in part.pop("times").items()}
    measured = {"products": products, "event": event, "ratios": ratios, "targets": targets}
    return measured | {"peer_versions": found["versions"]}


def within(times: dict[str, list[float]], above: str, below: str) -> dict[str, float]:
    """Spread of the ratio within a repetition."""
    return spread([a / b for a, b in zip(times[above], times[below], strict=True)])


# ---- what a fit pays -------------------------------------------------------------------------------------------------


class Perceptron(LightningModule):
    def __init__(self, hidden: int = 256) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(64, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, 10)
        )

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def batches(count: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count * BATCH_SIZE, 64, generator=generator)
    return TensorDataset(x, x[:, :10].argmax(1))


def timed_fit(steps: int, *callbacks: HessianSpectrum) -> float:
    """Seconds."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = Trainer(accelerator="cpu", devices=1, max_steps=steps, callbacks=[*callbacks], logger=False, **quiet)
    loader = DataLoader(batches(8), BATCH_SIZE, shuffle=True)
    start = time.perf_counter()
    trainer.fit(Perceptron(), loader)
    return time.perf_counter() - start


def gradient_seconds(calls: int) -> float:
    module, data = Perceptron(), batches(1)[:]
    start = time.perf_counter()
    for _ in range(calls):
        torch.autograd.grad(module.training_step(list(data), 0), list(module.parameters()))
    return (time.perf_counter() - start) / calls


def fit(quick: bool) -> dict[str, Any]:
    """One event of 80 products in a training, in gradients, and what it adds to 2000 steps."""
    repetitions, steps = (3, 40) if quick else (9, 200)
    rows: dict[str, list[float]] = {"without": [], "with": [], "event": [], "gradient": []}
    for _ in range(repetitions):
        callback = HessianSpectrum(n_probes=1, k=1, ggn=False, gradient_overlap=False, figure=False)
        rows["gradient"].append(gradient_seconds(10 if quick else 50))
        rows["without"].append(timed_fit(steps))
        rows["with"].append(timed_fit(steps, callback))
        rows["event"].append(callback.history[0].scalars["seconds"])
    gradients = within(rows, "event", "gradient")
    per_step = [seconds / steps for seconds in rows["without"]]
    share = spread([event / (2000 * step) for event, step in zip(rows["event"], per_step, strict=True)])
    added = spread([a - b for a, b in zip(rows["with"], rows["without"], strict=True)])
    say("gradients an event", gradients)
    say("share of a fit at every_n_steps=2000", share)
    return {
        "setting": {"steps": steps, "lanczos_steps": 80, "n_probes": 1, "batch_size": BATCH_SIZE},
        "seconds": {name: spread(values) for name, values in rows.items()},
        "added_seconds": added,
        "gradients_an_event": gradients,
        "share_every_2000_steps": share,
        "targets": {
            "gradients_an_event_at_most_140": target(gradients["median"], gradients["median"] <= 140),
            "share_every_2000_steps_below_0.07": target(share["median"], share["median"] < 0.07),
        },
    }


# ---- growth ----------------------------------------------------------------------------------------------------------


def event_seconds(hidden: int, lanczos_steps: int, n_probes: int) -> float:
    module = Perceptron(hidden)
    loss = ModuleLoss(module, [(list(batches(1)[:]), 0)])
    options: dict[str, Any] = {"k": 1, "ggn": False, "gradient_overlap": False, "tol": 1e9}  # no products besides
    start = time.process_time()
    spectrum(loss, lanczos_steps=lanczos_steps, n_probes=n_probes, params=module.parameters(), **options)
    seconds = time.process_time() - start
    loss.release()
    return seconds


def orthogonal_seconds(size: int, lanczos_steps: int) -> float:
    """The same without products: a diagonal costs next to nothing."""
    op = DiagonalOperator(torch.linspace(0, 1, size))
    start = time.process_time()
    lanczos(op, lanczos_steps)
    return time.process_time() - start


def peak_floats(hidden: int, lanczos_steps: int) -> float:
    """By how much an event raises the process's peak memory beyond a graph, as a multiple of ``(m + k) P`` floats."""

    def measure(sender: Any) -> None:
        module = Perceptron(hidden)
        size = sum(param.numel() for param in module.parameters())
        loss = ModuleLoss(module, [(list(batches(1)[:]), 0)])
        options: dict[str, Any] = {"k": 1, "n_probes": 1, "ggn": False, "gradient_overlap": False, "tol": 1e9}
        spectrum(loss, lanczos_steps=2, params=module.parameters(), **options)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        spectrum(loss, lanczos_steps=lanczos_steps, params=module.parameters(), **options)
        raised = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        sender.send(raised * 1024 / (4 * (lanczos_steps + 1) * size))

    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe()
    process = context.Process(target=measure, args=(sender,))
    process.start()
    floats = float(receiver.recv())
    process.join()
    return floats


def growth(quick: bool) -> dict[str, Any]:
    """Seconds of an event against its parameters, steps and probes; the share of re-orthogonalisation; memory."""
    repetitions = 3 if quick else 7
    base = {"hidden": 256, "lanczos_steps": 40, "n_probes": 1}
    values = {"hidden": (64, 128, 256, 512), "lanczos_steps": (20, 40, 80, 160), "n_probes": (1, 2, 4)}
    event_seconds(**base)
    curves: dict[str, list[dict[str, Any]]] = {}
    for name, points in values.items():
        measured = {point: [event_seconds(**base | {name: point}) for _ in range(repetitions)] for point in points}
        curves[name] = [
            {name: point, "parameters": parameters(point if name == "hidden" else 256), **spread(seconds)}
            for point, seconds in measured.items()
        ]
        say(f"seconds against {name}", {str(point[name]): point["median"] for point in curves[name]})
    size = parameters(256)
    shares = spread([orthogonal_seconds(size, 80) / event_seconds(256, 80, 1) for _ in range(repetitions)])
    floats = peak_floats(512 if quick else 1024, 40)
    say("re-orthogonalisation's share", shares)
    return {
        "setting": base | {"batch_size": BATCH_SIZE},
        "curves": curves,
        "orthogonalisation_share": shares,
        "peak_over_basis": floats,
        "targets": {
            "orthogonalisation_share_at_most_0.15": target(shares["median"], shares["median"] <= 0.15),
            "peak_at_most_basis_and_vectors": target(floats, floats <= 1.1),
        },
    }


def parameters(hidden: int) -> int:
    return sum(param.numel() for param in Perceptron(hidden).parameters())


# ---- the figure ------------------------------------------------------------------------------------------------------


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """CPU seconds of a spectrum by each, and an event's time against its settings."""
    found = results.get("peers", {})
    if "event" not in found or "growth" not in results:
        return []
    with mpl.rc_context(PAGE):
        figure, (event, growing) = plt.subplots(1, 2, figsize=(7, 2.6), width_ratios=(1.2, 1))
        names = list(reversed(COLOURS))
        for place, name in enumerate(names):
            low, value, high = (found["event"]["cpu_seconds"][name][q] for q in ("q25", "median", "q75"))
            whisker = [[value - low], [high - value]]
            event.barh(place, value, xerr=whisker, color=COLOURS[name], error_kw={"linewidth": 1}, height=0.7)
            copies = found["event"]["found"][name]["copies_of_lambda_max"]
            text = f"{value:.2f} s" + (f", largest one {copies} times" if copies > 1 else "")
            inside = copies > 1
            event.annotate(
                text,
                (0 if inside else high, place),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color="white" if inside else "black",
            )
        event.set_yticks(range(len(names)), [NAMES.get(name, name) for name in names])
        event.set(xlabel="CPU seconds", xlim=(0, 1.15 * event.dataLim.x1))
        event.set_title(f"Spectrum by {found['event']['products']} products")
        event.grid(axis="y", visible=False)
        curve = results["growth"]["curves"]["lanczos_steps"]
        growing.plot([p["lanczos_steps"] for p in curve], [p["median"] for p in curve], "o-", color=COLOURS["ours"])
        growing.set(xlabel="Lanczos steps", ylabel="CPU seconds", xlim=(0, None), ylim=(0, None))
        growing.set_title(f"An event, {curve[0]['parameters']:,} parameters")
        path = folder / "hessian_spectrum.png"
        figure.savefig(path)
        plt.close(figure)
    return [path]


SECTIONS: dict[str, Callable[[bool], dict[str, Any]]] = {"peers": peers, "fit": fit, "growth": growth}

if __name__ == "__main__":
    main("hessian_spectrum", __doc__, SECTIONS, draw)
