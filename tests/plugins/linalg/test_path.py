import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fulgurite.plugins.linalg import HessianOperator, ModuleLoss, PathResult, connecting_path
from tests.plugins.linalg.dense import CLASSES, Dense, batch, network
from tests.plugins.linalg.test_module_loss import Busy, Plain
from tests.plugins.linalg.test_spectrum import Linear
from tests.suites.processes import in_processes

close = torch.testing.assert_close


def weights(seed: int) -> Tensor:
    return nn.utils.parameters_to_vector(network(seed).parameters()).detach()


def test_the_loss_at_each_point_and_the_barrier() -> None:
    module, data = Plain(), batch()
    before = weights(0)
    loss, dense = ModuleLoss(module, [(data, 0)]), Dense(module.net, *data)
    a = dense.theta
    for _ in range(50):
        a = a - torch.func.grad(dense.loss)(a)
    b = torch.cat([-a[:-CLASSES], a[-CLASSES:]])  # the same function, for tanh is odd; halfway it is constant
    path = connecting_path(loss, a, b, n_points=5)
    expected = torch.stack([dense.loss((1 - t) * a + t * b) for t in (0, 0.25, 0.5, 0.75, 1)])
    close(path.loss, expected)
    assert path.barrier == pytest.approx(float(expected.max() - expected[0]))
    assert path.barrier > 0.1
    assert torch.equal(nn.utils.parameters_to_vector(module.parameters()), before)
    by_name = [
        {f"net.{name}": value for name, value in dense.weights(end).items()} | {"other": torch.zeros(1)}
        for end in (a, b)
    ]
    assert torch.equal(connecting_path(loss, *by_name, n_points=5).loss, path.loss)


def test_no_way_has_no_barrier_and_convex_losses_have_none() -> None:
    loss = ModuleLoss(Plain(), [(batch(), 0)])
    assert connecting_path(loss, weights(1), weights(1), 7).barrier == 0
    module = Linear(F.cross_entropy)
    a, b = torch.randn(2, 4 * CLASSES + CLASSES, dtype=torch.float64)
    path = connecting_path(ModuleLoss(module, [(batch(), 0)]), a, b)
    assert path.barrier == 0  # at the ends
    assert (path.loss[1:-1] < torch.lerp(path.loss[0], path.loss[-1], path.t)[1:-1]).all()


def test_kept_graphs_stay_valid() -> None:
    module = Plain()
    loss = ModuleLoss(module, [(batch(), 0)])
    op = HessianOperator(loss)
    first = op.to_dense()
    connecting_path(loss, weights(1), weights(2), 3)
    close(op.to_dense(), first)


def test_running_statistics_follow_the_weights_and_are_put_back() -> None:
    module = Busy().eval()
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    halves = [(batch(n=6, seed=1), 0), (batch(n=6, seed=2), 1)]
    point = torch.cat([param.detach().flatten() for param in module.parameters()]) * 3
    path = connecting_path(ModuleLoss(module, halves), point, point, 2)
    x, y = (torch.cat(parts) for parts in zip(*(data for data, _ in halves), strict=True))
    reference = Busy().eval()
    nn.utils.vector_to_parameters(point, reference.parameters())
    norm = reference.net[1]
    hidden = [reference.net[0](data[0]).detach() for data, _ in halves]
    norm.running_mean = torch.stack([h.mean(0) for h in hidden]).mean(0)
    norm.running_var = torch.stack([h.var(0) for h in hidden]).mean(0)
    close(path.loss[0], F.cross_entropy(reference.net(x), y))
    assert all(torch.equal(buffer, before[name]) for name, buffer in module.named_buffers())
    assert not any(part.training for part in module.modules())
    assert module.net[1].momentum == 0.1


def half(rank: int) -> dict[str, Tensor]:
    x, y = batch(n=8)
    mine = slice(4 * rank, 4 * rank + 4)
    path = connecting_path(ModuleLoss(Plain(), [((x[mine], y[mine]), 0)]), weights(1), weights(2), 3)
    return {"loss": path.loss, "barrier": torch.tensor(path.barrier)}


def test_two_ranks_with_half_the_batch_are_one_with_all_of_it() -> None:
    alone: PathResult = connecting_path(ModuleLoss(Plain(), [(batch(n=8), 0)]), weights(1), weights(2), 3)
    for result in in_processes(2, half):
        close(result["loss"], alone.loss)


def test_refusals() -> None:
    loss = ModuleLoss(Plain(), [(batch(), 0)])
    with pytest.raises(ValueError, match="`n_points` counts both ends"):
        connecting_path(loss, weights(0), weights(1), 1)
    with pytest.raises(ValueError, match=r"have 51 numbers each, got \(50,\)"):
        connecting_path(loss, weights(0), weights(1)[:-1])
