from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fulgurite.plugins.federated import PGD
from fulgurite.plugins.metrics import RobustAccuracy
from tests.suites.processes import in_processes

EPS = 0.1


def linear_data(size: int = 64, dim: int = 5) -> tuple[nn.Linear, Tensor, Tensor, Tensor]:
    """A linear model of two classes, inputs, targets, and by how much each is classified rightly."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(dim, 2).double()
    with torch.no_grad():
        model.weight.copy_(torch.randn(2, dim, generator=generator))
        model.bias.zero_()
    x = torch.randn(size, dim, generator=generator, dtype=torch.float64)
    target = torch.randint(2, (size,), generator=generator)
    logits = model(x).detach()
    margins = logits.gather(1, target[:, None]) - logits.gather(1, 1 - target[:, None])
    return model, x, target, margins.squeeze(1)


def attack(**options: Any) -> PGD:
    return PGD(**{"eps": EPS, "steps": 1, "step_size": EPS, "random_start": False, "clip": None} | options)


def test_equals_the_margin_of_a_linear_model() -> None:
    """An attack moves the margin by ``eps |w_1 - w_0|_1`` and no further: that many stay right."""
    model, x, target, margins = linear_data()
    reach = EPS * (model.weight[1] - model.weight[0]).abs().sum()
    expected = (margins > reach).double().mean()
    clean = (margins > 0).double().mean()
    assert 0 < expected < clean
    metric = RobustAccuracy(attack())
    for rows in torch.arange(len(x)).split([10, 1, 53]):
        metric.update(model, x[rows], target[rows])
    assert metric.compute() == pytest.approx(expected.item())
    metric = RobustAccuracy(attack(eps=0.0))
    metric.update(model, x, target)
    assert metric.compute() == pytest.approx(clean.item())


@pytest.mark.parametrize(
    "mode", [nullcontext, torch.no_grad, torch.inference_mode], ids=["grad", "no_grad", "inference"]
)
def test_works_in_every_mode_of_autograd(mode: Any) -> None:
    """Inference tensors as inputs, targets and states included; the model's own buffers are those of training."""
    model, x, target, _ = linear_data()
    norm = nn.BatchNorm1d(5).double().eval()
    with mode():
        metric = RobustAccuracy(attack())
        metric.update(lambda x: model(norm(x)), x * 1, target * 1)
        metric.update(lambda x: model(norm(x)), x * 1, target * 1)
        value = metric.compute()
        metric.reset()
    metric.update(lambda x: model(norm(x)), x, target)
    assert metric.compute() == value
    assert all(parameter.grad is None for parameter in model.parameters())


def test_two_evaluations_start_alike_and_leave_the_global_generator_alone() -> None:
    starts: list[list[Tensor]] = []
    before = torch.get_rng_state()
    metric = RobustAccuracy(attack(random_start=True))
    for _ in range(2):
        seen: list[Tensor] = []

        def logits(x: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(x.detach().clone())
            return torch.stack([x.sum(1), -x.sum(1)], 1)

        for _ in range(2):
            metric.update(logits, torch.zeros(4, 3), torch.zeros(4, dtype=torch.long))
        metric.compute()
        metric.reset()
        starts.append(seen[::2])  # each update asks for the start, then for the end
    assert torch.equal(torch.get_rng_state(), before)
    for one, two in zip(*starts, strict=True):
        assert torch.equal(one, two)
    assert not torch.equal(starts[0][0], starts[0][1])
    assert starts[0][0].abs().max() > 0


def test_logits_of_pixels() -> None:
    x, target = torch.rand(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.long)
    metric = RobustAccuracy(PGD(eps=0.01))
    metric.update(lambda x: x, x, target)
    expected = (x.argmax(1) == 0).float().mean()
    assert metric.compute() <= expected
    assert metric.total == 32


@pytest.mark.parametrize("shape", [(4,), (4, 1)], ids=str)
def test_refuses_a_single_logit(shape: tuple[int, ...]) -> None:
    metric = RobustAccuracy(PGD())
    with pytest.raises(ValueError, match=r"`logits_fn` must return \(N, C, ...\) with a logit a class"):
        metric.update(lambda x: x.reshape(shape), torch.rand(4, 1), torch.zeros(4, dtype=torch.long))


def test_small_gradients_in_half_precision_still_attack() -> None:
    """Of a sample that is right by 16 logits the loss has the gradient 1e-7 / 8, which is zero in float16."""
    x = torch.zeros(8, 1, dtype=torch.float16)
    metric = RobustAccuracy(PGD(eps=10.0, steps=1, step_size=10.0, random_start=False, clip=None))
    metric.update(lambda x: torch.cat([x + 16, -x], 1), x, torch.zeros(8, dtype=torch.long))
    assert metric.compute() == 0


def of_rank(rank: int, world_size: int) -> Tensor:
    model, x, target, _ = linear_data()
    metric = RobustAccuracy(attack())
    for rows in torch.arange(len(x)).split(8)[rank::world_size]:
        metric.update(model, x[rows], target[rows])
    return metric.compute()


def test_two_processes_count_as_one() -> None:
    one = of_rank(0, 1)
    assert in_processes(2, of_rank, 2) == [one, one]
