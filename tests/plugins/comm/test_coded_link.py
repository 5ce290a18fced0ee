import os
import signal
from typing import Any

import torch

from fulgurite.plugins.comm.coded_link import BROKEN, Link, Message
from tests.plugins.comm.rounds import threads, until
from tests.suites.processes import in_processes, of_survivors

LAST, OTHER = 0, 1


def link(arrived: list[Message]) -> Link:
    return Link(4, 3, torch.float32, (LAST,), arrived.append)


def told(message: Message) -> list[Any]:
    body = None if message.body is None else message.body.tolist()
    return [message.kind, message.sender, list(message.numbers), body, message.text]


def talked(rank: int) -> dict[str, Any]:
    arrived: list[Message] = []
    wire = link(arrived)
    for r in range(3):  # one after another, with and without a body, whose memory is used again
        body = wire.buffer(2).fill_(10.0 * rank + r) if r != 1 else None
        wire.report(Message(OTHER, numbers=(r, 2.0**53, 0.1), body=body))
    wire.report(Message(LAST, text="grüß dich"))
    up = [told(wire.results.get()) for _ in range(4 * 3)] if rank == 0 else []
    if rank == 0:
        for peer in range(3):
            wire.tell(peer, Message(OTHER, numbers=(peer,), body=torch.full((1, 4), float(peer))))
            wire.tell(peer, Message(LAST))
    down = [told(wire.inbox.get()) for _ in range(2)]
    wire.join()
    return {"up": up, "down": down, "arrived": list(map(told, arrived)), "threads": threads()}


def test_messages_arrive_whole_and_in_order() -> None:
    results = in_processes(3, talked)
    for sender in range(3):
        from_it = [message for message in results[0]["up"] if message[1] == sender]
        bodies = [[[10.0 * sender + r] * 4] * 2 if r != 1 else None for r in range(3)]
        wanted = [[OTHER, sender, [r, 2.0**53, 0.1], bodies[r], ""] for r in range(3)]
        assert from_it == [*wanted, [LAST, sender, [], None, "grüß dich"]]
    for rank, result in enumerate(results):
        assert result["down"] == [[OTHER, 0, [rank], [[float(rank)] * 4], ""], [LAST, 0, [], None, ""]]
        assert result["arrived"] == result["down"]
        assert result["threads"] == []


def bereaved(rank: int, victim: int) -> Any:
    arrived: list[Message] = []
    wire = link(arrived)
    if rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 0:
        first = wire.results.get()  # nothing was sent: the death alone is told
        for peer in (1, 2):
            wire.tell(peer, Message(LAST))
        wire.deliver(30.0)
        return told(first)
    if victim:
        return told(wire.inbox.get())
    until(lambda: bool(arrived))
    wire.report(Message(OTHER, body=wire.buffer(1).zero_()))  # does not raise: the cause is there already
    return [told(wire.inbox.get()) for _ in range(2)]


def test_the_death_of_a_worker_is_told_though_nothing_is_sent() -> None:
    results = of_survivors(3, bereaved, 2)
    kind, sender, _, _, text = results[0]
    assert (kind, sender) == (BROKEN, 2)
    assert text.startswith("the connection to rank 2 broke: ")
    assert results[1][0] == LAST


def test_the_death_of_rank_0_is_told_to_all() -> None:
    results = of_survivors(3, bereaved, 0)
    assert results.keys() == {1, 2}
    for messages in results.values():
        for kind, sender, _, _, text in messages:
            assert (kind, sender) == (BROKEN, 0)
            assert text.startswith("the connection to rank 0 broke: ")
