"""Means of gradients that keep what examples agree on."""

import torch
from torch import Tensor


def winsorized_mean(rows: Tensor, c: float) -> Tensor:
    """The mean over rows, in each coordinate after its extreme values were clipped (arXiv 2002.10657).

    The ``floor(c m)`` smallest values of the m become the next one, and likewise the largest.

    Args:
        rows: ``(m, ...)``.
        c: share to clip at each end, in ``[0, 0.5)``: 0 for the mean; towards 0.5 it becomes the median.

    Example:
        >>> winsorized_mean(torch.tensor([-100.0, 1.0, 2.0, 3.0, 50.0]), 0.2)
        tensor(2.)
    """
    k = int(c * len(rows))
    if k == 0:
        return rows.mean(0)
    ordered = rows.sort(0).values
    return ordered.clamp(ordered[k], ordered[-1 - k]).mean(0)


def median_of_three(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """In each coordinate (arXiv 2003.07422)."""
    return torch.maximum(torch.minimum(a, b), torch.minimum(torch.maximum(a, b), c))
