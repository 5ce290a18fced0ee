"""Symmetric matrices that are known by their products with vectors."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fulgurite.plugins.linalg.distributed import Peers

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator  # type: ignore[import-untyped]


class CurvatureOperator(ABC):
    """A symmetric matrix, ``(P, P)``, known by its products with vectors.

    Over a data-parallel group it is the mean of the ranks' matrices, and all ranks ask for the same products. Sums,
    shifts and multiples of operators are operators, and exchange once a product like each of their parts.

    Args:
        size: P.
        dtype: of vectors.
        device: of vectors.
        peers: ranks that the matrix is a mean over.

    Attributes:
        shape: ``(P, P)``.
        n_products: products with one vector so far.
    """

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device, peers: Peers | None = None) -> None:
        self.shape, self.dtype, self.device = (size, size), dtype, device
        self.peers = peers or Peers(sync=False)
        self.n_products = 0

    @abstractmethod
    def _products(self, vectors: Tensor) -> Tensor:
        """This rank's products with the rows of ``vectors``, ``(K, P)``."""

    def local(self, vectors: Tensor) -> Tensor:
        """This rank's products with the rows of ``vectors``, ``(K, P)``; their mean over the ranks is the product."""
        if vectors.dim() != 2 or vectors.shape[1] != self.shape[0]:
            raise ValueError(f"a vector must have {self.shape[0]} numbers, got {tuple(vectors.shape[1:])}")
        self.n_products += len(vectors)
        return self._products(vectors.to(self.dtype))

    def matvec(self, vector: Tensor) -> Tensor:
        """The product with ``vector``, ``(P,)``: one all-reduce."""
        return self.peers.mean_(self.local(vector[None]))[0]

    def matmat(self, vectors: Tensor) -> Tensor:
        """The products with the columns of ``vectors``, ``(P, K)``: one all-reduce for all of them."""
        return self.peers.mean_(self.local(vectors.T.contiguous())).T

    def __matmul__(self, other: Tensor) -> Tensor:
        return self.matvec(other) if other.dim() == 1 else self.matmat(other)

    def __add__(self, other: "CurvatureOperator") -> "CurvatureOperator":
        return _SumOperator(self, other)

    def shift(self, lam: float | Tensor) -> "CurvatureOperator":
        """The matrix plus ``lam`` on its diagonal: a number, or ``(P,)``."""
        diagonal = torch.as_tensor(lam, dtype=self.dtype, device=self.device)
        return _SumOperator(self, DiagonalOperator(diagonal.expand(self.shape[0])))

    def scale(self, c: float) -> "CurvatureOperator":
        """The matrix times ``c``."""
        return _ScaledOperator(self, c)

    def diagonal(self, n_probes: int | None = None, generator: torch.Generator | None = None) -> Tensor:
        """The diagonal, ``(P,)``.

        Args:
            n_probes: estimate it by that many products (:func:`~fulgurite.plugins.linalg.hutchinson_diagonal`); None
                for P products, which are exact.
            generator: draws the probes.
        """
        if n_probes is None:
            return self.to_dense().diagonal().clone()
        from fulgurite.plugins.linalg.slq import hutchinson_diagonal

        return hutchinson_diagonal(self, n_probes, generator=generator)[0]

    def to_dense(self, max_size: int = 4096) -> Tensor:
        """The matrix itself, ``(P, P)``, by P products; refused for P above ``max_size``."""
        if self.shape[0] > max_size:
            raise ValueError(
                f"the matrix has {self.shape[0]} rows, more than `max_size` ({max_size}): use products, a diagonal of "
                "`n_probes`, or give `max_size`"
            )
        return self.matmat(torch.eye(self.shape[0], dtype=self.dtype, device=self.device))

    def to_scipy(self) -> "LinearOperator":
        """For :mod:`scipy.sparse.linalg`, whose vectors are on the host."""
        from scipy.sparse.linalg import LinearOperator

        def product(array: Any) -> Any:
            return (self @ torch.as_tensor(array, dtype=self.dtype, device=self.device)).cpu().numpy()

        dtype = torch.empty((), dtype=self.dtype).numpy().dtype
        return LinearOperator(
            self.shape,
            dtype=dtype,
            matvec=lambda x: product(x.reshape(-1)),
            rmatvec=product,
            matmat=product,
            rmatmat=product,
        )


