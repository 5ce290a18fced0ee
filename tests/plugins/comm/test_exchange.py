from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fulgurite.plugins.comm import Exchange, dequantize_e3m0, quantize_e3m0
from fulgurite.plugins.comm.exchange import _CHUNK_BLOCKS, mean_cosine
from tests.suites.processes import in_processes


def values_of(rank: int, numel: int) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(rank))


def through_the_wire(values: Tensor) -> Tensor:
    return dequantize_e3m0(*quantize_e3m0(values), values.numel())


def exchanged(rank: int, numel: int, options: dict[str, Any]) -> dict[str, Any]:
    group = dist.group.WORLD
    assert group is not None
    values = values_of(rank, numel)
    flight = Exchange(group, **options).launch(values, torch.Generator().manual_seed(rank))
    values.fill_(float("nan"))  # a training step may change them while they fly
    if flight.relay is not None:
        flight.work.wait()
        flight = flight.relay()
    flight.work.wait()
    average = flight.land()
    return {"mean": average.mean, "gram": average.gram, "sent": flight.bytes_sent, "message": flight.message_bytes}


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("numel", [1, 128, 1000])
def test_gathered_4_bit_values_are_added_in_float32_in_rank_order(world_size: int, numel: int) -> None:
    results = in_processes(world_size, exchanged, numel, {})
    total = through_the_wire(values_of(0, numel))
    for rank in range(1, world_size):
        total = total + through_the_wire(values_of(rank, numel))
    blocks = -(-numel // 128)
    for result in results:
        assert torch.equal(result["mean"], total / world_size)  # bit-equal on all processes
        assert result["message"] == blocks * 64 + blocks
        assert result["sent"] == (world_size - 1) * result["message"]


def test_messages_longer_than_what_is_decoded_at_a_time() -> None:
    numel = 16 * _CHUNK_BLOCKS * 2 + 16 * 3 + 5
    results = in_processes(2, exchanged, numel, {"block_size": 16})
    rows = [dequantize_e3m0(*quantize_e3m0(values_of(rank, numel), 16), numel, 16) for rank in range(2)]
    assert torch.equal(results[0]["mean"], (rows[0] + rows[1]) / 2)
    expected = torch.stack(rows).double() @ torch.stack(rows).double().T
    torch.testing.assert_close(results[1]["gram"], expected, rtol=1e-5, atol=10.0)


def test_gram_holds_inner_products_of_what_arrived() -> None:
    result = in_processes(3, exchanged, 500, {})[0]
    rows = torch.stack([through_the_wire(values_of(rank, 500)) for rank in range(3)]).double()
    torch.testing.assert_close(result["gram"], rows @ rows.T, rtol=1e-5, atol=1e-4)
    normed = rows / rows.norm(dim=1, keepdim=True)
    cosines = (normed @ normed.T)[[0, 0, 1], [1, 2, 2]]
    assert mean_cosine(result["gram"]) == pytest.approx(cosines.mean().item(), abs=1e-5)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("numel", [1, 128, 1000])
def test_scattered_mean_is_the_gathered_one_in_bfloat16(world_size: int, numel: int) -> None:
    scattered = in_processes(world_size, exchanged, numel, {"reduction": "scatter"})
    rows = [through_the_wire(values_of(rank, numel)) for rank in range(world_size)]
    expected = (sum(rows[1:], rows[0]) / world_size).bfloat16().float()
    share = -(-numel // (world_size * 128)) * 128
    for result in scattered:
        assert torch.equal(result["mean"], expected)
        assert result["sent"] == (world_size - 1) * (share // 2 + share // 128 + 2 * share)


@pytest.mark.parametrize(("quantize", "size", "tolerance"), [("fp32", 4, 1e-6), ("bf16", 2, 2**-7)])
def test_all_reduce(quantize: str, size: int, tolerance: float) -> None:
    results = in_processes(3, exchanged, 1000, {"quantize": quantize})
    mean = torch.stack([values_of(rank, 1000) for rank in range(3)]).mean(0)
    for result in results:
        assert torch.equal(result["mean"], results[0]["mean"])
        torch.testing.assert_close(result["mean"], mean, rtol=0, atol=tolerance * 4)
        assert result["sent"] == 2 * 2 * 1000 * size // 3
        assert result["gram"] is None


def test_stochastic_rounding_differs_between_workers_and_repeats_with_the_generator() -> None:
    first, again = (in_processes(2, exchanged, 500, {"rounding": "stochastic"}) for _ in range(2))
    assert torch.equal(first[0]["mean"], again[0]["mean"])
    assert not torch.equal(first[0]["mean"], in_processes(2, exchanged, 500, {})[0]["mean"])


def test_mean_cosine_of_one_worker_is_nan() -> None:
    assert torch.tensor(mean_cosine(torch.ones(1, 1))).isnan()
