"""What the messages of coded rounds say."""

from dataclasses import astuple, dataclass, field
from typing import get_args

from torch import Tensor

from fulgurite.plugins.comm.coded_link import Message
from fulgurite.plugins.comm.gradient_codes import TaskKind

RESULT, SKIP, FLUSH, BYE, FAIL, ORDERS = range(6)
_KINDS: tuple[TaskKind, ...] = get_args(TaskKind)
TaskName = tuple[int, TaskKind, int]  # job, kind, index


@dataclass(frozen=True)
class RoundStats:
    """How a round went.

    Args:
        round_s: seconds from its start to its end.
        stragglers: workers whose results were not there at its end.
        waits: rounds until now that had to wait longer than ``1 + mu`` times their first result.
        skipped_tasks: tasks until now that late workers have dropped.
        bytes_sent: to and from rank 0 in the round.
        decode_error: largest of ``|a' E - 1|`` of the combination that decoded its gradient.
    """

    round_s: float = 0.0
    stragglers: float = 0.0
    waits: float = 0.0
    skipped_tasks: float = 0.0
    bytes_sent: float = 0.0
    decode_error: float = 0.0


@dataclass(frozen=True)
class Ended:
    """What a round has brought.

    Args:
        job: counted from the beginning of the window, whose gradient it is; -1 if none.
        vector: ``(size,)``, this process's own; None where the round brings no gradient.
        over: it was the last of a window.
        stop: a process has asked to stop.
        stats: how it went.
    """

    job: int = -1
    vector: Tensor | None = None
    over: bool = False
    stop: bool = False
    stats: RoundStats = field(default_factory=RoundStats)


@dataclass(frozen=True)
class Orders:
    """What a worker is to do in a round, and what the round before has brought.

    Args:
        round: counted from the beginning of the fit.
        draining: no job begins in it.
        tasks: job, kind and index of each.
        ended: of the round before.
    """

    round: int
    draining: bool
    tasks: tuple[TaskName, ...]
    ended: Ended

    @staticmethod
    def numbers(slots: int) -> int:
        """Most numbers of a message with orders."""
        return len(Orders(0, False, (), Ended()).pack().numbers) + 3 * slots

    @staticmethod
    def round_of(message: Message) -> int:
        """Of packed orders."""
        return int(message.numbers[0])

    def pack(self) -> Message:
        """As a message."""
        ended = self.ended
        numbers: list[float] = [self.round, self.draining, ended.job, ended.over, ended.stop, *astuple(ended.stats)]
        for job, kind, index in self.tasks:
            numbers += [job, _KINDS.index(kind), index]
        body = None if ended.vector is None else ended.vector[None]
        return Message(ORDERS, numbers=tuple(numbers), body=body)

    @classmethod
    def unpack(cls, message: Message) -> "Orders":
        """From what :meth:`pack` gave."""
        r, draining, job, over, stop, *rest = message.numbers
        count = len(astuple(RoundStats()))
        tasks = rest[count:]
        names = ((int(tasks[i]), _KINDS[int(tasks[i + 1])], int(tasks[i + 2])) for i in range(0, len(tasks), 3))
        vector = None if message.body is None else message.body[0]
        ended = Ended(int(job), vector, bool(over), bool(stop), RoundStats(*rest[:count]))
        return cls(int(r), bool(draining), tuple(names), ended)
