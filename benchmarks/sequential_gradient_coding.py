"""How long training takes with slow workers, uncoded and with three codes; and what it costs to simulate that.

    python benchmarks/sequential_gradient_coding.py
        [live|overhead|simulation|carry_over|simulator|peer|published_profile|figure|all]
        [--quick] [--peer FOLDER] [--profile FILE]

``live`` trains six processes that sleep now and then, ``overhead`` two that do not, beside DDP. ``simulation`` plays
drawn delays of 256 workers with each scheme's best parameters; ``carry_over`` does so where a late worker must finish
what it began; ``simulator`` times a simulated run and a search. ``peer`` times the paper's own simulator in turn, from
a checkout of mamaj/Sequential-Gradient-Coding-2; ``published_profile`` plays delays from a CSV of
``DelayProfile.to_csv``. These two are left out where they are given no path. Each section replaces its part of
``results/sequential_gradient_coding.json``.
"""

import importlib
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from time import process_time
from typing import Any

import matplotlib.pyplot as plt
from _coded_training import MU, SECONDS_PER_LOAD, WORLDS, Fit, with_delays, without_delays
from _coded_training import SCHEMES as TRAINED
from _plots import PAGE, mpl
from _record import spread
from _sections import Rows, main, ratio, say, summary, target
from matplotlib.axes import Axes

from fulgurite.plugins.comm.coding_schemes import Scheme
from fulgurite.plugins.comm.straggler_sim import DelayProfile, SimResult, Wait, search, simulate

Params = dict[str, int]

# ---- training ------------------------------------------------------------------------------------------------------

LIVE_NOTE = (
    "Seconds of training, from the first batch to the last step, of processes that sleep on top of their work:"
    " `isolated`, 8 % of the results take 3 to 9 times 50 ms; `bursts`, 1 result in 25 makes a worker slow, for two"
    " rounds on average, 3 times or more. `stopped`: they sleep until their round is over at most; `carried_over`: they"
    " sleep on. Ratios are within a repetition, each of which draws its own delays. `apart` is how far the weights are"
    " from those uncoded"
)


def live(quick: bool) -> dict[str, Any]:
    """Wall time of all schemes at equal results, with injected delays."""
    fit = Fit(3, 8, 48, accumulate=4) if quick else Fit(6, 48, 96, accumulate=8)
    repetitions = 2 if quick else 5
    names = ("isolated_stopped", "bursts_carried_over") if quick else tuple(WORLDS)
    schemes = ("uncoded", "gc_2", "m_sgc") if quick else tuple(TRAINED)
    found = with_delays(fit, repetitions, names, schemes, say)
    worlds = {
        world: {name: compared_to(rows["uncoded"], row) for name, row in rows.items()} for world, rows in found.items()
    }
    measured = worlds["isolated_stopped"]["gc_2"]["over_uncoded"]["median"]
    shape = {"processes": fit.processes, "batches": fit.batches, "batch_size": fit.batch_size}
    numbers = {"accumulate_grad_batches": fit.accumulate, "mu": MU, "seconds_per_load": SECONDS_PER_LOAD}
    return {
        "setting": shape | numbers | {"repetitions": repetitions, "schemes": TRAINED, "note": LIVE_NOTE},
        "worlds": worlds,
        "targets": {"gc_2_over_uncoded_at_most_0_6": target(measured, measured <= 0.6)},
    }


def compared_to(uncoded: dict[str, list[float]], row: dict[str, list[float]]) -> dict[str, Any]:
    """Of a scheme's repetitions."""
    over = [a / b for a, b in zip(row["seconds"], uncoded["seconds"], strict=True)]
    figures = {"seconds": row["seconds"], "over_uncoded": over, "waits": row["waits"]}
    return {name: spread(values) for name, values in figures.items()} | {"apart": max(row["apart"])}


OVERHEAD_NOTE = (
    "Two processes, an MLP of 10 million parameters, plain SGD, no delays. The median step of a run; ratios are within"
    " a repetition. `uncoded` sends each gradient to rank 0 and the sum back; DDP reduces buckets while it goes back"
)


