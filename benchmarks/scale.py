"""How traffic, memory and checkpoints of the strategies grow with processes and parameters, measured and extrapolated.

    python benchmarks/scale.py [growth|sockets|extrapolated|figure|all] [--quick]

``growth`` fits small modules on a few forked processes by each strategy, and puts what the kernel, Python and the files
say beside a formula; ``sockets`` counts their connections; ``extrapolated`` puts the formulas to sizes that no machine
here has. Nothing is timed. Each section replaces its part of ``results/scale.json``.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from _plots import PAGE, mpl
from _scale import CLIENTS_PER_PROCESS, CODED, Fit
from _sections import main, say
from matplotlib.axes import Axes

from fulgurite.plugins.comm.coding_schemes import delay, make_schedule

METHODS = {  # in the colours of _plots
    "ddp": ("DDP", "#000000", "s"),
    "diloco": ("DiLoCo", "#0072b2", "o"),
    "streaming": ("Streaming DiLoCo", "#d55e00", "o"),
    "streaming_scatter": ('the same, reduction="scatter"', "#e69f00", "v"),
    "federated": ("federated", "#009e73", "D"),
    "federated_adversarial": ("federated, adversarial", "#009e73", "x"),
    "fedspeed": ("federated, FedSpeed", "#7f7f7f", "D"),
    "gc": ("gradient code, s = 1", "#cc79a7", "^"),
    "sr_sgc": ("SR-SGC", "#cc79a7", "x"),
    "m_sgc": ("M-SGC", "#56b4e9", "^"),
}
QUICK = ("streaming", "federated", "m_sgc")
# Largest distance from the formula, relative to it, above and below. Sent and busiest are of the kernel, and have heads
# and the strategies' small talk above the payload; logged are the strategies' own counters. How much is held varies
# with what gloo has let go of, and with how many gradients rank 0 has at once: there the formula is about the most.
TOLERANCES = {
    "sent": (0.10, 0.02),
    "busiest": (0.10, 0.02),
    "logged": (0.02, 0.01),
    "held": (0.20, 0.45),
    "checkpoint": (0.10, 0.02),
    "gathered": (0.10, 0.02),
}
NOT_COMPARED = {("fedspeed", "sent"), ("fedspeed", "busiest")}  # which clients move is drawn: the formula is a mean


# ---- the formulas ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """Of a fit.

    Args:
        n: processes, each a worker of one device.
        parameters: P, in float32.
        every: steps between two exchanges (H), or local steps of a client (K).
        largest: share of the parameters in the largest fragment.
        clients: of the federation, all of which have trained; ``n`` of them train in a round.
    """

    n: int
    parameters: float
    every: int
    largest: float
    clients: int


def formula(method: str, size: Size) -> dict[str, float]:
    """Bytes by the name of what has them.

    ``sent``: by a worker a step. ``busiest``: through the busiest process's link a step, in the heavier direction.
    ``logged``: by the strategy's counter a step; 0 where there is none. ``held``: most at once, beyond module,
    gradients and optimizer, in the process that holds most. ``checkpoint``: with AdamW; all files. ``gathered``: what
    crosses rank 0's link to save it.
    """
    n, p, others = size.n, size.parameters, size.n - 1
    ring = 2 * others / n  # of what is reduced, each process sends this much
    fragment = size.largest * p
    if method in CODED:
        return coded(method, size)
    if method == "ddp":
        sent = ring * 4 * p
        return figures(sent, logged=0, held=4 * p, checkpoint=12 * p)
    if method.startswith("fed"):
        clients = size.clients if method == "fedspeed" else 0
        sent = ring * 8 * p / size.every + (2 * others / n * 4 * p / size.every if clients else 0)
        held = 12 * p + (4 * p * (clients / n + 2) if clients else 0)  # also the rows that it lends and trains
        saved = 4 * p * (1 + clients) + (4 * p if clients else 0)  # FedSpeed's server has a sum of the clients' duals
        return figures(sent, logged=8 * p * n / size.every, held=held, checkpoint=saved)
    saved, gathered = 12 * p + 12 * p * n, 12 * p * others
    if method == "diloco":
        sent = ring * 4 * p / size.every
        return figures(sent, logged=sent, held=8 * p + 16 * p, checkpoint=saved, gathered=gathered)
    message = 65 / 128  # bytes a value: four bits, and one byte for each 128 values
    if method == "streaming":
        sent = others * message * p / size.every
        held = 8 * p + 12 * fragment + (n + 1) * message * fragment
    else:
        sent = others / n * (message + 2) * p / size.every
        held = 8 * p + 12 * fragment + 2 * message * fragment + 4 * fragment
        saved, gathered = 20 * p, 0
    return figures(sent, logged=sent, held=held, checkpoint=saved, gathered=gathered)


def coded(method: str, size: Size) -> dict[str, float]:
    """Each worker sends rank 0 a vector for each of its tasks, and rank 0 sends each of them one."""
    settings = {name: value for name, value in CODED[method].items() if name != "pipeline"}
    slots, late = make_schedule(n=size.n, **settings).slots, delay(n=size.n, **settings)
    vector, others = 4 * size.parameters, size.n - 1
    # Results of all workers at once, the sum and its copy; with a delay the weights of then, and sums of open jobs.
    held = vector * (slots * size.n + 2 + (2 * (late + 1) + slots if late else 0))
    return figures(
        slots * vector,
        logged=others * vector * (slots + 1),
        held=held,
        checkpoint=12 * size.parameters,
        busiest=others * vector * slots,
    )


def figures(
    sent: float, *, logged: float, held: float, checkpoint: float, busiest: float | None = None, gathered: float = 0
) -> dict[str, float]:
    busiest = sent if busiest is None else busiest
    traffic = {"sent": sent, "busiest": busiest, "logged": logged}
    return traffic | {"held": held, "checkpoint": checkpoint, "gathered": gathered}


# ---- measured --------------------------------------------------------------------------------------------------------

NOTE = (
    "A module of six equal blocks on forked processes, gloo over loopback. `sent` and `busiest` are the kernel's counts"
    " of what TCP carried (tcp_info of each connection), over two exchanges of everything; `logged` is"
    " diloco/bytes_sent, fed/bytes or gradient_coding/bytes_sent; `held` counts the storages of all tensors that Python"
    " has, and DDP's buckets, but for the module, its gradients, the optimizer and the data, at each end of a batch"
    " and whenever the strategy logs: the working memory within a call is not in it. `off` is measured over formula,"
    " less 1. Codes step on each batch (`pipeline='delayed'`), with B=1, W=2, lam=1, or s=1. Scattered, checkpoints"
    " are without `worker_state`. A federation has twice as many clients as processes, of which half train in a round"
)


def growth(quick: bool) -> dict[str, Any]:
    """Of each method, by processes and width of the module."""
    processes, widths = ((3,), (96,)) if quick else ((2, 4, 8), (128, 408))
    every = 6
    found: dict[str, Any] = {}
    for width in widths:
        for n in processes:
            for method in QUICK if quick else METHODS:
                measured = measure(Fit(method, n, width, every))
                found.setdefault(method, {}).setdefault(f"w{width}", {})[f"n{n}"] = measured
                say(f"{method}, {n} processes, width {width}", measured["off"])
    return {
        "setting": {"processes": processes, "widths": widths, "every": every, "note": NOTE},
        "methods": found,
        "worst": worst(found),
    }


def measure(fit: Fit) -> dict[str, Any]:
    """What the processes have found, beside the formula."""
    ranks = fit.run()
    first, last = fit.window
    steps = last - first
    workers = ranks[1:] if fit.method in CODED else ranks
    measured = {
        "sent": sum(rank["sent"] for rank in workers) / len(workers) / steps,
        "busiest": max(max(rank["sent"], rank["received"]) for rank in ranks) / steps,
        "logged": logged(fit, ranks[-1]),
        "held": max(rank["held"] for rank in ranks),
        "checkpoint": ranks[0]["checkpoint"],
        "gathered": ranks[0]["gathered"],
    }
    block = fit.width * (fit.width + 1)
    parameters, clients = ranks[0]["parameters"], CLIENTS_PER_PROCESS * fit.processes
    trained = ranks[0]["clients_saved"] or clients
    expected = formula(fit.method, Size(fit.processes, parameters, fit.every, 3 * block / parameters, trained))
    off = {name: measured[name] / expected[name] - 1 for name in measured if expected[name]}
    return {"parameters": parameters, "measured": measured, "formula": expected, "off": off}


def logged(fit: Fit, rank: dict[str, Any]) -> float:
    """A step's bytes by the strategy's own counter."""
    if fit.method in CODED:
        return float(rank["logged_last"])
    if fit.method.startswith("fed"):
        return float(rank["logged_last"]) / fit.every
    return float(rank["logged"]) / (2 * fit.every)


def compared(found: dict[str, Any]) -> Iterable[tuple[str, str, str, float]]:
    """Method, setting, figure, and how far it is from its formula."""
    for method, widths in found.items():
        for width, sizes in widths.items():
            for n, result in sizes.items():
                for name, off in result["off"].items():
                    if (method, name) not in NOT_COMPARED:
                        yield method, f"{width} {n}", name, off


def misfits(found: dict[str, Any]) -> list[tuple[str, str, str, float]]:
    """Figures that are further from their formula than the tolerance."""
    return [row for row in compared(found) if not -TOLERANCES[row[2]][1] <= row[3] <= TOLERANCES[row[2]][0]]


def worst(found: dict[str, Any]) -> dict[str, Any]:
    """How far the figures are from their formulas at most, to either side."""
    offs = {name: [off for *_, figure, off in compared(found) if figure == name] for name in TOLERANCES}
    return {name: {"above": max(values), "below": min(values)} for name, values in offs.items()}


# ---- connections -----------------------------------------------------------------------------------------------------

SOCKETS_NOTE = (
    "Open sockets of TCP of the process that has most, at the end of a fit. gloo joins each process with each other"
    " one, once a process group. `a_process` is the slope from the fewest to the most processes, `n64` and `n1000` are"
    " EXTRAPOLATED along it"
)


def sockets(quick: bool) -> dict[str, Any]:
    """How many connections a process has."""
    processes = (2, 3) if quick else (2, 4, 8)
    found = {}
    for method in ("streaming",) if quick else ("ddp", "streaming", "federated", "gc"):
        counts = {n: max(rank["sockets"] for rank in Fit(method, n, 16, 6).run()) for n in processes}
        (few, least), (many, most) = (min(counts.items()), max(counts.items()))
        slope = (most - least) / (many - few)
        beyond = {f"n{n}": most + slope * (n - many) for n in (64, 1000)}
        found[method] = {"measured": {f"n{n}": count for n, count in counts.items()}, "a_process": slope} | beyond
        say(f"sockets, {method}", found[method]["measured"])
    return {"setting": {"processes": processes, "note": SOCKETS_NOTE}, "methods": found}


# ---- extrapolated ----------------------------------------------------------------------------------------------------

EXTRAPOLATED_NOTE = (
    "EXTRAPOLATED: the formulas, which fit at 2 to 8 processes and up to a million parameters, at sizes that were not"
    " run. Default settings: Streaming DiLoCo every 100 steps, its largest fragment an eighth of the model; DiLoCo"
    " every 500; clients of 100 local steps, ten times as many as processes, one a process in a round. `link_s` is what"
    " the busiest link takes for a step's bytes at 10 Gbit/s, on the average of the steps, if it does nothing else,"
    " and `gather_s` what rank 0's takes for a checkpoint"
)
DEFAULT_EVERY = {"ddp": 1, "diloco": 500, "streaming": 100, "streaming_scatter": 100}
LINK = 10e9 / 8  # bytes a second


def extrapolated(quick: bool) -> dict[str, Any]:
    """At 8, 64 and 1000 processes and a billion parameters."""
    sizes = {f"n{n}": {method: at_scale(method, n, 1e9) for method in METHODS} for n in (8, 64, 1000)}
    return {
        "setting": {"parameters": 1e9, "every": {m: every_of(m) for m in METHODS}, "note": EXTRAPOLATED_NOTE},
        "sizes": sizes,
    }


def every_of(method: str) -> int:
    return 1 if method in CODED else DEFAULT_EVERY.get(method, 100)


def at_scale(method: str, n: int, parameters: float) -> dict[str, float]:
    found = formula(method, Size(n, parameters, every_of(method), 1 / 8, 10 * n))
    giga = {f"{name}_gb": found[name] / 1e9 for name in found}
    return giga | {"link_s": found["busiest"] / LINK, "gather_s": found["gathered"] / LINK}


# ---- the figure ------------------------------------------------------------------------------------------------------

DRAWN = ("ddp", "diloco", "streaming", "streaming_scatter", "federated", "gc", "m_sgc")  # others lie on one of these


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """Bytes a step against processes: measured points, and the formulas as lines through and beyond them."""
    if "growth" not in results:
        return []
    growth = results["growth"]
    with mpl.rc_context(PAGE):
        figure, panels = plt.subplots(1, 2, figsize=(7, 3.9), sharey=True)
        for axes, name in zip(panels, ("sent", "busiest"), strict=True):
            for method in filter(growth["methods"].__contains__, DRAWN):
                line(axes, method, name, growth)
            axes.axvspan(max(growth["setting"]["processes"]), 1500, color="#f4f4f4", zorder=0)
            axes.set(xscale="log", yscale="log", xlabel="processes", xlim=(1.7, 1500))
            axes.set_xticks([2, 8, 64, 1000], ["2", "8", "64", "1000"])
            axes.minorticks_off()
        axes.text(0.98, 0.02, "extrapolated", transform=axes.transAxes, ha="right", color="#7f7f7f")
        panels[0].set_ylabel("bytes a step and parameter")
        panels[0].set_title("Sent by a worker")
        panels[1].set_title("Through the busiest link, one way")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=4, fontsize=7.5)
        path = folder / "scale.png"
        figure.savefig(path)
        plt.close(figure)
    return [path]


def line(axes: Axes, method: str, name: str, growth: dict[str, Any]) -> None:
    """Of the larger module."""
    label, colour, marker = METHODS[method]
    sizes = list(growth["methods"][method].values())[-1]
    every, points = growth["setting"]["every"], [int(n[1:]) for n in sizes]
    over = [result["measured"][name] / result["parameters"] for result in sizes.values()]
    most = [*range(2, 10), *range(10, 100, 10), *range(100, 1001, 100)]
    values = [formula(method, Size(n, 1, every, 0.5, 2 * n))[name] for n in most]
    axes.plot(most, values, color=colour, linewidth=1, linestyle="--" if method == "streaming_scatter" else "-")
    axes.plot(points, over, marker, color=colour, markersize=4.5, label=label)


SECTIONS = {"growth": growth, "sockets": sockets, "extrapolated": extrapolated}

if __name__ == "__main__":
    main("scale", __doc__, SECTIONS, draw)
