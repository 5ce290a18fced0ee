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
import matplotlib.pyplot as plt
import torch
from _sections import Rows, main, python_with, ratio, say, summary, target
from matplotlib.figure import Figure

FLUKE = "fluke-fl==0.8.1"
FEDERATION = {"clients": 100, "clients_per_round": 10, "local_steps": 10, "batch_size": 32, "optimizer": "SGD"}

# ---- a round, beside the bare passes ---------------------------------------------------------------------------------

ENGINE_NOTE = (
    "`hand` takes the same steps on the same batches, loads and averages the clients' weights, and does nothing else;"
    " `federated` is FederatedStrategy in the Trainer, `lightning` the Trainer alone with as many steps, each in turn"
    " with `hand`. Batches are rows of a tensor, read at once, for all. Ratios and differences are of"
    " neighbouring rounds. `million` is an MLP 64-960-960-10, `small` an MLP 64-32-10, `cnn` that of FedAvg's paper."
    " `max_difference` is between the weights of `hand` and `federated` at the end."
)


def engine(quick: bool) -> dict[str, Any]:
    """Rounds of a fit in turn with rounds of a loop written by hand, for models with more and less to compute."""
    found: dict[str, Any] = {}
    for net, (rounds, repetitions) in {"million": (8, 3), "small": (20, 3), "cnn": (4, 1)}.items():
        rounds, repetitions = (2, 1) if quick else (rounds, repetitions)
        rows: Rows = {"lightning": [], "federated": []}
        for _ in range(repetitions):
            for name in rows:
                fit = fed.apart(fed.beside_hand_loop, net, rounds, FEDERATION["batch_size"], name == "federated")
                rows[name] += engine_rows(fit)
                say(f"engine, {net}, {name}", rows[name][-1])
        found[net] = {"weights": fed.weights_of(net), **summary(rows), "max_difference": fit["max_difference"]}
        found[net]["rounds"] = rounds * repetitions
    over_hand = found["million"]["federated"]["over_hand"]["median"]
    return {
        "setting": FEDERATION | {"note": ENGINE_NOTE},
        **found,
        "targets": {"million_over_hand_at_most_1_10": target(over_hand, over_hand <= 1.10)},
    }


def engine_rows(fit: dict[str, Any]) -> list[dict[str, float]]:
    return [
        {
            "seconds_per_round": took,
            "hand_seconds_per_round": hand,
            "over_hand": took / hand,
            "overhead_us_per_step": (took - hand) / fit["steps"] * 1e6,
        }
        for took, hand in zip(fit["fit_s"], fit["hand_s"], strict=True)
    ]


# ---- processes -------------------------------------------------------------------------------------------------------


def ranks(quick: bool) -> dict[str, Any]:
    """Seconds of a round by one process and by two, of one thread each."""
    rounds, repetitions = (2, 2) if quick else (10, 5)
    rows: Rows = {"one": [], "two": []}
    for _ in range(repetitions):
        for devices, measured in enumerate(rows.values(), start=1):
            with TemporaryDirectory() as folder:
                seconds = fed.apart(fed.with_ranks, devices, rounds, FEDERATION["batch_size"], folder)
            measured.append({"seconds_per_round": median(seconds)})
            say(f"ranks, {devices}", measured[-1])
    speed_up = ratio(rows, "one", "two", "seconds_per_round")
    return {
        "setting": FEDERATION | {"weights": fed.weights_of("million"), "rounds": rounds, "repetitions": repetitions},
        "processes": summary(rows),
        "speed_up": speed_up,
        "targets": {"speed_up_at_least_1_7": target(speed_up["median"], speed_up["median"] >= 1.7)},
    }


# ---- the attack ------------------------------------------------------------------------------------------------------

ATTACK_NOTE = (
    "Steps of one fit, whose clients train clean or adversarially; with `backward` the inner loop is the one that peers"
    " write, `loss.backward()` through the weights too. Medians of a round, and ratios within it."
)


