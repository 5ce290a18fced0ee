"""The clients' average against NumPy."""

import numpy as np
import pytest
import torch
from torch import Tensor

from fulgurite.plugins.federated.average import ClientAverage
from tests.suites.processes import in_processes


def client_values(seed: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight, bias, mean = (torch.randn(size, generator=generator).to(dtype) for size in ((3, 2), (2,), (2,)))
    return [weight, bias, mean, torch.tensor(seed), torch.tensor(float(seed))]


def average_of(clients: list[int], total: float, dtype: torch.dtype) -> dict[str, list[Tensor] | list[float]]:
    """Starts from the values of seed 99; the weight of client c is c + 1; the last tensor is kept."""
    tensors = client_values(99, dtype)
    average = ClientAverage(tensors[:2], tensors[2:4], tensors[4:])
    average.open()
    norms = 0.0
    for client in clients:
        for tensor, value in zip(tensors, client_values(client, dtype), strict=True):
            tensor.copy_(value)
        norms += average.add(client + 1)
    changes, scalars = average.close(total, [norms, float(len(clients))])
    return {"changes": changes, "scalars": scalars, "tensors": tensors}


def of_rank(rank: int) -> dict[str, list[Tensor] | list[float]]:
    return average_of([[0, 3], [2, 1]][rank], 10.0, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_weighted_mean(dtype: torch.dtype) -> None:
    got = average_of([0, 1, 2, 3], 10.0, dtype)
    start = [value.double().numpy() for value in client_values(99, dtype)]
    clients = [[value.double().numpy() for value in client_values(client, dtype)] for client in range(4)]
    changes = [[after - before for after, before in zip(client, start, strict=True)] for client in clients]
    means = [np.average([change[i] for change in changes], axis=0, weights=[1, 2, 3, 4]) for i in range(3)]
    precision = torch.finfo(dtype).eps * 8
    for change, mean in zip(got["changes"], means, strict=False):
        np.testing.assert_allclose(change.numpy(), mean, atol=precision)
    weight, bias, running_mean, count, kept = got["tensors"]
    for tensor, value in zip((weight, bias, kept), [*client_values(99, dtype)[:2], torch.tensor(99.0)], strict=True):
        torch.testing.assert_close(tensor, value, rtol=0, atol=0)
    np.testing.assert_allclose(running_mean.double().numpy(), start[2] + means[2], atol=precision)
    assert count == 99  # the largest of 99, which all start from, and the clients' 0 to 3
    norms = sum(float((change[i] ** 2).sum()) for change in changes for i in range(2))
    assert got["scalars"] == pytest.approx([norms, 4], rel=precision)


def test_counts_take_the_largest() -> None:
    weight, count = torch.zeros(1), torch.tensor(0)
    average = ClientAverage([weight], [count])
    average.open()
    for seen in (3, 7, 5):
        count += seen
        average.add(1.0)
    average.close(3.0)
    assert count == 7


def test_neither_order_nor_processes_matter() -> None:
    alone, reverse = (average_of(clients, 10.0, torch.float32) for clients in ([0, 1, 2, 3], [3, 2, 1, 0]))
    for rank in in_processes(2, of_rank):
        for key in ("changes", "tensors"):
            torch.testing.assert_close(alone[key], rank[key], rtol=0, atol=0)
            torch.testing.assert_close(alone[key], reverse[key], rtol=0, atol=0)
        assert rank["scalars"] == pytest.approx(alone["scalars"], rel=1e-12)
