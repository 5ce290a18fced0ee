from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from fulgurite.plugins.linalg import (
    DenseOperator,
    DiagonalOperator,
    FunctionOperator,
    HessianOperator,
    ModuleLoss,
    cg,
    eigsh,
    lanczos,
)
from tests.plugins.linalg.dense import Dense, batch, network
from tests.plugins.linalg.test_module_loss import Plain

close = torch.testing.assert_close


def matrix(size: int = 12, low: float = -1.0, high: float = 3.0, seed: int = 0) -> Tensor:
    """Symmetric, with evenly spaced eigenvalues."""
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
    return q @ torch.linspace(low, high, size, dtype=torch.float64).diag() @ q.T


@pytest.fixture
def b() -> Tensor:
    return torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def network_hessian() -> tuple[HessianOperator, Tensor]:
    op = HessianOperator(ModuleLoss(Plain(), [(batch(n=20), 0)]))
    return op, op.to_dense()


@pytest.mark.parametrize("m", [1, 4, 10])
def test_lanczos_quadrature_is_exact_up_to_power_2m_minus_1(m: int) -> None:
    _, a = network_hessian()
    v = torch.randn(len(a), dtype=torch.float64)
    ritz = lanczos(DenseOperator(a), m, v0=v).ritz()
    v /= v.norm()
    powers = v.clone()
    for p in range(2 * m + 1):
        moment, exact = ritz.weights @ ritz.values**p, v @ powers
        assert torch.isclose(moment, exact, rtol=1e-11, atol=0) == (p < 2 * m), p
        powers = a @ powers


def test_all_steps_give_the_eigenvalues_and_an_orthonormal_basis_that_projects() -> None:
    a = Dense(network(), *batch(mse_loss), mse_loss).hessian()  # no eigenvalue twice, as the null space of softmax has
    result = lanczos(DenseOperator(a), 10**6)
    assert len(result) == len(a)
    close(result.ritz().values, torch.linalg.eigvalsh(a), rtol=0, atol=1e-13)
    basis = result.basis
    assert basis is not None
    close(basis @ basis.T, torch.eye(len(a), dtype=torch.float64), rtol=0, atol=1e-13)
    close(basis @ a @ basis.T, result.tridiagonal(), rtol=0, atol=1e-13)
    assert len(result.beta) == len(result.alpha) - 1


def test_without_reorthogonalisation_the_top_eigenvalue_comes_up_again() -> None:
    a = torch.cat([torch.linspace(0, 1, 90), torch.tensor([10.0, 100.0])]).double()
    start = torch.ones(92, dtype=torch.float64)
    copies = []
    for reorthogonalize in (True, False):
        values = lanczos(DiagonalOperator(a), 60, v0=start, reorthogonalize=reorthogonalize).ritz().values
        copies.append(int((values > 99.9).sum()))
    assert copies[0] == 1
    assert copies[1] > 1
    ghosts = lanczos(DiagonalOperator(a), 60, v0=start, basis="none")
    assert ghosts.basis is None
    ritz = ghosts.ritz()
    assert ritz.weights[ritz.values > 99.9].sum() == pytest.approx(1 / 92)  # which ghosts share
    with pytest.raises(ValueError, match="keeps no vectors"):
        ghosts.lift(torch.ones(60))


def test_an_invariant_space_stops_and_is_exact() -> None:
    d = torch.tensor([1.0, 1, 1, 2, 2, 5], dtype=torch.float64)
    result = lanczos(DiagonalOperator(d), 6, v0=torch.ones(6, dtype=torch.float64))
    assert (len(result), result.breakdown) == (3, True)
    ritz = result.ritz()
    close(ritz.values, torch.tensor([1.0, 2, 5], dtype=torch.float64))
    close(ritz.weights, torch.tensor([3.0, 2, 1], dtype=torch.float64) / 6)
    assert ritz.residuals.max() < 1e-14
    assert len(result.extend(2)) == 3
    zero = lanczos(DiagonalOperator(torch.zeros(4)), 4)
    assert (len(zero), zero.breakdown) == (1, True)


def test_not_a_number_stops() -> None:
    assert lanczos(DiagonalOperator(torch.full((4,), torch.nan)), 4).breakdown


@pytest.mark.parametrize("steps", [(3, 4), (1,) * 7])
def test_going_on_equals_never_having_stopped(steps: tuple[int, ...], b: Tensor) -> None:
    whole = lanczos(DenseOperator(matrix()), 7, v0=b)
    parts = lanczos(DenseOperator(matrix()), steps[0], v0=b)
    for n in steps[1:]:
        assert parts.extend(n) is parts
    close(parts.tridiagonal(), whole.tridiagonal(), rtol=0, atol=0)
    close(parts.basis, whole.basis, rtol=0, atol=0)


@pytest.mark.parametrize("shift", [1.5, 4.0, 100.0])
def test_one_basis_solves_for_every_shift(shift: float, b: Tensor) -> None:
    op = DenseOperator(matrix())
    for k in (4, 12):
        result = lanczos(op, k, v0=b)
        y = result.solve(float(b.norm()), shift)
        x = result.lift(y)
        residual = b - op.shift(shift) @ x
        assert float(residual.norm()) == pytest.approx(result.beta_last * abs(float(y[-1])), abs=1e-12)
        close(x @ residual, torch.zeros((), dtype=torch.float64), rtol=0, atol=1e-12)
    assert residual.norm() < 1e-12
    close(result.lift(torch.stack([y, 2 * y], 1)), torch.stack([x, 2 * x], 1))


