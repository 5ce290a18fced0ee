from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fulgurite.plugins.comm import Exchange, OuterFragment, OuterSGD
from fulgurite.plugins.comm.outer import Pending
from tests.suites.processes import in_processes

SHAPES = [(3, 5), (7,), (2, 2, 2)]


def tensors(seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_outer_sgd_is_torch_sgd(momentum: float, nesterov: bool) -> None:
    weight = nn.Parameter(torch.randn(50, dtype=torch.float64))
    reference = torch.optim.SGD([weight], lr=0.4, momentum=momentum, nesterov=nesterov and momentum > 0)
    value, velocity = weight.detach().clone(), torch.zeros(50, dtype=torch.float64)
    for _ in range(5):
        weight.grad = torch.randn(50, dtype=torch.float64)
        reference.step()
        value, velocity = OuterSGD(0.4, momentum, nesterov)(value, velocity, weight.grad)
    torch.testing.assert_close(value, weight.detach())


def test_the_defaults_swing_towards_a_fixed_point_by_0_735_a_round() -> None:
    lr, momentum = 0.4, 0.9
    matrix = torch.tensor([[1 - lr - lr * momentum, -lr * momentum**2], [1.0, momentum]], dtype=torch.float64)
    assert torch.linalg.eigvals(matrix).abs().tolist() == pytest.approx([0.54**0.5] * 2)
    state = torch.tensor([-1.0, 0.0], dtype=torch.float64)  # g - theta*, velocity
    value, velocity = state[:1].clone(), state[1:].clone()
    for _ in range(4):  # workers reach theta* = 0 in each round, so the outer gradient is g itself
        value, velocity = OuterSGD(lr, momentum)(value, velocity, value)
        state = matrix @ state
        torch.testing.assert_close(torch.cat([value, velocity]), state)
    assert 1 + value.item() == pytest.approx(1.3501, abs=1e-4)  # over by a third: few rounds are too few


def one_process(_: int, dtype: torch.dtype, offload: bool) -> dict[str, Any]:
    group = dist.group.WORLD
    assert group is not None
    local = tensors(0, dtype)
    fragment = OuterFragment(local, Exchange(group, "fp32"), OuterSGD(1.0, 0.0), offload=offload)
    started = fragment.value.clone()
    for tensor in local:
        tensor.mul_(0.5)
    pending = Pending(0, [1], 1, flight=fragment.launch())
    pending.wait()
    value, velocity = fragment.preview(pending.land())
    untouched = torch.equal(fragment.value, started)
    fragment.commit(value, velocity)
    drift = fragment.mix(fragment.value, alpha=0.25)
    return {"started": started, "untouched": untouched, "value": fragment.value, "drift": drift, "local": local}


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize(
    ("dtype", "outer"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_one_worker_moves_to_its_own_weights(dtype: torch.dtype, outer: torch.dtype, offload: bool) -> None:
    (result,) = in_processes(1, one_process, dtype, offload)
    half = torch.cat([tensor.flatten() for tensor in tensors(0, dtype)]).to(outer) / 2
    assert result["untouched"]
    assert result["value"].dtype == outer
    torch.testing.assert_close(result["value"], half, rtol=1e-6, atol=1e-6)
    assert result["drift"] == pytest.approx(0, abs=1e-6)
    assert [tuple(tensor.shape) for tensor in result["local"]] == SHAPES


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_alpha_weighs_the_local_value(alpha: float) -> None:
    local = tensors(0)
    fragment = OuterFragment(local, exchange=None, optimizer=OuterSGD())  # type: ignore[arg-type]
    outer = torch.cat([tensor.flatten() for tensor in tensors(1)])
    drift = fragment.mix(outer, alpha)
    for tensor, before, shared in zip(local, tensors(0), tensors(1), strict=True):
        torch.testing.assert_close(tensor, alpha * before + (1 - alpha) * shared)
    mine = torch.cat([tensor.flatten() for tensor in tensors(0)])
    assert drift == pytest.approx(((mine - outer).norm() / outer.norm()).item())


def two_workers_of_two(rank: int, options: dict[str, Any]) -> dict[str, Any]:
    outer_groups = [dist.new_group([place, 2 + place]) for place in range(2)]
    inner_groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    worker, place = divmod(rank, 2)
    local = tensors(0)
    fragment = OuterFragment(
        local, Exchange(outer_groups[place], block_size=4, **options), OuterSGD(0.7, 0.9), inner_groups[worker]
    )
    for tensor, noise in zip(local, tensors(10 + worker), strict=True):
        tensor.add_(noise)
    pending = Pending(0, [1], 1, flight=fragment.launch())
    pending.wait()
    fragment.commit(*fragment.preview(pending.land()))
    fragment.mix(fragment.value, 0.5)
    return {"full": fragment.full(fragment.value), "shard": fragment.value.numel(), "local": local}


@pytest.mark.parametrize("options", [{"quantize": "fp32"}, {}, {"reduction": "scatter"}], ids=str)
def test_shards_over_a_worker_make_the_whole_fragment(options: dict[str, Any]) -> None:
    results = in_processes(4, two_workers_of_two, options)
    start = torch.cat([tensor.flatten() for tensor in tensors(0)])
    noise = torch.stack([torch.cat([tensor.flatten() for tensor in tensors(10 + worker)]) for worker in range(2)])
    expected = start + 0.7 * 1.9 * noise.mean(0)  # one Nesterov step from rest
    tolerance = 1e-5 if "quantize" in options else 1.0
    for result in results:
        assert result["shard"] == 16  # 30 values, half of them, up to whole blocks
        assert torch.equal(result["full"], results[0]["full"])
        torch.testing.assert_close(result["full"], expected, rtol=0, atol=tolerance)
    for first, second in ((0, 1), (2, 3)):
        assert all(map(torch.equal, results[first]["local"], results[second]["local"]))
