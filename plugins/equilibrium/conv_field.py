"""Layers that are connected by convolutions, forward and back."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from fulgurite.plugins.equilibrium.dense_field import at_angle
from fulgurite.plugins.equilibrium.field import EquilibriumField
from fulgurite.plugins.equilibrium.pooling import SoftmaxPool2d


class ConvField(EquilibriumField):
    """A chain of convolutions with soft pooling, and kernels of their own back (arXiv 2309.02214).

    Block ``l1`` has ``channels[0]`` maps, and so on; the last one, ``out``, has ``out_features`` units. Forward each
    block gets ``pool(conv(r))`` of the one before, with a bias; back, without one, the derivative of
    ``sum(pool(conv_b(r)) r_next)`` with respect to its own ``r``. With equal kernels the Jacobian is symmetric.
    Convolutions keep the maps' size, except for the one to ``out``, which takes whole windows alone; so with ``k``
    blocks the smallest image has an edge of ``pool^k (pool + kernel_size - 1)``: 32 for the defaults, 8 for one block.

    Args:
        in_shape: ``(C, H, W)`` of ``x``.
        channels: maps of each block before ``out``.
        out_features: units of ``out``.
        kernel_size: edge of a kernel, odd.
        pool: edge of a pooling window, at least 1.
        angle: in degrees, between each kernel back and its forward one, when they are drawn.

    Raises:
        ValueError: an argument is out of its range, or ``out`` would not be one pixel.
    """

    def __init__(
        self,
        in_shape: Sequence[int] = (3, 32, 32),
        channels: Sequence[int] = (128, 256, 512),
        out_features: int = 512,
        kernel_size: int = 3,
        pool: int = 2,
        angle: float = 90.0,
    ) -> None:
        _validate(in_shape, channels, kernel_size, pool)
        shapes: list[tuple[int, ...]] = [tuple(in_shape)]
        for maps in channels:
            shapes.append((maps, shapes[-1][1] // pool, shapes[-1][2] // pool))
        shapes.append((out_features, *((edge - kernel_size + 1) // pool for edge in shapes[-1][1:])))
        if shapes[-1][1:] != (1, 1):
            raise ValueError(
                f"`out` would have maps of {shapes[-1][1:]} pixels, and must have 1 x 1: with a `kernel_size` of "
                f"{kernel_size} and a `pool` of {pool}, change the number of `channels` or the size of `in_shape`"
            )
        names = [*(f"l{number}" for number in range(1, len(channels) + 1)), "out"]
        super().__init__({name: math.prod(shape) for name, shape in zip(names, shapes[1:], strict=True)})
        self._shapes, self._padding = shapes[1:], kernel_size // 2
        self.pool = SoftmaxPool2d(pool)
        self.kernels, self.kernels_back, self.biases = nn.ParameterDict(), nn.ParameterDict(), nn.ParameterDict()
        for (pre, post), ((maps, *_), (new_maps, *_)) in zip(pairwise(["in", *names]), pairwise(shapes), strict=True):
            fan_in = maps * kernel_size**2
            kernel = torch.randn(new_maps, maps, kernel_size, kernel_size) / math.sqrt(fan_in)
            self.kernels[f"{pre}-{post}"] = nn.Parameter(kernel)
            self.biases[f"{pre}-{post}"] = nn.Parameter(torch.zeros(new_maps))
            if pre != "in":
                self.kernels_back[f"{post}-{pre}"] = nn.Parameter(at_angle(kernel, angle))

    @override
    def forward(self, r: Tensor, x: Tensor) -> Tensor:
        return self.at(x)(r)

    @override
    def at(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        first = next(iter(self.sizes))
        drive = self.pool(self._convolve(x, f"in-{first}"))

        def field(r: Tensor) -> Tensor:
            parts = torch.split(r, list(self.sizes.values()), 1)
            maps = [part.view(len(part), *shape) for part, shape in zip(parts, self._shapes, strict=True)]
            inputs = [drive, *(self._up(pair, maps[k]) for k, pair in enumerate(pairwise(self.sizes)))]
            for k, pair in enumerate(pairwise(self.sizes)):
                inputs[k] = inputs[k] + self._down(pair, maps[k], maps[k + 1])
            return torch.cat([part.flatten(1) for part in inputs], 1)

        return field

    def _up(self, pair: tuple[str, str], r: Tensor) -> Tensor:
        pre, post = pair
        pooled: Tensor = self.pool(self._convolve(r, f"{pre}-{post}"))
        return pooled

    def _convolve(self, r: Tensor, name: str) -> Tensor:
        padding = self._pad(name.partition("-")[2])
        z = _by_parts(lambda part: F.conv2d(part, self.kernels[name], padding=padding), r)
        bias: Tensor = self.biases[name]
        return z + bias[:, None, None]

    def _down(self, pair: tuple[str, str], r: Tensor, r_next: Tensor) -> Tensor:
        pre, post = pair
        kernel, padding = self.kernels_back[f"{post}-{pre}"], self._pad(post)
        z = _by_parts(lambda part: F.conv2d(part, kernel, padding=padding), r)
        v = self.pool.transpose(z, r_next)
        return _by_parts(lambda part: F.conv_transpose2d(part, kernel, padding=padding), v)

    def _pad(self, post: str) -> int:
        return 0 if post == "out" else self._padding


def _validate(in_shape: Sequence[int], channels: Sequence[int], kernel_size: int, pool: int) -> None:
    if len(in_shape) != 3:
        raise ValueError(f"`in_shape` must be (C, H, W), got {tuple(in_shape)}")
    if not channels:
        raise ValueError("`channels` is empty: give the maps of at least one block before `out`")
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"`kernel_size` must be odd, so that maps keep their size, got {kernel_size}")
    if pool < 1:
        raise ValueError(f"`pool` must be at least 1, which does not pool, got {pool}")


def _by_parts(real_map: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """A linear map with real weights, of the real and the imaginary part in one call."""
    if not z.is_complex():
        return real_map(z)
    return torch.complex(*real_map(torch.cat([z.real, z.imag])).chunk(2))