class _SumOperator(CurvatureOperator):
    """The sum of two matrices; a part without peers is the same on all ranks, so the mean leaves it as it is."""

    def __init__(self, first: CurvatureOperator, second: CurvatureOperator) -> None:
        if first.shape != second.shape:
            raise ValueError(f"the matrices have {first.shape[0]} and {second.shape[0]} rows")
        peers = first.peers if first.peers.size > 1 else second.peers
        super().__init__(first.shape[0], torch.promote_types(first.dtype, second.dtype), first.device, peers)
        self.first, self.second = first, second

    def _products(self, vectors: Tensor) -> Tensor:
        return self.first.local(vectors) + self.second.local(vectors)


class _ScaledOperator(CurvatureOperator):
    def __init__(self, op: CurvatureOperator, c: float) -> None:
        super().__init__(op.shape[0], op.dtype, op.device, op.peers)
        self.op, self.c = op, c

    def _products(self, vectors: Tensor) -> Tensor:
        return self.op.local(vectors) * self.c


class DiagonalOperator(CurvatureOperator):
    """A diagonal matrix; equal on all ranks.

    Args:
        d: the diagonal, ``(P,)``.
    """

    def __init__(self, d: Tensor) -> None:
        super().__init__(len(d), d.dtype, d.device)
        self.d = d

    def _products(self, vectors: Tensor) -> Tensor:
        return vectors * self.d

    def diagonal(self, n_probes: int | None = None, generator: torch.Generator | None = None) -> Tensor:
        """The diagonal itself, ``(P,)``."""
        return self.d.clone()


class LowRankOperator(CurvatureOperator):
    """``U diag(s) U'``; equal on all ranks.

    Args:
        u: ``(P, r)``, such as eigenvectors.
        s: ``(r,)``, such as eigenvalues.

    Raises:
        ValueError: for other shapes.
    """

    def __init__(self, u: Tensor, s: Tensor) -> None:
        if u.dim() != 2 or s.shape != u.shape[1:]:
            raise ValueError(f"`u` and `s` must be (P, r) and (r,), got {tuple(u.shape)} and {tuple(s.shape)}")
        super().__init__(len(u), u.dtype, u.device)
        self.u, self.s = u, s

    def _products(self, vectors: Tensor) -> Tensor:
        return vectors @ self.u * self.s @ self.u.T

    def diagonal(self, n_probes: int | None = None, generator: torch.Generator | None = None) -> Tensor:
        """The diagonal, ``(P,)``, exact without products."""
        return self.u.square() @ self.s


class DenseOperator(CurvatureOperator):
    """A symmetric matrix that is there; equal on all ranks.

    Args:
        a: ``(P, P)``.

    Raises:
        ValueError: for another shape.
    """

    def __init__(self, a: Tensor) -> None:
        if a.dim() != 2 or a.shape[0] != a.shape[1]:
            raise ValueError(f"`a` must be square, got {tuple(a.shape)}")
        super().__init__(len(a), a.dtype, a.device)
        self.a = a

    def _products(self, vectors: Tensor) -> Tensor:
        return vectors @ self.a.T

    def diagonal(self, n_probes: int | None = None, generator: torch.Generator | None = None) -> Tensor:
        """The diagonal, ``(P,)``, exact without products."""
        return self.a.diagonal().clone()


class FunctionOperator(CurvatureOperator):
    """A symmetric matrix given as a function.

    Args:
        matvec: the product with a vector, ``(P,)``; the same on all ranks.
        size: P.
        dtype: of vectors.
        device: of vectors.
    """

    def __init__(
        self,
        matvec: Callable[[Tensor], Tensor],
        size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(size, dtype, torch.device(device))
        self._matvec = matvec

    def _products(self, vectors: Tensor) -> Tensor:
        return torch.stack([self._matvec(vector) for vector in vectors])