def attack(quick: bool) -> dict[str, Any]:
    """A step of FAL over a plain one, of a small convolutional net."""
    rounds, batch_size = (2, 8) if quick else (12, 32)
    measured = fed.apart(fed.attacked_steps, rounds, batch_size, fed.TRAINED_ON)
    rows: Rows = {kind: [{"seconds_per_step": row[kind]} for row in measured] for kind in measured[0]}
    ratios = {f"{kind}_over_plain": ratio(rows, kind, "plain", "seconds_per_step") for kind in ("fal", "backward")}
    say("attack", {name: figure["median"] for name, figure in ratios.items()})
    setting = {
        "model": "three convolutions, 28 442 weights, on 3 x 32 x 32",
        "batch_size": batch_size,
        "attack_steps": fed.TRAINED_ON.steps,
        "rounds": rounds,
        "note": ATTACK_NOTE,
    }
    fal = ratios["fal_over_plain"]["median"]
    targets = {"fal_over_plain_at_most_6_2": target(fal, fal <= 6.2)}
    return {"setting": setting, "steps": summary(rows), "ratios": ratios, "targets": targets}


# ---- robust accuracy -------------------------------------------------------------------------------------------------

METHODS = {  # of `robust`: name and colour
    "fedavg": ("FedAvg, clean training", "#009e73"),
    "fal": ("FAL", "#cc79a7"),
    "fal_fedspeed": ("FAL with FedSpeed", "#332288"),
    "fal_one_step": ("FAL, one local step", "#999933"),
}


def robust(quick: bool) -> dict[str, Any]:
    """Clean and robust accuracy on digits held out, after each round, by seeds."""
    rounds, seeds = (4, 2) if quick else (100, 10)
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
    return {
        "mean": [round(mean(column), 4) for column in columns],
        "sd": [round(stdev(column), 4) for column in columns],
    }


# ---- memory ----------------------------------------------------------------------------------------------------------

MEMORY_NOTE = (
    "`peak_of_fit_bytes` is the highest resident memory in a fit above that before it, each in a process of its own;"
    " equal fits differ by a few models, as the allocator has it. Duals are a tensor for each parameter of each client"
    " that has trained. In `client_state_dir` they are pages of a file, which count as resident until the kernel wants"
    " the memory back; `anonymous_at_end_bytes` is without them."
)


def memory(quick: bool) -> dict[str, Any]:
    """Resident memory of a fit with few and with many clients; with FedSpeed's duals, in memory and in a file."""
    if not Path("/proc/self/clear_refs").exists():
        return {"skipped": "the memory of a process is read from Linux's /proc"}
    rounds, few, many = (3, 20, 200) if quick else (20, 100, 10_000)
    cases = {  # clients, duals, repetitions
        "few_clients": (few, False, 2 if quick else 15),
        "many_clients": (many, False, 2 if quick else 15),
        "duals_in_memory": (many, True, 2),
        "duals_in_file": (many, True, 2),
    }
    rows: Rows = {name: [] for name in cases}
    for repetition in range(cases["few_clients"][2]):
        for name, (clients, duals, repetitions) in cases.items():
            if repetition < repetitions:
                with TemporaryDirectory() as folder:
                    mapped = folder if name == "duals_in_file" else None
                    rows[name].append(fed.apart(fed.memory_of_fit, clients, rounds, duals, mapped))
                say(f"memory, {name}", rows[name][-1])
    found = summary(rows)
    few_peak, many_peak = (found[name]["peak_of_fit_bytes"]["median"] for name in ("few_clients", "many_clients"))
    models = (many_peak - few_peak) / found["few_clients"]["model_bytes"]["median"]
    return {
        "setting": {
            "few": few,
            "many": many,
            "clients_per_round": 10,
            "rounds": rounds,
            "repetitions": {name: repetitions for name, (_, _, repetitions) in cases.items()},
            "note": MEMORY_NOTE,
        },
        "fits": found,
        "many_above_few_models": models,
        "targets": {"many_above_few_below_one_model": target(models, models < 1)},
    }


