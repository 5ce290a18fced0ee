"""Gradients that cannot be differentiated again, and say so."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class _Refuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, message: str, grad: Tensor, *sources: Tensor) -> Tensor:
        ctx.message = message
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(ctx.message)


def without_second_derivative(grads: Sequence[Tensor], sources: Sequence[Tensor], message: str) -> list[Tensor]:
    """What a ``backward`` returns; under ``create_graph``, a backward pass from it to the sources raises the message.

    torch's ``once_differentiable`` is silent where the incoming gradient is a constant, as that of a sum is, and where
    the second derivative is asked for by ``autograd.grad``, whose inputs its error does not lead to.
    """
    if not torch.is_grad_enabled():
        return list(grads)
    return [_Refuse.apply(message, grad.detach(), *sources) for grad in grads]  # type: ignore[no-untyped-call]
