"""Layers that are connected by matrices, forward and back."""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from fulgurite.plugins.equilibrium.field import EquilibriumField


class DenseField(EquilibriumField):
    """Blocks joined by matrices: ``H_post = sum_pre W r_pre + b``, linear in ``r`` (arXiv 2309.02214).

    Without ``connections`` the blocks form a chain, ``in`` to the first and on to the last, with a matrix of its own
    back from each to the one before. A field of 64 inputs and ``{"l1": 32, "out": 16}`` has ``weights["in-l1"]``,
    ``["l1-out"]`` and ``["out-l1"]``, and ``biases`` of the first two.

    Args:
        in_features: numbers of a sample; ``x`` is flattened to them.
        sizes: units of each block.
        connections: ``"pre-post"`` to whether it has a bias; ``in`` is the input. None for the chain.
        angle: in degrees, between each matrix back and the transpose of its forward one, when they are drawn: 0 makes
            them equal, 90 independent. The one from the later block counts as the one back.
        gain: entries of a forward matrix are drawn with deviation ``gain / sqrt(fan_in)``; those of a matrix back are
            as large as those of the one forward.

    Raises:
        TypeError: ``sizes`` or ``connections`` is no dictionary.
        ValueError: an argument is out of its range, or a connection names no block.
    """

    def __init__(
        self,
        in_features: int,
        sizes: dict[str, int],
        connections: dict[str, bool] | None = None,
        angle: float = 90.0,
        gain: float = 1.0,
    ) -> None:
        super().__init__(sizes)
        self.in_features = in_features
        connections = _chain(list(sizes)) if connections is None else connections
        _validate(in_features, connections, angle, gain)
        self._ends = {name: _ends(name, sizes) for name in connections}
        self.weights, self.biases = nn.ParameterDict(), nn.ParameterDict()
        fans = sizes | {"in": in_features}
        for name in sorted(connections, key=self._is_back):  # a matrix back is drawn from the forward one
            pre, post = self._ends[name]
            weight = torch.randn(fans[post], fans[pre]) * (gain / math.sqrt(fans[pre]))
            forward = f"{post}-{pre}"
            if self._is_back(name) and forward in self.weights:
                weight = at_angle(self.weights[forward].detach().T.contiguous(), angle)  # L-BFGS takes views
            self.weights[name] = nn.Parameter(weight)
            if connections[name]:
                self.biases[name] = nn.Parameter(torch.zeros(fans[post]))

    def _is_back(self, name: str) -> bool:
        pre, post = self._ends[name]
        order = ["in", *self.sizes]
        return order.index(pre) > order.index(post)

    @override
    def forward(self, r: Tensor, x: Tensor) -> Tensor:
        return self.at(x)(r)

    @override
    def at(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        drive, matrix = self.drive(x), self.recurrent_matrix()

        def field(r: Tensor) -> Tensor:
            if r.is_complex():
                return torch.complex(F.linear(r.real, matrix) + drive, F.linear(r.imag, matrix))
            return torch.addmm(drive, r, matrix.T)

        return field

    def drive(self, x: Tensor) -> Tensor:
        """What the input and the biases add, ``(B, n)``: the same at each step."""
        x = x.flatten(1)
        parts = []
        for block, size in self.sizes.items():
            part = x.new_zeros(len(x), size)
            for name, (pre, post) in self._ends.items():
                if post == block and pre == "in":
                    part = part + F.linear(x, self.weights[name])
                if post == block and name in self.biases:
                    part = part + self.biases[name]
            parts.append(part)
        return torch.cat(parts, 1)

    @override
    def recurrent_matrix(self) -> Tensor:
        """All matrices between blocks as one, ``(n, n)``: a step takes one product."""
        weight = next(iter(self.weights.values()))
        rows = []
        for post, rows_of in self.sizes.items():
            names = [f"{pre}-{post}" for pre in self.sizes]
            blocks = [
                self.weights[name] if name in self.weights else weight.new_zeros(rows_of, columns)
                for name, columns in zip(names, self.sizes.values(), strict=True)
            ]
            rows.append(torch.cat(blocks, 1))
        return torch.cat(rows, 0)


def at_angle(weight: Tensor, degrees: float) -> Tensor:
    """A draw at that angle, in the mean, from a weight: ``sin(a) independent + cos(a) weight``, equally large."""
    independent = torch.randn_like(weight) * weight.square().mean().sqrt()
    return math.sin(math.radians(degrees)) * independent + math.cos(math.radians(degrees)) * weight


def _chain(blocks: list[str]) -> dict[str, bool]:
    forward = {f"{pre}-{post}": True for pre, post in pairwise(["in", *blocks])}
    return forward | {f"{post}-{pre}": False for pre, post in pairwise(blocks)}


def _validate(in_features: int, connections: dict[str, bool], angle: float, gain: float) -> None:
    if in_features < 1:
        raise ValueError(f"`in_features` must be at least 1, got {in_features}")
    if not isinstance(connections, dict):
        raise TypeError(
            f'`connections` must map "pre-post" to whether it has a bias, as {{"in-out": True}}, got {connections!r}'
        )
    if not connections:
        raise ValueError("`connections` is empty: give at least one, or None for a chain")
    if not math.isfinite(angle):
        raise ValueError(f"`angle` must be a number of degrees, got {angle}")
    if not gain >= 0:
        raise ValueError(f"`gain` must be at least 0, got {gain}")


def _ends(name: str, sizes: dict[str, int]) -> tuple[str, str]:
    pre, _, post = name.partition("-")
    if post not in sizes or (pre != "in" and pre not in sizes):
        raise ValueError(
            f"`connections` has {name!r}, which must be 'pre-post' with blocks of `sizes` ({', '.join(sizes)}), or "
            "'in' before the dash"
        )
    return pre, post
