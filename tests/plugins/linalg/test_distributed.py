from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from fulgurite.plugins.linalg import (
    DiagonalOperator,
    GGNOperator,
    HessianOperator,
    LossOperator,
    ModuleLoss,
    cg,
    eigsh,
    hutchinson_trace,
    lanczos,
    record_loss,
    slq,
)
from tests.plugins.linalg.dense import batch, network
from tests.plugins.linalg.test_module_loss import Plain
from tests.suites.processes import in_processes

close = torch.testing.assert_close
P = 51  # odd, so that the rows of two ranks are padded


def operator(kind: type[LossOperator], rank: int | None) -> LossOperator:
    """Of a rank's half of the batch, or of all of it."""
    x, y = batch(n=8)
    mine = slice(None) if rank is None else slice(4 * rank, 4 * rank + 4)
    return kind(ModuleLoss(Plain(), [((x[mine], y[mine]), 0)]))


def vector() -> Tensor:
    return torch.randn(P, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


def quantities(rank: int | None) -> dict[str, Tensor]:
    found = {}
    for kind in (HessianOperator, GGNOperator):
        op = operator(kind, rank)
        sharded = lanczos(op, 9, v0=vector(), basis="sharded")
        pairs = eigsh(op, 2, v0=vector(), tol=1e-10, basis="sharded")
        found[kind.__name__] = {
            "product": op @ vector(),
            "block": op @ torch.stack([vector(), vector() * 2], 1),
            "shifted": (op.shift(2.0) + DiagonalOperator(vector())).scale(0.5) @ vector(),
            "gradient": op.gradient,
            "loss": op.loss,
            "full": lanczos(op, 9, v0=vector()).tridiagonal(),
            "sharded": sharded.tridiagonal(),
            "krylov": sharded.lift(sharded.solve(1.0, 3.0)),
            "krylov rows": torch.tensor(sharded.basis.shape if sharded.basis is not None else ()),
            "eigenvalues": pairs.values,
            "eigenvector": pairs.vectors[:, 0].abs(),
            "cg": cg(op, vector(), shift=3.0, rtol=1e-12).x,
            "cg stop": torch.tensor(cg(op, vector(), shift=3.0, stop=lambda x, r: bool(r.norm() < 1e-3)).n_iter),
        }
    return {f"{kind} {name}": value for kind, values in found.items() for name, value in values.items()}


def test_two_ranks_with_half_the_batch_are_one_with_all_of_it() -> None:
    alone = quantities(None)
    ranks = in_processes(2, quantities)
    for name, value in alone.items():
        for result in ranks:
            if "rows" in name:
                assert result[name].tolist() == [9, 26]
            elif "eigenvector" not in name:
                close(result[name], value, rtol=1e-8, atol=1e-10)
        if "eigenvector" in name:
            close(torch.cat([result[name] for result in ranks])[:P], value, rtol=1e-6, atol=1e-8)
        if "krylov" in name or "sharded" in name:
            assert torch.equal(ranks[0][name], ranks[1][name])


def counted(rank: int) -> dict[str, list[str]]:
    calls: list[str] = []

    def counting(name: str) -> Any:
        original = getattr(dist, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(f"{name} {max(tensor.numel() for tensor in args if isinstance(tensor, Tensor))}")
            return original(*args, **kwargs)

        return call

    ops = {kind.__name__: operator(kind, rank) for kind in (HessianOperator, GGNOperator)}
    names = ("all_reduce", "broadcast", "reduce_scatter", "all_gather")
    for name in names:
        setattr(dist, name, counting(name))
    found = {}
    for name, op in ops.items():
        runs = {
            "product": lambda op=op: op @ vector(),
            "block": lambda op=op: op @ torch.stack([vector()] * 3, 1),
            "tree": lambda op=op: (op.shift(1.0) + DiagonalOperator(vector())) @ vector(),
            "full": lambda op=op: lanczos(op, 3, v0=vector()),
            "sharded": lambda op=op: lanczos(op, 3, v0=vector(), basis="sharded"),
            "alone": lambda op=op: type(op)(op.source, sync=False) @ vector(),  # type: ignore[attr-defined]
        }
        for run, function in runs.items():
            calls.clear()
            function()
            found[f"{name} {run}"] = list(calls)
    return found


@pytest.mark.parametrize("kind", ["HessianOperator", "GGNOperator"])
def test_a_product_is_one_all_reduce(kind: str) -> None:
    for found in in_processes(2, counted):
        assert found[f"{kind} product"] == [f"all_reduce {P}"]
        assert found[f"{kind} block"] == [f"all_reduce {3 * P}"]
        assert found[f"{kind} tree"] == [f"all_reduce {P}"]
        assert not found[f"{kind} alone"]
        big = [call for call in found[f"{kind} full"] if int(call.split()[1]) > 4]
        assert big == [f"all_reduce {P}"] * 3
        big = [call for call in found[f"{kind} sharded"] if int(call.split()[1]) > 4]
        assert big == ["all_gather 26", "reduce_scatter 26"] * 3


def disagreeing(rank: int) -> dict[str, Tensor]:
    """Ranks whose stopping rules and generators differ."""
    op = operator(HessianOperator, rank)
    generator = torch.Generator().manual_seed(rank)
    rule = lambda x, r: bool(r.norm() < (1e-1 if rank == 0 else 1e-9))  # noqa: E731
    result = cg(op, vector(), shift=3.0, stop=rule)
    return {
        "cg": torch.tensor(result.n_iter),
        "slq": slq(op, 3, 2, generator=generator).nodes,
        "trace": torch.tensor(hutchinson_trace(op, 3, generator=generator)),
        "gaussian": lanczos(op, 3, generator=generator).alpha,
        "eigsh": eigsh(op, 2, tol=1e-2 if rank == 0 else 1e-12, generator=generator).values,
    }


def test_rank_0_decides_and_draws() -> None:
    first, second = in_processes(2, disagreeing)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def ddp(rank: int) -> dict[str, Tensor]:
    net, (x, y) = network(), batch(n=8)
    wrapped = DistributedDataParallel(net)
    mine = slice(4 * rank, 4 * rank + 4)
    with record_loss() as rec:
        cross_entropy(wrapped(x[mine]), y[mine]).backward()
    op = GGNOperator(rec.graph, net.parameters())
    grads = op.flatten([param.grad for param in net.parameters()])
    product = op @ vector()
    assert torch.equal(op.flatten([param.grad for param in net.parameters()]), grads)
    return {"grad": grads, "gradient": op.gradient, "product": product}


def test_ddp_averages_the_recorded_gradient() -> None:
    whole = operator(GGNOperator, None)
    for result in in_processes(2, ddp):
        assert torch.equal(result["gradient"], result["grad"])
        close(result["product"], whole @ vector())


def own_group(rank: int) -> Tensor:
    groups = [dist.new_group([i, 3 - i]) for i in (0, 1)]
    mine = groups[rank if rank < 2 else 3 - rank]
    x, y = batch(n=8)
    half = slice(0, 4) if rank < 2 else slice(4, 8)
    op = HessianOperator(ModuleLoss(Plain(), [((x[half], y[half]), 0)]), group=mine)
    return op @ eigsh(op, 1, generator=torch.Generator().manual_seed(rank)).vectors[:, 0]


@pytest.mark.parametrize("world_size", [4])
def test_a_group_of_its_own(world_size: int) -> None:
    results = in_processes(world_size, own_group)
    assert torch.equal(results[0], results[3])
    assert torch.equal(results[1], results[2])
    whole = operator(HessianOperator, None)
    assert float(results[0].norm()) == pytest.approx(float(eigsh(whole, 1).values[0]), rel=1e-3)
