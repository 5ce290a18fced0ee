"""Systems ``(H + lambda) h = -g`` that are solved for one lambda after another."""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor
from typing_extensions import override

from fulgurite.plugins.linalg import CurvatureOperator, cg, lanczos


class ShiftedSystem(ABC):
    """A linear system ``(H + lambda) h = -g``.

    Attributes:
        dimension: of the space that the last solution is from.
    """

    dimension: int = 0

    @abstractmethod
    def solve(self, lam: float) -> Tensor | None:
        """The solution, ``(P,)``; None where the matrix is not positive."""


class Krylov(ShiftedSystem):
    """By one Lanczos basis, which serves all shifts; it grows for the first one alone.

    Args:
        op: H.
        slope: g, ``(P,)``.
        theta: the residual is at most ``theta lambda |h|``, or rounding.
        limit: products, at most.
    """

    def __init__(self, op: CurvatureOperator, slope: Tensor, theta: float, limit: int) -> None:
        self.run, self.norm, self.device = lanczos(op, 1, v0=slope), float(slope.norm()), op.device
        self.theta, self.eps, self.limit = theta, _rounding(op), min(limit, op.shape[0])
        self.closed = False
        self.peers = op.peers

    @override
    def solve(self, lam: float) -> Tensor | None:
        while True:
            y = _thomas(self.run.alpha.tolist(), self.run.beta.tolist(), lam, self.norm)
            # Ends with a positive matrix and a small residual, or where nothing can be added.
            over = self.closed or y is None or self.run.breakdown or len(self.run) == self.limit
            if y is not None and not over:
                least = max(self.theta * lam * math.hypot(*y), self.eps * self.norm)
                over = self.run.beta_last * abs(y[-1]) <= least
            if self.peers.decide(over, self.device):
                break
            self.run.extend(1)
        if y is None:
            return None
        self.closed, self.dimension = True, len(self.run)
        return -self.run.lift(torch.tensor(y, dtype=torch.float64))


def _rounding(op: CurvatureOperator) -> float:
    """Relative size of a residual that no product makes smaller."""
    return 4 * torch.finfo(op.dtype).eps


def _thomas(diagonal: list[float], beside: list[float], shift: float, first: float) -> list[float] | None:
    """Solves a tridiagonal system with the right side ``first e1``; None where the matrix is not positive."""
    pivots, right = [diagonal[0] + shift], [first]
    for a, b in zip(diagonal[1:], beside, strict=True):
        if not pivots[-1] > 0:
            return None
        factor = b / pivots[-1]
        pivots.append(a + shift - factor * b)
        right.append(-factor * right[-1])
    if not pivots[-1] > 0:
        return None
    solution = [right[-1] / pivots[-1]]
    for pivot, value, b in zip(reversed(pivots[:-1]), reversed(right[:-1]), reversed(beside), strict=True):
        solution.append((value - b * solution[-1]) / pivot)
    return solution[::-1]


class Conjugate(ShiftedSystem):
    """By conjugate gradients, anew for each shift; arguments as for :class:`Krylov`."""

    def __init__(self, op: CurvatureOperator, slope: Tensor, theta: float, limit: int) -> None:
        self.op, self.slope, self.limit = op, slope, limit
        self.theta, self.eps = theta, _rounding(op)

    @override
    def solve(self, lam: float) -> Tensor | None:
        least = self.eps * float(self.slope.norm())

        def close(x: Tensor, residual: Tensor) -> bool:
            return float(residual.norm()) <= max(self.theta * lam * float(x.norm()), least)

        found = cg(self.op, -self.slope, shift=lam, max_iter=self.limit, stop=close)
        self.dimension = found.n_iter
        return None if found.status == "negative_curvature" else found.x


class Diagonal(ShiftedSystem):
    """By division."""

    def __init__(self, diagonal: Tensor, slope: Tensor) -> None:
        self.diagonal, self.slope = diagonal, slope

    @override
    def solve(self, lam: float) -> Tensor | None:
        return -self.slope / (self.diagonal + lam)


class LowRank(ShiftedSystem):
    """By the formula of Sherman, Morrison and Woodbury, for a matrix with orthonormal ``u``."""

    def __init__(self, u: Tensor, s: Tensor, slope: Tensor) -> None:
        self.u, self.s, self.slope, self.dimension = u, s, slope, len(s)

    @override
    def solve(self, lam: float) -> Tensor | None:
        return (self.u @ (self.s / (self.s + lam) * (self.u.T @ self.slope)) - self.slope) / lam


class Preconditioned(CurvatureOperator):
    """``S H S`` for a diagonal S: the curvature in coordinates in which the metric is the identity."""

    def __init__(self, op: CurvatureOperator, s: Tensor) -> None:
        super().__init__(op.shape[0], op.dtype, op.device, op.peers)
        self.op, self.s = op, s

    def _products(self, vectors: Tensor) -> Tensor:
        return self.op.local(vectors * self.s) * self.s
