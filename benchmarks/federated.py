"""Federated training beside a hand-written loop and fluke: time, processes, the attack, robust accuracy, memory.

    python benchmarks/federated.py [engine|ranks|attack|robust|memory|fluke|figure|all] [--quick]

Each section measures its methods in turn, several times, and replaces its part of ``results/federated.json``.
``--quick`` runs little of everything, and writes into ``build/benchmarks`` instead. ``fluke`` installs its peer into an
environment that is gone afterwards; where that is impossible it records why.
"""

import json
import subprocess
from pathlib import Path
from statistics import mean, median, stdev
from tempfile import TemporaryDirectory
from typing import Any

import _federated as fed
import _plots
import matplotlib as mpl
import matplotlib.pyplot as plt
from _record import spread
from _sections import Rows, main, python_with, ratio, say, summary, target
from matplotlib.figure import Figure

FLUKE = "fluke-fl==0.8.1"
METHODS = {  # of `robust`: name and colour
    "fedavg": ("FedAvg, clean training", "#009e73"),
    "fal": ("FAL", "#cc79a7"),
    "fal_fedspeed": ("FAL with FedSpeed", "#332288"),
    "fal_one_step": ("FAL, one local step", "#999933"),
}

# ---- robust accuracy -------------------------------------------------------------------------------------------------


def robust(quick: bool) -> dict[str, Any]:
    """Clean and robust accuracy on digits held out, after each round, by seeds."""
    rounds, seeds = (4, 2) if quick else (100, 20)
    fits: dict[str, list[list[dict[str, float]]]] = {name: [] for name in METHODS}
    for seed in range(seeds):
        for name, curves in fits.items():
            curves.append(fed.apart(fed.robust_fit, name, seed, rounds))
            say(f"robust, seed {seed}, {name}", curves[-1][-1])
    return {"setting": robust_setting(rounds, seeds), **robust_results(fits, [rounds // 4, rounds // 2, rounds])}


def robust_setting(rounds: int, seeds: int) -> dict[str, Any]:
    return {
        "data": "scikit-learn's digits, 1437 to train on and 360 held out by a permutation of the seed",
        "clients": 20,
        "partition": "Dirichlet 0.3, equal sizes",
        "clients_per_round": 5,
        "local_steps": 10,
        "batch_size": 16,
        "model": "MLP 64-32-10, He normal",
        "lr": 0.3,
        "fedspeed": {"lam": 10, "rho": 0.1},
        "trained_on": vars(fed.TRAINED_ON),
        "tested_on": vars(fed.TESTED_ON),
        "rounds": rounds,
        "seeds": list(range(seeds)),
        "note": "The held-out digits are all that is measured; nothing was tuned on them. FedSpeed takes two gradients"
        " of the weights a step, on the same adversarial inputs. `sd` is over seeds.",
    }


def robust_results(fits: dict[str, list[list[dict[str, float]]]], rounds: list[int]) -> dict[str, Any]:
    """Of each method the curves' mean and sd, and the seeds' values at some rounds; against FedAvg, seed by seed."""
    methods = {
        name: {
            f"round{number}": {
                what: mean_sd([curve[number - 1][what] for curve in curves]) for what in ("clean", "robust")
            }
            for number in rounds
        }
        | {"curve": {what: curve_of(curves, what) for what in ("clean", "robust")}}
        for name, curves in fits.items()
    }
    gain, cost = (differences(fits, what) for what in ("robust", "clean"))
    targets = {
        "fal_robust_above_fedavg_by_at_least_0_12": target(gain["fal"]["mean"], gain["fal"]["mean"] >= 0.12),
        "fal_clean_below_fedavg_by_at_most_0_03": target(-cost["fal"]["mean"], -cost["fal"]["mean"] <= 0.03),
    }
    return {"methods": methods, "over_fedavg": {"robust": gain, "clean": cost}, "targets": targets}


def differences(fits: dict[str, list[list[dict[str, float]]]], what: str) -> dict[str, dict[str, Any]]:
    """At the end, to FedAvg with the same seed."""
    return {
        name: mean_sd([a[-1][what] - b[-1][what] for a, b in zip(curves, fits["fedavg"], strict=True)])
        for name, curves in fits.items()
        if name != "fedavg"
    }


def mean_sd(values: list[float]) -> dict[str, Any]:
    return {"mean": mean(values), "sd": stdev(values), "of_seeds": [round(value, 4) for value in values]}


def curve_of(curves: list[list[dict[str, float]]], what: str) -> dict[str, list[float]]:
    """Mean and sd over the seeds, round by round."""
    columns = [[point[what] for point in points] for points in zip(*curves, strict=True)]
    return {"mean": [round(mean(column), 4) for column in columns], "sd": [round(stdev(column), 4) for column in columns]}


SECTIONS = {"robust": robust}


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    return []

if __name__ == "__main__":
    main("federated", __doc__, SECTIONS, draw)
