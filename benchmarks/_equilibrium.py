"""What the benchmark of equilibrium propagation and the script of its peer share: networks, and steps timed in turn."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fulgurite.plugins.equilibrium import DenseField, EquilibriumLayer, adjoint_response

FREE_STEPS, NUDGED_STEPS, STEP_SIZE = 150, 20, 0.6
BATCH_SIZE = 50
NETWORKS: dict[str, tuple[int, dict[str, int]]] = {
    "digits": (64, {"l1": 64, "l2": 32, "out": 16}),
    "fashion": (784, {"l1": 256, "l2": 256, "out": 10}),  # the paper's
}


class EqualSteps(EquilibriumLayer):
    """The adjoint takes as many steps as the nudged phase, and neither stops early."""

    def exact_response(self, u: Tensor, x: Tensor, g: Tensor) -> Tensor:
        steps = self.nudged_steps
        return adjoint_response(self.field, self.activation, u, x, g, steps=steps, tol=0.0, step_size=self.step_size)


def network(name: str, gradient: Any, **options: Any) -> EquilibriumLayer:
    """The same weights each time."""
    torch.manual_seed(0)
    inputs, sizes = NETWORKS[name]
    settings = {"free_steps": FREE_STEPS, "nudged_steps": NUDGED_STEPS, "step_size": STEP_SIZE, "tol": 0.0}
    return EqualSteps(DenseField(inputs, sizes), gradient=gradient, **settings | options)


def batch(name: str) -> Tensor:
    return torch.rand(BATCH_SIZE, NETWORKS[name][0], generator=torch.Generator().manual_seed(1))


def training_step(layer: torch.nn.Module, x: Tensor) -> Callable[[], Any]:
    """Forward and backward, without an optimizer."""

    def take() -> None:
        layer.zero_grad()
        layer(x).square().sum().backward()

    return take


def times(contenders: dict[str, Callable[[], Any]], repetitions: int) -> dict[str, list[float]]:
    """Seconds of each repetition; who comes first changes from one to the next."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for repetition in range(-2, repetitions):
        for name in names[repetition % len(names) :] + names[: repetition % len(names)]:
            started = time.perf_counter()
            contenders[name]()
            if repetition >= 0:  # before that, memory is still being mapped
                found[name].append(time.perf_counter() - started)
    return found