def overhead(quick: bool) -> dict[str, Any]:
    """A round without a code beside a step of DDP."""
    repetitions, batches, width = (2, 6, 64) if quick else (7, 24, 2750)
    found: dict[str, Any] = {}
    for per_process in (64, 256):
        rows = without_delays(Fit(2, batches, 2 * per_process, inputs=784, width=width), repetitions)
        over = {key: ratio(rows, "uncoded", "ddp", key) for key in ("median_step_s", "mean_step_s")}
        found[f"batch_{per_process}"] = {"methods": summary(rows), "uncoded_over_ddp": over}
        say(f"overhead, {per_process} samples a process", {"over DDP": over["median_step_s"]["median"]})
    most = max(figures["uncoded_over_ddp"]["median_step_s"]["median"] for figures in found.values())
    return {
        "setting": {"processes": 2, "batches": batches, "width": width, "repetitions": repetitions}
        | {"note": OVERHEAD_NOTE},
        "batch_sizes": found,
        "targets": {"uncoded_over_ddp_at_most_1_1": target(most, most <= 1.1)},
    }


# ---- drawn delays ----------------------------------------------------------------------------------------------------

# Two-state Markov chains: bursts last 1 / q rounds. Load is dear where a unit of it takes long beside the 0.65 s of a
# result without load.
PROFILES: dict[str, dict[str, float]] = {
    "short_cheap": {"p": 0.02, "q": 0.97, "seconds_per_load": 2.2},
    "short_dear": {"p": 0.02, "q": 0.97, "seconds_per_load": 8.0},
    "medium_cheap": {"p": 0.01, "q": 0.90, "seconds_per_load": 2.2},
    "medium_dear": {"p": 0.01, "q": 0.90, "seconds_per_load": 8.0},
    "long": {"p": 0.01, "q": 0.6, "seconds_per_load": 1.122},
}
WINDOWS = ((1, 2), (2, 3), (1, 3), (2, 4))  # B, W
LONGEST_DELAY = 4


@dataclass(frozen=True)
class Size:
    """How much is simulated."""

    workers: int = 256
    jobs: int = 200
    seeds: tuple[int, ...] = (0, 1, 2)
    s: tuple[int, ...] = tuple(range(0, 40, 2))
    lam: tuple[int, ...] = tuple(range(8, 80, 10))

    def profile(self, name: str, seed: int) -> DelayProfile:
        return DelayProfile.gilbert_elliott(self.workers, self.jobs + LONGEST_DELAY, seed=seed, **PROFILES[name])

    def grid(self, scheme: Scheme) -> list[Params]:
        if scheme == "gc":
            return [{"s": s} for s in self.s]
        windows = [(B, W) for B, W in WINDOWS if scheme == "m_sgc" or (W - 1) % B == 0]
        return [{"B": B, "W": W, "lam": lam} for B, W in windows for lam in self.lam]


FULL = Size()
QUICK = Size(workers=48, jobs=12, seeds=(0, 1), s=(0, 4, 8), lam=(8, 28))
RULES: dict[str, tuple[Scheme, Wait]] = {
    "gc": ("gc", "complete"),
    "gc_all": ("gc", "all"),
    "sr_sgc": ("sr_sgc", "complete"),
    "m_sgc_all": ("m_sgc", "all"),
    "m_sgc_conform": ("m_sgc", "conform"),
    "m_sgc": ("m_sgc", "complete"),
}
SETTING_NOTE = (
    "Seconds of a whole run, also of the rounds that only finish what was begun. `over_gc` is relative to the best `gc`"
    " of the same seed; each scheme has its best parameters of the grid, seed by seed. `_all` waits for everybody where"
    " the model of late workers is broken, as the paper's simulator does, `_conform` only until it holds, and the rest"
    " only until all jobs can still be completed"
)


def simulation(quick: bool) -> dict[str, Any]:
    """Late workers are stopped when a round ends, as serverless calls."""
    size = QUICK if quick else FULL
    return setting(size) | {"profiles": {name: played(name, size, RULES, carry_over=False) for name in PROFILES}}


def carry_over(quick: bool) -> dict[str, Any]:
    """The same where late workers finish first what they began, as stalled processes, and where they are stopped."""
    size = QUICK if quick else FULL
    rules = {name: RULES[name] for name in ("gc", "sr_sgc", "m_sgc")}
    worlds = {"off": False, "on": True}
    return setting(size) | {
        "profiles": {
            name: {key: played(name, size, rules, carried) for key, carried in worlds.items()} for name in PROFILES
        }
    }


