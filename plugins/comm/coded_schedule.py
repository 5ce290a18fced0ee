"""Who computes what in which round, and when a round may end: sequential gradient coding (arXiv 2211.13802).

A schedule knows which results have come in, and nothing of gradients. Job t is one gradient; it starts in round t and
must be whole at the end of round ``t + delay``. A worker's results for a job fill the ``plain + groups`` columns of a
table: a plain one is needed from every worker, a coded one from all but ``s`` of them.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from fulgurite.plugins.comm.encoding import check_missing
from fulgurite.plugins.comm.straggler_models import (
    ArbitraryModel,
    BurstyModel,
    BurstyOrFewModel,
    PerRoundModel,
    StragglerModel,
    check_burst,
)

Rule = Literal["conform", "complete"]
_RULES: tuple[Rule, ...] = get_args(Rule)  # once: a simulation asks in each round
Mask = NDArray[np.bool_]
IDLE = -1


@dataclass(frozen=True)
class Plan:
    """The tasks of a round, ``(slots, n)`` each: the job that worker i serves in a slot, and the column it fills.

    ``IDLE`` in ``columns`` where it has nothing to do. ``table`` is the shape of what they fill.
    """

    jobs: NDArray[np.int64]
    columns: NDArray[np.int64]
    table: tuple[int, ...]

    @cached_property
    def busy(self) -> Mask:
        """``(n,)``: the workers that have a task."""
        busy: Mask = (self.columns != IDLE).any(0)
        return busy

    @cached_property
    def cells(self) -> NDArray[np.int64]:
        """``(slots, n)``: where in the flat table a result goes."""
        blocks, rows, n = self.table
        cells: NDArray[np.int64] = (self.jobs % blocks * rows + self.columns % rows) * n + np.arange(n)
        return cells


class Schedule(ABC):
    """What the three schemes have in common.

    Args:
        n: workers.
        s: workers whose coded result a job can do without.
        delay: rounds from a job's first to its last (T in the paper).
        plain: columns that every worker must fill.
        groups: columns that all but ``s`` workers must fill.
        models: the patterns of late workers that are borne; one of them must hold from the first round on.
        jobs: number of jobs; None for no end.
    """

    slots = 1  # tasks of a worker in a round, of equal cost
    load: float  # share of a batch that a worker computes in a round

    def __init__(
        self, n: int, s: int, delay: int, plain: int, groups: int, models: list[StragglerModel], jobs: int | None
    ) -> None:
        if jobs is not None and jobs < 1:
            raise ValueError(f"`jobs` counts gradients and must be at least 1, got {jobs}")
        self.n, self.s, self.delay, self.plain, self.groups = n, s, delay, plain, groups
        self.jobs = math.inf if jobs is None else jobs
        self.round = -1
        self.plans: dict[int, Plan] = {}  # of the rounds whose jobs may still be open
        # Job t in block t mod (delay + 1), a row a column of the table, and a last row that IDLE points at.
        self._have = np.zeros((delay + 1, plain + groups + 1, n), dtype=bool)
        self._models = models
        self._late = np.zeros((n, max(model.window for model in models) - 1), dtype=bool)  # of the rounds before this
        self._back = np.zeros(n, dtype=bool)  # whose results of this round came in while it ran

    def have(self, job: int) -> Mask:
        """``(plain + groups, n)``: the results of a job that have come in."""
        return self._have[job % (self.delay + 1), :-1]

    def is_open(self, job: int) -> bool:
        """Whether results of the job are kept: from its first round until the one after its last begins."""
        return 0 <= job < self.jobs and self.round - self.delay <= job <= self.round

    def is_complete(self, job: int) -> bool:
        """Whether enough results are there to decode, whichever they are."""
        have = self.have(job)
        return bool(have[: self.plain].all() and (have[self.plain :].sum(1) >= self.n - self.s).all())

    def begin(self, r: int) -> Plan:
        """Ends round ``r - 1`` and gives the tasks of round ``r``; asked again, it gives the same."""
        if r not in (self.round, self.round + 1) or r < 0:
            raise ValueError(f"`r` must be the round after the last, {self.round + 1}, got {r}")
        if r > self.round:
            if self.round >= 0:
                late = self.plans[self.round].busy & ~self._back
                self._models = [model for model in self._models if self._admits(model, late)]
                self._late = self._window(late)[:, 1:]
            self.round = r
            self._back[:] = False
            self.have(r)[:] = False
            self.plans.pop(r - self.delay - 1, None)
            self.plans[r] = self._plan(r)
        return self.plans[r]

    def end(self) -> None:
        """No job begins from the round that runs on, whose plan is made anew: what is left serves the jobs before."""
        self.jobs = min(self.jobs, self.round)
        self.plans[self.round] = self._plan(self.round)

    def mark(self, r: int, workers: Mask) -> None:
        """The results of these workers for round ``r`` are in."""
        if r == self.round:
            self._back |= workers
        self._fill(self._have, r, workers)

    def affordable(self, missing: Mask, rule: Rule) -> bool:
        """Whether this round may end without the results of ``missing`` and with all others.

        Args:
            missing: ``(n,)``; workers without a task do not count.
            rule: ``"conform"``, the pattern of late workers is one that the scheme bears, or ``"complete"``, all open
                jobs become whole if nobody is late any more.

        Raises:
            ValueError: there is no such rule.
        """
        if rule not in _RULES:
            raise ValueError(f"`rule` must be one of {_RULES}, got {rule!r}")
        missing = missing & self.plans[self.round].busy
        if not missing.any():
            return True
        if rule == "conform":
            return any(self._admits(model, missing) for model in self._models)
        have = self._have.copy()
        self._fill(have, self.round, ~missing)
        return self._completable(have)

    def state_dict(self) -> dict[str, Any]:
        """All that changes from round to round, as arrays and numbers."""
        plans = {r: (plan.jobs, plan.columns) for r, plan in self.plans.items()}
        alive = [type(model).__name__ for model in self._models]
        return {
            "round": self.round,
            "plans": plans,
            "have": self._have.copy(),
            "late": self._late,
            "back": self._back.copy(),
            "models": alive,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from :meth:`state_dict` of a schedule with the same arguments."""
        self.round = state["round"]
        self.plans = {r: Plan(jobs, columns, self._have.shape) for r, (jobs, columns) in state["plans"].items()}
        self._have, self._late, self._back = state["have"].copy(), state["late"], state["back"].copy()
        self._models = [model for model in self._models if type(model).__name__ in state["models"]]

    def _admits(self, model: StragglerModel, late: Mask) -> bool:
        return model.admits(self._window(late)[:, -model.window :])

    def _window(self, late: Mask) -> Mask:
        return np.concatenate((self._late, late[:, None]), 1)

    def _fill(self, have: Mask, r: int, workers: Mask) -> None:
        plan = self.plans[r]
        # Jobs before the oldest open one are over and others have their blocks: for those the result is too late.
        cells = plan.cells[:, workers]
        if r < self.round:
            cells = cells[plan.jobs[:, workers] >= self.round - self.delay]
        have.reshape(-1)[cells] = True
        have[:, IDLE] = False

    @abstractmethod
    def _plan(self, r: int) -> Plan:
        """The tasks of round ``r``, given what has come in."""

    @abstractmethod
    def _completable(self, have: Mask) -> bool:
        """Whether all open jobs become whole from ``have`` at the end of this round if nobody is late any more."""


