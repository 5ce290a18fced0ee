"""Figures of the results, for a page 700 pixels wide."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's colours, which all kinds of eyes tell apart; a method has one name and one colour in all figures.
STYLE = {
    "solo": ("one worker alone", "#7f7f7f"),
    "ddp": ("DDP", "#000000"),
    "ddp_bf16": ("DDP, bfloat16", "#56b4e9"),
    "post_local_sgd": ("post-local SGD", "#e69f00"),
    "diloco": ("DiLoCo", "#0072b2"),
    "streaming": ("Streaming DiLoCo", "#d55e00"),
}
PAGE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e5e5e5",
    "grid.linewidth": 0.6,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 200,
}


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """Draws what the results allow; returns the files."""
    drawn = []
    with mpl.rc_context(PAGE):
        for section, figure_of in (("loss", loss_figure), ("link", link_figure)):
            if section in results and "skipped" not in results[section]:
                figure = figure_of(results[section])
                path = folder / f"streaming_diloco_{section}.png"
                figure.savefig(path)
                plt.close(figure)
                drawn.append(path)
    return drawn


def loss_figure(loss: dict[str, Any]) -> Figure:
    """Held-out loss against tokens and against bytes; lines are means over seeds, bands reach from least to most."""
    figure, (by_tokens, by_bytes) = plt.subplots(1, 2, figsize=(7, 3), sharey=True)
    setting = loss["setting"]
    for name in ("solo", "ddp", "diloco", "streaming"):
        curves = loss["curves"][name]
        label, color = STYLE[name]
        workers = 1 if name == "solo" else setting["workers"]
        tokens = [point["step"] * workers * setting["tokens_per_step_and_worker"] / 1e6 for point in curves[0]]
        band(by_tokens, tokens, curves, color, label)
        if name == "solo":
            final = mean(curve[-1]["nats_per_byte"] for curve in curves)
            by_bytes.axhline(final, color=color, linestyle="--", linewidth=1.2)
            by_bytes.annotate(
                "one worker alone", (0.02, final), (0, 3), by_bytes.get_yaxis_transform(), "offset points", color=color
            )
        else:
            band(by_bytes, [max(point["bytes_sent"], 1.0) / 1e6 for point in curves[0]], curves, color, label)
    first = min(curves[0][0]["bytes_sent"] for name, curves in loss["curves"].items() if name != "solo") / 1e6
    by_bytes.set_xlim(left=first / 15)  # room for the name of the line
    by_tokens.set(xlabel="million training bytes seen, all workers", ylabel="held-out nats a byte")
    by_bytes.set(xlabel="megabytes sent by each worker", xscale="log")
    low, high = final_range(loss)
    by_tokens.set_ylim(low - 0.1 * (high - low), high)
    by_tokens.legend(loc="upper right")
    by_tokens.set_title("By tokens")
    by_bytes.set_title("By traffic")
    return figure


def final_range(loss: dict[str, Any]) -> tuple[float, float]:
    """From the best result to the worst one at a fifth of the run: the start would flatten all curves."""
    ends = [curve[-1]["nats_per_byte"] for curves in loss["curves"].values() for curve in curves]
    early = [curve[len(curve) // 5]["nats_per_byte"] for curves in loss["curves"].values() for curve in curves]
    return min(ends), max(early)


def band(axes: Axes, x: Sequence[float], curves: list[list[dict[str, float]]], color: str, label: str) -> None:
    columns = [[point["nats_per_byte"] for point in points] for points in zip(*curves, strict=True)]
    axes.plot(x, [mean(column) for column in columns], color=color, label=label, linewidth=1.6)
    axes.fill_between(
        x, [min(column) for column in columns], [max(column) for column in columns], color=color, alpha=0.2, linewidth=0
    )


def link_figure(link: dict[str, Any]) -> Figure:
    """Milliseconds and bytes of a step at each rate; whiskers are quartiles."""
    rates = [key for key in link if key.startswith("mbit")]
    figure, panels = plt.subplots(1, len(rates) + 1, figsize=(7, 2.7), sharey=True)
    names = list(reversed([name for name in STYLE if name in link[rates[0]]["methods"]]))
    for axes, rate in zip(panels, rates, strict=False):
        bars(axes, names, link[rate]["methods"], "seconds_per_step", 1e3, names)
        axes.set(xlabel="milliseconds a step", xlim=(0, 1.3 * axes.dataLim.x1))
        axes.set_title(f"Time at {rate.removeprefix('mbit')} Mbit/s")
    sending = [name for name in names if link[rates[0]]["methods"][name]["wire_bytes_per_step"]["median"] > 0]
    bars(panels[-1], sending, link[rates[0]]["methods"], "wire_bytes_per_step", 1e-3, names)
    panels[-1].set(xlabel="kilobytes a step and worker", xscale="log", xlim=(1, 10 * panels[-1].dataLim.x1))
    panels[-1].set_title("On the wire")
    panels[0].set_yticks(range(len(names)), [STYLE[name][0] for name in names])
    for axes in panels:
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
    return figure


def bars(axes: Axes, names: list[str], methods: dict[str, Any], figure: str, unit: float, rows: list[str]) -> None:
    """A bar a method, in the place of its name in ``rows``."""
    for name in names:
        low, value, high = (methods[name][figure][q] * unit for q in ("q25", "median", "q75"))
        whisker = [[value - low], [high - value]]
        axes.barh(rows.index(name), value, xerr=whisker, color=STYLE[name][1], error_kw={"linewidth": 1}, height=0.7)
        number = f"{value:,.0f}" if value >= 20 else f"{value:.2g}"
        end = (max(high, value), rows.index(name))
        axes.annotate(number, end, (4, 0), textcoords="offset points", va="center", fontsize=8)
