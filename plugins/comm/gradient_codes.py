"""Exact gradients without the slow workers: gradient codes over a sequence of jobs (arXiv 1612.03301, 2211.13802).

The three classes hold the root's side: who computes what in a round, and what has come in. Results are added up as they
arrive: an open job costs one vector, and a group of coded results that is not decoded yet at most ``s + 1`` more with
the 0/1 codes; of the cyclic code it must keep up to ``n - s``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fulgurite.plugins.comm.coded_schedule import (
    IDLE,
    GradientCodeSchedule,
    MultiplexedSchedule,
    Rule,
    Schedule,
    SelectiveRepeatSchedule,
)
from fulgurite.plugins.comm.coded_sum import Coder, JobSum
from fulgurite.plugins.comm.coding_schemes import Scheme, delay, lower_bound, make_schedule, normalized_load
from fulgurite.plugins.comm.encoding import Code, UndecodableError, decode_vector, encoding_matrix
from fulgurite.plugins.comm.straggler_models import (
    ArbitraryModel,
    BurstyModel,
    BurstyOrFewModel,
    PerRoundModel,
    conforms,
)

__all__ = [
    "ArbitraryModel",
    "BurstyModel",
    "BurstyOrFewModel",
    "GradientCode",
    "Multiplexed",
    "PerRoundModel",
    "SelectiveRepeat",
    "Task",
    "UndecodableError",
    "conforms",
    "decode_vector",
    "delay",
    "encoding_matrix",
    "lower_bound",
    "normalized_load",
]


TaskKind = Literal["plain", "coded"]


@dataclass(frozen=True, eq=False)
class Task:
    """One vector that a worker is to compute, ``sum_c coeffs[c] w_c g_c`` over some chunks of one job.

    ``w_c`` is the chunk's share of the batch and ``g_c`` the mean gradient over it.

    Args:
        job: whose gradient it belongs to.
        kind: ``"plain"``, a chunk that no other worker has, or ``"coded"``.
        index: of the worker's plain chunk, or of the coded group.
        chunks: of the batch.
        coeffs: ``(len(chunks),)``, float64.
    """

    job: int
    kind: TaskKind
    index: int
    chunks: list[int]
    coeffs: Tensor


class _CodedJobs:
    """What the three schemes share; see their docstrings for the arguments."""

    n_chunks: int
    chunk_weights: Tensor  # (n_chunks,), float64, shares of the batch: they sum to 1

    def __init__(self, schedule: Schedule, code: Code, seed: int) -> None:
        self.schedule = schedule
        self.n, self.load, self.delay = schedule.n, schedule.load, schedule.delay
        if schedule.groups:
            self._code = Coder(self.n, schedule.s, code, seed)
        self._sums: dict[int, JobSum] = {}
        self._set_chunks()

    def _set_chunks(self) -> None:
        self.n_chunks = self.n
        self.chunk_weights = torch.full((self.n,), 1 / self.n, dtype=torch.float64)

    def task(self, worker: int, job: int, kind: TaskKind, index: int) -> Task:
        """The task that these four name: what a worker needs that was told only them."""
        plain = self.schedule.plain
        if kind == "plain":
            return Task(job, kind, index, [worker * plain + index], torch.ones(1, dtype=torch.float64))
        chunks, coeffs = self._code.rows[worker]
        first = plain * self.n + index * self.n
        return Task(job, kind, index, [first + chunk for chunk in chunks], coeffs)

    def assign(self, r: int) -> list[list[Task]]:
        """Ends round ``r - 1`` and gives the tasks of round ``r``, one list a worker.

        What was not received until now counts as late. Rounds come in order from 0; the same round may be asked again.
        The jobs of which nothing is left to do yield no task, and all lists are empty in a round that may be skipped.
        """
        self.schedule.begin(r)
        self._sums = {job: total for job, total in self._sums.items() if self.schedule.is_open(job)}
        return [self._tasks(r, worker) for worker in range(self.n)]

    def end(self) -> list[list[Task]]:
        """Lets no job begin any more, not even in the round that was assigned last; gives that round's tasks anew."""
        self.schedule.end()
        return [self._tasks(self.schedule.round, worker) for worker in range(self.n)]

    def chunks_of(self, worker: int) -> list[int]:
        """All chunks of a batch that a worker may ever be given."""
        tasks = [self.task(worker, 0, "plain", index) for index in range(self.schedule.plain)]
        tasks += [self.task(worker, 0, "coded", index) for index in range(self.schedule.groups)]
        return sorted({chunk for task in tasks for chunk in task.chunks})

    def receive(self, r: int, worker: int, results: Sequence[Tensor]) -> None:
        """Takes the results of a worker for its tasks of round ``r``.

        A result that comes after its round has ended still serves the jobs that are open; one that came before counts
        once. The vectors are added up, not kept.

        Args:
            r: this round, or one before it.
            worker: from 0 to ``n - 1``.
            results: one vector a task of ``assign(r)[worker]``, in that order.

        Raises:
            ValueError: the round has not been assigned, or the number of results is not that of the tasks.
        """
        if not 0 <= worker < self.n:
            raise ValueError(f"`worker` must be from 0 to {self.n - 1}, got {worker}")
        if not 0 <= r <= self.schedule.round:
            raise ValueError(f"`r` is {r}, and the last round assigned is {self.schedule.round}: assign it first")
        if r not in self.schedule.plans:
            return  # so late that all its jobs are over
        columns = self._columns(r, worker)
        if len(results) != len(columns):
            raise ValueError(
                f"`results` must hold one vector for each of the {len(columns)} tasks of worker {worker} in round {r},"
                f" got {len(results)}"
            )
        for (job, column), result in zip(columns, results, strict=True):
            if self.schedule.is_open(job) and not self.schedule.have(job)[column, worker]:
                self._add(self._sums.setdefault(job, JobSum()), worker, column, result)
        self.schedule.mark(r, np.arange(self.n) == worker)

    def affordable(self, r: int, missing: set[int], rule: Rule = "complete") -> bool:
        """Whether round ``r`` may end when all workers but ``missing`` have sent their results.

        Args:
            r: the round that runs.
            missing: workers whose results would not be there; those without a task do not count.
            rule: ``"complete"``: all open jobs become whole if nobody is late any more; ``"conform"``: the late workers
                since round 0 are a pattern of the scheme's model, so that every continuation within it is borne too.
        """
        if r != self.schedule.round:
            raise ValueError(f"`r` must be the round that runs, {self.schedule.round}, got {r}")
        return self.schedule.affordable(np.isin(np.arange(self.n), list(missing)), rule)

    def decodable(self, job: int) -> bool:
        """Whether the results that are there give the gradient of the job."""
        return self.schedule.is_open(job) and job in self._sums and self._lacks(job) is None

    def decode(self, job: int) -> Tensor:
        """The gradient of a job, until the round after its last is assigned: ``sum_c w_c g_c`` over all its chunks.

        Raises:
            UndecodableError: results are missing, or the job is not open.
        """
        if not self.schedule.is_open(job):
            raise UndecodableError(
                f"job {job} is not open: its results are kept from round {job} to round {job + self.delay}"
            )
        lack = self._lacks(job)
        if lack is not None:
            raise UndecodableError(f"job {job} cannot be decoded yet: {lack}")
        total = self._sums[job].total
        assert total is not None
        return total

    def decode_error(self, job: int) -> float:
        """Largest of ``|a' E - 1|`` of what decoded an open job; 0 for the codes of zeros and ones."""
        return self._sums[job].error if job in self._sums else 0.0

    def state_dict(self) -> dict[str, Any]:
        """The open jobs and the last rounds, in tensors and plain containers; no sums once all jobs are over."""
        schedule = _as_tensors(self.schedule.state_dict())
        return {"schedule": schedule, "sums": {job: total.state_dict() for job, total in self._sums.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from :meth:`state_dict` of an object with the same arguments."""
        self.schedule.load_state_dict(_as_arrays(state["schedule"]))
        self._sums = {job: JobSum.from_state(total) for job, total in state["sums"].items()}

    def _add(self, total: JobSum, worker: int, column: int, result: Tensor) -> None:
        if column < self.schedule.plain:
            total.add(result)
        else:
            total.add_coded(self._code, column - self.schedule.plain, worker, result)

    def _tasks(self, r: int, worker: int) -> list[Task]:
        plain = self.schedule.plain
        return [
            self.task(worker, job, *(("plain", column) if column < plain else ("coded", column - plain)))
            for job, column in self._columns(r, worker)
        ]

    def _columns(self, r: int, worker: int) -> list[tuple[int, int]]:
        plan = self.schedule.plans[r]
        pairs = zip(plan.jobs[:, worker].tolist(), plan.columns[:, worker].tolist(), strict=True)
        return [(job, column) for job, column in pairs if column != IDLE]

    def _lacks(self, job: int) -> str | None:
        """What a job is short of: the first group that is not decoded, or plain chunks."""
        have, plain = self.schedule.have(job), self.schedule.plain
        if not have[:plain].all():
            return f"have {int(have[:plain].sum())}, need {self.n * plain} results of plain chunks"
        done = self._sums[job].done if job in self._sums else set()
        for group in range(self.schedule.groups):
            if group not in done:
                count = int(have[plain + group].sum())
                return f"have {count}, need {self.n - self.schedule.s} coded results of group {group}"
        return None


class GradientCode(_CodedJobs):
    """A gradient code: each round's gradient is exact without its ``s`` slowest workers (arXiv 1612.03301).

    The batch is cut into ``n`` chunks of equal weight and a worker computes about ``s + 1`` of them.

    Args:
        n: workers.
        s: workers that may be late in each round, below ``n``.
        code: as in :func:`encoding_matrix`.
        seed: of the cyclic code.
        jobs: number of jobs; None for no end.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> code = GradientCode(4, 1)
        >>> gradients = torch.tensor([[1.0], [2.0], [3.0], [4.0]])  # of four chunks, whose mean is 2.5
        >>> tasks = code.assign(0)
        >>> for worker in (1, 2, 3):  # worker 0 is late
        ...     (task,) = tasks[worker]
        ...     weights = task.coeffs * code.chunk_weights[task.chunks]
        ...     code.receive(0, worker, [weights.float() @ gradients[task.chunks]])
        >>> code.decode(0)
        tensor([2.5000])
    """

    def __init__(self, n: int, s: int, *, code: Code = "balanced", seed: int = 0, jobs: int | None = None) -> None:
        super().__init__(GradientCodeSchedule(n, s, jobs), code, seed)


class SelectiveRepeat(_CodedJobs):
    """SR-SGC: a gradient code of less work, whose rare shortfall is made up ``B`` rounds later (arXiv 2211.13802).

    Bears late workers of which every ``W`` rounds in a row are as in :class:`BurstyModel`, or have at most
    ``ceil(B lam / (W - 1 + B))`` in each. A job is whole ``B`` rounds after it began.

    Args:
        n: workers.
        B: rounds of a burst, must divide ``W - 1``.
        W: rounds of a window.
        lam: different late workers in a window, at most ``n``.
        code: as in :func:`encoding_matrix`.
        seed: of the cyclic code.
        jobs: number of jobs; None for no end.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self, n: int, *, B: int, W: int, lam: int, code: Code = "balanced", seed: int = 0, jobs: int | None = None
    ) -> None:
        super().__init__(SelectiveRepeatSchedule(n, B, W, lam, jobs), code, seed)


class Multiplexed(_CodedJobs):
    """M-SGC: a round serves ``W - 1 + B`` jobs, and lost chunks are computed anew (arXiv 2211.13802).

    Bears late workers as in :class:`BurstyModel`, or at most ``B`` times each in ``W + B - 1`` rounds, ``lam`` of them
    (:class:`ArbitraryModel`). A job is whole ``W - 2 + B`` rounds after it began. Chunks: plain chunk m of worker i is
    ``i (W-1) + m``; chunk c of coded group g is ``(W-1) n + g n + c``.

    Args:
        n: workers.
        B: rounds of a burst.
        W: rounds of a window.
        lam: different late workers in a window, at most ``n``.
        code: as in :func:`encoding_matrix`.
        seed: of the cyclic code.
        jobs: number of jobs; None for no end.

    Raises:
        ValueError: an argument is out of range.
    """

    schedule: MultiplexedSchedule

    def __init__(
        self, n: int, *, B: int, W: int, lam: int, code: Code = "balanced", seed: int = 0, jobs: int | None = None
    ) -> None:
        super().__init__(MultiplexedSchedule(n, B, W, lam, jobs), code, seed)

    def _set_chunks(self) -> None:
        plain, coded = self.n * self.schedule.plain, self.n * self.schedule.groups
        self.n_chunks = plain + coded
        self.chunk_weights = torch.full((self.n_chunks,), self.schedule.coded_weight, dtype=torch.float64)
        self.chunk_weights[:plain] = self.schedule.plain_weight


SequentialCode = GradientCode | SelectiveRepeat | Multiplexed


def make_code(
    scheme: Scheme,
    n: int,
    *,
    s: int | None = None,
    B: int | None = None,
    W: int | None = None,
    lam: int | None = None,
    code: Code = "balanced",
    seed: int = 0,
) -> SequentialCode:
    """A scheme by its name; ``"gc"`` takes ``s`` alone, the others ``B``, ``W`` and ``lam``.

    Raises:
        ValueError: an argument is missing, does not belong to the scheme, or is out of range.
    """
    make_schedule(scheme, n, s=s, B=B, W=W, lam=lam)
    if s is not None:
        return GradientCode(n, s, code=code, seed=seed)
    assert B is not None
    assert W is not None
    assert lam is not None
    return (SelectiveRepeat if scheme == "sr_sgc" else Multiplexed)(n, B=B, W=W, lam=lam, code=code, seed=seed)


def _as_tensors(value: Any) -> Any:
    return _mapped(value, np.ndarray, torch.from_numpy)


def _as_arrays(value: Any) -> Any:
    return _mapped(value, Tensor, Tensor.numpy)


def _mapped(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, dict):
        return {key: _mapped(item, kind, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_mapped(item, kind, change) for item in value)
    return change(value) if isinstance(value, kind) else value