class GradientCodeSchedule(Schedule):
    """A gradient code alone, ``delay`` 0: every job needs the results of all but ``s`` workers in its own round."""

    def __init__(self, n: int, s: int, jobs: int | None = None) -> None:
        check_missing(n, s)
        super().__init__(n, s, 0, 0, 1, [PerRoundModel(s)], jobs)
        self.load = (s + 1) / n

    def _plan(self, r: int) -> Plan:
        columns = np.full((1, self.n), 0 if r < self.jobs else IDLE)
        return Plan(np.full((1, self.n), r), columns, self._have.shape)

    def _completable(self, have: Mask) -> bool:
        return bool(np.count_nonzero(have[0, 0]) >= self.n - self.s)


class SelectiveRepeatSchedule(Schedule):
    """A gradient code whose missing results are made up for ``B`` rounds later, by as few workers as need be.

    Args:
        n: workers.
        B: rounds of a burst, and the delay; must divide ``W - 1``.
        W: rounds of a window.
        lam: different late workers in a window, at most ``n``.
        jobs: number of jobs; None for no end.
    """

    def __init__(self, n: int, B: int, W: int, lam: int, jobs: int | None = None) -> None:
        check_window(n, B, W, lam)
        if (W - 1) % B:
            nearest = max(1, round((W - 1) / B)) * B + 1
            raise ValueError(f"`B` must divide `W` - 1 for 'sr_sgc', got B={B} and W={W}; nearest W: {nearest}")
        s = math.ceil(B * lam / (W - 1 + B))
        super().__init__(n, s, B, 0, 1, [BurstyOrFewModel(B, W, lam, s)], jobs)
        self.load = (s + 1) / n

    def _plan(self, r: int) -> Plan:
        jobs = np.full(self.n, r)
        columns = np.full(self.n, 0 if r < self.jobs else IDLE)
        if self.is_open(r - self.delay):
            lacking = (~self.have(r - self.delay)[0]).nonzero()[0]
            repeating = lacking[: max(0, len(lacking) - self.s)]
            jobs[repeating], columns[repeating] = r - self.delay, 0
        return Plan(jobs[None], columns[None], self._have.shape)

    def _completable(self, have: Mask) -> bool:
        due = self.round - self.delay
        return not self.is_open(due) or bool(np.count_nonzero(have[due % (self.delay + 1), 0]) >= self.n - self.s)


