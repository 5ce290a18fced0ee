"""A training step by torchdeq and by Fulgurite, in turn; runs where torchdeq is installed.

Arguments: a file for the result and the number of repetitions.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from _equilibrium import FREE_STEPS, NETWORKS, NUDGED_STEPS, STEP_SIZE, batch, network, times, training_step
from torch import Tensor, nn
from torchdeq import get_deq


class Deq(nn.Module):
    """The same field under torchdeq's implicit differentiation."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.layer = network(name, "ep")
        self.deq = get_deq(
            ift=True,
            f_solver="simple_fixed_point_iter",
            b_solver="fixed_point_iter",  # its backward pass does not run with the simple one
            f_max_iter=FREE_STEPS,
            b_max_iter=NUDGED_STEPS,
            b_tol=0,
        )

    def forward(self, x: Tensor) -> Tensor:
        field, phi = self.layer.field.at(x), self.layer.activation
        # The damped step is part of the function: at the fixed point it is the same as without.
        states, _ = self.deq(lambda u: torch.lerp(u, field(phi(u)), STEP_SIZE), x.new_zeros(len(x), self.layer.field.n))
        return phi(states[-1])[:, self.layer.readout]


def relative_difference(one: nn.Module, two: nn.Module) -> float:
    """Of the gradients, which would be equal after many steps."""
    first, second = (torch.cat([param.grad.flatten() for param in module.parameters()]) for module in (one, two))
    return ((first - second).norm() / second.norm()).item()


def main(file: str, repetitions: str) -> None:
    torch.set_num_threads(1)
    found = {}
    for name in NETWORKS:
        x, theirs = batch(name), Deq(name)
        ours = {gradient: network(name, gradient) for gradient in ("ep", "adjoint")}
        contenders = {key: training_step(layer, x) for key, layer in (ours | {"torchdeq": theirs}).items()}
        found[name] = {"times": times(contenders, int(repetitions))}
        found[name]["difference_to_adjoint"] = relative_difference(theirs.layer, ours["adjoint"])
    Path(file).write_text(json.dumps(found | {"versions": {"torchdeq": version("torchdeq")}}))


if __name__ == "__main__":
    main(*sys.argv[1:])
