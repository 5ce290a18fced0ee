"""What each example adds to the gradient of a parameter, and its norm, from what the parameter's calls saw."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

_CACHED_BYTES = 2**22  # chunks that a CPU need not read from memory again
_MOVED = 16  # a number that is written and read again costs as much as that many multiplications


class Use(ABC):
    """What one call of a module adds to the gradient of one of its parameters, example by example.

    Attributes:
        examples: B.
        shape: of the parameter.
        dtype: of what follows.
    """

    examples: int
    shape: torch.Size
    dtype: torch.dtype

    @abstractmethod
    def gradients(self, rows: slice) -> Tensor:
        """Of the examples in ``rows``, ``(b, *shape)``."""


class Sum(Use):
    """A gradient that is small, or that has no structure: ``gradients`` of some rows from a function."""

    def __init__(self, param: Tensor, examples: int, of: Callable[[slice], Tensor]) -> None:
        self.examples, self.shape, self.dtype, self._of = examples, param.shape, wide(param.dtype), of

    def gradients(self, rows: slice) -> Tensor:  # noqa: D102
        return self._of(rows).to(self.dtype)


class Outer(Use):
    """A gradient that is a sum of ``length`` outer products: of linear maps, convolutions and embeddings.

    Args:
        param: a matrix once all axes but the first are flattened; in ``groups`` blocks of rows.
        examples: B.
        length: L, outer products an example.
        factors: from rows of the batch to left ``(b, groups, L, p)``, or with ``ids`` the numbers of the rows that are
            not zero, ``(b, 1, L)``, and right ``(b, groups, L, d)``.
        groups: blocks.
        ids: as of an embedding.
    """

    def __init__(
        self,
        param: Tensor,
        examples: int,
        length: int,
        factors: Callable[[slice], tuple[Tensor, Tensor]],
        groups: int = 1,
        ids: bool = False,
    ) -> None:
        self.examples, self.shape, self.dtype, self.length = examples, param.shape, wide(param.dtype), length
        self.groups, self.ids, self._factors = groups, ids, factors
        self.widths = (param.shape[0] // groups, param[0].numel())

    def factors(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Left and right of the examples in ``rows``."""
        left, right = self._factors(rows)
        return left if self.ids else left.to(self.dtype), right.to(self.dtype)

    def product(self, rows: slice) -> Tensor:
        """The gradient in an order of its own, ``(b, n)``: positions in a kernel before its channels."""
        left, right = self.factors(rows)
        if self.ids:
            total = right.new_zeros(len(left), *self.widths)
            total.scatter_add_(1, left[:, 0, :, None].expand(-1, -1, self.widths[1]), right[:, 0])
        else:
            total = left.transpose(2, 3) @ right
        return total.flatten(1)

    def gradients(self, rows: slice) -> Tensor:  # noqa: D102
        channels_last = (self.shape[0], *self.shape[2:], *self.shape[1:2])
        total = self.product(rows)
        return total.view(len(total), *channels_last).movedim(-1, 2)


@dataclass(eq=False)
class Uses:
    """All uses of one parameter in a backward pass."""

    calls: Sequence[Use]
    max_bytes: int
    device: torch.device

    def gradients(self, rows: slice = slice(None)) -> Tensor:
        """What each example adds to the parameter's gradient, ``(b, *shape)``."""
        return _total([call.gradients(rows) for call in self.calls])

    def sq_norms(self) -> Tensor:
        """The squared norms of :meth:`gradients`, ``(B,)``, in chunks of at most ``max_bytes``."""
        first = self.calls[0]
        outer = [call for call in self.calls if isinstance(call, Outer)]
        if len(outer) == len(self.calls) and len({call.groups for call in outer}) == 1:
            numbers, of = _plan(outer)
        else:
            numbers, of = first.shape.numel(), lambda rows: _square(self.gradients(rows))
        limit = min(self.max_bytes, _CACHED_BYTES) if self.device.type == "cpu" else self.max_bytes
        size = max(1, limit // (numbers * first.dtype.itemsize))
        if size >= first.examples:
            return of(slice(None))
        return torch.cat([of(slice(i, i + size)) for i in range(0, first.examples, size)])


def _plan(calls: list[Outer]) -> tuple[int, Callable[[slice], Tensor]]:
    """Numbers an example and the cheaper function: gradients, or inner products of their factors."""
    (p, d), groups = calls[0].widths, calls[0].groups
    length, dense = (sum(call.length for call in calls if not (call.ids and skip)) for skip in (False, True))
    factors = length * (p + d if dense else 1 + d)
    gram, direct = length * (factors + _MOVED * length), p * d * (dense + _MOVED)
    if gram <= direct or length == 1:
        return groups * (factors + length**2), partial(_gram, calls)
    return groups * (factors + p * d), lambda rows: _square(_total([call.product(rows) for call in calls]))


def _gram(calls: list[Outer], rows: slice) -> Tensor:
    """``sum_st <l_s, l_t> <r_s, r_t>`` over the outer products of all calls."""
    terms = [call.factors(rows) for call in calls]
    if len(terms) == 1 and calls[0].length == 1 and not calls[0].ids:
        left, right = terms[0]
        return (_square(left) if left.shape[1] == 1 else left.square().sum(3)) * _square(right)
    kinds = [[term for call, term in zip(calls, terms, strict=True) if call.ids == ids] for ids in (False, True)]
    merged = [tuple(_joined(side) for side in zip(*kind, strict=True)) for kind in kinds if kind]
    left, right = merged[0]
    parts = [_inner(left, left) * (right @ right.transpose(2, 3))]
    for ids, seeds in merged[1:]:
        parts += [_inner(ids, ids) * (seeds @ seeds.transpose(2, 3))]
        parts += [2 * _inner(left, ids) * (right @ seeds.transpose(2, 3))]
    return _total([part.flatten(1).sum(1) for part in parts])


def _inner(left: Tensor, other: Tensor) -> Tensor:
    """Inner products of dense rows ``(b, g, L, p)``, or one-hot ones, given by their ids ``(b, 1, L)``."""
    if left.dim() == 3:
        return (left[:, :, :, None] == other[:, :, None, :]).to(torch.float32)
    if other.dim() == 3:
        return left.gather(3, other[:, :, None, :].expand(-1, -1, left.shape[2], -1))
    return left @ other.transpose(2, 3)


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(tensors), 2) if len(tensors) > 1 else tensors[0]


def _square(rows: Tensor) -> Tensor:
    rows = rows.flatten(1)
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)  # in one pass
    return norms.square()


def _total(parts: Sequence[Tensor]) -> Tensor:
    total, *others = parts
    for other in others:
        total = total + other
    return total


def wide(dtype: torch.dtype) -> torch.dtype:
    """Half precision overflows when it is squared."""
    return torch.promote_types(dtype, torch.float32)