def setting(size: Size) -> dict[str, Any]:
    grids = {"s": size.s, "B_W": WINDOWS, "lam": size.lam}
    shape = {"workers": size.workers, "jobs": size.jobs, "seeds": size.seeds, "mu": 1.0}
    return {"setting": shape | {"profiles": PROFILES, "grid": grids, "note": SETTING_NOTE}}


def played(name: str, size: Size, rules: dict[str, tuple[Scheme, Wait]], carry_over: bool) -> dict[str, Any]:
    """Each rule's best run, of every seed."""
    runs: dict[str, list[SimResult]] = {key: [] for key in ("uncoded", *rules)}
    for seed in size.seeds:
        profile = size.profile(name, seed)
        runs["uncoded"].append(simulate("gc", profile, size.jobs, carry_over=carry_over, s=0))
        for key, (scheme, wait) in rules.items():
            runs[key].append(best(scheme, size.grid(scheme), profile, size.jobs, wait, carry_over))
    found = compared(runs)
    say(f"{name}, carry over {carry_over}", {key: figures["over_gc"]["mean"] for key, figures in found.items()})
    return found


def best(
    scheme: Scheme, grid: Iterable[Params], profile: DelayProfile, jobs: int, wait: Wait, carry_over: bool = False
) -> SimResult:
    runs = (simulate(scheme, profile, jobs, wait=wait, carry_over=carry_over, **params) for params in grid)
    return min(runs, key=lambda run: run.total_s)


def compared(runs: dict[str, list[SimResult]]) -> dict[str, dict[str, Any]]:
    return {
        key: {
            "seconds": mean_sd([run.total_s for run in of_seeds]),
            "over_gc": mean_sd([run.total_s / gc.total_s for run, gc in zip(of_seeds, runs["gc"], strict=True)]),
            "params": [run.params for run in of_seeds],
            "waits": [run.waits for run in of_seeds],
        }
        for key, of_seeds in runs.items()
    }


def mean_sd(values: list[float]) -> dict[str, Any]:
    return {"mean": mean(values), "sd": stdev(values), "of_seeds": values}


# ---- the time of simulating ------------------------------------------------------------------------------------------

TIMED: dict[str, tuple[Scheme, Params]] = {
    "gc": ("gc", {"s": 8}),
    "sr_sgc": ("sr_sgc", {"B": 1, "W": 2, "lam": 16}),
    "m_sgc": ("m_sgc", {"B": 1, "W": 2, "lam": 28}),
    "m_sgc_long": ("m_sgc", {"B": 2, "W": 4, "lam": 28}),
}


def simulator(quick: bool) -> dict[str, Any]:
    """CPU seconds of a run of 500 gradients, and of a search for the parameters of 200."""
    size = Size(48, 20) if quick else Size(256, 500)
    profile, repetitions = size.profile("short_dear", seed=0), 2 if quick else 15
    rows: Rows = {name: [] for name in TIMED}
    for _ in range(repetitions):
        for name, (scheme, params) in TIMED.items():
            rows[name].append({"seconds": timed(partial(simulate, scheme, profile, size.jobs, **params))})
    slowest = max(spread([row["seconds"] for row in measured])["median"] for measured in rows.values())
    found = searched(Size(24, 10) if quick else Size(), max_delay=2 if quick else 8, repetitions=2 if quick else 3)
    say("simulator", {"seconds": slowest, "search of 1000": found["seconds_of_1000"]["median"]})
    return {
        "setting": {"workers": size.workers, "jobs": size.jobs, "repetitions": repetitions, "params": TIMED},
        "runs": summary(rows),
        "search": found,
        "targets": {
            "run_at_most_0_2_s": target(slowest, slowest <= 0.2),
            "search_of_1000_at_most_60_s": target(
                found["seconds_of_1000"]["median"], found["seconds_of_1000"]["median"] <= 60
            ),
        },
    }


def searched(size: Size, max_delay: int, repetitions: int) -> dict[str, Any]:
    """A whole search, on one core."""
    drawn = DelayProfile.gilbert_elliott(size.workers, size.jobs + max_delay, **PROFILES["short_dear"])
    seconds, runs = [], []
    for _ in range(repetitions):
        start = process_time()
        runs = search(drawn, size.jobs, max_delay=max_delay)
        seconds.append(process_time() - start)
    first = {scheme: next(run for run in runs if run.scheme == scheme) for scheme in ("gc", "sr_sgc", "m_sgc")}
    return {
        "workers": size.workers,
        "jobs": size.jobs,
        "max_delay": max_delay,
        "carry_over": True,
        "parameter_sets": len(runs),
        "cores": 1,
        "seconds": spread(seconds),
        "seconds_of_1000": spread([1000 / len(runs) * value for value in seconds]),
        "best": {scheme: {"seconds": run.total_s, "params": run.params} for scheme, run in first.items()},
    }


