"""A network settles, is nudged and settles again: its response is the error that it learns from."""

import cmath
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fulgurite.plugins.equilibrium.activations import slope
from fulgurite.plugins.equilibrium.field import EquilibriumField
from fulgurite.plugins.equilibrium.jacobian import transpose_product

CHECK_EVERY = 10  # steps between looks at the residual: each waits for the device


def free_phase(
    field: EquilibriumField,
    activation: nn.Module,
    x: Tensor,
    u0: Tensor | None = None,
    *,
    steps: int,
    step_size: float = 1.0,
    tol: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Settles: ``u <- u + step_size (H(phi(u), x) - u)`` (arXiv 2309.02214).

    Args:
        field: H.
        activation: phi, elementwise.
        x: input, ``(B, ...)``; real and floating.
        u0: where to start, ``(B, n)``; zeros by default.
        steps: at most that many (T1).
        step_size: in (0, 1]. Smaller ones settle where synchronous updates would swing, at the same fixed point.
        tol: stop when no unit is further than this from its input; looked at every tenth step. 0 never stops.

    Returns:
        The state, ``(B, n)``, and the largest ``|H(phi(u), x) - u|`` in the batch, ``()``. Not to have converged is no
        error. Where gradients are enabled they flow through all steps.

    Raises:
        ValueError: an argument is out of its range, or the field returns another shape than the state's.
    """
    check_relaxation(steps, step_size)
    if u0 is None:
        u0 = x.new_zeros(len(x), field.n)
    return settle(field.at(x), activation, u0, steps, step_size, tol)[:2]


def settle(
    field: Callable[[Tensor], Tensor], activation: nn.Module, u: Tensor, steps: int, step_size: float, tol: float
) -> tuple[Tensor, Tensor, int]:
    """The state, its residual, and the steps that it took."""
    h = field(activation(u))
    if h.shape != u.shape:
        raise ValueError(f"the field returned {tuple(h.shape)} for a state of {tuple(u.shape)}: both are (B, n)")
    for done in range(steps):
        if tol > 0 and done % CHECK_EVERY == 0 and _largest(h - u) < tol:
            return u, _largest(h - u), done
        u = h if step_size == 1 else torch.lerp(u, h, step_size)
        h = field(activation(u))
    return u, _largest(h - u), steps


def nudged_response(
    field: EquilibriumField,
    activation: nn.Module,
    u: Tensor,
    x: Tensor,
    g: Tensor,
    *,
    beta: float,
    points: int,
    steps: int,
    step_size: float = 1.0,
) -> Tensor:
    """How activities answer to a constant drive along ``g``, by settling under ``b g``: equilibrium propagation.

    It estimates ``d = (D^-1 - W)^-1 g`` with ``W = dH/dr`` and ``D = phi'(u)`` on the diagonal; for a symmetric ``W``
    the error vector of the loss whose gradient ``g`` is. With ``b_k = beta exp(2 pi i k / points)`` the estimate is the
    mean of ``Re(phi(u(b_k)) / b_k)``, at an error of order ``beta^points`` (arXiv 2209.00530). One point, a one-sided
    difference, has an error of order ``beta``. All points settle in one batch; two are real, more are complex, and of
    each conjugate pair one is computed.

    Args:
        field: H.
        activation: phi, elementwise; holomorphic for more than two points.
        u: settled state, ``(B, n)``.
        x: input, ``(B, ...)``.
        g: ``dL/dr``, ``(B, n)``. The nudge is ``beta g`` as it stands: bring it to a length of about 1 first.
        beta: radius, above 0; beyond the radius in which the state is holomorphic the estimate is wrong.
        points: N, at least 1.
        steps: to settle again (T2).
        step_size: in (0, 1].

    Returns:
        ``(B, n)``, real.

    Raises:
        ValueError: an argument is out of its range, or more than two points on a device without complex numbers or
            with a field that does not take them.
    """
    check_relaxation(steps, step_size)
    check_points(beta, points)
    if points > 2 and u.device.type == "mps":
        raise ValueError(f"`points` is {points}, and MPS lacks complex kernels: use at most 2")

    def activities(nudges: list[complex]) -> list[Tensor]:
        drive = torch.cat([g * (nudge if nudge.imag else nudge.real) for nudge in nudges])
        count = len(nudges)
        at = field.at(x.repeat(count, *[1] * (x.dim() - 1)))
        state = u.repeat(count, 1).to(drive.dtype)
        for _ in range(steps):
            h = at(activation(state)) + drive
            state = h if step_size == 1 else torch.lerp(state, h, step_size)
        return list(activation(state).chunk(count))

    with torch.no_grad():
        if points == 1:
            rest: Tensor = activation(u)
            return (activities([complex(beta)])[0] - rest) / beta
        if points == 2:
            ahead, behind = activities([complex(beta), complex(-beta)])
            return (ahead - behind) / (2 * beta)
        real = [complex(beta), *([complex(-beta)] if points % 2 == 0 else [])]
        upper = [beta * cmath.exp(2j * cmath.pi * k / points) for k in range(1, (points + 1) // 2)]
        response = torch.zeros_like(u)
        for nudges, weight in ((real, 1), (upper, 2)):
            try:
                responses = activities(nudges)
            except RuntimeError as error:  # torch has no kernel where there is no order, as in ReLU's
                if "complex" not in str(error).lower():
                    raise
                raise ValueError(
                    f"`points` is {points}, above 2, which takes a field that is holomorphic in its activities; "
                    f"{type(field).__name__} is not ({error}): use at most 2"
                ) from error
            for r, nudge in zip(responses, nudges, strict=True):
                response += weight * (r / nudge if nudge.imag else r / nudge.real).real
        return response / points


def adjoint_response(
    field: EquilibriumField,
    activation: nn.Module,
    u: Tensor,
    x: Tensor,
    g: Tensor,
    *,
    steps: int,
    tol: float = 1e-6,
    step_size: float = 1.0,
) -> Tensor:
    """The exact error vector ``d = (D^-1 - W)^-T g``, by the transposed network (Almeida 1987, Pineda 1987).

    Iterates ``v <- v + step_size (W' D v + g - v)``, which converges where the network does, and returns ``D v``.

    Args:
        field: H.
        activation: phi, elementwise.
        u: settled state, ``(B, n)``.
        x: input, ``(B, ...)``.
        g: ``dL/dr``, ``(B, n)``.
        steps: at most that many.
        tol: stop when no entry would change by more than this part of the largest of ``g``; looked at every tenth step.
        step_size: in (0, 1], that of the free phase.

    Returns:
        ``(B, n)``.
    """
    check_relaxation(steps, step_size)
    with torch.no_grad():
        slopes = slope(activation, u)
        back = transpose_product(field, activation(u), x)
        limit = tol * _largest(g)
        v = g
        for done in range(steps):
            change = back(slopes * v) + g - v
            v = v + step_size * change
            if tol > 0 and done % CHECK_EVERY == CHECK_EVERY - 1 and _largest(change) <= limit:
                break
        return slopes * v


def check_relaxation(steps: int, step_size: float) -> None:
    """Refuses what no relaxation can run with."""
    if steps < 1:
        raise ValueError(f"`steps` counts steps of a relaxation and must be at least 1, got {steps}")
    if not 0 < step_size <= 1:
        raise ValueError(f"`step_size` must be in (0, 1], got {step_size}: 1 is a whole step")


def check_points(beta: float, points: int) -> None:
    """Refuses nudges that are none."""
    if points < 1:
        raise ValueError(f"`points` counts nudges (N) and must be at least 1, got {points}")
    if not beta > 0:
        raise ValueError(f"`beta` is the size of the nudge and must be above 0, got {beta}")


def _largest(values: Tensor) -> Tensor:
    values = values.detach().abs()
    return values.amax() if values.numel() else values.sum()
