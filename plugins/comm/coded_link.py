"""Messages of coded rounds: results go up to rank 0, orders come down (arXiv 2211.13802).

A message is a head of float64 numbers (whole ones up to 2**53 are exact in it) and, if the head says so, a body. Nobody
waits for a slow peer: rank 0 has a thread for each that it receives from and one for each that it sends to. (gloo can
receive from whoever sends first in one thread, but then says nothing of a peer that has died.)
"""

import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import timedelta
from queue import SimpleQueue
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_UP, _DOWN = 1, 2  # tags
_BREAKS = RuntimeError, ValueError  # the latter where this process has destroyed its groups after a failure
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
        last: kinds of messages that are a sender's last to a peer.
        arrived: called by the receiving thread with each message that came down, before it is in ``inbox``.
    """

    def __init__(
        self,
        size: int,
        numbers: int,
        dtype: torch.dtype,
        last: Collection[int],
        arrived: Callable[[Message], None],
    ) -> None:
        self.rank, self.n = dist.get_rank(), dist.get_world_size()
        self.inbox: SimpleQueue[Message] = SimpleQueue()  # what came down
        self.results: SimpleQueue[Message] = SimpleQueue()  # what came up, on rank 0
        self._size, self._numbers, self._dtype, self._last = size, numbers, dtype, {*last, BROKEN}
        self._arrived = arrived
        self._free: defaultdict[int, deque[Tensor]] = defaultdict(deque)
        self._group = dist.new_group(backend="gloo", timeout=_DAYS)
        self._outboxes: dict[int, SimpleQueue[Message]] = {}
        self._receivers: list[threading.Thread] = []
        self._senders: list[threading.Thread] = []
        for peer in range(1, self.n) if self.rank == 0 else ():
            self._outboxes[peer] = SimpleQueue()
            self._senders.append(_started(self._deliver, peer))
            self._receivers.append(_started(self._receive, peer, _UP, self.results.put))
        if self.rank:
            self._receivers.append(_started(self._receive, 0, _DOWN, self._take))

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
        """Sends a message up; waits until rank 0 has taken it. If it cannot, the cause is the last one in ``inbox``."""
        message.sender = self.rank
        if self.rank == 0:
            self.results.put(message)
            return
        try:
            self._send(message, 0, _UP)
        except _BREAKS as error:
            self._take(_broken(0, error))
        if message.body is not None:
            self.recycle(message.body)

    def tell(self, peer: int, message: Message) -> None:
        """Sends a message down, in the background."""
        if peer == 0:
            self._take(message)
        else:
            self._outboxes[peer].put(message)

    def join(self) -> None:
        """Waits until the last messages have come and gone, and closes the connections."""
        for thread in self._senders + self._receivers:
            thread.join()
        dist.destroy_process_group(self._group)
        del self._group  # sockets and gloo's threads go with it, not with the next garbage collection

    def deliver(self, patience_s: float) -> None:
        """Waits until the last messages have gone, but not long: a peer may never take its own."""
        end = time.monotonic() + patience_s
        for thread in self._senders:
            thread.join(max(0.0, end - time.monotonic()))

    def _take(self, message: Message) -> None:
        self._arrived(message)
        self.inbox.put(message)

    # ---- threads -----------------------------------------------------------------------------------------------------

    def _receive(self, peer: int, tag: int, put: Callable[[Message], None]) -> None:
        is_last = False
        while not is_last:
            message = self._received(peer, tag)
            is_last = message.kind in self._last
            put(message)

    def _deliver(self, peer: int) -> None:
        is_last = False
        while not is_last:
            message = self._outboxes[peer].get()
            is_last = message.kind in self._last
            try:
                self._send(message, peer, _DOWN)
            except _BREAKS as error:
                self.results.put(_broken(peer, error))
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

    def _received(self, sender: int, tag: int) -> Message:
        head = torch.zeros(HEAD + self._numbers, dtype=torch.float64)
        try:
            dist.recv(head, sender, self._group, tag)
            kind, rows, length, count = (int(number) for number in head[:4].tolist())
            body, text = None, b""
            if rows:
                body = self.buffer(rows)
                dist.recv(body, sender, self._group, tag)
            if length:
                encoded = torch.zeros(length, dtype=torch.uint8)
                dist.recv(encoded, sender, self._group, tag)
                text = bytes(encoded.tolist())
        except _BREAKS as error:
            return _broken(sender, error)
        return Message(kind, sender, tuple(head[HEAD : HEAD + count].tolist()), body, text.decode())


def _started(target: Callable[..., None], *args: Any) -> threading.Thread:
    thread = threading.Thread(target=target, args=args, daemon=True, name=f"coded rounds: {target.__name__}")
    thread.start()
    return thread


def _broken(peer: int, error: Exception) -> Message:
    return Message(BROKEN, peer, text=f"the connection to rank {peer} broke: {error}")
