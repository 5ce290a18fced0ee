import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fulgurite.plugins.equilibrium import (
    ConvField,
    DenseField,
    EquilibriumField,
    attach_loss,
    homeostatic_loss,
    jacobian_symmetry,
)
from tests.plugins.equilibrium.dense import SIZES, Opaque, dense_field, inputs, jacobian


def conv_field() -> ConvField:
    torch.manual_seed(0)
    return ConvField((1, 8, 8), (3,), 4).double()


def case(name: str) -> tuple[EquilibriumField, Tensor, Tensor]:
    field = {"dense": dense_field, "opaque": lambda: Opaque(dense_field()), "conv": conv_field}[name]()
    x = inputs(5, 1, 8, 8) if name == "conv" else inputs()
    return field, inputs(5, field.n, seed=2), x


def by_hand(field: EquilibriumField, r: Tensor, x: Tensor) -> Tensor:
    """``2 |A|^2 / n``, a mean over samples, from the Jacobian."""
    j = jacobian(field, r, x)
    return (2 / field.n) * (0.5 * (j - j.mT)).square().sum((1, 2)).mean()


def test_exact_is_the_jacobians_antisymmetric_part() -> None:
    field, r, x = case("dense")
    loss = homeostatic_loss(field, r, x, estimator="exact")
    torch.testing.assert_close(loss, by_hand(field, r, x), rtol=1e-13, atol=0)


def test_exact_is_a_sum_over_reciprocal_pairs_and_lonely_connections() -> None:
    connections = {"in-l1": True, "l1-out": True, "out-l1": False, "l1-l2": True, "l2-out": True}
    field = DenseField(6, SIZES, connections).double()
    w = field.weights
    expected = (w["l1-out"] - w["out-l1"].T).square().sum() + w["l1-l2"].square().sum() + w["l2-out"].square().sum()
    x = inputs()
    torch.testing.assert_close(
        homeostatic_loss(field, inputs(5, field.n), x, estimator="exact"), expected / field.n, rtol=1e-13, atol=0
    )


@pytest.mark.parametrize("name", ["dense", "opaque", "conv"])
@pytest.mark.parametrize("estimator", ["vjp", "jvp"])
def test_probes_have_the_mean_of_the_jacobian(name: str, estimator: Any) -> None:
    field, r, x = case(name)
    generator = torch.Generator().manual_seed(3)
    draws = torch.stack(
        [homeostatic_loss(field, r, x, estimator=estimator, generator=generator).detach() for _ in range(150)]
    )
    standard_error = draws.std() / math.sqrt(len(draws))
    assert (draws.mean() - by_hand(field, r, x)).abs() < 4 * standard_error
    assert standard_error < 0.05 * draws.mean()
    assert estimator == "jvp" or draws.min() > 0


@pytest.mark.parametrize("name", ["dense", "opaque"])
@pytest.mark.parametrize("estimator", ["vjp", "jvp"])
def test_probes_have_the_gradient_of_the_closed_form(name: str, estimator: Any) -> None:
    field, r, x = case(name)
    inner = field.inner if isinstance(field, Opaque) else field
    names = ["l1-l2", "l2-l1", "l2-out", "out-l2"]
    weights = [inner.weights[key] for key in names]  # type: ignore[index]
    exact = homeostatic_loss(inner, r, x, estimator="exact")  # type: ignore[arg-type]
    expected = torch.cat([grad.flatten() for grad in torch.autograd.grad(exact, weights)])
    generator, probes = torch.Generator().manual_seed(3), 200
    draws = []
    for _ in range(40):
        loss = homeostatic_loss(field, r, x, probes=probes, estimator=estimator, generator=generator)
        draws.append(torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, weights)]))
    mean, errors = torch.stack(draws).mean(0), torch.stack(draws).std(0) / math.sqrt(len(draws))
    assert ((mean - expected).abs() < 5 * errors).all()  # some 110 weights
    assert torch.cosine_similarity(mean, expected, dim=0) > 0.999


