"""How far a field's Jacobian is from symmetric, as a loss on its weights."""

from typing import Any, Literal

import torch
from torch import Tensor

from fulgurite.plugins.equilibrium.field import EquilibriumField
from fulgurite.plugins.equilibrium.jacobian import product, transpose_product
from fulgurite.plugins.equilibrium.once import without_second_derivative

Estimator = Literal["vjp", "jvp", "exact"]
MAX_JACOBIAN = 2048
_NO_SECOND = (
    "there is no second derivative through a tensor with a penalty attached, as JacobianHomeostasis does: set its "
    "`coef` to 0, or add `homeostatic_loss` to the loss instead"
)


def homeostatic_loss(
    field: EquilibriumField,
    r: Tensor,
    x: Tensor,
    *,
    probes: int = 5,
    estimator: Estimator = "vjp",
    generator: torch.Generator | None = None,
) -> Tensor:
    """``2 |A|^2 / n`` with ``A`` the antisymmetric part of ``dH/dr``, a mean over the samples (arXiv 2309.02214).

    Args:
        field: whose weights the loss is of; activities and input count as constants.
        r: activities, ``(B, n)``.
        x: input, ``(B, ...)``.
        probes: random directions a sample, at least 1.
        estimator: with ``e`` a normal draw, ``"vjp"`` is ``|J e - J' e|^2 / 2``, which is never negative, and
            ``"jvp"`` is ``|J e|^2 - e' J J e``, which a single draw can make so; both over n, and of the same mean.
            ``"exact"`` takes no probe, and needs a field that is linear in ``r``.
        generator: draws the probes, on the device of ``r``.

    Returns:
        ``()``, differentiable in the weights; 0 for an empty batch.

    Raises:
        ValueError: ``probes`` below 1, an unknown ``estimator``, or ``"exact"`` for a field that is not linear.
    """
    check_estimator(probes, estimator)
    if estimator == "exact":
        return (2 / field.n) * antisymmetric(exact_matrix(field)).square().sum()
    r, x = r.detach().repeat(probes, 1), x.detach().repeat(probes, *[1] * (x.dim() - 1))
    e = torch.randn(r.shape, dtype=r.dtype, device=r.device, generator=generator)
    forward = product(field, r, x)
    if estimator == "vjp":
        total = 0.5 * (forward(e) - transpose_product(field, r, x)(e)).square().sum()
    else:
        once = forward(e)
        total = once.square().sum() - (e * forward(once)).sum()
    return total / (field.n * max(len(r), 1))


def check_estimator(probes: int, estimator: str) -> None:
    """Refuses what the loss does not know."""
    if probes < 1:
        raise ValueError(f"`probes` counts random directions a sample and must be at least 1, got {probes}")
    if estimator not in ("vjp", "jvp", "exact"):
        raise ValueError(f"`estimator` must be 'vjp', 'jvp' or 'exact', got {estimator!r}")


def exact_matrix(field: EquilibriumField) -> Tensor:
    """``dH/dr`` of a field that is linear in its activities, ``(n, n)``."""
    matrix = field.recurrent_matrix()
    if matrix is None:
        raise ValueError(
            f"`estimator='exact'` needs a field that is linear in `r`, and {type(field).__name__} has no "
            "`recurrent_matrix()`: use 'vjp' or 'jvp'"
        )
    return matrix


def antisymmetric(matrix: Tensor) -> Tensor:
    """``(M - M') / 2``."""
    return 0.5 * (matrix - matrix.mT)


@torch.no_grad()
def jacobian_symmetry(field: EquilibriumField, r: Tensor, x: Tensor) -> Tensor:
    """``|S| / (|S| + |A|)`` of the symmetric and antisymmetric parts of ``dH/dr`` (arXiv 2309.02214).

    Args:
        field: with at most 2048 units, as the Jacobian is written out.
        r: activities, ``(B, n)``.
        x: input, ``(B, ...)``.

    Returns:
        ``(B,)``: 1 for a symmetric Jacobian, about 0.5 for independent entries, 0 for an antisymmetric one.

    Raises:
        ValueError: the field has more units.
    """
    if field.n > MAX_JACOBIAN:
        raise ValueError(
            f"the symmetry index writes out the Jacobian, which has {field.n} rows, above {MAX_JACOBIAN}: "
            "use `homeostatic_loss`, which takes products"
        )
    matrix = field.recurrent_matrix()
    if matrix is None:
        rows = transpose_product(field, r, x)
        units = torch.eye(field.n, dtype=r.dtype, device=r.device)
        matrix = torch.stack([rows(unit.expand_as(r)) for unit in units], 1)  # (B, n, n)
    off = torch.linalg.matrix_norm(antisymmetric(matrix))
    on = torch.linalg.matrix_norm(matrix - antisymmetric(matrix))
    return torch.where(on + off > 0, on / (on + off), torch.ones_like(on)).expand(len(r))


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, loss: Tensor, weight: Tensor | float) -> Tensor:
        ctx.weight = weight
        ctx.save_for_backward(loss)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (loss,) = ctx.saved_tensors
        weight = torch.as_tensor(ctx.weight, dtype=loss.dtype, device=loss.device)
        # Products with the Jacobian of `out` would count the penalty once each.
        grad, weight = without_second_derivative([grad, weight], [grad, loss], _NO_SECOND)
        return grad, weight, None


def attach_loss(out: Tensor, loss: Tensor, weight: Tensor | float) -> Tensor:
    """``out`` itself; a backward pass through it adds the gradient of ``weight * loss``, whatever its own gradient.

    So a penalty joins the graph of a loss that is computed elsewhere, and one backward pass is of both. There is no
    second derivative through it: to ask for one is a RuntimeError.

    Args:
        out: any tensor that the loss will depend on.
        loss: the penalty, ``()``.
        weight: its factor; no gradient flows into it.

    Raises:
        ValueError: ``loss`` is no scalar.
    """
    if loss.dim():
        raise ValueError(f"`loss` must be a scalar, got the shape {tuple(loss.shape)}: take its mean or its sum")
    result: Tensor = _Attach.apply(out, loss, weight)  # type: ignore[no-untyped-call]
    return result
