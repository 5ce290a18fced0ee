from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fulgurite.plugins.linalg import (
    FisherOperator,
    GGNOperator,
    HessianOperator,
    LossGraph,
    LossOperator,
    record_loss,
)
from tests.plugins.linalg.dense import CLASSES, Dense, Loss, SquaredOnce, batch, network, penalty

LOSSES: list[Loss] = [F.cross_entropy, F.mse_loss]
close = torch.testing.assert_close


def record(net: nn.Module, x: Tensor, y: Tensor, loss: Loss = F.cross_entropy, decay: float = 0.0) -> LossGraph:
    with record_loss() as rec:
        total = loss(net(x), y)
        rec.finish(total + decay * penalty(list(net.parameters())) if decay else total)
    return rec.graph


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("loss", LOSSES)
def test_matrices_equal_those_of_functional_transforms(loss: Loss, decay: float) -> None:
    net, (x, y) = network(), batch(loss)
    graph, dense = record(net, x, y, loss, decay), Dense(net, x, y, loss, decay)
    kinds: dict[type[LossOperator], Tensor] = {
        HessianOperator: dense.hessian(),
        GGNOperator: dense.ggn(),
        FisherOperator: dense.empirical_fisher(),
    }
    for kind, matrix in kinds.items():
        op = kind(graph, net.parameters())
        close(op.to_dense(), matrix)
        close(op.gradient, dense.gradient())  # with the penalty, which reaches the loss past the outputs
        close(op.loss, dense.loss(dense.theta))
        assert op.n_products == op.shape[0] == 51
    assert all(param.grad is None for param in net.parameters())


@pytest.mark.parametrize("loss", LOSSES)
def test_the_ggn_of_a_linear_model_is_its_hessian(loss: Loss) -> None:
    net, (x, y) = nn.Linear(4, CLASSES).double(), batch(loss)
    graph = record(net, x, y, loss)
    close(GGNOperator(graph, net.parameters()).to_dense(), HessianOperator(graph, net.parameters()).to_dense())


def test_products_are_symmetric_and_central_differences_of_gradients() -> None:
    net, (x, y) = network(), batch()
    op, dense = HessianOperator(record(net, x, y), net.parameters()), Dense(net, x, y)
    u, v = torch.randn(2, op.shape[0], dtype=torch.float64)
    close(u @ (op @ v), v @ (op @ u))

    def difference(eps: float) -> Tensor:
        gradient = torch.func.grad(dense.loss)
        return (gradient(dense.theta + eps * v) - gradient(dense.theta - eps * v)) / (2 * eps)

    errors = [(difference(eps) - op @ v).norm() for eps in (1e-2, 5e-3)]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.01)  # the difference is wrong by O(eps^2)


def test_a_quadratic_loss_has_its_matrix() -> None:
    a = torch.randn(5, 5, dtype=torch.float64)
    a, theta = a + a.T, nn.Parameter(torch.randn(5, dtype=torch.float64))
    with record_loss() as rec:
        (0.5 * theta @ a @ theta).backward()
    op = HessianOperator(rec.graph)
    close(op.to_dense(), a)
    close(op.gradient, a @ theta.detach())


def test_columns_of_a_block_are_products() -> None:
    net, (x, y) = network(), batch()
    graph = record(net, x, y, decay=0.3)
    block = torch.randn(51, 4, dtype=torch.float64)
    for op in (HessianOperator(graph, net.parameters()), GGNOperator(graph, net.parameters())):
        product = op @ block
        assert op.n_products == 4
        for k in range(4):
            close(product[:, k], op @ block[:, k])


def test_several_outputs_with_and_without_a_cross_term() -> None:
    net, (x, y), other = network(), batch(), network(seed=3)
    both = nn.ModuleList([net, other])

    def curvature(coupled: bool) -> tuple[Tensor, Tensor]:
        def loss(z: Tensor, w: Tensor) -> Tensor:
            total = F.cross_entropy(z, y) + F.mse_loss(w, torch.zeros_like(w))
            return total * F.cross_entropy(z, y) if coupled else total

        with record_loss() as rec:
            rec.finish(loss(net(x), other(x)))
        dense = [Dense(net, x, y), Dense(other, x, y)]
        z = torch.stack([part.output(part.theta) for part in dense])
        inner = torch.func.hessian(lambda zs: loss(zs[0], zs[1]))(z).reshape(z.numel(), -1)
        jacobian = torch.block_diag(*(part.jacobian().flatten(0, 1) for part in dense))
        return GGNOperator(rec.graph, both.parameters()).to_dense(), jacobian.T @ inner @ jacobian

    close(*curvature(coupled=False))
    close(*curvature(coupled=True))


