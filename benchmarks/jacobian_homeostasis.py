"""Equilibrium propagation with and without homeostasis: accuracy, alignment, errors of the nudges, memory and time.

    python benchmarks/jacobian_homeostasis.py [accuracy|error|memory|step|torchdeq|figure|all] [--quick]

``accuracy`` trains on the handwritten digits with ten seeds, two at a time (minutes); the other sections take seconds.
Each replaces its part of ``results/jacobian_homeostasis.json``; ``--quick`` does little of it, into
``build/benchmarks``.
"""

import json
import subprocess
from collections.abc import Callable
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, stdev
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from _equilibrium import BATCH_SIZE, FREE_STEPS, NETWORKS, NUDGED_STEPS, STEP_SIZE, batch, network, times, training_step
from _plots import PAGE, mpl
from _record import spread
from _sections import main, python_with, say, target
from sklearn.datasets import load_digits
from torch import Tensor, nn

from fulgurite.plugins.equilibrium import (
    ConvField,
    DenseField,
    EquilibriumLayer,
    ScaledSigmoid,
    free_phase,
    homeostatic_loss,
    jacobian_symmetry,
    nudged_response,
)
from fulgurite.plugins.equilibrium.activations import slope

# ---- accuracy --------------------------------------------------------------------------------------------------------

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "ep": ("EP", {"gradient": "ep"}),
    "homeostasis": ("EP, homeostasis", {"gradient": "ep", "estimator": "vjp"}),
    "homeostasis_exact": ("EP, homeostasis,\nclosed form", {"gradient": "ep", "estimator": "exact"}),
    "adjoint": ("exact adjoint", {"gradient": "adjoint"}),
    "unroll": ("backpropagation\nthrough the steps", {"gradient": "unroll"}),
}
SEEDS = range(10)
EPOCHS, LR, COEF, T1 = 20, 8e-3, 1.0, 40
WATCH_EVERY = 10
ACCURACY_NOTE = (
    "digits of scikit-learn, 1437 to train and 360 to test, one split; pixels from 0 to 1. Field 64-(64, 32, 16),"
    " feedback drawn independently, linear read-out; Adam along a cosine to 0. Cosines are of the response with the"
    " exact error over the hidden units, means over the last third of the steps; a seed draws weights and order"
)


