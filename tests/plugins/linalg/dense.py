"""Losses with known curvature: of a small network, by functional transforms in double precision, and of a quadratic."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev
from torch.nn.functional import cross_entropy

Loss = Callable[[Tensor, Tensor], Tensor]

CLASSES = 3
D = torch.tensor([6.0, 3.0, 2.0, 0.5, 0.02, -0.01, -1.0], dtype=torch.float64)
SCALARS_OF_D = {  # of the quadratic with these curvatures, by as many Lanczos steps from two probes, `near_zero` 0.004
    "lambda_max": 6.0,
    "lambda_min": -1.0,
    "trace": float(D.sum()),
    "trace_stderr": 0.0,
    "frobenius": float(D.norm()),
    "negative_mass": 1.01 / float(D.abs().sum()),
    "near_zero_fraction": 2 / 7,
    "bulk_median": 1.0,
    "outliers": 4.0,
    "outlier_gap": 25.0,
    "gradient_overlap": 1.0,
    "n_products": 14.0,
}


def network(seed: int = 0, hidden: int = 6) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, hidden), nn.Tanh(), nn.Linear(hidden, CLASSES)).double()


def batch(loss: Loss = cross_entropy, n: int = 10, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, dtype=torch.float64, generator=generator)
    labels = torch.randint(CLASSES, (n,), generator=generator)
    return x, labels if loss is cross_entropy else torch.randn(n, CLASSES, dtype=torch.float64, generator=generator)


def penalty(params: list[Tensor]) -> Tensor:
    """Not quadratic, so that its Hessian depends on the weights."""
    return sum((param.square().sum() ** 2 for param in params), torch.zeros((), dtype=torch.float64))


class SquaredOnce(torch.autograd.Function):
    """Has no second derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grad


class Dense:
    """Loss, gradient, Hessian and Gauss-Newton matrix as functions of all weights in one vector."""

    def __init__(self, module: nn.Module, x: Tensor, y: Tensor, loss: Loss = cross_entropy, decay: float = 0.0) -> None:
        self.module, self.x, self.y, self.compare, self.decay = module, x, y, loss, decay
        self.theta = nn.utils.parameters_to_vector(module.parameters()).detach()

    def weights(self, theta: Tensor) -> dict[str, Tensor]:
        named = dict(self.module.named_parameters())
        pieces = theta.split([param.numel() for param in named.values()])
        return {name: piece.view_as(param) for (name, param), piece in zip(named.items(), pieces, strict=True)}

    def output(self, theta: Tensor) -> Tensor:
        return functional_call(self.module, self.weights(theta), (self.x,))

    def past(self, theta: Tensor) -> Tensor:
        return self.decay * penalty(list(self.weights(theta).values()))

    def loss(self, theta: Tensor) -> Tensor:
        return self.compare(self.output(theta), self.y) + self.past(theta)

    def gradient(self) -> Tensor:
        return jacrev(self.loss)(self.theta)

    def hessian(self) -> Tensor:
        return hessian(self.loss)(self.theta)

    def jacobian(self) -> Tensor:
        """(N, C, P)."""
        return jacrev(self.output)(self.theta)

    def ggn(self) -> Tensor:
        z = self.output(self.theta)
        inner = hessian(lambda out: self.compare(out, self.y))(z).reshape(z.numel(), z.numel())
        jacobian = self.jacobian().flatten(0, 1)
        return jacobian.T @ inner @ jacobian + hessian(self.past)(self.theta)

    def empirical_fisher(self) -> Tensor:
        """From the gradients of one sample's loss after the other's."""
        rows = [
            jacrev(Dense(self.module, self.x[i : i + 1], self.y[i : i + 1], self.compare).loss)(self.theta)
            for i in range(len(self.x))
        ]
        gradients = torch.stack(rows)
        return gradients.T @ gradients / len(rows) + hessian(self.past)(self.theta)
