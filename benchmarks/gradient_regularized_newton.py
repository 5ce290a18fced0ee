"""GradientRegularizedNewton beside LBFGS, Adam, SOAP, SophiaH, AdaHessian and Shampoo, on full batches of digits.

    python benchmarks/gradient_regularized_newton.py [runs|step|figure|all] [--quick]

``runs`` solves four problems to a target: for each method it picks the best of its settings on two splits of the data,
and then solves with five others. ``step`` measures what a step costs in gradients, and its memory. Work is counted in
units: loss and gradient are 1, a product with the curvature is 2; also in what a product was measured to cost. Each
replaces its part of ``results/gradient_regularized_newton.json``; ``--quick`` does little, into ``build/benchmarks``.
"""

import math
import resource
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytorch_optimizer
import torch
import torch.nn.functional as F
from _plots import PAGE, mpl
from _record import spread
from _sections import main, say, target
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import LBFGS, Adam, Optimizer

from fulgurite.plugins.linalg import GGNOperator, HessianOperator, record_loss
from fulgurite.plugins.optim import GradientRegularizedNewton

PRODUCT = 2  # units
TRAIN = 1437
TUNING_SEEDS, SEEDS = (100, 101), (0, 1, 2, 3, 4)

# ---- problems --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """A loss of all training digits at once, and where a method is done.

    Attributes:
        pixels: are divided by it.
        penalty: ``penalty / 2 |w|^2`` is a part of the loss.
        hidden: two hidden layers of tanh; softmax regression without.
        gradient: target of the gradient's norm.
        above: target of the loss, above the minimum.
        loss: target of the loss.
        units: after which a method that only has gradients gives up.
    """

    label: str
    pixels: float
    penalty: float
    dtype: torch.dtype
    hidden: bool = False
    gradient: float | None = None
    above: float | None = None
    loss: float | None = None
    units: int = 1000


PROBLEMS = {
    "A": Problem("softmax regression, ill-conditioned, to |g| = 1e-8", 1, 1e-6, torch.float64, gradient=1e-8),
    "B": Problem("softmax regression, to |g| = 1e-8", 16, 1e-4, torch.float64, gradient=1e-8),
    "C": Problem("softmax regression, to a loss", 16, 1e-4, torch.float32, above=1e-3),
    "D": Problem("perceptron, to a loss", 16, 1e-4, torch.float32, hidden=True, loss=0.0150),
}


@cache
def digits() -> tuple[Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    return torch.from_numpy(images), torch.from_numpy(labels)


class Task:
    """A problem with a split and initial weights."""

    def __init__(self, problem: Problem, seed: int) -> None:
        self.problem = problem
        generator = torch.Generator().manual_seed(seed)
        images, labels = digits()
        rows = torch.randperm(len(labels), generator=generator)[:TRAIN]
        self.x, self.y = (images[rows] / problem.pixels).to(problem.dtype), labels[rows]
        widths = (64, 64, 64, 10) if problem.hidden else (64, 10)
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            layers += [nn.Linear(inputs, outputs), nn.Tanh()]
        self.model = nn.Sequential(*layers[:-1]).to(problem.dtype)
        for param in self.model.parameters():
            bound = param.shape[-1] ** -0.5 if problem.hidden else 0.0
            nn.init.uniform_(param, -bound, bound, generator=generator)

    def loss(self) -> Tensor:
        weights = torch.stack([param.square().sum() for param in self.model.parameters()]).sum()
        return F.cross_entropy(self.model(self.x), self.y) + self.problem.penalty / 2 * weights

    def gradient_norm(self) -> float:
        return float(
            torch.cat([p.grad.detach().flatten() for p in self.model.parameters() if p.grad is not None]).norm()
        )


@cache
def minimum(problem: Problem, seed: int) -> float:
    """Of a convex problem, by LBFGS in double precision."""
    task = Task(problem, seed)
    task.model.double()
    task.x = task.x.double()
    optimizer = lbfgs(task.model.parameters(), history_size=200, max_iter=300)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = task.loss()
        loss.backward()
        return loss

    optimizer.step(closure)
    return float(task.loss().detach())


# ---- methods ---------------------------------------------------------------------------------------------------------

Make = Callable[[Iterable[nn.Parameter]], Optimizer]


def lbfgs(params: Iterable[nn.Parameter], **options: Any) -> LBFGS:
    return LBFGS(params, line_search_fn="strong_wolfe", tolerance_grad=0, tolerance_change=0, **options)


def grid(make: Callable[..., Optimizer], **options: list[Any]) -> dict[str, Make]:
    """One setting for each combination."""
    settings: list[dict[str, Any]] = [{}]
    for name, values in options.items():
        settings = [{**setting, name: value} for setting in settings for value in values]
    return {", ".join(f"{k}={v}" for k, v in setting.items()): partial(make, **setting) for setting in settings}


OURS = ("grn_ggn", "grn_hessian", "grn_40")
RATES = {"lr": [0.003, 0.01, 0.03, 0.1]}
METHODS: dict[str, dict[str, Make]] = {
    "grn_ggn": grid(GradientRegularizedNewton, theta=[0.5, 0.9], max_krylov=[10, 20, 40]),
    "grn_hessian": grid(
        partial(GradientRegularizedNewton, curvature="hessian"), theta=[0.5, 0.9], max_krylov=[10, 20, 40]
    ),
    "grn_40": grid(partial(GradientRegularizedNewton, curvature="hessian"), max_krylov=[40]),
    "grn_jacobi": grid(partial(GradientRegularizedNewton, metric="diagonal"), theta=[0.5], max_krylov=[20, 40]),
    "lbfgs": grid(lbfgs, history_size=[20, 100, 200], max_iter=[20, 100]),
    "lbfgs_100": grid(lbfgs, history_size=[100], max_iter=[20]),
    "lbfgs_20": grid(lbfgs, history_size=[20], max_iter=[20]),
    "adam": grid(Adam, **RATES),
    "soap": grid(partial(pytorch_optimizer.SOAP, weight_decay=0.0), **RATES),
    "sophia": grid(pytorch_optimizer.SophiaH, lr=[0.03, 0.1, 0.3, 1.0]),
    "adahessian": grid(pytorch_optimizer.AdaHessian, lr=[0.03, 0.1, 0.3, 1.0]),
    "shampoo": grid(pytorch_optimizer.Shampoo, lr=[0.03, 0.1, 0.3, 1.0]),
}
SECOND_GRAPH = {"sophia": 10, "adahessian": 1}  # whose step wants the gradient's graph, and how often
SECONDS = 6.0  # of the processor, after which a method gives up


class Done(Exception):
    """The target is reached, in the middle of a step maybe."""


class Solve:
    """One method on one task, until the target or its limit; what it measures is in ``row`` and ``curve``."""

    def __init__(self, name: str, make: Make, problem: Problem, seed: int, limit: float = SECONDS) -> None:
        self.task, self.limit = Task(problem, seed), limit
        self.goal = problem.loss if problem.above is None else minimum(problem, seed) + problem.above
        self.curve: list[
            tuple[float, float, float]
        ] = []  # seconds of the processor, units, norm of the gradient or loss
        self.closures = self.products = self.steps = 0
        params = list(self.task.model.parameters())
        self.optimizer = make(params)
        self.period = SECOND_GRAPH.get(name, 0)
        self.first_order = not isinstance(self.optimizer, GradientRegularizedNewton | LBFGS)
        reached = self._run(problem)
        self.row = {
            "reached": float(reached),
            "steps": self.steps,
            "closures": self.closures,
            "products": self.products,
        }
        self.row |= {"units": self.closures + PRODUCT * self.products, "seconds": self.wall, "cpu_seconds": self.cpu}
        self.row |= {"last": min((value for _, _, value in self.curve if math.isfinite(value)), default=math.inf)}

    def _run(self, problem: Problem) -> bool:
        self.started, wall = time.process_time(), time.perf_counter()
        try:
            with counted(self):
                while time.process_time() - self.started < self.limit:
                    if self.first_order and self.closures + PRODUCT * self.products > problem.units:
                        break
                    self.steps += 1
                    self.optimizer.step(self._closure)
                    self.products += bool(self.period) and (self.steps - 1) % max(self.period, 1) == 0
            return False
        except Done:
            return True
        except RuntimeError:  # it diverged
            return False
        finally:
            self.wall, self.cpu = time.perf_counter() - wall, time.process_time() - self.started

    def _closure(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.task.loss()
        loss.backward(create_graph=bool(self.period))
        self.closures += 1
        value = float(loss.detach()) if self.goal is not None else self.task.gradient_norm()
        now = time.process_time() - self.started
        self.curve.append((now, self.closures + PRODUCT * self.products, value))
        if value <= (self.goal if self.goal is not None else self.task.problem.gradient or 0.0):
            raise Done
        return loss


class counted:
    """Counts the products of a solve as they are made: the last step does not end."""

    def __init__(self, solve: Solve) -> None:
        self.solve = solve

    def __enter__(self) -> None:
        self.kept = [(kind, kind._of_graph) for kind in (HessianOperator, GGNOperator)]
        for kind, product in self.kept:
            kind._of_graph = self._counting(product)  # type: ignore[method-assign]

    def __exit__(self, *error: object) -> None:
        for kind, product in self.kept:
            kind._of_graph = product  # type: ignore[method-assign]

    def _counting(self, product: Callable[..., Any]) -> Any:
        def counting(*args: Any) -> Any:
            self.solve.products += 1
            return product(*args)

        return counting


def product_costs(problem: Problem, repetitions: int) -> dict[str, dict[str, float]]:
    """Time of a product over that of loss and gradient, in turn."""
    task = Task(problem, 0)
    params = list(task.model.parameters())
    with record_loss() as recording:
        task.loss().backward()
    operators = {"ggn": GGNOperator(recording.graph, params), "hessian": HessianOperator(recording.graph, params)}
    vector = torch.randn(operators["ggn"].shape[0], dtype=problem.dtype, generator=torch.Generator().manual_seed(0))
    found: dict[str, list[float]] = {name: [] for name in operators}
    for repetition in range(-3, repetitions):
        started = time.process_time()
        for param in params:
            param.grad = None
        task.loss().backward()
        gradient = time.process_time() - started
        for name, op in operators.items():
            started = time.process_time()
            op.matvec(vector)
            if repetition >= 0:
                found[name].append((time.process_time() - started) / gradient)
    return {name: spread(values) for name, values in found.items()}


def best(name: str, problem: Problem) -> tuple[str, Make]:
    """The setting that reached the target most often and in the least time, or that came nearest to it."""

    def key(setting: str) -> tuple[float, float]:
        rows = [Solve(name, METHODS[name][setting], problem, seed).row for seed in TUNING_SEEDS]
        missed = sum(not row["reached"] for row in rows)
        return missed, sum(row["last" if missed == len(rows) else "cpu_seconds"] for row in rows)

    settings = list(METHODS[name])
    chosen = min(settings, key=key) if len(settings) > 1 else settings[0]
    return chosen, METHODS[name][chosen]


def runs(quick: bool) -> dict[str, Any]:
    """Four problems, all methods, in turn on each seed."""
    warnings.filterwarnings("ignore", message=".*create_graph=True.*")
    seeds = SEEDS[:2] if quick else SEEDS
    results: dict[str, Any] = {"setting": {"train": TRAIN, "seeds": list(seeds), "product_units": PRODUCT}}
    for letter, problem in PROBLEMS.items():
        if quick:
            settings = {name: next(iter(methods.items())) for name, methods in METHODS.items()}
        else:
            settings = {name: best(name, problem) for name in METHODS}
        costs = product_costs(problem, 5 if quick else 60)
        rows: dict[str, list[dict[str, float]]] = {name: [] for name in METHODS}
        curves: dict[str, list[tuple[float, float, float]]] = {}
        for seed in seeds:
            for name, (_, make) in settings.items():
                solve = Solve(name, make, problem, seed, limit=0.4 if quick else SECONDS)
                cost = costs["hessian" if name in ("grn_hessian", "grn_40") else "ggn"]["median"]
                measured = solve.row["closures"] + cost * solve.row["products"]
                rows[name].append(solve.row | {"measured_units": measured})
                if seed == seeds[0]:
                    curves[name] = thinned(solve.curve)
        results[letter] = {
            "label": problem.label,
            "product_cost": costs,
            "settings": {name: setting for name, (setting, _) in settings.items()},
            "methods": {name: {key: of_seeds(rows[name], key) for key in rows[name][0]} for name in METHODS},
            "curves": curves,
        }
        for name in METHODS:
            say(f"{letter} {name:12}", {key: results[letter]["methods"][name][key]["median"] for key in rows[name][0]})
    results["ratios"] = {letter: ratios(results[letter]["methods"]) for letter in PROBLEMS}
    return results | {"targets": targets(results)}


def of_seeds(rows: list[dict[str, float]], key: str) -> dict[str, Any]:
    """Of runs that reached the target and of those that gave up alike: see ``reached``."""
    values = [row[key] for row in rows]
    return spread(values) | {"of_seeds": values, "max": max(values), "sum": sum(values)}


def ratios(methods: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Ours against each form of LBFGS, seed by seed."""
    found = {}
    for peer in ("lbfgs", "lbfgs_100", "lbfgs_20"):
        for ours in OURS:
            for key in ("seconds", "cpu_seconds", "units"):
                pairs = zip(methods[ours][key]["of_seeds"], methods[peer][key]["of_seeds"], strict=True)
                found[f"{ours}_over_{peer}_{key}"] = spread([a / b for a, b in pairs])
    return found


