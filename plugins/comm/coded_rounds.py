"""Rounds of coded gradients between processes, none of which waits for the slow ones (arXiv 2211.13802).

Rank 0 keeps the books in a thread of its own (:mod:`coded_root`), besides being a worker as all others are. In a round
each worker computes what it has been told to, one task after another, sends it up and waits for the end of the round.
One that is late finds its round over, drops the rest and takes what the rounds have brought: so it catches up.
"""

import math
import time
from collections.abc import Callable
from queue import Empty

import torch
from torch import Tensor

from fulgurite.plugins.comm.coded_link import BROKEN, Link, Message
from fulgurite.plugins.comm.coded_messages import BYE, FAIL, FLUSH, ORDERS, RESULT, SKIP, Ended, Orders
from fulgurite.plugins.comm.coded_root import Root, Waiting
from fulgurite.plugins.comm.gradient_codes import SequentialCode, Task

_FAREWELL_S = 5.0  # most that a process stays after a failure, for the others to hear of it


class CodedRounds:
    """This process's part in the rounds; all processes of the world make one and call its methods alike.

    Args:
        make_code: gives the scheme anew; rank 0 takes one for each window, from a beginning or :meth:`flush` to the
            next.
        size: numbers in a gradient.
        waiting: how long rank 0 waits for late results.
        total: the rounds bring no gradient, and :meth:`flush` the sum of all since the last one.
        dtype: of gradients.
        record: keep how long the workers took.
    """

    def __init__(
        self,
        make_code: Callable[[], SequentialCode],
        size: int,
        waiting: Waiting,
        *,
        total: bool = False,
        dtype: torch.dtype = torch.float32,
        record: bool = True,
    ) -> None:
        self._code, self._waiting = make_code(), waiting
        self._newest: float = -1
        self._link = Link(size, Orders.numbers(self._code.schedule.slots), dtype, (BYE, FAIL), self._note)
        self._orders: Orders | None = None
        self._failed = self._closed = False
        self.stopped = False  # set by a worker to have all processes stop in the same round
        self._root = Root(make_code, self._link, waiting, total=total, record=record) if self._link.rank == 0 else None

    @property
    def round(self) -> int:
        """Number of the round that is to come."""
        return self._current().round

    def run(self, compute: Callable[[Task, Tensor], bool]) -> Ended:
        """Takes part in one round, in which one job begins.

        Args:
            compute: writes a task's vector into a row of ``(size,)``; False where it gave up, as :meth:`is_over` says.

        Returns:
            What the round has brought, the same on all processes.

        Raises:
            RuntimeError: a worker has failed or does not answer, or a connection broke.
        """
        return self._round(self._current(), compute)

    def flush(self, compute: Callable[[Task, Tensor], bool]) -> list[Ended]:
        """Ends the jobs that have begun: rounds that begin none, until their gradients are there.

        Returns:
            What they have brought, one a round; with ``total`` the last has the sum.
        """
        self._link.report(Message(FLUSH, numbers=(self._current().round, 0.0, self.stopped, 0)))
        self._orders = self._next()
        brought = [self._orders.ended] if self._orders.ended.over else []
        while self._orders.draining:
            brought.append(self._round(self._orders, compute))
        return brought

    @property
    def is_closed(self) -> bool:
        """Whether they have ended, by :meth:`close` or a failure."""
        return self._closed or self._failed

    def times(self) -> list[Tensor]:
        """On rank 0, of each of the last rounds ``(n,)`` seconds that the workers took, nan where not waited for."""
        return list(self._root.times) if self._root is not None else []

    def is_over(self) -> bool:
        """Whether the round that this process is in has ended without it."""
        return self._orders is not None and self._newest > self._orders.round

    def fail(self, cause: str) -> None:
        """Tells all that this process cannot go on."""
        if not self.is_closed:
            self._leave(Message(FAIL, text=f"rank {self._link.rank} has failed: {cause}"))

    def close(self) -> None:
        """Ends the rounds, when all processes have called it; no job may be under way.

        Raises:
            RuntimeError: a worker has failed instead, or a connection broke.
        """
        if not self.is_closed:
            self._closed = True
            self._link.report(Message(BYE))
            self._link.join()
            if self._root is not None:
                self._root.join()
            message = self._link.inbox.get()
            while message.kind == ORDERS:  # of a round that nobody runs
                message = self._link.inbox.get()
            if message.kind != BYE:
                raise RuntimeError(message.text)

    def _leave(self, farewell: Message) -> None:
        """After a failure; what the others are to know of it reaches them before this process may be gone."""
        self._failed = True
        self._link.report(farewell)
        if self._root is not None:
            self._root.join()
            self._link.deliver(_FAREWELL_S)

    def _round(self, orders: Orders, compute: Callable[[Task, Tensor], bool]) -> Ended:
        began = time.monotonic()
        if orders.tasks:
            tasks = [self._code.task(self._link.rank, *task) for task in orders.tasks]
            body = self._link.buffer(len(tasks))
            done = all(compute(task, row) for task, row in zip(tasks, body, strict=True))
            numbers = (orders.round, time.monotonic() - began, float(self.stopped), len(tasks))
            if not done:
                self._link.recycle(body)
            self._link.report(Message(RESULT if done else SKIP, numbers=numbers, body=body if done else None))
        self._orders = self._next(time.monotonic() - began)
        return self._orders.ended

    def _current(self) -> Orders:
        if self._orders is None:
            self._orders = self._next()
        return self._orders

    def _next(self, took_s: float = 0.0) -> Orders:
        # Rank 0 gives up first, and knows whom it misses.
        patience = 2 * self._waiting.timeout_s + self._waiting.mu * took_s
        try:
            message = self._link.inbox.get(timeout=patience)
        except Empty:
            self._failed = True
            raise RuntimeError(
                f"rank 0 has not ended the round for {patience:.0f} s: see there, or raise `timeout`"
            ) from None
        if message.kind == ORDERS:
            return Orders.unpack(message)
        self._leave(Message(BYE))
        raise RuntimeError(message.text)

    def _note(self, message: Message) -> None:
        """In the receiving thread, so that a worker that computes learns that its round is over."""
        if message.kind == ORDERS:
            self._newest = Orders.round_of(message)
        elif message.kind in (FAIL, BROKEN):
            self._newest = math.inf
