"""Messages of coded rounds: results go up to rank 0, orders come down (arXiv 2211.13802).

A message is a head of float64 numbers (whole ones up to 2**53 are exact in it) and, if the head says so, a body. Nobody
waits for a slow peer: rank 0 receives from whoever sends first, and has a thread for each peer that it sends to.
"""

import threading
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from queue import SimpleQueue

import torch
import torch.distributed as dist
from torch import Tensor

_UP, _DOWN = 1, 2  # tags
_DAYS = timedelta(days=1)  # gloo closes all connections when a wait times out: the queues have the timeouts instead
HEAD = 8  # numbers of a head before a message's own


@dataclass
class Message:
    """What one rank tells another.

    Args:
        kind: what it is about, from 0; negative where a connection broke, with the cause in ``text``.
        sender: its rank.
        numbers: a few of them.
        body: ``(rows, size)``, or None.
        text: of a failure.
    """

    kind: int
    sender: int = 0
    numbers: tuple[float, ...] = ()
    body: Tensor | None = None
    text: str = ""


BROKEN = -1


class Link:
    """This process's connection to rank 0, and rank 0's to all; made by all processes of the world together.

    Args:
        size: numbers in a row of a body.
        numbers: most numbers of a message.
        dtype: of bodies.
        last: kind of the message that is a peer's last.
        arrived: called by the receiving thread with each message that came down, before it is in ``inbox``.
    """

    def __init__(
        self, size: int, numbers: int, dtype: torch.dtype, last: int, arrived: Callable[[Message], None]
    ) -> None:
        self.rank, self.n = dist.get_rank(), dist.get_world_size()
        self.inbox: SimpleQueue[Message] = SimpleQueue()  # what came down
        self.results: SimpleQueue[Message] = SimpleQueue()  # what came up, on rank 0
        self._size, self._numbers, self._dtype, self._last = size, numbers, dtype, last
        self._arrived = arrived
        self._free: defaultdict[int, deque[Tensor]] = defaultdict(deque)
        self._group = dist.new_group(backend="gloo", timeout=_DAYS)
        self._outboxes: dict[int, SimpleQueue[Message]] = {}
        self._threads: list[threading.Thread] = []
        if self.rank:
            self._start(self._listen)
            return
        self._start(self._gather)
        for peer in range(1, self.n):
            self._outboxes[peer] = SimpleQueue()
            self._start(self._deliver, peer)

    def _start(self, target: Callable[..., None], *args: int) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True, name=f"coded rounds: {target.__name__}")
        thread.start()
        self._threads.append(thread)

    def buffer(self, rows: int) -> Tensor:
        """``(rows, size)``, not initialised, for a body; to be given back by :meth:`recycle`."""
        try:
            return self._free[rows].pop()
        except IndexError:
            return torch.empty(rows, self._size, dtype=self._dtype)

    def recycle(self, body: Tensor) -> None:
        """Takes the memory of a body for a later one: fresh pages cost more than the sum that is written to them."""
        self._free[len(body)].append(body)

    def report(self, message: Message) -> None:
        """Sends a message up; waits until rank 0 has taken it."""
        message.sender = self.rank
        if self.rank == 0:
            self.results.put(message)
            return
        self._send(message, 0, _UP)
        if message.body is not None:
            self.recycle(message.body)

    def tell(self, peer: int, message: Message) -> None:
        """Sends a message down, in the background."""
        if peer == 0:
            self._take(message)
        else:
            self._outboxes[peer].put(message)

    def behind(self, peer: int) -> int:
        """Messages that a peer has not taken yet."""
        return self._outboxes[peer].qsize() if peer else 0

    def join(self) -> None:
        """Waits until the last messages have come and gone."""
        for thread in self._threads:
            thread.join()

    def _take(self, message: Message) -> None:
        self._arrived(message)
        self.inbox.put(message)

    # ---- threads -----------------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        kind = BROKEN - 1
        while kind not in (self._last, BROKEN):
            message = self._received(0, _DOWN, "rank 0")
            kind = message.kind
            self._take(message)

    def _gather(self) -> None:
        """Receives from any; that is also how gloo tells which of many has come first."""
        present = self.n - 1
        while present:
            message = self._received(None, _UP, "a worker")
            self.results.put(message)
            if message.kind == BROKEN:
                return
            present -= message.kind == self._last

    def _deliver(self, peer: int) -> None:
        kind = BROKEN
        while kind != self._last:
            message = self._outboxes[peer].get()
            kind = message.kind
            try:
                self._send(message, peer, _DOWN)
            except RuntimeError as error:
                self.results.put(Message(BROKEN, peer, text=f"the connection to rank {peer} broke: {error}"))
                return

    # ---- on the wire -------------------------------------------------------------------------------------------------

    def _send(self, message: Message, peer: int, tag: int) -> None:
        body = message.body
        text = message.text.encode()
        rows = 0 if body is None else len(body)
        head = torch.zeros(HEAD + self._numbers, dtype=torch.float64)
        head[:4] = torch.tensor([message.kind, rows, len(text), len(message.numbers)])
        head[HEAD : HEAD + len(message.numbers)] = torch.tensor(message.numbers, dtype=torch.float64)
        dist.send(head, peer, self._group, tag)
        if body is not None:
            dist.send(body, peer, self._group, tag)
        if text:
            dist.send(torch.frombuffer(bytearray(text), dtype=torch.uint8), peer, self._group, tag)

    def _received(self, source: int | None, tag: int, name: str) -> Message:
        head = torch.zeros(HEAD + self._numbers, dtype=torch.float64)
        try:
            sender = dist.recv(head, source, self._group, tag)
            kind, rows, length, count = (int(number) for number in head[:4].tolist())
            body, text = None, b""
            if rows:
                body = self.buffer(rows)
                dist.recv(body, sender, self._group, tag)
            if length:
                encoded = torch.zeros(length, dtype=torch.uint8)
                dist.recv(encoded, sender, self._group, tag)
                text = bytes(encoded.tolist())
        except RuntimeError as error:
            return Message(BROKEN, source or 0, text=f"the connection to {name} broke: {error}")
        return Message(kind, sender, tuple(head[HEAD : HEAD + count].tolist()), body, text.decode())
