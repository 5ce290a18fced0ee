"""Rank 0's books of coded rounds: who is to do what, what has come in, and when a round may end (arXiv 2211.13802)."""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from queue import Empty

import torch
from torch import Tensor

from fulgurite.plugins.comm.coded_link import BROKEN, Link, Message
from fulgurite.plugins.comm.coded_messages import BYE, FAIL, FLUSH, RESULT, SKIP, Ended, Orders, RoundStats
from fulgurite.plugins.comm.coded_schedule import Rule
from fulgurite.plugins.comm.gradient_codes import SequentialCode, Task

_MOST_BEHIND = 16  # rounds that a worker may leave unanswered: their gradients wait in its memory, or in rank 0's
_RECORDED = 8192  # rounds


@dataclass(frozen=True)
class Waiting:
    """How long rank 0 waits for late results.

    Args:
        mu: a round may end ``1 + mu`` times as late as its first result.
        rule: what it may not do without then, as in :meth:`GradientCode.affordable`.
        timeout_s: after which missing results that it cannot do without are an error.
    """

    mu: float = 1.0
    rule: Rule = "complete"
    timeout_s: float = 1800.0


class _Clock:
    """When the results of a round came in, by the first worker's own clock and rank 0's.

    A round begins when the first worker that answers began it: pauses before it, such as validation, do not count.
    """

    def __init__(self, n: int) -> None:
        self.took = torch.full((n,), torch.nan, dtype=torch.float64)
        self.made = time.monotonic()
        self.start = self.first_s = 0.0

    def note(self, worker: int, took_s: float) -> None:
        """The result of a worker has come in, which has worked on it for so long."""
        now = time.monotonic()
        if not self.has_begun:
            self.start, self.first_s = now - took_s, took_s
        self.took[worker] = now - self.start

    @property
    def has_begun(self) -> bool:
        """Whether anybody has answered."""
        return self.start > 0

    @property
    def age_s(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self.start if self.has_begun else 0.0


class Root:
    """Runs the rounds in a thread, from making it until all workers have said goodbye.

    Args:
        make_code: gives the scheme anew for each window.
        link: to the workers.
        waiting: how long to wait for late results.
        total: bring the sum of a window's gradients, at its end, instead of each.
        record: keep how long the workers took.
    """

    def __init__(
        self, make_code: Callable[[], SequentialCode], link: Link, waiting: Waiting, *, total: bool, record: bool
    ) -> None:
        self._make_code, self._link, self._waiting, self._total = make_code, link, waiting, total
        self.times: deque[Tensor] = deque(maxlen=_RECORDED if record else 0)
        self._round = 0
        self._waits = self._skipped_tasks = 0
        self._stop = False
        self._left: set[int] = set()
        self._unanswered = [0] * link.n  # orders with tasks, of each worker
        self._last_stats = RoundStats()
        self._open_window()
        self._thread = threading.Thread(target=self._run, daemon=True, name="coded rounds: root")
        self._thread.start()

    def join(self) -> None:
        """Waits for the end of the thread."""
        self._thread.join()

    def _open_window(self) -> None:
        self._code = self._make_code()
        self._base, self._draining = self._round, False
        self._sum: Tensor | None = None

    def _run(self) -> None:
        try:
            self._begin(Ended())
            while self._collect():
                ended = self._end()
                self._round += 1
                if ended.over:
                    self._open_window()
                self._begin(ended)
            farewell = Message(BYE)
        except Exception as error:  # every process raises it from its next call
            farewell = Message(FAIL, text=str(error))
        for peer in range(self._link.n):
            self._link.tell(peer, farewell)

    # ---- a round -----------------------------------------------------------------------------------------------------

    def _begin(self, ended: Ended) -> None:
        self._bytes = 0
        self._give_out(self._code.assign(self._round - self._base), ended)

    def _give_out(self, tasks: list[list[Task]], ended: Ended) -> None:
        self._busy = {worker for worker, own in enumerate(tasks) if own}
        self._missing = set(self._busy)
        self._clock, self._had_to_wait = _Clock(self._link.n), False
        for peer, own in enumerate(tasks):
            vector = ended.vector
            if vector is not None and peer == 0:  # its optimizer may write to it while it is on the way to the others
                vector = vector.clone()
            self._unanswered[peer] += bool(own)
            names = tuple((task.job, task.kind, task.index) for task in own)
            orders = Orders(self._round, self._draining, names, replace(ended, vector=vector))
            self._link.tell(peer, orders.pack())
            if vector is not None and peer:
                self._bytes += vector.nbytes

    def _collect(self) -> bool:
        """Takes messages until the round may end; False when all workers have left instead."""
        while self._busy or not self._draining:
            wait_s = self._patience_s()
            if wait_s is None and self._clock.has_begun:
                return True
            try:
                message = self._link.results.get(timeout=wait_s)
            except Empty:
                continue
            self._take(message)
            if len(self._left) == self._link.n:
                return False
        return True

    def _patience_s(self) -> float | None:
        """How long to wait for one more message; None for no end, or not at all where the round may end."""
        clock, waiting = self._clock, self._waiting
        if not clock.has_begun:
            # No pause comes before a round that only finishes what was begun: its workers are there, or gone.
            return self._left_s(clock.made + waiting.timeout_s) if self._draining else None
        if not self._missing:
            return None
        deadline = clock.start + (1 + waiting.mu) * clock.first_s
        left_s = deadline - time.monotonic()
        if left_s > 0:
            return left_s
        if self._affordable():
            return None
        self._had_to_wait = True
        return self._left_s(deadline + waiting.timeout_s)

    def _left_s(self, end: float) -> float:
        left_s = end - time.monotonic()
        if left_s < 0:
            raise TimeoutError(self._complaint())
        return left_s + 1e-3

    def _affordable(self) -> bool:
        if any(self._unanswered[worker] > _MOST_BEHIND for worker in self._missing):
            return False
        r = self._round - self._base
        if self._code.affordable(r, self._missing, self._waiting.rule):
            return True
        # A code may decode what came although more are missing than it bears in every case.
        return self._code.delay == 0 and self._code.decodable(r)

    def _complaint(self) -> str:
        return (
            f"rank(s) {', '.join(map(str, sorted(self._missing)))} have not answered in round {self._round} for"
            f" {self._waiting.timeout_s:g} s after they were due, and the code cannot do without them: restart from a"
            " checkpoint if they are gone, raise `timeout` if they may take so long, or choose a code that bears more"
        )

    def _take(self, message: Message) -> None:
        if message.kind in (FAIL, BROKEN):
            raise RuntimeError(message.text)
        if message.kind == BYE:
            self._left.add(message.sender)
            return
        self._unanswered[message.sender] -= 1
        r, took_s, stop, tasks = message.numbers
        self._stop |= bool(stop)
        if message.kind == FLUSH:
            if r == self._round and not self._draining:
                self._drain()
        elif message.kind == SKIP:
            self._skipped_tasks += int(tasks)
        elif message.kind == RESULT:
            self._add(int(r), message, took_s)

    def _add(self, r: int, message: Message, took_s: float) -> None:
        assert message.body is not None
        if r >= self._base:  # else of a window that is over
            self._code.receive(r - self._base, message.sender, list(message.body))
        if message.sender:
            self._bytes += message.body.nbytes
        self._link.recycle(message.body)
        if r == self._round:
            self._clock.note(message.sender, took_s)
            self._missing.discard(message.sender)

    def _drain(self) -> None:
        """The round begins no job; if none is under way, its window is over."""
        self._draining = True
        tasks = self._code.end()
        if self._round > self._last:
            ended = Ended(vector=self._sum, over=True, stop=self._stop, stats=self._last_stats)
            self._round += 1  # the others are to flush the same round
            self._open_window()
            self._begin(ended)
        else:
            self._give_out(tasks, Ended(stats=self._last_stats))

    @property
    def _last(self) -> float:
        """The last round of the window."""
        return self._base + self._code.schedule.jobs - 1 + self._code.delay

    def _end(self) -> Ended:
        clock = self._clock
        round_s = clock.age_s
        self._waits += self._had_to_wait
        if self._busy:
            self.times.append(clock.took)
        job, vector, error = self._round - self._base - self._code.delay, None, 0.0
        if 0 <= job < self._code.schedule.jobs:
            vector, error = self._code.decode(job), self._code.decode_error(job)
        over = self._draining and self._round >= self._last
        if self._total and vector is not None:
            self._sum = vector if self._sum is None else self._sum.add_(vector)
            vector = None
        if self._total and over:
            vector = self._sum
        stragglers = len(self._missing)
        self._last_stats = RoundStats(round_s, stragglers, self._waits, self._skipped_tasks, self._bytes, error)
        return Ended(job, vector, over, self._stop, self._last_stats)
