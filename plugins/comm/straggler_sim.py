"""How long training takes with slow workers: coded rounds played from recorded or drawn delays (arXiv 2211.13802)."""

import csv
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fulgurite.plugins.comm.coded_schedule import Rule, Schedule
from fulgurite.plugins.comm.coding_schemes import Scheme, make_schedule

Wait = Literal["conform", "complete", "all"]
Seconds = NDArray[np.float64]
_HEADER = ["load", "seconds_per_load", "carry_over"]


@dataclass(frozen=True)
class DelayProfile:
    """How long each worker takes in each round.

    Args:
        times: ``(n, rounds)``, seconds from the start of a round to the worker's result, not negative.
        load: share of a batch that a worker computed in them: ``1 / n`` where training was uncoded.
        seconds_per_load: seconds that one more unit of load would take a worker.
        carry_over: a worker that is late finishes what it began before it turns to the next round; for injected delays.

    Raises:
        ValueError: times are missing, negative or not finite.
    """

    times: Tensor
    load: float
    seconds_per_load: float
    carry_over: bool = False

    def __post_init__(self) -> None:
        if self.times.dim() != 2 or not self.times.numel():
            raise ValueError(
                f"`times` must have a row a worker and a column a round, got shape {tuple(self.times.shape)}"
            )
        if not bool(((self.times >= 0) & self.times.isfinite()).all()):
            raise ValueError("`times` are seconds and must be finite and not negative: some are not")
        if not (0 <= self.load < math.inf and 0 <= self.seconds_per_load < math.inf):
            raise ValueError(
                "`load` and `seconds_per_load` must be finite and not negative, got"
                f" {self.load} and {self.seconds_per_load}"
            )

    @classmethod
    def gilbert_elliott(
        cls,
        n: int,
        rounds: int,
        p: float,
        q: float,
        seed: int = 0,
        *,
        base_s: float = 0.65,
        jitter: float = 0.08,
        slowdown: float = 2.2,
        tail: float = 2.5,
        seconds_per_load: float = 2.2,
    ) -> "DelayProfile":
        """Draws a profile in which each worker turns slow and normal again at random, at load 0.

        A normal result takes ``base_s exp(jitter N(0, 1))``, a slow one ``slowdown`` times a Pareto variable more,
        whose least value is 1. Workers start in the long-run mixture of the two states.

        Args:
            n: workers.
            rounds: rounds.
            p: probability that a normal worker is slow in the next round.
            q: probability that a slow worker is normal in the next round, so bursts last ``1 / q`` rounds.
            seed: of the draw.
            base_s: median seconds of a normal result without load.
            jitter: standard deviation of the logarithm.
            slowdown: least factor of a slow result.
            tail: exponent of the Pareto variable.
            seconds_per_load: as in the class.

        Raises:
            ValueError: a probability is not from 0 to 1, or both are 0.
        """
        if not (0 <= p <= 1 and 0 <= q <= 1 and p + q > 0):
            raise ValueError(f"`p` and `q` are probabilities and must be in [0, 1], not both 0, got p={p}, q={q}")
        generator = torch.Generator().manual_seed(seed)
        chance = torch.rand(n, rounds, dtype=torch.float64, generator=generator)
        slow = torch.empty(n, rounds, dtype=torch.bool)
        slow[:, 0] = chance[:, 0] < p / (p + q)
        for r in range(1, rounds):
            slow[:, r] = torch.where(slow[:, r - 1], chance[:, r] >= q, chance[:, r] < p)
        noise = torch.randn(n, rounds, dtype=torch.float64, generator=generator)
        uniform = torch.rand(n, rounds, dtype=torch.float64, generator=generator)
        factor = torch.where(slow, slowdown * (1 - uniform) ** (-1 / tail), 1.0)
        return cls(base_s * (jitter * noise).exp() * factor, 0.0, seconds_per_load)

    @classmethod
    def from_csv(cls, path: str | Path) -> "DelayProfile":
        """Reads what :meth:`to_csv` wrote: names, their values, then a line of seconds for each worker.

        Raises:
            ValueError: the file is not of this form, or names a worker whose line is shorter than the first.
        """
        with Path(path).open(newline="") as file:
            lines = [line for line in csv.reader(file) if line]
        if len(lines) < 3 or lines[0] != _HEADER:
            raise ValueError(
                f"{path} must begin with the line {','.join(_HEADER)}, then a line with their values, then one of"
                " seconds for each worker"
            )
        for worker, line in enumerate(lines[2:]):
            if len(line) != len(lines[2]):
                raise ValueError(f"{path} has {len(line)} rounds for worker {worker}, and {len(lines[2])} for worker 0")
        load, slope, carry_over = (float(value) for value in lines[1])
        times = torch.tensor([[float(value) for value in line] for line in lines[2:]], dtype=torch.float64)
        return cls(times, load, slope, bool(carry_over))

    def to_csv(self, path: str | Path) -> None:
        """Writes the profile so that :meth:`from_csv` reads the same numbers."""
        with Path(path).open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerows([_HEADER, [self.load, self.seconds_per_load, int(self.carry_over)]])
            writer.writerows(self.times.double().tolist())

    def at_load(self, load: float) -> "DelayProfile":
        """The same delays with another share of the batch: ``(load - self.load) * seconds_per_load`` on top.

        Raises:
            ValueError: results would come before their round.
        """
        times = self.times + (load - self.load) * self.seconds_per_load
        if bool((times < 0).any()):
            raise ValueError(
                f"`load` of {load:g} is so far below the {self.load:g} of the profile that, with `seconds_per_load` of"
                f" {self.seconds_per_load:g}, results would come before 0 s: measure it by `fit_load_slope`"
            )
        return replace(self, times=times, load=load)


