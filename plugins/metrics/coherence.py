"""How many examples profit from a step on one of them."""

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torchmetrics import Metric

Normalize = Literal["m", "one", "unbiased"]


def m_coherence(grads: Tensor) -> Tensor:
    """The m-coherence of gradients, ``|sum g_i|^2 / sum |g_i|^2`` (arXiv 2008.01217, 2203.10036).

    Args:
        grads: ``(m, P)``, one gradient a row.

    Returns:
        Scalar in ``[0, m]``: 1 for orthogonal rows, ``m`` for equal ones, nan where all are zero.

    Example:
        >>> m_coherence(torch.tensor([[3.0, 4.0], [0.0, 5.0]]))
        tensor(1.8000)
    """
    return grads.sum(0).square().sum() / grads.square().sum()


def normalized(coherence: Tensor, m: Tensor | int, how: Normalize) -> Tensor:
    """The m-coherence of m examples as itself, over m, or ``(. - 1) / (m - 1)``, whose mean does not depend on m."""
    match how:
        case "m":
            return coherence
        case "one":
            return coherence / m
        case "unbiased":
            return (coherence - 1) / (m - 1)


class MCoherence(Metric):
    """M-coherence of all examples of an epoch, over chunks and processes, without their gradients.

    Args:
        normalize: ``"m"`` for the number of examples that profit, in ``[0, m]``; ``"one"`` for its share of m;
            ``"unbiased"`` for the mean inner product of two different examples over the mean square, at most 1.
        per_layer: compute one value for each key of the updates.
        **kwargs: for :class:`~torchmetrics.Metric`.

    Raises:
        ValueError: for an unknown ``normalize``.
        RuntimeError: in ``compute``, before the first update.

    Example:
        >>> metric = MCoherence()
        >>> metric.update_grads(torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
        >>> metric.update_grads(torch.tensor([[0.0, 1.0]]))
        >>> metric.compute()
        tensor(1.6667)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    m: Tensor

    def __init__(self, normalize: Normalize = "m", per_layer: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if normalize not in get_args(Normalize):
            raise ValueError(f"`normalize` must be one of {get_args(Normalize)}, got {normalize!r}")
        self.normalize, self.per_layer = normalize, per_layer
        self.names: list[str] | None = None
        self.add_state("m", torch.tensor(0), dist_reduce_fx="sum")

    def update(
        self, grad_sum: Tensor | Mapping[str, Tensor], sq_norm_sum: Tensor | Mapping[str, Tensor], m: int
    ) -> None:
        """Takes a chunk of examples.

        Args:
            grad_sum: the sum of their gradients, of one shape in all updates; by layer for ``per_layer``.
            sq_norm_sum: the sum of the squared norms, ``()``; by layer likewise.
            m: examples.

        Raises:
            ValueError: layers or shapes that do not fit together or the first update.
        """
        sums = dict(grad_sum) if isinstance(grad_sum, Mapping) else {"": grad_sum}
        squares = dict(sq_norm_sum) if isinstance(sq_norm_sum, Mapping) else {"": sq_norm_sum}
        self._check(sums, squares)
        assert self.names is not None
        for index, name in enumerate(self.names):
            total, square = getattr(self, f"grad_sum_{index}"), getattr(self, f"sq_norm_sum_{index}")
            setattr(self, f"grad_sum_{index}", total + sums[name].detach())
            setattr(self, f"sq_norm_sum_{index}", square + squares[name].detach())
        self.m = self.m + m

    def update_grads(self, grads: Tensor) -> None:
        """Takes the gradients of a chunk of examples, ``(b, P)``."""
        self.update(grads.sum(0), grads.square().sum(), len(grads))

    def compute(self) -> Tensor | dict[str, Tensor]:
        """A scalar, or by layer; nan where all gradients are zero."""
        if self.names is None:
            raise RuntimeError("`MCoherence` has seen no gradient: call `update` first")
        tops = [getattr(self, f"grad_sum_{index}").square().sum() for index in range(len(self.names))]
        squares = [getattr(self, f"sq_norm_sum_{index}") for index in range(len(self.names))]
        if not self.per_layer:
            return normalized(torch.stack(tops).sum() / torch.stack(squares).sum(), self.m, self.normalize)
        layers = zip(self.names, tops, squares, strict=True)
        return {name: normalized(top / square, self.m, self.normalize) for name, top, square in layers}

    def _check(self, sums: dict[str, Tensor], squares: dict[str, Tensor]) -> None:
        """The states of the layers come with the first update, which knows them."""
        if sums.keys() != squares.keys() or (self.names is not None and set(self.names) != sums.keys()):
            odd = (sums.keys() ^ squares.keys()) or (set(self.names or ()) ^ sums.keys())
            raise ValueError(
                f"`grad_sum` and `sq_norm_sum` have the same layers in each update, got {sorted(odd)} besides"
            )
        if self.names is None:
            self.names = list(sums)
            for index, total in enumerate(sums.values()):
                self.add_state(f"grad_sum_{index}", torch.zeros_like(total), dist_reduce_fx="sum")
                self.add_state(f"sq_norm_sum_{index}", total.new_zeros(()), dist_reduce_fx="sum")
        for index, name in enumerate(self.names):
            before = getattr(self, f"grad_sum_{index}").shape
            if sums[name].shape != before or squares[name].dim():
                got = f"{tuple(sums[name].shape)} and {tuple(squares[name].shape)}"
                raise ValueError(f"layer {name!r} has sums of shape {tuple(before)} and (), got {got}")
