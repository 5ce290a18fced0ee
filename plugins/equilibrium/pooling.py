"""Max pooling's smooth sibling, which is holomorphic."""

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
    """

    def __init__(self, kernel_size: int = 2, temperature: float = 1.0) -> None:
        super().__init__()
        if kernel_size < 1 or not temperature > 0:
            raise ValueError(
                f"`kernel_size` must be at least 1 and `temperature` above 0, got {kernel_size} and {temperature}"
            )
        self.kernel_size, self.temperature = kernel_size, temperature

    @override
    def forward(self, z: Tensor) -> Tensor:
        """``(B, C, H, W)`` to ``(B, C, H // k, W // k)``."""
        windows = self._windows(z)
        return (windows * self._shares(windows)).sum((3, 5))

    def transpose(self, z: Tensor, v: Tensor) -> Tensor:
        """The derivative of ``sum(pool(z) v)`` with respect to ``z``, itself holomorphic in both.

        Args:
            z: ``(B, C, H, W)``.
            v: ``(B, C, H // k, W // k)``.
        """
        windows = self._windows(z)
        shares = self._shares(windows)
        pooled = (windows * shares).sum((3, 5), keepdim=True)
        slopes = shares * (1 + (windows - pooled) / self.temperature) * v[:, :, :, None, :, None]
        slopes = slopes.flatten(4, 5).flatten(2, 3)
        return F.pad(slopes, (0, z.shape[3] - slopes.shape[3], 0, z.shape[2] - slopes.shape[2]))

    def _windows(self, z: Tensor) -> Tensor:
        k = self.kernel_size
        rows, columns = z.shape[2] // k, z.shape[3] // k
        return z[:, :, : rows * k, : columns * k].reshape(*z.shape[:2], rows, k, columns, k)

    def _shares(self, windows: Tensor) -> Tensor:
        # The shift is a constant, which cancels: the maximum itself is not holomorphic.
        shift = windows.detach().real.amax((3, 5), keepdim=True)
        weights = torch.exp((windows - shift) / self.temperature)
        return weights / weights.sum((3, 5), keepdim=True)