def targets(results: dict[str, Any]) -> dict[str, Any]:
    a = results["ratios"]["A"]
    time_ratio = min(a[f"{ours}_over_lbfgs_cpu_seconds"]["median"] for ours in OURS)
    history_100 = min(a[f"{ours}_over_lbfgs_100_cpu_seconds"]["median"] for ours in OURS)
    steps = min(results["A"]["methods"][ours]["steps"]["max"] for ours in OURS)
    units = {letter: min(results[letter]["methods"][ours]["units"]["max"] for ours in OURS) for letter in "CD"}
    grn = [results[letter]["methods"][ours] for letter in "BCD" for ours in OURS]
    closures = sum(row["closures"]["sum"] for row in grn) / sum(row["steps"]["sum"] for row in grn)
    return {
        "A_seconds_at_most_half_of_best_lbfgs": target(time_ratio, time_ratio <= 0.5),
        "A_seconds_at_most_half_of_lbfgs_100": target(history_100, history_100 <= 0.5),
        "A_at_most_20_steps": target(steps, steps <= 20),
        "C_at_most_130_units": target(units["C"], units["C"] <= 130),
        "D_at_most_260_units": target(units["D"], units["D"] <= 260),
        "closures_a_step_at_most_2_2": target(closures, closures <= 2.2),
    }