def test_a_block_of_the_parameters_and_unused_ones() -> None:
    net, (x, y) = network(), batch()
    spare = nn.Parameter(torch.ones(2, dtype=torch.float64))
    graph, dense = record(net, x, y), Dense(net, x, y)
    weight = net[2].weight
    last = slice(4 * 6 + 6, 51 - CLASSES)
    for kind, matrix in ((HessianOperator, dense.hessian()), (GGNOperator, dense.ggn())):
        block = kind(graph, [weight, spare]).to_dense()
        close(block[:-2, :-2], matrix[last, last])
        assert not block[-2:].any()


def test_what_a_step_only_logs_does_not_count() -> None:
    net, (x, y) = network(), batch()
    with record_loss() as rec:
        z = net(x)
        F.l1_loss(z, torch.zeros_like(z))
        F.mse_loss(network(seed=5)(x), x[:, :CLASSES])
        F.cross_entropy(z, y).backward()
    close(GGNOperator(rec.graph, net.parameters()).to_dense(), Dense(net, x, y).ggn())
    close(FisherOperator(rec.graph, net.parameters()).to_dense(), Dense(net, x, y).empirical_fisher())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("loss", LOSSES)
def test_drawn_fisher_matrices_have_the_ggn_as_their_mean(loss: Loss, reduction: str) -> None:
    net, (x, y) = network(hidden=2), batch(loss)
    scale = 0.5 if reduction == "mean" else 1.0
    with record_loss() as rec:
        rec.finish(scale * loss(net(x), y, reduction=reduction).mean())  # type: ignore[call-arg]
    ggn = GGNOperator(rec.graph, net.parameters()).to_dense()
    draws = 2000
    op = FisherOperator(rec.graph, net.parameters(), "mc", draws, torch.Generator().manual_seed(0))
    error = (op.to_dense() - ggn).norm() / ggn.norm()
    # A draw's own error is of the order of the matrix times the root of its rank, below 4 here.
    assert error < 4 / draws**0.5
    one = FisherOperator(rec.graph, net.parameters(), "mc", 1, torch.Generator().manual_seed(0))
    assert (one.to_dense() - ggn).norm() / ggn.norm() > 4 / draws**0.5
    close(one @ torch.ones(op.shape[0]), one @ torch.ones(op.shape[0]), rtol=0, atol=0)  # drawn once


def test_fisher_ignores_what_cross_entropy_ignores() -> None:
    net, (x, y) = network(), batch()
    y[:3] = -100
    graph, dense = record(net, x, y), Dense(net, x[3:], y[3:])
    close(FisherOperator(graph, net.parameters()).to_dense(), dense.empirical_fisher())
    drawn = FisherOperator(graph, net.parameters(), "mc", 2000, torch.Generator().manual_seed(0)).to_dense()
    assert (drawn - dense.ggn()).norm() / dense.ggn().norm() < 4 / 2000**0.5


def test_fisher_ignores_samples_of_weight_zero() -> None:
    net, (x, y) = network(), batch()
    mask = (torch.arange(10) > 2).double()
    with record_loss() as rec:
        rec.finish((F.cross_entropy(net(x), y, reduction="none") * mask).sum() / mask.sum())
    fisher = FisherOperator(rec.graph, net.parameters()).to_dense()
    close(fisher, Dense(net, x[3:], y[3:]).empirical_fisher())


@pytest.mark.parametrize("kind", ["empirical", "mc"])
def test_fisher_of_pixels_takes_the_class_axis(kind: Any) -> None:
    net = nn.Conv1d(2, CLASSES, 1).double()
    flat = nn.Linear(2, CLASSES).double()
    flat.load_state_dict({"weight": net.weight[..., 0], "bias": net.bias})
    x, y = torch.randn(3, 2, 5, dtype=torch.float64), torch.randint(CLASSES, (3, 5))
    graphs = record(net, x, y), record(flat, x.movedim(1, 2).reshape(-1, 2), y.reshape(-1))
    matrices = []
    for graph, part in zip(graphs, (net, flat), strict=True):
        op = FisherOperator(graph, part.parameters(), kind, generator=torch.Generator().manual_seed(1))
        matrices.append(op.to_dense())
    close(*matrices)


def test_vectors_are_float32_unless_a_parameter_is_wider() -> None:
    net, (x, y) = network().bfloat16(), batch()
    op = HessianOperator(record(net, x.bfloat16(), y), net.parameters())
    assert op.dtype == op.gradient.dtype == (op @ op.gradient).dtype == torch.float32
    pieces = op.unflatten(torch.arange(51.0))
    assert [piece.shape for piece in pieces] == [param.shape for param in net.parameters()]
    assert torch.equal(op.flatten(pieces), torch.arange(51.0))