# ---- fluke -----------------------------------------------------------------------------------------------------------

FLUKE_NOTE = (
    "`fulgurite` reads the digits row by row, as a DataLoader over a TensorDataset does, `fulgurite_table` a batch at"
    " once, as fluke does. fluke's FAT takes 10 attack steps of 2/255 without a random start, whatever its settings"
    " say, and ours here the same; its last step is on clean and adversarial samples together, ours on the adversarial"
    " ones alone. Seconds are medians of a fit's rounds, ratios within a repetition: above 1, ours is faster."
)


def fluke(quick: bool) -> dict[str, Any]:
    """Rounds of FedAvg and of adversarial training by fluke and by ours."""
    with TemporaryDirectory() as folder:
        try:
            python = python_with(Path(folder), FLUKE, f"torch=={torch.__version__}")
            found = fluke_rounds(python, Path(folder) / "result.json", quick)
        except subprocess.SubprocessError as error:
            output = getattr(error, "stderr", None) or str(error)
            return {"skipped": f"{FLUKE}: {output.strip().splitlines()[-1]}"}
    results = {}
    for name, rows in found["rows"].items():
        ratios = {
            f"{ours}_rounds_per_second_over_fluke": ratio(rows, "fluke", ours, "seconds_per_round")
            for ours in rows
            if ours != "fluke"
        }
        results[name] = {"methods": summary(rows), "ratios": ratios}
        say(f"fluke, {name}", {ours: figure["median"] for ours, figure in ratios.items()})
    setting = {
        "data": "digits",
        "clients": 100,
        "clients_per_round": 10,
        "local_epochs": 5,
        "batch_size": 10,
        "versions": {"fluke-fl": found["fluke-fl"], "torch": found["torch"]},
        "note": FLUKE_NOTE,
    }
    return {"setting": setting, **results}


def fluke_rounds(python: str, file: Path, quick: bool) -> dict[str, Any]:
    script = str(Path(__file__).with_name("_fluke.py"))
    command = [python, script, str(file), "2" if quick else "3", str(int(quick))]
    subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True, timeout=fed.TIMEOUT_S, cwd=file.parent)
    return dict(json.loads(file.read_text()))


# ---- the figure ------------------------------------------------------------------------------------------------------


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """Draws what the results allow; returns the files."""
    if "methods" not in results.get("robust", {}):
        return []
    path = folder / "federated_robust.png"
    with plt.rc_context(_plots.PAGE):
        figure = robust_figure(results["robust"])
        figure.savefig(path)
        plt.close(figure)
    return [path]


def robust_figure(found: dict[str, Any]) -> Figure:
    """Clean and robust accuracy against rounds: means over seeds, in bands of one standard deviation."""
    figure, panels = plt.subplots(1, 2, figsize=(7, 3), sharey=True)
    for axes, what, title in zip(
        panels, ("clean", "robust"), ("Clean inputs", "Inputs perturbed by up to 0.1"), strict=True
    ):
        for name in ("fedavg", "fal", "fal_fedspeed"):
            label, color = METHODS[name]
            curve = found["methods"][name]["curve"][what]
            rounds = range(1, len(curve["mean"]) + 1)
            low, high = ([m + sign * s for m, s in zip(curve["mean"], curve["sd"], strict=True)] for sign in (-1, 1))
            axes.plot(rounds, curve["mean"], color=color, label=label, linewidth=1.6)
            axes.fill_between(rounds, low, high, color=color, alpha=0.2, linewidth=0)
        axes.set(xlabel="rounds", ylim=(0, 1), xlim=(0, len(rounds)))
        axes.set_title(title)
    panels[0].set(ylabel="accuracy on digits held out")
    panels[0].legend(loc="lower right")
    return figure


SECTIONS = {
    "engine": engine,
    "ranks": ranks,
    "attack": attack,
    "robust": robust,
    "memory": memory,
    "fluke": fluke,
}

if __name__ == "__main__":
    main("federated", __doc__, SECTIONS, draw)
