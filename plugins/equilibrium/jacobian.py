"""Products with the recurrent Jacobian ``J = dH/dr``."""

from collections.abc import Callable

import torch
from torch import Tensor

from fulgurite.plugins.equilibrium.field import EquilibriumField

Product = Callable[[Tensor], Tensor]


def product(field: EquilibriumField, r: Tensor, x: Tensor) -> Product:
    """``e -> J e`` for each sample, ``(B, n)``; differentiable in the weights where gradients are enabled."""
    matrix = field.recurrent_matrix()
    if matrix is not None:
        return lambda e: e @ matrix.T
    at = field.at(x)
    return lambda e: torch.func.jvp(at, (r,), (e,))[1]


def transpose_product(field: EquilibriumField, r: Tensor, x: Tensor) -> Product:
    """``e -> J' e`` for each sample, ``(B, n)``; differentiable in the weights where gradients are enabled."""
    matrix = field.recurrent_matrix()
    if matrix is not None:
        return lambda e: e @ matrix
    keep = torch.is_grad_enabled()
    with torch.enable_grad():
        r = r.detach().requires_grad_()
        h = field(r, x)
    # A field without recurrence has no path from r to h.
    return lambda e: torch.autograd.grad(
        h, r, e, retain_graph=True, create_graph=keep, materialize_grads=True, allow_unused=True
    )[0]
