"""All gradients of a module, with the loss that they belong to, as one vector to send."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class GradientVector:
    """Where each parameter's gradient lies in a vector.

    After the gradients come the loss, and for each parameter the part of the batch whose loss reached it: what nothing
    reached has no gradient, as in an ordinary step, and an optimizer leaves it alone.

    Args:
        parameters: those to train.

    Raises:
        ValueError: one is complex.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        for parameter in self.parameters:
            if parameter.is_complex():
                raise ValueError(
                    f"`parameters` must be real, got one of {parameter.dtype}: hold it as `torch.view_as_real` of it"
                )
        self._numels = [parameter.numel() for parameter in self.parameters]
        self._at_loss = sum(self._numels)
        self.size = self._at_loss + 1 + len(self.parameters)

    @property
    def dtype(self) -> torch.dtype:
        """float64 if a parameter is; else float32, in which sums are exact enough also for 16-bit parameters."""
        is_double = any(parameter.dtype == torch.float64 for parameter in self.parameters)
        return torch.float64 if is_double else torch.float32

    def clear(self) -> None:
        """Takes all gradients away."""
        for parameter in self.parameters:
            parameter.grad = None

    def write(self, vector: Tensor, loss: float, weight: float, unscale: float = 1.0) -> None:
        """Puts the gradients that the parameters have into a vector.

        Args:
            vector: ``(at least size,)``; what is left of it becomes 0.
            loss: that they belong to, times its weight.
            weight: part of the batch that it is the mean of.
            unscale: factor for the gradients.
        """
        for parameter, part in zip(self.parameters, self._split(vector), strict=True):
            if parameter.grad is None:
                part.zero_()
            else:
                grad = parameter.grad
                part.view(parameter.shape).copy_(grad.to_dense() if grad.is_sparse else grad)
        if unscale != 1:
            vector[: self._at_loss].mul_(unscale)
        vector[self._at_loss] = loss
        reached = [0.0 if parameter.grad is None else weight for parameter in self.parameters]
        vector[self._at_loss + 1 : self.size] = torch.tensor(reached, dtype=vector.dtype)
        vector[self.size :].zero_()

    def read(self, vector: Tensor, scale: float = 1.0) -> None:
        """Gives the parameters their gradients from a vector, which they keep, times ``scale``."""
        if scale != 1:
            vector[: self._at_loss].mul_(scale)
        reached = (vector[self._at_loss + 1 : self.size].abs() > 1e-6).tolist()
        for parameter, part, has_grad in zip(self.parameters, self._split(vector), reached, strict=True):
            grad = part.view(parameter.shape).to(parameter.device, parameter.dtype)
            parameter.grad = grad if has_grad and parameter.requires_grad else None

    def loss(self, vector: Tensor) -> Tensor:
        """The loss in a vector."""
        return vector[self._at_loss].clone()

    def _split(self, vector: Tensor) -> tuple[Tensor, ...]:
        return torch.split(vector[: self._at_loss], self._numels)