@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
def test_eigenpairs_at_each_end(which: Any) -> None:
    op, a = network_hessian()
    values, vectors, residuals = eigsh(op, 4, which=which, tol=1e-10)
    exact = torch.linalg.eigvalsh(a)
    order = {"LA": -exact, "SA": exact, "LM": -exact.abs()}[which].argsort()[:4]
    close(values, exact[order], rtol=1e-9, atol=1e-12)
    close(vectors.T @ vectors, torch.eye(4, dtype=torch.float64))
    errors = (a @ vectors - vectors * values).norm(dim=0)
    assert (errors <= residuals + 1e-12).all()


def test_residuals_bound_the_error_before_convergence() -> None:
    exact = torch.linspace(-1, 3, 60, dtype=torch.float64)
    values, vectors, residuals = eigsh(DenseOperator(matrix(60)), 3, n_iter=10)
    distance = (values[:, None] - exact).abs().amin(1)
    assert (distance <= residuals * (1 + 1e-9)).all()
    assert residuals.max() > 1e-2  # not converged
    close((matrix(60) @ vectors - vectors * values).norm(dim=0), residuals)


def test_a_warm_start_needs_fewer_products() -> None:
    a = matrix(100) + 20 * torch.eye(100, dtype=torch.float64)[0].diag()
    cold, warm = DenseOperator(a), DenseOperator(a)
    found = eigsh(cold, 2, tol=1e-8, generator=torch.Generator().manual_seed(0))
    again = eigsh(warm, 2, tol=1e-8, v0=found.vectors.sum(1))
    close(again.values, found.values)
    assert warm.n_products < cold.n_products


def test_multiple_eigenvalues_after_breakdown() -> None:
    d = torch.tensor([3.0, 3, 3, 0, 0], dtype=torch.float64)
    close(eigsh(DiagonalOperator(d), 5).values, d)
    close(eigsh(DiagonalOperator(torch.zeros(4, dtype=torch.float64)), 3).values, torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("x0", [False, True])
@pytest.mark.parametrize("shift", [0.0, 2.0])
def test_cg_solves(shift: float, x0: bool, b: Tensor) -> None:
    a = matrix(low=0.5)
    op = DenseOperator(a)
    result = cg(op, b, shift=shift, x0=torch.ones_like(b) if x0 else None, rtol=1e-10)
    shifted = a + shift * torch.eye(12, dtype=torch.float64)
    close(result.x, torch.linalg.solve(shifted, b), rtol=1e-8, atol=1e-8)
    assert result.status == "converged"
    assert result.residual_norm <= 1e-10 * b.norm()
    assert float((b - shifted @ result.x).norm()) == pytest.approx(result.residual_norm, abs=1e-12)
    assert op.n_products == result.n_iter + x0


def test_cg_after_k_steps_is_the_krylov_solution(b: Tensor) -> None:
    op = DenseOperator(matrix(low=0.5))
    result = cg(op, b, shift=1.0, max_iter=5)
    run = lanczos(op, 5, v0=b)
    close(result.x, run.lift(run.solve(float(b.norm()), 1.0)))
    assert (result.status, result.n_iter) == ("max_iter", 5)


def test_cg_with_the_inverse_as_preconditioner_needs_one_product(b: Tensor) -> None:
    a = matrix(low=0.5)
    for inverse in (DenseOperator(torch.linalg.inv(a)), lambda r: torch.linalg.solve(a, r)):
        result = cg(DenseOperator(a), b, preconditioner=inverse)
        assert result.n_iter == 1
        close(result.x, torch.linalg.solve(a, b))


def test_cg_stops_where_it_is_told_to(b: Tensor) -> None:
    op = DenseOperator(matrix(low=0.5))
    seen: list[float] = []

    def stop(x: Tensor, r: Tensor) -> bool:
        seen.append(float(r.norm()))
        close(r, b - op.a @ x)
        return len(seen) == 4

    assert cg(op, b, stop=stop).n_iter == 3
    assert cg(op, torch.zeros_like(b)).n_iter == 0
    assert cg(op, b, atol=1e3).n_iter == 0


def test_cg_reports_negative_curvature(b: Tensor) -> None:
    a = matrix()
    result = cg(DenseOperator(a), b)
    assert result.status == "negative_curvature"
    p = result.direction
    assert p is not None
    assert p @ a @ p <= 0
    run = lanczos(DenseOperator(a), max(result.n_iter - 1, 1), v0=b)
    if result.n_iter > 1:  # x is the iterate before
        close(result.x, run.lift(run.solve(float(b.norm()), 0.0)))
    assert cg(DenseOperator(a), b, shift=1.5).status == "converged"


def test_random_vectors_come_from_the_generator() -> None:
    op = FunctionOperator(lambda v: v * torch.arange(50.0), 50)
    state = torch.get_rng_state()
    runs = [lanczos(op, 3, generator=torch.Generator().manual_seed(seed)).alpha for seed in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert torch.equal(torch.get_rng_state(), state)


def test_refusals(b: Tensor) -> None:
    op = DenseOperator(matrix())
    with pytest.raises(ValueError, match="`n_iter` counts products"):
        lanczos(op, 0)
    with pytest.raises(ValueError, match="`basis` must be"):
        lanczos(op, 3, basis="half")  # type: ignore[arg-type]
    for k in (0, 13):
        with pytest.raises(ValueError, match=f"from 1 to 12, got {k}"):
            eigsh(op, k)
    with pytest.raises(ValueError, match="`which` must be"):
        eigsh(op, 2, which="BE")  # type: ignore[arg-type]