@pytest.mark.parametrize("estimator", ["vjp", "jvp"])
def test_gradients_of_convolutions_are_those_of_the_jacobian(estimator: Any) -> None:
    field, r, x = case("conv")
    kernels = [field.kernels["l1-out"], field.kernels_back["out-l1"]]  # type: ignore[union-attr, operator]
    expected = torch.cat([grad.flatten() for grad in torch.autograd.grad(by_hand_with_graph(field, r, x), kernels)])
    generator = torch.Generator().manual_seed(3)
    draws = []
    for _ in range(30):
        loss = homeostatic_loss(field, r, x, probes=40, estimator=estimator, generator=generator)
        draws.append(torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, kernels)]))
    mean = torch.stack(draws).mean(0)
    assert torch.cosine_similarity(mean, expected, dim=0) > 0.99
    assert mean.norm() / expected.norm() == pytest.approx(1, abs=0.1)


def by_hand_with_graph(field: EquilibriumField, r: Tensor, x: Tensor) -> Tensor:
    rows = torch.stack(
        [
            torch.autograd.functional.jacobian(lambda row, xs=xs: field(row[None], xs[None])[0], rs, create_graph=True)
            for rs, xs in zip(r, x, strict=True)
        ]
    )
    return (2 / field.n) * (0.5 * (rows - rows.mT)).square().sum((1, 2)).mean()


@pytest.mark.parametrize("estimator", ["vjp", "jvp", "exact"])
def test_a_symmetric_field_has_no_loss(estimator: Any) -> None:
    field, x = dense_field(angle=0.0), inputs()
    loss = homeostatic_loss(field, inputs(5, field.n), x, estimator=estimator)
    assert abs(loss.item()) < (1e-15 if estimator == "jvp" else 1e-30)


def test_the_loss_is_of_the_weights_alone() -> None:
    field, r, x = case("conv")
    r.requires_grad_()
    x.requires_grad_()
    homeostatic_loss(field, r, x).backward()
    assert r.grad is None
    assert x.grad is None
    assert all(kernel.grad is not None for kernel in field.kernels_back.values())  # type: ignore[union-attr, operator]


def test_an_empty_batch_has_no_loss() -> None:
    for name in ("dense", "opaque", "conv"):
        field, r, x = case(name)
        for estimator in ("vjp", "jvp"):
            assert homeostatic_loss(field, r[:0], x[:0], estimator=estimator) == 0  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["dense", "opaque", "conv"])
def test_the_index_is_that_of_the_jacobian(name: str) -> None:
    field, r, x = case(name)
    j = jacobian(field, r, x)
    on, off = (0.5 * (j + j.mT)).flatten(1).norm(dim=1), (0.5 * (j - j.mT)).flatten(1).norm(dim=1)
    torch.testing.assert_close(jacobian_symmetry(field, r, x), on / (on + off))


def test_the_index_is_1_for_symmetric_and_0_for_antisymmetric_and_half_between() -> None:
    field = DenseField(3, {"out": 60}, {"out-out": False}).double()
    weight, r, x = field.weights["out-out"], inputs(1, 60), inputs(1, 3)
    assert jacobian_symmetry(field, r, x).item() == pytest.approx(0.5, abs=0.02)
    with torch.no_grad():
        drawn = weight.clone()
        for sign, expected in ((1, 1.0), (-1, 0.0), (0, 1.0)):
            weight.copy_(drawn + drawn.T if sign == 1 else drawn - drawn.T if sign == -1 else 0 * drawn)
            assert jacobian_symmetry(field, r, x).item() == expected


def test_attach_adds_the_gradient_of_the_loss_alone() -> None:
    weight = torch.ones(3, requires_grad=True)
    other = torch.ones(3, requires_grad=True)
    out = attach_loss(2 * weight, (other**2).sum(), torch.tensor(0.25))
    assert torch.equal(out, 2 * weight)
    (1000 * out).sum().backward()
    assert torch.equal(weight.grad, torch.full((3,), 2000.0))
    assert torch.equal(other.grad, torch.full((3,), 0.5))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda *given: homeostatic_loss(*given, probes=0), "`probes` .* at least 1, got 0"),
        (lambda *given: homeostatic_loss(*given, estimator="best"), "`estimator` must be .* got 'best'"),
        (lambda *given: homeostatic_loss(*given, estimator="exact"), "`estimator='exact'` .* ConvField has no"),
        (lambda field, r, x: attach_loss(r, r, 1.0), "`loss` must be a scalar"),
        (lambda field, r, x: jacobian_symmetry(DenseField(3, {"out": 2049}), r, x), "2049 rows, above 2048"),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(*case("conv"))
