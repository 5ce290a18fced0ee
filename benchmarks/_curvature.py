"""Curvature by ours and by the peers in turn, in an environment that has them all: ``python _curvature.py FILE QUICK``.

Times are CPU seconds. What all of them compute is compared first.
"""

import json
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from curvlinops import GGNLinearOperator, HessianLinearOperator
from curvlinops.papyan2020traces.spectrum import fast_lanczos
from hessian_eigenthings import HessianOperator as EigenthingsHessian
from hessian_eigenthings import spectral_density, supervised_loss
from pyhessian import hessian as pyhessian
from sklearn.datasets import load_digits
from torch import Tensor, nn

from fulgurite.plugins.linalg import GGNOperator, HessianOperator, ModuleLoss, spectrum

PEERS = ("curvlinops-for-pytorch", "hessian-eigenthings", "PyHessian")
GHOST = 1e-3  # Ritz values this close to the largest, relative to it, are copies of it
Batch = tuple[Tensor, Tensor]


class Step(nn.Module):
    """A network with a training step."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])


def eig(matrix: Tensor, eigenvectors: bool = True) -> tuple[Tensor, Tensor]:
    """What ``torch.eig``, gone since torch 1.13, gave for a symmetric matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return torch.stack([values, torch.zeros_like(values)], 1), vectors


def mlp() -> tuple[Step, Batch]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 10))
    return Step(net), (torch.randn(512, 64), torch.randint(10, (512,)))


def convolutions() -> tuple[Step, Batch]:
    """5050 parameters, trained for a while on digits, so that eigenvalues stand out."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 16, 3, padding=1), nn.Tanh(), nn.Conv2d(16, 16, 3, padding=1), nn.Tanh()]
    step = Step(nn.Sequential(*layers, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(256, 10)))
    digits = load_digits()
    x = torch.tensor(digits.images[:128, None] / 16, dtype=torch.float32)
    batch = x, torch.tensor(digits.target[:128])
    optimizer = torch.optim.SGD(step.parameters(), lr=0.1, momentum=0.9)
    for _ in range(100):
        optimizer.zero_grad()
        step.training_step(batch, 0).backward()
        optimizer.step()
    return step, batch


def in_turn(contenders: dict[str, Callable[[], Any]], repetitions: int, calls: int) -> dict[str, list[float]]:
    """CPU seconds a call, of each in each repetition."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for function in contenders.values():
        function()
    for _ in range(repetitions):
        for name, function in contenders.items():
            start = time.process_time()
            for _ in range(calls):
                function()
            times[name].append((time.process_time() - start) / calls)
    return times


def products(quick: bool) -> dict[str, Any]:
    """One product with the Hessian and with the Gauss-Newton matrix of a perceptron."""
    step, batch = mlp()
    params = list(step.parameters())
    loss = ModuleLoss(step, [(batch, 0)])
    peer: dict[str, Any] = {"check_deterministic": False}
    compare = nn.CrossEntropyLoss()
    operators = {
        "hessian": HessianOperator(loss, params),
        "hessian curvlinops": HessianLinearOperator(step.net, compare, params, [batch], **peer),
        "hessian eigenthings": EigenthingsHessian(step.net, [batch], supervised_loss(compare)),
        "ggn": GGNOperator(loss, params),
        "ggn curvlinops": GGNLinearOperator(step.net, compare, params, [batch], **peer),
    }
    vector = torch.randn(operators["hessian"].shape[0])
    found = {name: product(op, vector) for name, op in operators.items()}
    apart = max(
        float((value - found[name.split()[0]]).norm() / value.norm()) for name, value in found.items() if " " in name
    )
    assert apart < 1e-5, apart
    contenders: dict[str, Callable[[], Any]] = {
        name: lambda op=op: product(op, vector) for name, op in operators.items()
    }
    contenders["gradient"] = lambda: torch.autograd.grad(step.training_step(batch, 0), params)
    times = in_turn(contenders, 5 if quick else 31, 3 if quick else 10)
    return {"times": times, "largest_difference": apart, "parameters": len(vector)}


def product(op: Any, vector: Tensor) -> Tensor:
    result: Tensor = op.matvec(vector) if hasattr(op, "matvec") else op @ vector
    return result.detach()


def event(quick: bool) -> dict[str, Any]:
    """A spectrum of 60 products with one random vector, and its extremes."""
    step, batch = convolutions()
    params, steps = list(step.parameters()), 60

    def ours() -> Tensor:
        loss = ModuleLoss(step, [(batch, 0)])
        options: dict[str, Any] = {"lanczos_steps": steps, "n_probes": 1, "ggn": False, "gradient_overlap": False}
        try:
            return spectrum(loss, k=1, params=params, **options).measure.nodes[0]
        finally:
            loss.release()

    def eigenthings() -> Tensor:
        op = EigenthingsHessian(step.net, [batch], supervised_loss(nn.CrossEntropyLoss()))
        return spectral_density(op, num_runs=1, lanczos_steps=steps, seed=0).raw_eigenvalues[0]

    def pyhessian_density() -> Tensor:
        step.zero_grad(set_to_none=True)
        values, _ = pyhessian(step.net, nn.CrossEntropyLoss(), data=batch, cuda=False).density(iter=steps, n_v=1)
        step.zero_grad(set_to_none=True)
        return torch.tensor([float(value) for value in values[0]])

    def curvlinops() -> Tensor:
        op = HessianLinearOperator(step.net, nn.CrossEntropyLoss(), params, [batch], check_deterministic=False)
        return fast_lanczos(op, steps)[0]

    contenders: dict[str, Callable[[], Any]] = {
        "ours": ours,
        "eigenthings": eigenthings,
        "PyHessian": pyhessian_density,
        "curvlinops": curvlinops,
    }
    found = {}
    for name, function in contenders.items():
        torch.manual_seed(1)
        values = function().double()
        top = float(values.max())
        copies = int((values > top * (1 - GHOST)).sum())
        found[name] = {"lambda_max": top, "lambda_min": float(values.min()), "copies_of_lambda_max": copies}
    apart = max(abs(each["lambda_max"] / found["ours"]["lambda_max"] - 1) for each in found.values())
    assert apart < 1e-3, found
    times = in_turn(contenders, 5 if quick else 21, 1 if quick else 2)
    return {"times": times, "found": found, "products": steps, "parameters": sum(p.numel() for p in params)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.eig = eig  # for PyHessian
    quick = bool(int(sys.argv[2]))
    results = {"products": products(quick), "event": event(quick), "versions": {peer: version(peer) for peer in PEERS}}
    Path(sys.argv[1]).write_text(json.dumps(results))