class InjectedDelays:
    """Makes a worker of a real run as slow as a profile says: it sleeps before each of its small pieces of work.

    Args:
        profile: for as many workers or more; its rounds come again and again.
        worker: whose row.
        load: share of the batch that a worker computes in a round.

    Raises:
        ValueError: the profile has no such worker, or its delays cannot be those of so little load.
    """

    def __init__(self, profile: DelayProfile, worker: int, load: float) -> None:
        if worker >= len(profile.times):
            raise ValueError(f"`profile` has delays of {len(profile.times)} workers, and there is a worker {worker}")
        self._carry_over = profile.carry_over
        self._seconds = profile.at_load(load).times[worker].tolist()

    def sleep(self, r: int, pieces: int, is_over: Callable[[], bool]) -> None:
        """Sleeps for one of the ``pieces`` of a round's work; unless delays carry over, no longer than the round."""
        end = time.monotonic() + self._seconds[r % len(self._seconds)] / pieces
        while (left := end - time.monotonic()) > 0 and (self._carry_over or not is_over()):
            time.sleep(min(left, 0.005))


@dataclass(frozen=True)
class SimResult:
    """What a simulated run took.

    Args:
        total_s: seconds of all rounds.
        round_s: ``(rounds,)``, seconds of each; the last ``delay`` only finish what was begun.
        waits: rounds that could not end at ``1 + mu`` times their first result.
        finished_at: ``(jobs,)``, seconds from the start to the end of the round in which each job was whole.
        scheme: its name.
        params: its parameters.
        load: share of a batch that a worker computes in a round.
    """

    total_s: float
    round_s: Tensor
    waits: int
    finished_at: Tensor
    scheme: Scheme = "gc"
    params: dict[str, int] = field(default_factory=dict)
    load: float = 0.0


def simulate(
    scheme: Scheme,
    profile: DelayProfile,
    jobs: int,
    mu: float = 1.0,
    wait: Wait = "complete",
    carry_over: bool = False,
    seconds_per_vector: float = 0.0,
    **params: int,
) -> SimResult:
    """Plays a run of ``jobs`` gradients with a scheme, round by round (arXiv 2211.13802).

    A round ends ``1 + mu`` times as late as its first result, or with the last result if that is earlier; where the
    scheme cannot do without the results that are missing then, with the first later one that makes it so. Every round
    is charged the scheme's full load, also the first and last ones, in which workers have fewer tasks.

    Args:
        scheme: ``"gc"``, ``"sr_sgc"`` or ``"m_sgc"``.
        profile: at least ``jobs + delay`` rounds; its workers are the scheme's.
        jobs: gradients.
        mu: patience with late results, above 0.
        wait: what a round may not do without: ``"complete"`` and ``"conform"`` as in
            :meth:`GradientCode.affordable`; ``"all"`` takes the latter, and where it fails waits for everybody.
        carry_over: False: a late worker is stopped and starts the next round afresh, as a serverless call. True: it
            finishes what it has begun first, as a process that is stalled, and a round that ended before it could begin
            passes it by; a late result is not used.
        seconds_per_vector: seconds that a vector takes from a worker to the root; M-SGC sends ``W - 1 + B`` a round.
        **params: ``s`` for ``"gc"``; ``B``, ``W`` and ``lam`` for the others.

    Raises:
        ValueError: an argument is out of range, or the profile has too few rounds.

    Example:
        >>> times = torch.tensor([[1.0, 1.0], [1.0, 9.0], [1.0, 1.0]])
        >>> simulate("gc", DelayProfile(times, load=1 / 3, seconds_per_load=0.0), jobs=2, s=1).round_s
        tensor([1., 2.], dtype=torch.float64)
    """
    schedule = make_schedule(scheme, len(profile.times), jobs=jobs, **params)
    _check(schedule, profile, jobs, mu, wait, seconds_per_vector)
    delays = profile.at_load(schedule.load).times.double().numpy() + seconds_per_vector * schedule.slots
    rounds = jobs + schedule.delay
    free_at, finished_at = np.zeros(schedule.n), np.full(jobs, np.nan)
    round_s, now, waits = np.zeros(rounds), 0.0, 0
    for r in range(rounds):
        busy = schedule.begin(r).busy
        if busy.any():
            start = np.maximum(now, free_at) if carry_over else now
            arrival = np.where(busy, start + delays[:, r], np.inf)
            end, waited = _end(schedule, arrival, now, mu, wait)
            schedule.mark(r, arrival <= end)
            if carry_over:  # who could not begin is free as before
                free_at = np.where(busy & (start < end), arrival, free_at)
            round_s[r], now, waits = end - now, end, waits + waited
        # A round fills one column of a job's table at most.
        for job in range(max(0, r - schedule.delay), min(r + 2 - schedule.plain - schedule.groups, jobs)):
            if np.isnan(finished_at[job]) and schedule.is_complete(job):
                finished_at[job] = now
    return SimResult(
        now, torch.from_numpy(round_s), waits, torch.from_numpy(finished_at), scheme, dict(params), schedule.load
    )


