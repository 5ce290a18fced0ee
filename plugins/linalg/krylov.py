"""Krylov methods for symmetric operators: conjugate gradients, Lanczos, and eigenpairs."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fulgurite.plugins.linalg.distributed import Sharded, Whole
from fulgurite.plugins.linalg.operators import CurvatureOperator

Basis = Literal["full", "sharded", "none"]
Distribution = Literal["rademacher", "gaussian"]


class CGResult(NamedTuple):
    """What :func:`cg` found.

    Attributes:
        x: the last iterate, ``(P,)``.
        n_iter: products.
        residual_norm: norm of ``b - (A + shift) x``, as the recurrence has it.
        status: how it ended; "negative_curvature" where ``p'(A + shift)p <= 0`` for the direction p.
        direction: that p, ``(P,)``; None otherwise.
    """

    x: Tensor
    n_iter: int
    residual_norm: float
    status: Literal["converged", "max_iter", "negative_curvature"]
    direction: Tensor | None


def cg(
    op: CurvatureOperator,
    b: Tensor,
    *,
    shift: float = 0.0,
    x0: Tensor | None = None,
    rtol: float = 1e-5,
    atol: float = 0.0,
    max_iter: int | None = None,
    stop: Callable[[Tensor, Tensor], bool] | None = None,
    preconditioner: Callable[[Tensor], Tensor] | CurvatureOperator | None = None,
) -> CGResult:
    """Solves ``(A + shift) x = b`` by conjugate gradients (Hestenes and Stiefel 1952).

    Args:
        op: A.
        b: ``(P,)``, the same on all ranks.
        shift: added to the diagonal.
        x0: first iterate, ``(P,)``; None for zeros.
        rtol: converged when the residual's norm is at most ``max(rtol * norm(b), atol)``.
        atol: see ``rtol``.
        max_iter: products at most; None for P.
        stop: given the iterate and the residual, decides in place of ``rtol`` and ``atol``.
        preconditioner: an approximation of the inverse, positive definite, as a function or an operator.
    """
    size = op.shape[0]
    precondition = preconditioner.matvec if isinstance(preconditioner, CurvatureOperator) else preconditioner
    limit = size if max_iter is None else max_iter

    def norms(r: Tensor, z: Tensor) -> list[float]:
        numbers: list[float] = op.peers.agree_(torch.stack([r @ z, r @ r]).double()).tolist()
        return numbers

    def done(x: Tensor, r: Tensor, norm: float) -> bool:
        return op.peers.decide(bool(stop(x, r)), op.device) if stop is not None else norm <= tolerance

    x = torch.zeros_like(b, dtype=op.dtype) if x0 is None else x0.to(op.dtype, copy=True)
    b = b.to(op.dtype)
    tolerance = max(rtol * float(op.peers.agree_(b.norm())), atol)
    r = b.clone() if x0 is None else b - op.matvec(x) - shift * x
    z = precondition(r) if precondition is not None else r
    p, (rz, rr) = z.clone(), norms(r, z)
    n_iter = 0
    while not done(x, r, rr**0.5):
        if n_iter == limit:
            return CGResult(x, n_iter, rr**0.5, "max_iter", None)
        product = op.matvec(p).add_(p, alpha=shift)
        n_iter += 1
        curvature = float(op.peers.agree_((p @ product).double()))
        if not curvature > 0:
            return CGResult(x, n_iter, rr**0.5, "negative_curvature", p)
        x.add_(p, alpha=rz / curvature)
        r.sub_(product, alpha=rz / curvature)
        z = precondition(r) if precondition is not None else r
        previous, (rz, rr) = rz, norms(r, z)
        p.mul_(rz / previous).add_(z)
    return CGResult(x, n_iter, rr**0.5, "converged", None)


class Ritz(NamedTuple):
    """Eigenpairs of the tridiagonal matrix, which approximate those of the operator.

    Attributes:
        values: ``(k,)``, ascending.
        weights: ``(k,)``, squared overlaps of the start vector with the Ritz vectors; their sum is 1.
        residuals: ``(k,)``: an eigenvalue of the operator lies within the residual of each value.
        coefficients: ``(k, k)``, one eigenvector a column: :meth:`LanczosResult.lift` makes Ritz vectors of them.
    """

    values: Tensor
    weights: Tensor
    residuals: Tensor
    coefficients: Tensor


class LanczosResult:
    """The projection ``T = V' A V`` of an operator on the Krylov space of a start vector; see :func:`lanczos`.

    Small matrices are float64 and on the host. ``k`` is the number of steps so far.

    Attributes:
        breakdown: the Krylov space is invariant: T's eigenvalues are exact, and no step can follow.
    """

    def __init__(self, op: CurvatureOperator, start: Tensor, reorthogonalize: bool, basis: Basis) -> None:
        self._space = Sharded(op) if basis == "sharded" else Whole(op)
        self._keeps, self._reorthogonalize = basis != "none", reorthogonalize and basis != "none"
        self._alpha: list[float] = []
        self._beta: list[float] = []  # the last one couples to the vector that comes next
        self._rows = start.new_empty(0, self._space.rows)
        norm = start.norm()
        self._next = self._space.own(start / norm)
        self._previous = torch.zeros_like(self._next)
        self.breakdown = not op.peers.decide(bool(norm > 0), op.device)

    def __len__(self) -> int:
        return len(self._alpha)

    @property
    def alpha(self) -> Tensor:
        """The diagonal of T, ``(k,)``."""
        return torch.tensor(self._alpha, dtype=torch.float64)

    @property
    def beta(self) -> Tensor:
        """The entries beside it, ``(k - 1,)``."""
        return torch.tensor(self._beta[:-1], dtype=torch.float64)

    @property
    def beta_last(self) -> float:
        """The norm of what the last product has outside of the basis."""
        return self._beta[-1]

    @property
    def basis(self) -> Tensor | None:
        """V', ``(k, P)``, orthonormal rows; sharded, this rank's ``ceil(P / W)`` columns, padded with zeros."""
        return self._rows[: len(self)] if self._keeps else None

    def tridiagonal(self) -> Tensor:
        """T, ``(k, k)``."""
        return torch.diag(self.alpha) + torch.diag(self.beta, 1) + torch.diag(self.beta, -1)

    def ritz(self) -> Ritz:
        """Eigenpairs of T."""
        values, vectors = torch.linalg.eigh(self.tridiagonal())
        return Ritz(values, vectors[0] ** 2, self.beta_last * vectors[-1].abs(), vectors)

    def solve(self, b_norm: float, shift: float) -> Tensor:
        """Solves ``(T + shift) y = b_norm e1`` for y, ``(k,)``.

        ``x = lift(y)`` is the Krylov solution of ``(A + shift) x = b`` where ``b`` was the start vector, and
        ``beta_last * abs(y[-1])`` the norm of its residual: one basis serves every shift.
        """
        right = torch.zeros(len(self), dtype=torch.float64)
        right[0] = b_norm
        shifted = self.tridiagonal() + shift * torch.eye(len(self), dtype=torch.float64)
        solution: Tensor = torch.linalg.solve(shifted, right)
        return solution

    def lift(self, y: Tensor, whole: bool = True) -> Tensor:
        """``V y``: ``(P,)`` for ``(k,)``, ``(P, n)`` for ``(k, n)``.

        Args:
            y: coefficients.
            whole: all rows of it; False for those of this rank where the basis is sharded.

        Raises:
            ValueError: without a basis.
        """
        if self.basis is None:
            raise ValueError('`basis="none"` keeps no vectors: take "full" or "sharded"')
        rows: Tensor = self.basis.T @ y.to(self._rows)
        if not whole:
            return rows
        return self._space.whole(rows) if y.dim() == 1 else torch.stack([*map(self._space.whole, rows.T)], 1)

    def extend(self, n: int) -> "LanczosResult":
        """Goes on for ``n`` steps, or until breakdown or P steps."""
        steps = min(n, self._space.op.shape[0] - len(self))
        missing = len(self) + steps - len(self._rows)
        if self._keeps and missing > 0:  # at least twice as many, so that step after step does not copy all each time
            room = min(max(missing, len(self._rows)), self._space.op.shape[0] - len(self._rows))
            self._rows = torch.cat([self._rows, self._rows.new_empty(room, self._space.rows)])
        for _ in range(steps):
            if self.breakdown:
                break
            self._step()
        return self

    def restart(self, vector: Tensor) -> None:
        """After breakdown: goes on from the part of ``vector`` that is orthogonal to the basis."""
        assert self.basis is not None
        rows = self._space.own(vector)
        for _ in range(2):
            rows = torch.addmv(rows, self.basis.T, self._space.total_(self.basis @ rows), alpha=-1)
        norm = self._space.total_((rows @ rows)[None]).sqrt()
        self._next, self._beta[-1], self.breakdown = rows / norm, 0.0, False

    def _step(self) -> None:
        space, k = self._space, len(self)
        if self._keeps:
            self._rows[k] = self._next
        rest = space.product(self._next)
        # For a symmetric matrix the recurrence with two vectors is a pass of Gram-Schmidt, to rounding.
        alpha = space.total_((self._next @ rest)[None])[0]
        rest = rest - self._next * alpha
        if k:
            rest.sub_(self._previous, alpha=self._beta[-1])
        square = (rest @ rest)[None]
        if self._reorthogonalize:
            basis = self._rows[: k + 1]
            numbers = space.total_(torch.cat([basis @ rest, square]))  # one message for both
            inside, square = numbers[:-1], numbers[-1:]
            rest = torch.addmv(rest, basis.T, inside, alpha=-1)
            beta = (square[0] - inside.square().sum()).clamp(min=0).sqrt()
        else:
            beta = space.total_(square)[0].sqrt()
        a, b = space.op.peers.agree_(torch.stack([alpha, beta]).double()).tolist()
        self._alpha.append(a)
        self._beta.append(b)
        self._previous, self._next = self._next, rest / b if b else rest
        scale = max(abs(number) for number in (*self._alpha, *self._beta))
        eps = torch.finfo(rest.dtype).eps
        self.breakdown = not b > eps * scale * space.op.shape[0] ** 0.5  # so written that nan stops, too


def lanczos(
    op: CurvatureOperator,
    n_iter: int,
    *,
    v0: Tensor | None = None,
    reorthogonalize: bool = True,
    basis: Basis = "full",
    generator: torch.Generator | None = None,
) -> LanczosResult:
    """Projects an operator on the Krylov space of a vector (Lanczos 1950), re-orthogonalised in full.

    The m-step quadrature of its Ritz values and weights has the moments ``v' A^p v``, p up to ``2 m - 1``.

    Args:
        op: A.
        n_iter: steps, one product each; at most P.
        v0: start vector, ``(P,)``, the same on all ranks; None draws one.
        reorthogonalize: against all earlier vectors; without it eigenvalues that have converged come up again.
        basis: where the vectors are: whole on each rank; ``"sharded"``, rows of them on each, which takes as much
            traffic and a W-th of the memory; ``"none"``, nowhere, without re-orthogonalisation.
        generator: draws the start vector, on rank 0.

    Raises:
        ValueError: for an argument out of its range.
    """
    if n_iter < 1:
        raise ValueError(f"`n_iter` counts products and must be at least 1, got {n_iter}")
    if basis not in ("full", "sharded", "none"):
        raise ValueError(f"`basis` must be 'full', 'sharded' or 'none', got {basis!r}")
    start = draw(op, "gaussian", generator) if v0 is None else v0.to(op.dtype)
    return LanczosResult(op, start, reorthogonalize, basis).extend(n_iter)


class EigenResult(NamedTuple):
    """What :func:`eigsh` found.

    Attributes:
        values: ``(k,)``, float64 on the host, the wanted end first.
        vectors: ``(P, k)``, orthonormal; of ``basis="sharded"`` this rank's rows.
        residuals: ``(k,)``: an eigenvalue of the operator lies within the residual of each value.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor


