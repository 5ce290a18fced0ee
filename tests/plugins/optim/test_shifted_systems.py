"""Each way to solve against a dense solve."""

import pytest
import torch
from torch import Tensor

from fulgurite.plugins.linalg import DenseOperator
from fulgurite.plugins.optim.shifted_systems import Conjugate, Diagonal, Krylov, LowRank, Preconditioned, ShiftedSystem

EXACT = 0.0


def matrix(lowest: float = 0.1, size: int = 12) -> Tensor:
    q, _ = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    return q * torch.linspace(lowest, 5, size, dtype=torch.float64) @ q.T


@pytest.mark.parametrize("kind", ["krylov", "conjugate", "diagonal", "low rank", "preconditioned"])
def test_solves_for_one_shift_after_another(kind: str) -> None:
    a, slope = matrix(), torch.arange(1.0, 13, dtype=torch.float64)
    system: ShiftedSystem
    match kind:
        case "krylov":
            system = Krylov(DenseOperator(a), slope, EXACT, 12)
        case "conjugate":
            system = Conjugate(DenseOperator(a), slope, EXACT, 100)
        case "diagonal":
            a = torch.diag(a.diagonal())
            system = Diagonal(a.diagonal(), slope)
        case "low rank":
            values, vectors = torch.linalg.eigh(a)
            a = vectors[:, 5:] * values[5:] @ vectors[:, 5:].T
            system = LowRank(vectors[:, 5:], values[5:], slope)
        case _:
            s = torch.linspace(0.5, 2, 12, dtype=torch.float64)
            system = Krylov(Preconditioned(DenseOperator(a), s), slope, EXACT, 12)
            a = s[:, None] * a * s
    for lam in (0.3, 1.0, 50.0):
        expected = -torch.linalg.solve(a + lam * torch.eye(12, dtype=torch.float64), slope)
        torch.testing.assert_close(system.solve(lam), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", [Krylov, Conjugate])
def test_an_indefinite_matrix_has_a_solution_from_a_shift_on(kind: type[Krylov] | type[Conjugate]) -> None:
    a, slope = matrix(lowest=-2.0), torch.ones(12, dtype=torch.float64)
    system = kind(DenseOperator(a), slope, EXACT, 100)
    assert system.solve(1.0) is None
    expected = -torch.linalg.solve(a + 3 * torch.eye(12, dtype=torch.float64), slope)
    torch.testing.assert_close(system.solve(3.0), expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("theta", [0.1, 0.9])
def test_a_basis_serves_larger_shifts_without_another_product(theta: float) -> None:
    a, slope = matrix(size=40, lowest=1e-3), torch.ones(40, dtype=torch.float64)
    op = DenseOperator(a)
    system = Krylov(op, slope, theta, 40)
    system.solve(0.01)
    products = op.n_products
    for lam in (0.02, 0.1, 1.0, 100.0):
        step = system.solve(lam)
        assert step is not None
        residual = a @ step + lam * step + slope
        assert residual.norm() <= theta * lam * step.norm() * (1 + 1e-9)
        assert abs(residual @ step) < 1e-9 * residual.norm() * step.norm() + 1e-12
    assert op.n_products == products < 40