def _end(schedule: Schedule, arrival: Seconds, now: float, mu: float, wait: Wait) -> tuple[float, bool]:
    """When a round ends, and whether it had to wait for that."""
    rule: Rule = "conform" if wait == "all" else wait
    times = np.sort(arrival[np.isfinite(arrival)])
    deadline = now + (1 + mu) * (times[0] - now)
    if times[-1] <= deadline:
        return float(times[-1]), False
    if schedule.affordable(arrival > deadline, rule):
        return float(deadline), False
    if wait == "all":
        return float(times[-1]), True
    # With fewer missing a round stays affordable, so the first arrival that makes it so is found by halving.
    low, high = int(np.searchsorted(times, deadline, side="right")), len(times) - 1
    while low < high:
        middle = (low + high) // 2
        if schedule.affordable(arrival > times[middle], rule):
            high = middle
        else:
            low = middle + 1
    return float(times[low]), True


def search(
    profile: DelayProfile,
    jobs: int,
    schemes: Sequence[Scheme] = ("gc", "sr_sgc", "m_sgc"),
    max_delay: int = 3,
    carry_over: bool = True,
    seconds_per_vector: float = 0.0,
    mu: float = 1.0,
) -> list[SimResult]:
    """Simulates the schemes with many parameters on one profile; ``"gc"`` with ``s=0`` is training without a code.

    All numbers of late workers are tried up to 9, from there on in steps of about a sixth. With the rule that the
    simulation waits by, SR-SGC depends on ``B`` and its ``s`` alone: ``W = B + 1`` stands for all ``W``. Without late
    workers, ``lam=0``, both are training without a code, and left out.

    Args:
        profile: at least ``jobs + max_delay`` rounds.
        jobs: gradients of a run.
        schemes: which to try.
        max_delay: longest delay in rounds.
        carry_over: as in :func:`simulate`; True is how processes behave.
        seconds_per_vector: the same.
        mu: the same.

    Returns:
        A result a setting, the fastest first.
    """
    n = len(profile.times)
    found = []
    for scheme in schemes:
        for params in _grid(scheme, n, max_delay):
            run = simulate(scheme, profile, jobs, mu, "complete", carry_over, seconds_per_vector, **params)
            found.append(run)
    return sorted(found, key=lambda run: run.total_s)


def _grid(scheme: Scheme, n: int, max_delay: int) -> list[dict[str, int]]:
    counts = [0]
    while counts[-1] < n:
        counts.append(min(n, counts[-1] + max(1, round(counts[-1] / 6))))
    if scheme == "gc":
        return [{"s": s} for s in counts if s < n]
    if scheme == "sr_sgc":
        windows = [(B, B + 1) for B in range(1, max_delay + 1)]
        counts = [min(2 * s, n) for s in counts if 2 * s <= n + 1]  # s is half of lam, rounded up
    else:
        windows = [(B, W) for W in range(2, max_delay + 2) for B in range(1, W) if max_delay >= W - 2 + B]
    return [{"B": B, "W": W, "lam": lam} for B, W in windows for lam in counts if lam]


def fit_load_slope(profiles: Sequence[DelayProfile]) -> float:
    """Seconds that a unit of load takes: the slope of the mean time against the load, by least squares.

    Args:
        profiles: recorded at two or more loads.

    Raises:
        ValueError: all have the same load.
    """
    loads = np.array([profile.load for profile in profiles])
    means = np.array([float(profile.times.double().mean()) for profile in profiles])
    if len(set(loads.tolist())) < 2:
        raise ValueError(f"`profiles` must have been recorded at two or more loads, got {sorted(set(loads.tolist()))}")
    spread = loads - loads.mean()
    return float(spread @ means / (spread @ spread))


def _check(
    schedule: Schedule, profile: DelayProfile, jobs: int, mu: float, wait: Wait, seconds_per_vector: float
) -> None:
    if not mu > 0:
        raise ValueError(f"`mu` is the patience with late results and must be positive, got {mu}")
    if wait not in get_args(Wait):
        raise ValueError(f"`wait` must be one of {get_args(Wait)}, got {wait!r}")
    if not seconds_per_vector >= 0:
        raise ValueError(f"`seconds_per_vector` must be at least 0, got {seconds_per_vector}")
    if profile.times.shape[1] < jobs + schedule.delay:
        raise ValueError(
            f"`profile` has {profile.times.shape[1]} rounds, and {jobs} jobs with a delay of {schedule.delay} take"
            f" {jobs + schedule.delay}: record more rounds or ask for fewer jobs"
        )