def eigsh(
    op: CurvatureOperator,
    k: int,
    *,
    which: Literal["LA", "SA", "LM"] = "LA",
    n_iter: int | None = None,
    tol: float = 1e-4,
    v0: Tensor | None = None,
    basis: Literal["full", "sharded"] = "full",
    generator: torch.Generator | None = None,
) -> EigenResult:
    """Eigenpairs at an end of the spectrum, by as many Lanczos steps as they need.

    An eigenvalue that is there several times is found once, unless the Krylov space breaks down before there are k.

    Args:
        op: A.
        k: pairs, at most P.
        which: ``"LA"`` largest, ``"SA"`` smallest, ``"LM"`` largest in magnitude.
        n_iter: products at most; None for ``10 k + 100``.
        tol: goes on until all residuals are at most ``tol`` times the largest magnitude found.
        v0: start vector, such as a sum of earlier eigenvectors; None draws one.
        basis: as in :func:`lanczos`.
        generator: draws vectors, on rank 0.

    Raises:
        ValueError: for an argument out of its range.
    """
    if not 1 <= k <= op.shape[0]:
        raise ValueError(f"`k` counts eigenpairs and must be from 1 to {op.shape[0]}, got {k}")
    if which not in ("LA", "SA", "LM"):
        raise ValueError(f"`which` must be 'LA', 'SA' or 'LM', got {which!r}")
    limit = min(op.shape[0], max(k, 10 * k + 100 if n_iter is None else n_iter))
    result = lanczos(op, min(limit, 2 * k + 8), v0=v0, basis=basis, generator=generator)
    while True:
        ritz = result.ritz()
        order = {"LA": -ritz.values, "SA": ritz.values, "LM": -ritz.values.abs()}[which].argsort()[:k]
        close = ritz.residuals[order] <= tol * ritz.values.abs().max()
        if op.peers.decide(len(order) == k and bool(close.all()), op.device) or len(result) == limit:
            break
        if result.breakdown:
            result.restart(draw(op, "gaussian", generator))
        result.extend(min(8, limit - len(result)))
    vectors = result.lift(ritz.coefficients[:, order], whole=False)
    return EigenResult(ritz.values[order], vectors, ritz.residuals[order])


def draw(op: CurvatureOperator, distribution: Distribution, generator: torch.Generator | None) -> Tensor:
    """A random vector, ``(P,)``, of norm 1 and covariance ``1 / P``, drawn on rank 0."""
    device = op.device if generator is None else generator.device
    size = op.shape[0]
    if distribution == "rademacher":
        vector = torch.randint(2, (size,), generator=generator, device=device).to(op.dtype).mul_(2).sub_(1)
    else:
        vector = torch.randn(size, dtype=op.dtype, generator=generator, device=device)
    return op.peers.agree_((vector / vector.norm()).to(op.device))