def test_autocast_graphs_agree_with_full_precision_to_its_rounding() -> None:
    net, (x, y) = network().float(), batch()
    exact = GGNOperator(record(net, x.float(), y), net.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        mixed = GGNOperator(record(net, x.float(), y), net.parameters())
    v = exact.gradient
    assert (mixed @ v - exact @ v).norm() < 0.05 * (exact @ v).norm()


def linear(net: nn.Module, x: Tensor, y: Tensor) -> LossGraph:
    return record(net, x, y, lambda z, y: F.nll_loss(z, y))


def nested(net: nn.Module, x: Tensor, y: Tensor) -> LossGraph:
    return record(net, x, y, lambda z, y: F.cross_entropy(z, y) + F.mse_loss(z.tanh(), torch.zeros_like(z)))


def by_hand(net: nn.Module, x: Tensor, y: Tensor) -> LossGraph:
    return record(net, x, y, lambda z, y: z.square().mean())


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (linear, "`nll_loss` is linear in its input"),
        (nested, "one recorded output depends on another"),
        (by_hand, r"pass `outputs=<submodule>`"),
    ],
)
def test_refused_splits(make: Callable[[nn.Module, Tensor, Tensor], LossGraph], match: str) -> None:
    net, (x, y) = network(), batch()
    with pytest.raises(ValueError, match=match):
        GGNOperator(make(net, x, y), net.parameters())


def test_refused_draws_and_kinds() -> None:
    net, (x, y) = network(), batch()
    graph = record(net, x, y, lambda z, y: F.huber_loss(z, torch.zeros_like(z)))
    with pytest.raises(ValueError, match=r"`kind='mc'` knows cross_entropy and mse_loss.*huber_loss"):
        FisherOperator(graph, net.parameters(), "mc")
    weighted = record(net, x, y, lambda z, y: F.cross_entropy(z, y, weight=torch.ones(CLASSES).double()))
    with pytest.raises(ValueError, match=r"`kind='mc'`.*`cross_entropy` with a weight"):
        FisherOperator(weighted, net.parameters(), "mc")
    twice = record(net, x, y, lambda z, y: F.cross_entropy(z, y) + F.mse_loss(z, torch.zeros_like(z)))
    with pytest.raises(ValueError, match="two loss functions got the same prediction"):
        FisherOperator(twice, net.parameters())
    with pytest.raises(ValueError, match="`kind` must be"):
        FisherOperator(graph, net.parameters(), "exact")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`n_samples` counts draws"):
        FisherOperator(graph, net.parameters(), "mc", 0)


def test_refused_parameters() -> None:
    net, (x, y) = network(), batch()
    graph = record(net, x, y)
    pieces = nn.Parameter(torch.ones(2))
    pieces.ds_id = 3  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"held in pieces by FSDP.*train with DDP"):
        HessianOperator(graph, [pieces])
    with pytest.raises(ValueError, match="`params` is empty"):
        HessianOperator(graph, [])
    with pytest.raises(ValueError, match="must be real and require gradients"):
        HessianOperator(graph, [torch.ones(2)])
    with pytest.raises(ValueError, match="live on"):
        HessianOperator(graph, [net[0].weight, nn.Parameter(torch.ones(2, device="meta"))])
    with pytest.raises(ValueError, match="must have 51 numbers"):
        HessianOperator(graph, net.parameters()) @ torch.ones(50)


def test_parameters_that_left_the_graph_are_refused() -> None:
    net, (x, y) = network(), batch()
    op = HessianOperator(record(net, x, y), net.parameters())
    net.float()  # without the error, all products would be zero
    with pytest.raises(RuntimeError, match="changed their type or device"):
        op @ torch.ones(51)


def test_an_operation_without_second_derivative_is_named() -> None:
    net, (x, y) = network(), batch()
    with record_loss() as rec:
        rec.finish(F.cross_entropy(SquaredOnce.apply(net(x)), y))
    with pytest.raises(RuntimeError, match=r"lacks a derivative: .*once_differentiable"):
        HessianOperator(rec.graph, net.parameters()) @ torch.ones(51)


def test_stepped_weights_need_a_new_recording() -> None:
    net, (x, y) = network(), batch()
    op = HessianOperator(record(net, x, y), net.parameters())
    op @ torch.ones(51)
    with torch.no_grad():
        net[2].weight.add_(1)
    with pytest.raises(RuntimeError, match="weights that an optimizer stepped need a new recording"):
        op @ torch.ones(51)