def train(method: str, seed: int, epochs: int) -> dict[str, float]:
    """One fit, in a loop of its own, with the gradients that the callback brings about."""
    options = dict(METHODS[method][1])
    estimator = options.pop("estimator", None)
    images, digits = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    images = (images / 16).float()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(123))
    rows, held_out = order[:1437], order[1437:]
    torch.manual_seed(seed)
    field = DenseField(*NETWORKS["digits"])
    tol = 0.0 if options["gradient"] == "unroll" else 1e-6
    net = EquilibriumLayer(field, free_steps=T1, nudged_steps=NUDGED_STEPS, step_size=STEP_SIZE, tol=tol, **options)
    readout = nn.Linear(16, 10)
    optimizer = torch.optim.Adam([*net.parameters(), *readout.parameters()], lr=LR)
    steps = epochs * -(-len(rows) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    cosines, residuals = [], []
    for index in range(steps):
        if index % (steps // epochs) == 0:
            batches = iter(rows[torch.randperm(len(rows))].split(BATCH_SIZE))
        chosen = next(batches)
        loss = F.cross_entropy(readout(net(images[chosen])), digits[chosen])
        if estimator:
            r = net.activation(net.last_state)
            loss = loss + COEF * homeostatic_loss(field, r, net.last_input, estimator=estimator)
        optimizer.zero_grad()
        loss.backward()
        if index >= steps * 2 / 3 and index % WATCH_EVERY == 0:
            residuals.append(net.last_residual.item())
            if net.gradient != "unroll":
                cosines.append(cosine(net))
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        right = readout(net(images[held_out])).argmax(1) == digits[held_out]
    return {
        "accuracy": right.double().mean().item(),
        "cosine": fmean(cosines) if cosines else 1.0,
        "symmetry": jacobian_symmetry(field, net.last_state[:1], net.last_input[:1]).item(),
        "residual": max(residuals),
    }


def cosine(net: EquilibriumLayer) -> float:
    record = net.last_backward
    assert record is not None
    exact = net.exact_response(record.state, record.input, record.signal)
    hidden = slice(0, net.readout.start)
    return F.cosine_similarity(exact[:, hidden], record.response[:, hidden]).mean().item()


def accuracy(quick: bool) -> dict[str, Any]:
    """Each method with each seed, two fits at a time."""
    seeds, epochs = (range(2), 2) if quick else (SEEDS, EPOCHS)
    fits = list(product(METHODS, seeds, [epochs]))
    with get_context("fork").Pool(2, torch.set_num_threads, (1,)) as pool:
        measured = pool.starmap(train, fits, chunksize=1)
    found: dict[str, Any] = {}
    for name in METHODS:
        rows = [row for (method, *_), row in zip(fits, measured, strict=True) if method == name]
        columns = {key: [row[key] for row in rows] for key in rows[0]}
        found[name] = {
            key: {"mean": fmean(values), "sd": stdev(values), **spread(values), "of_seeds": values}
            for key, values in columns.items()
        }
        say(name, {key: value["mean"] for key, value in found[name].items()})
    gaps = [
        100 * (one - two)
        for one, two in zip(
            found["homeostasis"]["accuracy"]["of_seeds"], found["ep"]["accuracy"]["of_seeds"], strict=True
        )
    ]
    gap, with_it, without = fmean(gaps), *(found[name]["cosine"]["mean"] for name in ("homeostasis", "ep"))
    return {
        "setting": {
            "seeds": len(seeds),
            "epochs": epochs,
            "lr": LR,
            "coef": COEF,
            "free_steps": T1,
            "nudged_steps": NUDGED_STEPS,
            "step_size": STEP_SIZE,
            "batch_size": BATCH_SIZE,
            "note": ACCURACY_NOTE,
        },
        "methods": found,
        "gap_points": {"mean": gap, "sd": stdev(gaps), "least": min(gaps), "most": max(gaps), "of_seeds": gaps},
        "targets": {
            "gap_at_least_6_points": target(gap, gap >= 6),
            "cosine_with_at_least_0_9": target(with_it, with_it >= 0.9),
            "cosine_without_at_most_0_6": target(without, without <= 0.6),
        },
    }


# ---- errors ----------------------------------------------------------------------------------------------------------

POINTS = (1, 2, 3, 4, 6, 8, 16)
BETAS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def error(quick: bool) -> dict[str, Any]:
    """Relative error of the response against the solution of its linear system, in double precision."""
    torch.manual_seed(0)
    field, phi = DenseField(*NETWORKS["digits"], gain=0.7).double(), ScaledSigmoid()
    x = batch("digits")[:10].double()
    with torch.no_grad():
        u, _ = free_phase(field, phi, x, steps=3000, step_size=STEP_SIZE)
        g = torch.zeros_like(u)
        g[:, field.block("out")] = F.normalize(torch.randn(10, 16, dtype=u.dtype), dim=1)
        system = torch.diag_embed(1 / slope(phi, u)) - field.recurrent_matrix()
        exact = torch.linalg.solve(system, g)
    steps, found = 50 if quick else 1000, {}
    for points in POINTS:
        errors = []
        for beta in BETAS:
            d = nudged_response(field, phi, u, x, g, beta=beta, points=points, steps=steps, step_size=STEP_SIZE)
            errors.append(((d - exact).norm() / exact.norm()).item())
        found[f"n{points}"] = errors
        say(f"N = {points}", dict(zip(map(str, BETAS), errors, strict=True)))
    note = "unit signals, float64, 10 samples, gain 0.7, independent feedback; Frobenius norms"
    return {"setting": {"beta": BETAS, "steps": steps, "note": note}, "relative_error": found}


# ---- memory ----------------------------------------------------------------------------------------------------------


def memory(quick: bool) -> dict[str, Any]:
    """Bytes that a forward pass saves for its backward one, weights included, each tensor once."""
    found = {}
    for name in NETWORKS:
        kept = {gradient: saved_bytes(network(name, gradient), batch(name)) for gradient in ("ep", "unroll")}
        kept["ep_twice_the_steps"] = saved_bytes(network(name, "ep", free_steps=2 * FREE_STEPS), batch(name))
        weights = sum(param.nbytes for param in network(name, "ep").parameters())
        ratios = {
            "ep_over_unroll": kept["ep"] / kept["unroll"],
            "ep_over_unroll_without_weights": (kept["ep"] - weights) / (kept["unroll"] - weights),
        }
        found[name] = {"saved_bytes": kept, "weight_bytes": weights, "ratios": ratios}
        say(name, kept | ratios)
    least = {name: result["ratios"]["ep_over_unroll_without_weights"] for name, result in found.items()}
    return {
        "setting": {"free_steps": FREE_STEPS, "batch_size": BATCH_SIZE},
        **found,
        "targets": {f"{name}_at_most_a_50th": target(ratio, ratio <= 1 / 50) for name, ratio in least.items()},
    }


def saved_bytes(layer: EquilibriumLayer, x: Tensor) -> int:
    sizes: dict[int, int] = {}
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        kept.append(tensor)  # else another tensor might get its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x).sum()
    return sum(sizes.values())


# ---- time ------------------------------------------------------------------------------------------------------------

STEP_NOTE = (
    "forward and backward without an optimizer, nothing stops early; adjoint of as many steps as the nudged phase."
    " `penalised` adds the homeostatic loss with 5 probes; `no_hoisting` computes each connection by itself, anew"
    " in each step. `convolution_step` is a relaxation step of a convolutional field over its convolutions"
)


def step(quick: bool) -> dict[str, Any]:
    """Seconds of a training step by each gradient, in turn."""
    found: dict[str, Any] = {}
    for name in NETWORKS:
        x = batch(name)
        contenders = {gradient: training_step(network(name, gradient), x) for gradient in ("ep", "adjoint", "unroll")}
        contenders["penalised"] = penalised_step(network(name, "ep"), x)
        plain = network(name, "ep")
        plain.field.at = lambda x, field=plain.field: lambda r: field(r, x)  # type: ignore[method-assign]
        plain.field.forward = unhoisted(plain.field)  # type: ignore[method-assign]
        contenders["no_hoisting"] = training_step(plain, x)
        found[name] = in_turn(contenders, 3 if quick else 30, over="adjoint")
        say(f"step, {name}", {key: value["median"] for key, value in found[name]["over_adjoint"].items()})
    found["convolution_step"] = in_turn(convolution_step(quick), 3 if quick else 30, over="bare")
    say("convolutions", {key: value["median"] for key, value in found["convolution_step"]["over_bare"].items()})
    ratio = found["fashion"]["over_adjoint"]["ep"]["median"]
    small = found["digits"]["over_adjoint"]["ep"]["median"]
    conv = found["convolution_step"]["over_bare"]["step"]["median"]
    return {
        "setting": {
            "free_steps": FREE_STEPS,
            "nudged_steps": NUDGED_STEPS,
            "batch_size": BATCH_SIZE,
            "note": STEP_NOTE,
        },
        **found,
        "targets": {
            "ep_over_adjoint_at_most_1_2": target(max(ratio, small), max(ratio, small) <= 1.2),
            "convolution_step_at_most_2": target(conv, conv <= 2),
        },
    }


def in_turn(contenders: dict[str, Callable[[], Any]], repetitions: int, over: str) -> dict[str, Any]:
    return shown(times(contenders, repetitions), over)


def shown(found: dict[str, list[float]], over: str) -> dict[str, Any]:
    """Seconds, and the ratios within a repetition."""
    ratios = {
        name: spread([a / b for a, b in zip(values, found[over], strict=True)])
        for name, values in found.items()
        if name != over
    }
    return {"seconds": {name: spread(values) for name, values in found.items()}, f"over_{over}": ratios}


def penalised_step(layer: EquilibriumLayer, x: Tensor) -> Callable[[], Any]:
    def take() -> None:
        layer.zero_grad()
        out = layer(x)
        (out.square().sum() + homeostatic_loss(layer.field, layer.last_state, x)).backward()

    return take


def unhoisted(field: DenseField) -> Callable[[Tensor, Tensor], Tensor]:
    """``H`` as one would write it, a product a connection."""

    def forward(r: Tensor, x: Tensor) -> Tensor:
        blocks = {"in": x} | dict(zip(field.sizes, r.split([*field.sizes.values()], 1), strict=True))
        inputs: dict[str, Tensor] = {}
        for name, weight in field.weights.items():
            pre, _, post = name.partition("-")
            bias = field.biases.get(name, None)
            part = F.linear(blocks[pre], weight, bias)
            inputs[post] = inputs[post] + part if post in inputs else part
        return torch.cat([inputs[block] for block in field.sizes], 1)

    return forward


@torch.no_grad()
def convolution_step(quick: bool) -> dict[str, Callable[[], Any]]:
    channels, rows = ((2, 3, 4), 2) if quick else ((32, 64, 128), 16)
    torch.manual_seed(0)
    field, phi = ConvField((3, 32, 32), channels, 64), ScaledSigmoid()
    x = torch.rand(rows, 3, 32, 32)
    u = torch.rand(rows, field.n)
    at = field.at(x)
    kernels = [*zip([*field.kernels.values()][1:], field.kernels_back.values(), strict=True)]
    maps = [
        torch.rand(rows, kernel.shape[1], edge, edge) for (kernel, _), edge in zip(kernels, (16, 8, 4), strict=True)
    ]

    @torch.no_grad()
    def bare() -> None:
        for (kernel, back), r in zip(kernels, maps, strict=True):
            padding = 0 if r.shape[-1] == 4 else 1
            F.conv2d(r, kernel, padding=padding)
            F.conv_transpose2d(F.conv2d(r, back, padding=padding), back, padding=padding)

    @torch.no_grad()
    def one() -> None:
        torch.lerp(u, at(phi(u)), STEP_SIZE)

    return {"step": one, "bare": bare}


# ---- torchdeq --------------------------------------------------------------------------------------------------------

TORCHDEQ = "torchdeq==0.1.0"
TORCHDEQ_NOTE = (
    "torchdeq's implicit differentiation by its fixed-point solvers, forward the one without statistics, on the same"
    " field with the same hoisting; its backward pass takes as many steps as ours. Ratios within a repetition: above 1,"
    " ours is faster"
)


def torchdeq(quick: bool) -> dict[str, Any]:
    """A training step by torchdeq and by ours, in turn, in an environment of its own."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        try:
            python = python_with(Path(folder), "--no-deps", TORCHDEQ)
            script = Path(__file__).with_name("_torchdeq.py")
            command = [python, str(script), str(file), "3" if quick else "30"]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
        except subprocess.SubprocessError as failure:
            output = getattr(failure, "stderr", None) or str(failure)
            return {"skipped": f"{TORCHDEQ}: {output.strip().splitlines()[-1]}"}
        found = json.loads(file.read_text())
    results: dict[str, Any] = {"setting": {"note": TORCHDEQ_NOTE, "versions": found["versions"]}}
    for name in NETWORKS:
        seconds = found[name]["times"]
        ratios = {
            f"torchdeq_over_{ours}": spread([a / b for a, b in zip(seconds["torchdeq"], seconds[ours], strict=True)])
            for ours in ("ep", "adjoint")
        }
        results[name] = {
            "seconds": {key: spread(values) for key, values in seconds.items()},
            "ratios": ratios,
            "difference_to_adjoint": found[name]["difference_to_adjoint"],
        }
        say(f"torchdeq, {name}", {key: value["median"] for key, value in ratios.items()})
    return results


# ---- all of it -------------------------------------------------------------------------------------------------------

COLOURS = {  # as in _plots, Okabe and Ito's
    "ep": "#7f7f7f",
    "homeostasis": "#d55e00",
    "homeostasis_exact": "#e69f00",
    "adjoint": "#0072b2",
    "unroll": "#000000",
}


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """Accuracy of each seed, mean cosines, and the error of the nudges."""
    if not {"accuracy", "error"} <= set(results):
        return []
    with mpl.rc_context(PAGE):
        figure, (seeds, errors) = plt.subplots(1, 2, figsize=(7, 3))
        labels = []
        for row, (name, (label, options)) in enumerate(METHODS.items()):
            found = results["accuracy"]["methods"][name]
            values = [100 * value for value in found["accuracy"]["of_seeds"]]
            seeds.scatter(values, [row] * len(values), s=18, color=COLOURS[name], alpha=0.6, linewidths=0)
            measured = f"{fmean(found['cosine']['of_seeds']):.2f}" if options["gradient"] == "ep" else "1"
            labels.append(f"{label}\ncosine {measured}")
        seeds.set_yticks(range(len(METHODS)), labels, fontsize=7.5)
        seeds.set(xlabel="test accuracy, %")
        seeds.invert_yaxis()
        seeds.set_title("Digits, a mark a seed")
        shades = plt.get_cmap("viridis")
        for index, points in enumerate(POINTS):
            values = results["error"]["relative_error"][f"n{points}"]
            colour = shades(index / len(POINTS))
            errors.loglog(results["error"]["setting"]["beta"], values, "o-", markersize=3, color=colour, label=points)
        errors.set(xlabel="radius beta", ylabel="relative error of the response")
        errors.legend(title="points", fontsize=7.5, loc="center left", bbox_to_anchor=(1, 0.5))
        errors.set_title("Error of the nudges")
        path = folder / "jacobian_homeostasis.png"
        figure.savefig(path)
        plt.close(figure)
    return [path]


SECTIONS = {"accuracy": accuracy, "error": error, "memory": memory, "step": step, "torchdeq": torchdeq}

if __name__ == "__main__":
    main("jacobian_homeostasis", __doc__, SECTIONS, draw)
