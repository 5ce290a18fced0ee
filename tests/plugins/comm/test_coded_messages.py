from typing import Any

import pytest
import torch

from fulgurite.plugins.comm.coded_messages import Ended, Orders, RoundStats

STATS = RoundStats(0.125, 2, 3, 7, 2**40, 1e-12)


@pytest.mark.parametrize(
    "orders",
    [
        Orders(0, False, (), Ended()),
        Orders(2**40, True, ((3, "plain", 0), (2, "coded", 1), (1, "coded", 0)), Ended(5, None, True, True, STATS)),
        Orders(7, False, ((7, "coded", 0),), Ended(6, torch.arange(4.0), False, True, STATS)),
    ],
)
def test_orders_survive_packing(orders: Orders) -> None:
    message = orders.pack()
    assert len(message.numbers) <= Orders.numbers(len(orders.tasks))
    assert Orders.round_of(message) == orders.round
    again = Orders.unpack(message)
    assert (again.round, again.draining, again.tasks) == (orders.round, orders.draining, orders.tasks)
    assert told(again.ended) == told(orders.ended)


def told(ended: Ended) -> Any:
    vector = None if ended.vector is None else ended.vector.tolist()
    return ended.job, vector, ended.over, ended.stop, ended.stats
