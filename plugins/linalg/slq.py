"""Spectral densities and traces from a few random vectors."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fulgurite.plugins.linalg.krylov import Basis, Distribution, LanczosResult, draw, lanczos
from fulgurite.plugins.linalg.operators import CurvatureOperator


@dataclass(eq=False)
class SpectralMeasure:
    """The eigenvalue distribution of a symmetric matrix, as seen by random vectors (arXiv 1901.10159).

    Attributes:
        nodes: ``(n_probes, k)``, float64.
        weights: ``(n_probes, k)``, at least 0; a probe's have the sum 1.
        size: P: the trace of ``fn`` of the matrix is P times its integral.
        runs: the :class:`LanczosResult` of each probe, where :func:`slq` was told to keep them.
    """

    nodes: Tensor
    weights: Tensor
    size: int
    runs: list[LanczosResult] = field(default_factory=list, repr=False)

    def integrate(self, fn: Callable[[Tensor], Tensor]) -> tuple[float, float]:
        """The mean of ``fn`` over the eigenvalues, and its standard error over probes (nan for one)."""
        return _estimate((self.weights * fn(self.nodes)).sum(1))

    def trace(self, fn: Callable[[Tensor], Tensor] = lambda nodes: nodes) -> tuple[float, float]:
        """The trace of ``fn`` of the matrix, and its standard error over probes."""
        mean, error = self.integrate(fn)
        return self.size * mean, self.size * error

    def moment(self, p: int) -> float:
        """The mean of the eigenvalues' ``p``-th powers."""
        return self.integrate(lambda nodes: nodes**p)[0]

    def density(self, grid: Tensor, sigma: float) -> Tensor:
        """The density on ``grid``, ``(n,)``, smoothed by a normal kernel of width ``sigma``; its integral is 1."""
        if not sigma > 0:
            raise ValueError(f"`sigma` is the width of the kernel and must be positive, got {sigma}")
        distance = (grid.to(self.nodes)[:, None] - self.nodes.flatten()) / sigma
        kernel = (distance.square() / -2).exp() / (sigma * (2 * torch.pi) ** 0.5)
        density: Tensor = kernel @ self.weights.flatten() / len(self.nodes)
        return density

    def cdf(self, grid: Tensor) -> Tensor:
        """The fraction of eigenvalues that are at most ``grid``, ``(n,)``."""
        below = self.nodes.flatten() <= grid.to(self.nodes)[:, None]
        return below.to(self.nodes) @ self.weights.flatten() / len(self.nodes)

    def quantile(self, q: float) -> float:
        """The smallest node with at least the fraction ``q`` of the eigenvalues at or below it."""
        nodes, order = self.nodes.flatten().sort()
        total = self.weights.flatten()[order].cumsum(0)
        return float(nodes[(total < q * total[-1]).sum().clamp(max=len(nodes) - 1)])

    def merge(self, other: "SpectralMeasure") -> "SpectralMeasure":
        """The probes of both, of the same matrix."""
        if self.size != other.size:
            raise ValueError(f"the measures belong to matrices with {self.size} and {other.size} rows")
        width = max(self.nodes.shape[1], other.nodes.shape[1])
        parts = [_padded(part.nodes, part.weights, width) for part in (self, other)]
        nodes, weights = (torch.cat(rows) for rows in zip(*parts, strict=True))
        return SpectralMeasure(nodes, weights, self.size, self.runs + other.runs)


def slq(
    op: CurvatureOperator,
    n_iter: int,
    n_probes: int,
    *,
    distribution: Distribution = "rademacher",
    basis: Basis = "full",
    keep_lanczos: bool = False,
    generator: torch.Generator | None = None,
) -> SpectralMeasure:
    """Stochastic Lanczos quadrature of the spectrum (Golub and Meurant; arXiv 1901.10159).

    Args:
        op: A.
        n_iter: Lanczos steps a probe (m in the paper), one product each.
        n_probes: random vectors; :func:`hutchinson_trace` draws the same ones from the same state of ``generator``.
        distribution: ``"rademacher"`` (signs) or ``"gaussian"``.
        basis: as in :func:`lanczos`; ``"none"`` saves the memory; ghosts share the weight of their eigenvalue.
        keep_lanczos: keep each probe's run, with its basis, in ``runs``.
        generator: draws on rank 0.

    Raises:
        ValueError: for no probe, and as :func:`lanczos`.
    """
    check_probes(n_probes)
    total: SpectralMeasure | None = None
    for _ in range(n_probes):
        run = lanczos(op, n_iter, v0=draw(op, distribution, generator), basis=basis)
        ritz = run.ritz()
        probe = SpectralMeasure(ritz.values[None], ritz.weights[None], op.shape[0], [run] if keep_lanczos else [])
        total = probe if total is None else total.merge(probe)
    assert total is not None
    return total


def hutchinson_trace(
    op: CurvatureOperator,
    n_probes: int,
    *,
    distribution: Distribution = "rademacher",
    generator: torch.Generator | None = None,
) -> tuple[float, float]:
    """The trace and its standard error, from ``P v' A v`` of random vectors of norm 1 (Hutchinson 1990)."""
    check_probes(n_probes)
    probes = (draw(op, distribution, generator) for _ in range(n_probes))
    mean, error = _estimate(torch.stack([(probe @ op.matvec(probe)).double() for probe in probes]))
    return op.shape[0] * mean, op.shape[0] * error


def hutchinson_diagonal(
    op: CurvatureOperator,
    n_probes: int,
    *,
    distribution: Distribution = "rademacher",
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """The diagonal, ``(P,)``, and its standard error, from ``P v * A v`` (Bekas, Kokiopoulou and Saad 2007)."""
    check_probes(n_probes)
    total = torch.zeros(op.shape[0], dtype=op.dtype, device=op.device)
    squares = total.clone()
    for _ in range(n_probes):
        probe = draw(op, distribution, generator)
        sample = probe * op.matvec(probe) * op.shape[0]
        total += sample
        squares += sample.square()
    mean = total / n_probes
    spread = (squares / n_probes - mean.square()).clamp(min=0)
    return mean, (spread / (n_probes - 1)).sqrt() if n_probes > 1 else torch.full_like(mean, torch.nan)


def check_probes(n_probes: int) -> None:
    """Refuses no probe at all."""
    if n_probes < 1:
        raise ValueError(f"`n_probes` counts random vectors and must be at least 1, got {n_probes}")


def _estimate(samples: Tensor) -> tuple[float, float]:
    """The mean, and its standard error."""
    n = len(samples)
    return float(samples.mean()), float(samples.std() / n**0.5) if n > 1 else float("nan")


def _padded(nodes: Tensor, weights: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Rows of ``width``: the last node again, with weight 0."""
    missing = width - nodes.shape[1]
    zeros = weights.new_zeros(len(weights), missing)
    return torch.cat([nodes, nodes[:, -1:].expand(-1, missing)], 1), torch.cat([weights, zeros], 1)
