import math

import pytest
import torch
from torch import Tensor

from fulgurite.plugins.linalg import (
    DenseOperator,
    DiagonalOperator,
    HessianOperator,
    ModuleLoss,
    SpectralMeasure,
    hutchinson_diagonal,
    hutchinson_trace,
    slq,
)
from tests.plugins.linalg.dense import batch
from tests.plugins.linalg.test_module_loss import Plain

close = torch.testing.assert_close
D = torch.tensor([-2.0, -0.5, 0.1, 1.0, 3.0, 4.0, 9.0], dtype=torch.float64)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def exact() -> SpectralMeasure:
    """Signs see each axis alike: all steps give all eigenvalues with equal weights."""
    return slq(DiagonalOperator(D), len(D), 2, generator=seeded())


def test_a_diagonal_matrix_is_seen_exactly(exact: SpectralMeasure) -> None:
    close(exact.nodes, D.expand(2, -1))
    close(exact.weights, torch.full((2, 7), 1 / 7, dtype=torch.float64))
    assert exact.trace() == pytest.approx((float(D.sum()), 0.0), abs=1e-12)
    assert exact.moment(3) == pytest.approx(float((D**3).mean()))
    negative, error = exact.integrate(lambda nodes: nodes.clamp(max=0).abs())
    assert (negative, error) == pytest.approx((2.5 / 7, 0.0), abs=1e-12)
    log = slq(DiagonalOperator(D.abs()), 7, 1).trace(torch.log)[0]
    assert log == pytest.approx(float(D.abs().log().sum()))


def test_distribution_functions_of_a_measure(exact: SpectralMeasure) -> None:
    grid = torch.tensor([-3.0, 0.0, 3.5, 10.0])
    close(exact.cdf(grid), torch.tensor([0, 2, 5, 7], dtype=torch.float64) / 7)
    assert [exact.quantile(q) for q in (0.01, 0.5, 1.0)] == pytest.approx([-2.0, 1.0, 9.0])
    for sigma in (0.1, 1.0):
        line = torch.linspace(-2 - 8 * sigma, 9 + 8 * sigma, 4001, dtype=torch.float64)
        density = exact.density(line, sigma)
        assert torch.trapezoid(density, line) == pytest.approx(1, abs=1e-6)
        variance = torch.trapezoid(density * line**2, line) - torch.trapezoid(density * line, line) ** 2
        assert variance == pytest.approx(float(D.var(correction=0)) + sigma**2, abs=1e-4)
    with pytest.raises(ValueError, match="`sigma` is the width"):
        exact.density(line, 0.0)


def test_estimates_of_a_network_are_within_their_errors_which_shrink() -> None:
    op = HessianOperator(ModuleLoss(Plain(), [(batch(), 0)]))
    a = op.to_dense()
    dense = DenseOperator(a)
    errors = []
    for n_probes in (16, 256):
        for trace, error in (
            slq(dense, 8, n_probes, generator=seeded()).trace(),
            hutchinson_trace(dense, n_probes, distribution="gaussian", generator=seeded(1)),
        ):
            assert abs(trace - float(a.trace())) < 4 * error
        errors.append(error)
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.5)
    frobenius = slq(dense, 8, 256, distribution="gaussian", generator=seeded()).trace(lambda nodes: nodes**2)
    assert abs(frobenius[0] - float(a.square().sum())) < 4 * frobenius[1]


def test_hutchinson_and_slq_share_probes() -> None:
    a = torch.randn(9, 9, dtype=torch.float64)
    op = DenseOperator(a + a.T)
    measure = slq(op, 3, 4, generator=seeded(5), keep_lanczos=True)
    assert hutchinson_trace(op, 4, generator=seeded(5)) == pytest.approx(measure.trace())
    assert [len(run) for run in measure.runs] == [3] * 4
    close(torch.stack([run.ritz().values for run in measure.runs]), measure.nodes)


def test_a_diagonal_is_estimated_with_its_error() -> None:
    a = torch.randn(9, 9, dtype=torch.float64)
    a = a + a.T
    mean, error = hutchinson_diagonal(DenseOperator(a), 2000, generator=seeded())
    spread = ((a**2).sum(1) - a.diagonal() ** 2) ** 0.5  # of one probe of signs
    close(error, spread / 2000**0.5, rtol=0.1, atol=0)
    assert ((mean - a.diagonal()).abs() < 4 * error).all()
    mean, error = hutchinson_diagonal(DiagonalOperator(D), 1)
    close(mean, D)
    assert error.isnan().all()


def test_merging_pools_probes_of_unequal_length() -> None:
    d = torch.tensor([1.0, 1.0, 2.0, 2.0], dtype=torch.float64)
    short, long = slq(DiagonalOperator(d), 4, 1), slq(DenseOperator(D[:4].diag()), 4, 2)
    assert (short.nodes.shape[1], long.nodes.shape[1]) == (2, 4)
    both = short.merge(long)
    assert both.nodes.shape == (3, 4)
    for fn in (torch.abs, torch.reciprocal):
        pooled = short.integrate(fn)[0] / 3 + 2 * long.integrate(fn)[0] / 3
        assert both.integrate(fn)[0] == pytest.approx(pooled)
    assert math.isnan(short.integrate(torch.abs)[1])
    with pytest.raises(ValueError, match="with 4 and 7 rows"):
        short.merge(slq(DiagonalOperator(D), 2, 1))


def test_no_probes_are_refused() -> None:
    for estimate in (
        lambda op: slq(op, 2, 0),
        lambda op: hutchinson_trace(op, 0),
        lambda op: hutchinson_diagonal(op, 0),
    ):
        with pytest.raises(ValueError, match="`n_probes` counts random vectors"):
            estimate(DiagonalOperator(D))


def test_without_a_basis_the_weights_hold() -> None:
    measures: list[Tensor] = []
    for basis in ("full", "none"):
        measure = slq(DiagonalOperator(D), 5, 1, basis=basis, generator=seeded())  # type: ignore[arg-type]
        measures.append(measure.cdf(torch.linspace(-3, 10, 14)))
    close(*measures)