def thinned(curve: list[tuple[float, float, float]], points: int = 150) -> list[tuple[float, float, float]]:
    """The smallest value so far, at about so many places."""
    low, kept = math.inf, []
    for index, (seconds, units, value) in enumerate(curve):
        low = min(low, value)
        if index % max(1, len(curve) // points) == 0 or index == len(curve) - 1:
            kept.append((round(seconds, 4), units, low))
    return kept


# ---- a step ----------------------------------------------------------------------------------------------------------


def network(hidden: int, batch: int) -> tuple[nn.Module, Callable[[], Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, 10))
    x, y = torch.randn(batch, 64), torch.randint(10, (batch,))
    return model, lambda: F.cross_entropy(model(x), y)


def trainer_of(make: Make, hidden: int, batch: int) -> tuple[Optimizer, Callable[[], Any]]:
    model, loss_of = network(hidden, batch)
    optimizer = make(model.parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        return loss

    return optimizer, lambda: optimizer.step(closure)


def peak(make: Make, hidden: int, batch: int) -> float:
    """Bytes that three steps need beyond what was there before."""
    _, take = trainer_of(make, hidden, batch)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(3):
        take()
    return 1024.0 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def in_a_process(make: Make, hidden: int, batch: int) -> float:
    with get_context("spawn").Pool(1) as pool:  # a new one, whose peak is its own
        return pool.apply(peak, (make, hidden, batch))


def step(quick: bool) -> dict[str, Any]:
    """A step with twenty products: time in gradients, and memory beside a step of SGD."""
    hidden, batch, turns = (64, 128, 4) if quick else (256, 512, 30)
    makes: dict[str, Make] = {
        curvature: partial(GradientRegularizedNewton, curvature=curvature, theta=0.0, max_krylov=20)
        for curvature in ("ggn", "hessian")
    }
    makes["sgd"] = partial(torch.optim.SGD, lr=1e-3)
    contenders = {name: trainer_of(make, hidden, batch) for name, make in makes.items()}
    costs: dict[str, list[float]] = {"ggn": [], "hessian": []}
    for turn in range(-2, turns):
        times = {}
        for name, (optimizer, take) in contenders.items():
            started = time.process_time()
            take()
            times[name] = time.process_time() - started
            if name in costs:  # what a step without a rejection costs
                times[name] -= (optimizer.metrics["grn/trials"] - 1) * times.get("sgd", 0.0)
        if turn >= 0:
            for name in costs:
                costs[name].append(times[name] / times["sgd"])
    wide, large = (128, 2_000) if quick else (512, 20_000)
    memory = {name: in_a_process(make, wide, large) for name, make in makes.items()}
    size = sum(param.numel() for param in network(wide, 1)[0].parameters())
    limit = 3 * memory["sgd"] + 24 * 4 * size
    found = {name: spread(values) for name, values in costs.items()}
    say("step, in gradients", {name: value["median"] for name, value in found.items()})
    say("memory, MB", {name: value / 1e6 for name, value in memory.items()})
    worst = max(value["median"] for value in found.values())
    return {
        "setting": {"hidden": hidden, "batch": batch, "products": 20, "memory_hidden": wide, "memory_batch": large},
        "gradients_a_step": found,
        "peak_bytes": memory,
        "targets": {
            "step_of_20_products_at_most_45_gradients": target(worst, worst <= 45),
            "memory_at_most_3_steps_and_24_vectors": target(
                max(memory["ggn"], memory["hessian"]) / limit, max(memory["ggn"], memory["hessian"]) <= limit
            ),
        },
    }


# ---- all of it -------------------------------------------------------------------------------------------------------

SHOWN = {  # Okabe and Ito's colours
    "grn_hessian": ("gradient-regularised Newton", "#d55e00"),
    "lbfgs": ("LBFGS, best of six settings", "#0072b2"),
    "lbfgs_20": ("LBFGS, history 20", "#56b4e9"),
    "adam": ("Adam, best of four rates", "#000000"),
    "soap": ("SOAP, best of four rates", "#009e73"),
}


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """Run A: the gradient's norm against seconds and against units."""
    if "runs" not in results:
        return []
    curves = results["runs"]["A"]["curves"]
    with mpl.rc_context(PAGE):
        figure, panels = plt.subplots(1, 2, figsize=(7, 3.1), sharey=True)
        ends = [0.0, 0.0]
        for name, (label, color) in SHOWN.items():
            for place, axes in enumerate(panels):
                x = [point[place] for point in curves[name]]
                axes.plot(x, [point[2] for point in curves[name]], color=color, label=label, linewidth=1.5)
                if name in ("grn_hessian", "lbfgs"):
                    ends[place] = max(ends[place], x[-1])
        for place, axes in enumerate(panels):
            axes.set_xlim(0, 1.6 * ends[place])
        panels[0].set(yscale="log", xlabel="seconds of one core", ylabel="smallest norm of the gradient")
        panels[1].set(xlabel="units: a gradient is 1, a product 2")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
        path = folder / "gradient_regularized_newton.png"
        figure.savefig(path)
        plt.close(figure)
    return [path]


if __name__ == "__main__":
    main("gradient_regularized_newton", __doc__, {"runs": runs, "step": step}, draw)
