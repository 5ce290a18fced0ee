import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from torch import Tensor

from fulgurite.plugins.linalg import (
    CurvatureOperator,
    DenseOperator,
    DiagonalOperator,
    FunctionOperator,
    LowRankOperator,
)

P = 7
close = torch.testing.assert_close


def symmetric(seed: int = 0) -> Tensor:
    a = torch.randn(P, P, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return a + a.T


A, B = symmetric(), symmetric(1)
U, S = A[:, :2], torch.tensor([2.0, -1.0], dtype=torch.float64)
V = torch.randn(P, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
OPERATORS: dict[str, tuple[CurvatureOperator, Tensor]] = {
    "dense": (DenseOperator(A), A),
    "diagonal": (DiagonalOperator(A[0]), A[0].diag()),
    "low rank": (LowRankOperator(U, S), U @ S.diag() @ U.T),
    "function": (FunctionOperator(lambda v: A @ v, P, torch.float64), A),
    "shifted": (DenseOperator(A).shift(0.5), A + 0.5 * torch.eye(P)),
    "shifted by a vector": (DenseOperator(A).shift(B[0]), A + B[0].diag()),
    "scaled": (DenseOperator(A).scale(-3), -3 * A),
    "sum": (DenseOperator(A) + DenseOperator(B), A + B),
    "tree": ((DenseOperator(A).scale(2) + LowRankOperator(U, S)).shift(1.0), 2 * A + U @ S.diag() @ U.T + torch.eye(P)),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_are_their_matrices(name: str) -> None:
    op, matrix = OPERATORS[name]
    close(op @ V[:, 0], matrix @ V[:, 0])
    close(op @ V, matrix @ V)
    close(op.to_dense(), matrix)
    close(op.diagonal(), matrix.diagonal())
    before = op.n_products
    op @ V
    assert op.n_products == before + 3


def test_scipy_finds_the_eigenvalues() -> None:
    op = DenseOperator(A).shift(1.0).to_scipy()
    close(torch.from_numpy(op @ V.numpy()), (A + torch.eye(P)) @ V)
    found = scipy.sparse.linalg.eigsh(op, 2, which="LA", v0=np.ones(P))[0]
    close(torch.from_numpy(found), torch.linalg.eigvalsh(A)[-2:] + 1)


def test_products_of_a_part_count_as_its_own() -> None:
    op = DenseOperator(A)
    op.shift(2.0).scale(3.0) @ V
    assert op.n_products == 3


def test_an_estimated_diagonal_is_exact_for_a_diagonal_matrix() -> None:
    close(FunctionOperator(lambda v: A[0] * v, P, torch.float64).diagonal(n_probes=2), A[0])


def test_refusals() -> None:
    op = DenseOperator(A)
    with pytest.raises(ValueError, match=r"7 rows, more than `max_size` \(6\)"):
        op.to_dense(6)
    with pytest.raises(ValueError, match="must have 7 numbers"):
        op @ torch.ones(6)
    with pytest.raises(ValueError, match="7 and 2 rows"):
        op + DiagonalOperator(S)
    with pytest.raises(ValueError, match="`a` must be square"):
        DenseOperator(U)
    with pytest.raises(ValueError, match=r"`u` and `s` must be \(P, r\)"):
        LowRankOperator(U, A[0])