def timed(work: Callable[[], object]) -> float:
    start = process_time()
    work()
    return process_time() - start


# ---- the paper's simulator -------------------------------------------------------------------------------------------

PEER_NOTE = (
    "The peer's objects from `2_find_runtimes`, and `simulate` with the same rule, `all`, in turn on the same delays; a"
    " peer's GC with `s` bears one late worker fewer and so gets one more. Above 1, ours is faster. `totals_apart` says"
    " how far the simulated totals are apart, relatively: for SR-SGC the rules differ, as the peer judges the rounds"
    " with few late workers one by one and not by whole windows"
)


def peer(quick: bool, folder: Path | None) -> dict[str, Any]:
    """CPU seconds of a simulated run, theirs and ours."""
    if folder is None:
        return {"skipped": "no --peer FOLDER with a checkout of mamaj/Sequential-Gradient-Coding-2"}
    size, repetitions = (Size(48, 20), 2) if quick else (Size(256, 500), 15)
    drawn = size.profile("short_dear", seed=0)
    result: dict[str, Any] = {}
    with importable(folder / "2_find_runtimes"):
        for name, (scheme, params) in TIMED.items():
            ours = simulate(scheme, drawn, size.jobs, wait="all", **params)
            theirs = played_by_peer(scheme, size, params, drawn.at_load(ours.load))
            contenders = {
                "peer": partial(played_by_peer, scheme, size, params, drawn.at_load(ours.load)),
                "fulgurite": partial(simulate, scheme, drawn, size.jobs, wait="all", **params),
            }
            rows: Rows = {key: [] for key in contenders}
            for _ in range(repetitions):
                for key, run in contenders.items():
                    rows[key].append({"seconds": timed(run)})
            result[name] = {
                "methods": summary(rows),
                "peer_over_fulgurite": ratio(rows, "peer", "fulgurite", "seconds"),
                "totals_apart": abs(theirs / ours.total_s - 1),
            }
            say(f"peer, {name}", {"over ours": result[name]["peer_over_fulgurite"]["median"]})
    most = max(found["peer_over_fulgurite"]["median"] for found in result.values())
    return {
        "setting": {"workers": size.workers, "jobs": size.jobs, "repetitions": repetitions, "note": PEER_NOTE},
        "schemes": result,
        "targets": {"peer_over_fulgurite_at_least_50": target(most, most >= 50)},
    }


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def played_by_peer(scheme: Scheme, size: Size, params: Params, profile: DelayProfile) -> float:
    """Seconds of the run that their objects simulate."""
    names = {"gc": "GradientCoding", "sr_sgc": "SelectiveRepeatSGC", "m_sgc": "MultiplexedSGC"}
    modules = {"gc": "gradient_coding", "sr_sgc": "selective_repeat_sgc", "m_sgc": "multiplexed_sgc"}
    kind = getattr(importlib.import_module(modules[scheme]), names[scheme])
    numbers = [params["s"] + 1] if scheme == "gc" else [params[key] for key in ("B", "W", "lam")]
    model = kind(size.workers, *numbers, size.jobs, 1.0, profile.times.numpy())
    model.run()
    return float(model.durations.sum())


# ---- recorded delays -------------------------------------------------------------------------------------------------

PUBLISHED_NOTE = (
    "A profile that the paper's authors recorded on AWS Lambda, at load 0: 256 workers, 30 rounds, Canada, batch 2048."
    " Best of all `s` below 40 and all `lam` below 80 with the windows of the grid; a job for each round but the"
    " longest delay"
)


