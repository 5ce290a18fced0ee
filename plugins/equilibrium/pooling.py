"""Max pooling's smooth sibling, which is holomorphic."""

from collections.abc import Callable
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override


class SoftmaxPool2d(nn.Module):
    """``sum z exp(z / t) / sum exp(z / t)`` over windows that do not overlap (arXiv 2309.02214); real or complex.

    Rows and columns beyond the last whole window are left out, as in :class:`torch.nn.MaxPool2d`.

    Args:
        kernel_size: edge of a window, at least 1.
        temperature: t, above 0; towards 0 it is the maximum, towards infinity the mean.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(self, kernel_size: int = 2, temperature: float = 1.0) -> None:
        super().__init__()
        if kernel_size < 1:
            raise ValueError(f"`kernel_size` must be at least 1, got {kernel_size}")
        if not temperature > 0:
            raise ValueError(f"`temperature` must be above 0, got {temperature}")
        self.kernel_size, self.temperature = kernel_size, temperature

    @override
    def forward(self, z: Tensor) -> Tensor:
        """``(B, C, H, W)`` to ``(B, C, H // k, W // k)``."""
        z = self._whole_windows(z)
        weights = self._weights(z)
        return self._fold(torch.add, z * weights) / self._fold(torch.add, weights)

    def transpose(self, z: Tensor, v: Tensor) -> Tensor:
        """The derivative of ``sum(pool(z) v)`` with respect to ``z``, itself holomorphic in both.

        Args:
            z: ``(B, C, H, W)``.
            v: ``(B, C, H // k, W // k)``.
        """
        height, width = z.shape[2:]
        z = self._whole_windows(z)
        weights = self._weights(z)
        total = self._fold(torch.add, weights)
        pooled = self._fold(torch.add, z * weights) / total
        # v times share times (1 + (z - pooled) / t), with all that is the same within a window worked out there.
        slope = v / (total * self.temperature)
        grad = weights * self._spread(slope) * (z + self._spread(self.temperature - pooled))
        return F.pad(grad, (0, width - z.shape[3], 0, height - z.shape[2]))

    def _whole_windows(self, z: Tensor) -> Tensor:
        height, width = (edge - edge % self.kernel_size for edge in z.shape[2:])
        return z[:, :, :height, :width]

    def _weights(self, z: Tensor) -> Tensor:
        # The shift is a constant, which cancels: the maximum itself is not holomorphic.
        highest = self._fold(torch.maximum, z.detach().real)
        return torch.exp((z - self._spread(highest)) / self.temperature)

    def _fold(self, operation: Callable[[Tensor, Tensor], Tensor], z: Tensor) -> Tensor:
        """One value a window; whole rows at a time, several times as fast as a reduction over its axes."""
        k = self.kernel_size
        rows = reduce(operation, [z[..., place::k, :] for place in range(k)])
        return reduce(operation, [rows[..., place::k] for place in range(k)])

    def _spread(self, values: Tensor) -> Tensor:
        """The value of a window to each of its pixels."""
        return values.repeat_interleave(self.kernel_size, 3).repeat_interleave(self.kernel_size, 2)
