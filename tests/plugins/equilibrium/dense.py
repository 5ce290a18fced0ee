"""Jacobians written out, in float64: what the relaxations and probes are held to."""

import torch
from torch import Tensor, nn

from fulgurite.plugins.equilibrium import DenseField, EquilibriumField

BATCH, INPUTS = 5, 6
SIZES = {"l1": 7, "l2": 5, "out": 4}


def dense_field(angle: float = 90.0, gain: float = 0.7, seed: int = 0) -> DenseField:
    torch.manual_seed(seed)
    return DenseField(INPUTS, SIZES, angle=angle, gain=gain).double()


def inputs(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(*(shape or (BATCH, INPUTS)), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def jacobian(field: EquilibriumField, r: Tensor, x: Tensor) -> Tensor:
    """``dH/dr`` of each sample, ``(B, n, n)``; one sample at a time, by reverse mode."""
    return torch.stack(
        [
            torch.autograd.functional.jacobian(lambda row, xs=xs: field(row[None], xs[None])[0], rs)
            for rs, xs in zip(r, x, strict=True)
        ]
    )


def system(field: EquilibriumField, activation: nn.Module, u: Tensor, x: Tensor) -> Tensor:
    """``D^-1 - W`` of each sample, ``(B, n, n)``; the slopes by reverse mode."""
    slopes = torch.autograd.functional.jacobian(lambda v: activation(v).sum(), u)
    return torch.diag_embed(1 / slopes) - jacobian(field, activation(u), x)


class Opaque(EquilibriumField):
    """A field as a user might write it: ``forward`` alone."""

    def __init__(self, inner: EquilibriumField) -> None:
        super().__init__(inner.sizes)
        self.inner = inner

    def forward(self, r: Tensor, x: Tensor) -> Tensor:
        return self.inner(r, x)
