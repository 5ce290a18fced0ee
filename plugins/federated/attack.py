"""Adversarial examples by projected gradient ascent."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Norm = Literal["linf", "l2"]
Mode = Literal["eval", "train"]


@dataclass(frozen=True)
class PGD:
    """Searches the input within ``eps`` that has the highest loss, by projected gradient ascent (arXiv 1706.06083).

    Each step is ``x <- clip(x_0 + Proj(x + step_size * dir(g) - x_0))`` with the gradient ``g`` of the loss and the
    given input ``x_0``, where ``dir`` is the sign (``"linf"``) or ``g / |g|`` of each sample (``"l2"``). The last
    iterate is returned. One step of size ``eps`` without a random start is the fast gradient sign method.

    Args:
        eps: radius of the perturbation of a sample, in the units of the input, at least 0.
        step_size: length of a step, above 0; by default ``2.5 * eps / steps``.
        steps: gradients to take (J), at least 1.
        norm: ``"linf"`` bounds each element of the perturbation, ``"l2"`` the length of the whole.
        random_start: begin at a uniform draw from the ball, not at its centre.
        clip: the smallest and the largest valid input; None for inputs without bounds, such as standardised ones.
        mode: how a strategy runs the module that is attacked: ``"eval"``, or ``"train"`` with dropout as in training.

    Raises:
        ValueError: an argument is out of range; when called, the input is not floating or not within ``clip``, or the
            loss does not depend on it.
    """

    eps: float = 8 / 255
    step_size: float | None = None
    steps: int = 7
    norm: Norm = "linf"
    random_start: bool = True
    clip: tuple[float, float] | None = (0.0, 1.0)
    mode: Mode = "eval"

    def __post_init__(self) -> None:
        rules = {
            "eps": (0 <= self.eps < float("inf"), "is a radius in the units of the input and must be at least 0"),
            "step_size": (self.step_size is None or self.step_size > 0, "must be None or positive"),
            "steps": (self.steps >= 1, "counts gradients and must be at least 1"),
            "norm": (self.norm in get_args(Norm), f"must be one of {get_args(Norm)}"),
            "clip": (self.clip is None or self.clip[0] < self.clip[1], "must be None or (lowest, highest), ascending"),
            "mode": (self.mode in get_args(Mode), f"must be one of {get_args(Mode)}"),
        }
        for name, (holds, meaning) in rules.items():
            if not holds:
                raise ValueError(f"`{name}` {meaning}, got {getattr(self, name)!r}")

    def __call__(
        self, loss_fn: Callable[[Tensor], Tensor], x: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """The adversarial input; gradients of parameters are neither computed nor touched.

        Args:
            loss_fn: maps the input to the scalar to raise; called once a step, first at the start.
            x: ``(N, ...)`` floating.
            generator: draws the random start, on the device of ``x``; None for the global one.

        Returns:
            Of the shape and type of ``x``, without a graph.
        """
        self._check_input(x)
        clean = x.detach()
        step_size = 2.5 * self.eps / self.steps if self.step_size is None else self.step_size
        adversarial = self._clip(clean + self._draw(clean, generator)) if self.random_start else clean
        confine = self._confine(clean)
        for _ in range(self.steps):
            direction = self._direction(_gradient(loss_fn, adversarial))
            adversarial = confine(adversarial.add(direction, alpha=step_size))
        return adversarial

    def _check_input(self, x: Tensor) -> None:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(
                f"the attacked input must be a floating tensor, got {got}: indices cannot be perturbed; let `input_key`"
                " name another entry of the batch"
            )
        if self.clip is None or not x.numel():
            return
        lowest, highest = (bound.item() for bound in x.detach().aminmax())
        if lowest < self.clip[0] - 1e-6 or highest > self.clip[1] + 1e-6:
            raise ValueError(
                f"`clip` is {self.clip} and the input reaches from {lowest:g} to {highest:g}: the attack works in the"
                " units of the batch; give `clip=None` or its bounds, and `eps` in those units"
            )

    def _clip(self, x: Tensor) -> Tensor:
        return x if self.clip is None else x.clamp(*self.clip)

    def _draw(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        """Uniform in the ball, of the shape of ``x``."""
        if self.norm == "linf":
            return torch.empty_like(x).uniform_(-self.eps, self.eps, generator=generator)
        direction = self._direction(torch.empty_like(x).normal_(generator=generator))
        radius = x.new_empty(len(x), *[1] * (x.dim() - 1)).uniform_(generator=generator)
        return self.eps * radius ** (1 / x.shape[1:].numel()) * direction

    def _direction(self, gradient: Tensor) -> Tensor:
        if self.norm == "linf":
            return gradient.sign()
        return (gradient / _lengths(gradient)).to(gradient.dtype)

    def _confine(self, clean: Tensor) -> Callable[[Tensor], Tensor]:
        """Into the ball, and then between the bounds; for ``"linf"`` both are boxes, and one pass does."""
        if self.norm == "linf":
            lowest, highest = self._clip(clean - self.eps), self._clip(clean + self.eps)
            return lambda x: x.clamp(lowest, highest)

        def confine(x: Tensor) -> Tensor:
            delta = x - clean
            return self._clip(clean + (delta * (self.eps / _lengths(delta)).clamp(max=1)).to(delta.dtype))

        return confine


def _lengths(x: Tensor) -> Tensor:
    """Of each sample, at least 1e-12: ``(N, 1, ...)`` in float32 or wider, where that is not zero."""
    flat = x.reshape(len(x), x.shape[1:].numel())
    lengths: Tensor = torch.linalg.vector_norm(flat, dim=1, dtype=torch.promote_types(x.dtype, torch.float32))
    return lengths.clamp(min=1e-12).view(-1, *[1] * (x.dim() - 1))


def _gradient(loss_fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        loss = loss_fn(x.clone())  # a leaf would refuse to be changed in place, which the loss may do to its input
    gradient = torch.autograd.grad(loss, x, allow_unused=True)[0] if loss.requires_grad else None
    if gradient is None:
        raise ValueError(
            "the loss does not depend on the attacked input: `input_key` names an entry that is not used, or the input"
            " is detached on its way to the loss"
        )
    return gradient


def pgd(
    loss_fn: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    eps: float,
    step_size: float | None = None,
    steps: int = 7,
    norm: Norm = "linf",
    random_start: bool = True,
    clip: tuple[float, float] | None = (0.0, 1.0),
    generator: torch.Generator | None = None,
) -> Tensor:
    """:class:`PGD` as a function: the adversarial input for ``x``.

    Example:
        >>> x = torch.tensor([[0.2, 0.9]])
        >>> pgd(lambda x: (x * torch.tensor([1.0, -1.0])).sum(), x, eps=0.1, random_start=False)
        tensor([[0.3000, 0.8000]])
    """
    return PGD(eps, step_size, steps, norm, random_start, clip)(loss_fn, x, generator)