def published_profile(quick: bool, file: Path | None) -> dict[str, Any]:
    """The best runs on recorded delays."""
    if file is None:
        return {"skipped": "no --profile FILE"}
    profile = DelayProfile.from_csv(file)
    workers, rounds = profile.times.shape
    step = 13 if quick else 1
    counts = {"s": tuple(range(0, min(40, workers), step)), "lam": tuple(range(1, min(80, workers + 1), step))}
    size = Size(workers, rounds - LONGEST_DELAY, seeds=(), **counts)
    runs = {"uncoded": simulate("gc", profile, size.jobs, s=0)}
    for key, (scheme, wait) in (RULES | {"sr_sgc_all": ("sr_sgc", "all")}).items():
        runs[key] = best(scheme, size.grid(scheme), profile, size.jobs, wait)
    say("published profile", {key: run.total_s for key, run in runs.items()})
    shape = {"workers": workers, "rounds": rounds, "jobs": size.jobs, "mu": 1.0}
    return {
        "setting": shape | {"seconds_per_load": profile.seconds_per_load, "note": PUBLISHED_NOTE},
        "best": {
            key: {
                "seconds": run.total_s,
                "over_gc": run.total_s / runs["gc"].total_s,
                "params": run.params,
                "load": run.load,
                "waits": run.waits,
            }
            for key, run in runs.items()
        },
    }


# ---- the figure ------------------------------------------------------------------------------------------------------

SCHEMES = {  # in the colours of _plots
    "uncoded": ("uncoded", "#000000", "s"),
    "sr_sgc": ("SR-SGC", "#0072b2", "o"),
    "m_sgc_all": ("M-SGC, waiting for all", "#e69f00", "D"),
    "m_sgc": ("M-SGC", "#d55e00", "D"),
}


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """Time relative to the best gradient code, where late work is stopped and where it goes on."""
    if not {"simulation", "carry_over"} <= set(results):
        return []
    stopped = results["simulation"]["profiles"]
    carried = {name: found["on"] for name, found in results["carry_over"]["profiles"].items()}
    with mpl.rc_context(PAGE):
        figure, panels = plt.subplots(1, 2, figsize=(7, 3.2), sharey=True, sharex=True)
        for axes, profiles in zip(panels, (stopped, carried), strict=True):
            dots(axes, profiles)
        panels[0].set_yticks(range(len(PROFILES)), [described(name) for name in PROFILES], fontsize=7.5)
        panels[0].set_ylim(len(PROFILES) - 0.5, -0.5)
        panels[0].set_xscale("log")
        panels[0].set_xticks([0.8, 1, 1.5, 2, 3], ["0.8", "1", "1.5", "2", "3"])
        panels[0].minorticks_off()
        panels[0].set_title("Late workers are stopped (serverless)")
        panels[1].set_title("Late workers finish first (processes)")
        figure.supxlabel("time of a run, best gradient code = 1 (whiskers: least and most of the seeds)", fontsize=9)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(SCHEMES), fontsize=8)
        path = folder / "sequential_gradient_coding_simulation.png"
        figure.savefig(path)
        plt.close(figure)
    return [path]


def dots(axes: Axes, profiles: dict[str, Any]) -> None:
    axes.axvline(1, color="#7f7f7f", linewidth=1)
    for place, (key, (label, colour, marker)) in enumerate(SCHEMES.items()):
        rows = [row for row, name in enumerate(profiles) if key in profiles[name]]
        found = [profiles[name][key]["over_gc"] for name in profiles if key in profiles[name]]
        if not found:
            continue
        means = [figures["mean"] for figures in found]
        whiskers = [
            [figures["mean"] - min(figures["of_seeds"]) for figures in found],
            [max(figures["of_seeds"]) - figures["mean"] for figures in found],
        ]
        heights = [row + 0.17 * (place - (len(SCHEMES) - 1) / 2) for row in rows]
        fill = "white" if key.endswith("_all") else colour
        axes.errorbar(
            means, heights, xerr=whiskers, fmt=marker, color=colour, mfc=fill, markersize=4.5, linewidth=1, label=label
        )
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)


def described(name: str) -> str:
    numbers = PROFILES[name]
    return (
        f"p {numbers['p']:g}, bursts of {1 / numbers['q']:.2g} rounds\n{numbers['seconds_per_load']:g} s a unit of load"
    )


SECTIONS = {
    "live": live,
    "overhead": overhead,
    "simulation": simulation,
    "carry_over": carry_over,
    "simulator": simulator,
    "peer": peer,
    "published_profile": published_profile,
}
PATHS = {
    "peer": ("peer", "a checkout of mamaj/Sequential-Gradient-Coding-2"),
    "published_profile": ("profile", "delays in a CSV as DelayProfile.to_csv writes it"),
}

if __name__ == "__main__":
    main("sequential_gradient_coding", __doc__, SECTIONS, draw, PATHS)
