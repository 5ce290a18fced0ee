"""Squared norms of per-example gradients, by Fulgurite, by Opacus and by vmap, in turn; runs where Opacus is installed.

Arguments: a file for the result, and repetitions.
"""

import json
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from time import process_time

import torch
import torch.nn.functional as F
from opacus import GradSampleModule
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from fulgurite.plugins.linalg import per_example_sq_norms

Step = Callable[[], Tensor | None]  # norms (B,), or None where none are asked for


class Block(nn.Module):
    """A transformer block over 1000 tokens."""

    def __init__(self, vocabulary: int = 1000, width: int = 64) -> None:
        super().__init__()
        self.embed, self.first, self.second = nn.Embedding(vocabulary, width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        q, k, v = (part[:, None] for part in self.qkv(self.first(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v)[:, 0])
        return self.head(x + self.mlp(self.second(x)))


def conv() -> nn.Module:
    layers = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()]
    layers += [nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 64, 64), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(64, 10))


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))


def cases() -> dict[str, tuple[Callable[[], nn.Module], Tensor, Tensor]]:
    torch.manual_seed(0)
    return {
        "conv": (conv, torch.randn(256, 1, 8, 8), torch.randint(10, (256,))),
        "mlp": (perceptron, torch.randn(256, 64), torch.randint(10, (256,))),
        "transformer": (Block, torch.randint(1000, (64, 64)), torch.randint(1000, (64, 64))),
    }


def loss_of(output: Tensor, target: Tensor) -> Tensor:
    """The mean over examples; of a sequence, the mean over its tokens."""
    return F.cross_entropy(output.transpose(1, 2) if output.dim() == 3 else output, target)


def methods(make: Callable[[], nn.Module], x: Tensor, target: Tensor) -> dict[str, Step]:
    def fresh() -> nn.Module:
        torch.manual_seed(1)
        return make()

    bare, ours, alone = fresh(), fresh(), fresh()
    ghost = GradSampleModuleFastGradientClipping(fresh(), max_grad_norm=1.0, use_ghost_clipping=True)
    samples = GradSampleModule(fresh(), loss_reduction="mean")
    params = {name: param.detach() for name, param in alone.named_parameters()}

    def plain() -> None:
        bare.zero_grad()
        loss_of(bare(x), target).backward()

    def fulgurite() -> Tensor:
        ours.zero_grad()
        with per_example_sq_norms(ours) as norms:
            loss_of(ours(x), target).backward()
        return torch.stack(list(norms.values())).sum(0) * len(x) ** 2

    def opacus_ghost() -> Tensor:
        # Up to the norms, after its first backward: its clipping makes another one.
        ghost.zero_grad()
        output = ghost(x)
        flat, labels = (output.flatten(0, 1), target.flatten()) if output.dim() == 3 else (output, target)
        losses = F.cross_entropy(flat, labels, reduction="none").view(len(x), -1).mean(1)
        losses.mean().backward()
        return torch.stack([param._norm_sample for param in ghost.parameters()]).square().sum(0)

    def opacus_samples() -> Tensor:
        samples.zero_grad()
        loss_of(samples(x), target).backward()
        return torch.stack([p.grad_sample.flatten(1).square().sum(1) for p in samples.parameters()]).sum(0)

    def one(params: dict[str, Tensor], row: Tensor, label: Tensor) -> Tensor:
        return loss_of(functional_call(alone, params, (row[None],)), label[None])

    def functorch() -> Tensor:
        gradients = vmap(grad(one), in_dims=(None, 0, 0))(params, x, target)
        return torch.stack([rows.flatten(1).square().sum(1) for rows in gradients.values()]).sum(0)

    return {
        "plain": plain,
        "fulgurite": fulgurite,
        "opacus_ghost": opacus_ghost,
        "opacus_samples": opacus_samples,
        "vmap": functorch,
    }


def main() -> None:
    file, repetitions = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    found, errors = {}, {}
    for case, (make, x, target) in cases().items():
        steps = methods(make, x, target)
        exact = steps["vmap"]()
        errors[case] = {
            name: float(((norms - exact).abs() / exact).max())
            for name, step in steps.items()
            if (norms := step()) is not None
        }
        rows: dict[str, list[dict[str, float]]] = {name: [] for name in steps}
        for _ in range(repetitions):
            for name, step in steps.items():
                start = process_time()
                step()
                rows[name].append({"seconds": process_time() - start})
        found[case] = rows
    versions = {name: version(name) for name in ("torch", "opacus")}
    Path(file).write_text(json.dumps({"rows": found, "largest_relative_error": errors, "versions": versions}))


if __name__ == "__main__":
    main()
