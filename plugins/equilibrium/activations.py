"""Activations that are holomorphic, so that a network may settle at a complex state."""

import copy

import torch
from torch import Tensor, nn
from typing_extensions import override


class ScaledSigmoid(nn.Module):
    """``1 / (1 + exp(-(4 z - 2)))``, elementwise: from 0 to 1, with slope 1 in the middle, at 1/2."""

    @override
    def forward(self, z: Tensor) -> Tensor:
        return torch.sigmoid(4 * z - 2)


class DSiLU(nn.Module):
    """``z/2 sigmoid(z) + (1 - z/2) sigmoid(z - 2)``, elementwise: a smooth step from 0 to 1 (arXiv 2209.00530)."""

    @override
    def forward(self, z: Tensor) -> Tensor:
        half = 0.5 * z
        return half * torch.sigmoid(z) + (1 - half) * torch.sigmoid(z - 2)


def slope(activation: nn.Module, u: Tensor) -> Tensor:
    """``phi'(u)`` of an elementwise activation, in the shape of ``u``."""
    with torch.enable_grad():
        u = u.detach().requires_grad_()
        return torch.autograd.grad(activation(u).sum(), u)[0]


@torch.no_grad()
def is_holomorphic(activation: nn.Module) -> bool:
    """Whether a step along i changes ``phi`` by i times what the same step along 1 does, at a few places."""
    step = 1e-5
    z = torch.complex(*torch.linspace(-2, 2, 14, dtype=torch.float64, device="cpu").view(7, 2).T.contiguous())
    try:
        along_1 = (activation(z + step) - activation(z - step)) / (2 * step)
        along_i = (activation(z + 1j * step) - activation(z - 1j * step)) / (2j * step)
    except (RuntimeError, NotImplementedError):  # torch has no kernel where there is no order: ReLU, max
        return False
    return torch.allclose(along_1, along_i, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def check_activation(activation: object, units: int) -> None:
    """Refuses what no relaxation can use: a function, weights, chance, and units that depend on each other."""
    if not isinstance(activation, nn.Module):
        raise TypeError(
            f"`activation` must be a module, got {activation!r}: use an instance, such as ScaledSigmoid() or nn.ReLU()"
        )
    name = type(activation).__name__
    if any(True for _ in activation.parameters()):
        raise ValueError(f"`activation` ({name}) has weights, which no response reaches: use one without")
    trial = copy.deepcopy(activation).train()  # dropout is random in training alone
    z = torch.linspace(-2, 2, units * max(4, 4096 // units), device="cpu").view(-1, units)
    before = trial(z)
    if before.shape != z.shape or not _same(before, trial(z)).all():
        raise ValueError(f"`activation` must give each unit one value, always the same, got {name}, which does not")
    z[1, units // 2] += 10
    same = _same(before, trial(z))
    same[1, units // 2] = True
    if not same.all():
        raise ValueError(
            f"`activation` must be elementwise, got {name}, by which a unit changes others: put it behind the layer"
        )


def _same(one: Tensor, two: Tensor) -> Tensor:
    return torch.isclose(one, two, rtol=0, atol=0, equal_nan=True)