class MultiplexedSchedule(Schedule):
    """Each worker's own chunks, tried anew where lost, and coded chunks after them; a round serves many jobs.

    Slot m of round r serves job ``r - m``: for ``m < W - 1`` it computes chunk m of the worker alone; after that the
    lowest of those chunks that was lost, or, if none is, the coded chunks of group ``m - (W - 1)``.

    Args:
        n: workers.
        B: rounds of a burst.
        W: rounds of a window; the delay is ``W - 2 + B``.
        lam: different late workers in a window, at most ``n``; with ``n`` there are no coded chunks.
        jobs: number of jobs; None for no end.
    """

    def __init__(self, n: int, B: int, W: int, lam: int, jobs: int | None = None) -> None:
        check_window(n, B, W, lam)
        models: list[StragglerModel] = [BurstyModel(B, W, lam), ArbitraryModel(B, W + B - 1, lam)]
        super().__init__(n, lam, W - 2 + B, W - 1, B if lam < n else 0, models, jobs)
        self.B, self.slots = B, W - 1 + B
        cost = lam + 1 if lam < n else 1  # of a task, in coded chunks
        self.coded_weight = 1 / (n * (self.groups + (W - 1) * cost))
        self.plain_weight = cost * self.coded_weight
        self.load = self.slots * self.plain_weight

    def _plan(self, r: int) -> Plan:
        columns = np.full((self.slots, self.n), IDLE)
        for m in range(self.slots):
            if not self.is_open(r - m):
                continue
            columns[m] = m if m < self.plain + self.groups else IDLE
            if m >= self.plain:
                plain = self.have(r - m)[: self.plain]
                columns[m] = np.where(plain.all(0), columns[m], plain.argmin(0))
        return Plan((r - np.arange(self.slots))[:, None].repeat(self.n, 1), columns, self._have.shape)

    def _completable(self, have: Mask) -> bool:
        m = np.arange(max(0, self.round + 1 - self.jobs), min(self.round, self.delay) + 1)  # a row an open job below
        rows = have[(self.round - m) % self.slots]
        lacking = np.minimum(m + 1, self.plain)[:, None] - rows[:, : self.plain].sum(1)
        repeats_left = np.minimum(self.B, self.delay - m)
        if (lacking.max(1) > repeats_left).any():
            return False
        if not self.groups:
            return True
        # Who lacks a chunk repeats it in the next slot, and the coded group of that slot lacks his result.
        if (np.count_nonzero(lacking, 1) > self.s)[repeats_left > 0].any():
            return False
        over = np.arange(self.groups) <= m[:, None] - self.plain  # the groups whose slot has passed
        return not (rows[:, self.plain : -1].sum(2) < self.n - self.s)[over].any()


def check_window(n: int, B: int, W: int, lam: int) -> None:
    """Refuses numbers that no sequential code can have."""
    if n < 1:
        raise ValueError(f"`n` counts workers and must be at least 1, got {n}")
    check_burst(B, W, lam)
    if lam > n:
        raise ValueError(f"`lam` counts late workers and must be at most the {n} that there are, got {lam}")
