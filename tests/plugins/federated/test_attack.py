import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import CLI
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, softplus

from fulgurite.plugins.federated import PGD, pgd

EPS = 0.1
both_norms = pytest.mark.parametrize("norm", ["linf", "l2"])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def lengths(delta: Tensor, norm: str) -> Tensor:
    return torch.linalg.vector_norm(delta.flatten(1), ord=torch.inf if norm == "linf" else 2, dim=1)


class Logistic:
    """A linear model with logistic loss, whose worst input is known."""

    def __init__(self) -> None:
        self.w = torch.randn(5, generator=generator(1), dtype=torch.float64)
        self.x = torch.randn(8, 5, generator=generator(2), dtype=torch.float64)
        self.y = torch.tensor([1.0, -1.0] * 4, dtype=torch.float64)

    def losses(self, x: Tensor) -> Tensor:
        return softplus(-self.y * (x @ self.w))

    def loss(self, x: Tensor) -> Tensor:
        return self.losses(x).mean()


def test_one_linf_step_is_the_worst_input_of_a_linear_model() -> None:
    model = Logistic()
    found = pgd(model.loss, model.x, eps=EPS, step_size=EPS, steps=1, random_start=False, clip=None)
    torch.testing.assert_close(found, model.x - EPS * model.y[:, None] * model.w.sign(), rtol=0, atol=1e-15)
    worst = torch.log1p(torch.exp(-(model.y * (model.x @ model.w) - EPS * model.w.abs().sum())))
    torch.testing.assert_close(model.losses(found), worst)


def test_one_l2_step_is_the_worst_input_of_a_linear_model() -> None:
    model = Logistic()
    found = pgd(model.loss, model.x, eps=EPS, step_size=EPS, steps=1, norm="l2", random_start=False, clip=None)
    torch.testing.assert_close(found, model.x - EPS * model.y[:, None] * model.w / model.w.norm(), rtol=0, atol=1e-15)


@both_norms
def test_many_steps_from_anywhere_find_it_too(norm: Any) -> None:
    """With a constant direction, steps of 2.5 eps in all reach the border from anywhere in the ball."""
    model = Logistic()
    direction = model.w.sign() if norm == "linf" else model.w / model.w.norm()
    found = pgd(model.loss, model.x, eps=EPS, steps=200, step_size=EPS, norm=norm, clip=None, generator=generator())
    torch.testing.assert_close(found, model.x - EPS * model.y[:, None] * direction, rtol=0, atol=1e-10)


# With l2 and bounds the toolbox clips before it projects, which is another iterate.
@pytest.mark.parametrize(("norm", "clip"), [("linf", None), ("linf", (0.0, 1.0)), ("l2", None)], ids=str)
def test_equals_the_adversarial_robustness_toolbox(norm: Any, clip: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from art.attacks.evasion import ProjectedGradientDescentPyTorch
        from art.estimators.classification import PyTorchClassifier
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 3))
    x, y = torch.rand(10, 3, 2, 2, generator=generator(3)), torch.randint(3, (10,), generator=generator(4))
    classifier = PyTorchClassifier(
        model, nn.CrossEntropyLoss(), input_shape=(3, 2, 2), nb_classes=3, clip_values=clip, device_type="cpu"
    )
    order = np.inf if norm == "linf" else 2
    options = {"eps": 0.3, "eps_step": 0.07, "max_iter": 12, "num_random_init": 0, "verbose": False}
    theirs = ProjectedGradientDescentPyTorch(classifier, norm=order, **options).generate(x.numpy(), y.numpy())
    ours = pgd(
        lambda x: cross_entropy(model(x), y),
        x,
        eps=0.3,
        step_size=0.07,
        steps=12,
        norm=norm,
        random_start=False,
        clip=clip,
    )
    assert lengths(ours - x, norm).max() > 0.2
    # float32: 12 steps, each rounded in the input (6e-8) and, relatively, in the gradient.
    torch.testing.assert_close(ours, torch.from_numpy(theirs), rtol=0, atol=5e-6)


@both_norms
@pytest.mark.parametrize("seed", range(3))
def test_stays_in_the_ball_and_in_the_box(norm: Any, seed: int) -> None:
    x = torch.rand(20, 3, 4, generator=generator(seed), dtype=torch.float64)
    weights = torch.randn(3, 4, generator=generator(seed + 9), dtype=torch.float64)
    found = pgd(lambda x: (x * weights).sin().sum(), x, eps=0.4, norm=norm, generator=generator(seed))
    assert lengths(found - x, norm).max() <= 0.4 + 1e-12
    assert found.min() >= 0
    assert found.max() <= 1
    assert found.shape == x.shape
    assert not found.requires_grad


@both_norms
def test_eps_zero_returns_the_input(norm: Any) -> None:
    x = torch.rand(6, 5, generator=generator())
    for random_start in (False, True):
        found = pgd(lambda x: x.square().sum(), x, eps=0.0, norm=norm, random_start=random_start)
        torch.testing.assert_close(found, x, rtol=0, atol=0)


def test_random_start_is_uniform_in_the_cube() -> None:
    """With a step of next to nothing the start is returned: 40000 draws, so a mean is known to 0.58 eps / 200."""
    start = pgd(
        lambda x: x.sum(), torch.zeros(8000, 5), eps=2.0, step_size=1e-9, steps=1, clip=None, generator=generator()
    )
    unit = start.flatten().double() / 2
    assert unit.abs().max() <= 1
    assert unit.mean().abs() < 5 * (1 / 3) ** 0.5 / 200
    assert (unit.square().mean() - 1 / 3).abs() < 5 * (4 / 45) ** 0.5 / 200


def test_random_start_is_uniform_in_the_ball() -> None:
    start = pgd(
        lambda x: x.sum(),
        torch.zeros(8000, 1, 3),
        eps=2.0,
        step_size=1e-9,
        steps=1,
        norm="l2",
        clip=None,
        generator=generator(),
    ).double()
    volume = (lengths(start, "l2") / 2) ** 3  # uniform in [0, 1] if the ball is filled evenly
    assert volume.max() <= 1 + 1e-6
    assert (volume.mean() - 1 / 2).abs() < 5 * (1 / 12) ** 0.5 / 8000**0.5
    assert (volume.square().mean() - 1 / 3).abs() < 5 * (4 / 45) ** 0.5 / 8000**0.5
    # A coordinate of a uniform point has variance r^2 / 5 in three dimensions.
    assert start.mean(0).abs().max() < 5 * 2 * (1 / 5) ** 0.5 / 8000**0.5


def test_the_generator_alone_decides_the_start() -> None:
    x = torch.rand(4, 3, generator=generator())
    before = torch.get_rng_state()
    one, two, other = (pgd(lambda x: x.sum(), x, eps=0.1, generator=generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    first = pgd(lambda x: x.sum(), x, eps=0.1, step_size=1e-9, generator=generator(1))
    second = pgd(lambda x: x.sum(), x, eps=0.1, step_size=1e-9, generator=generator(2))
    assert torch.equal(one, two)
    assert not torch.equal(first, second)
    assert other.shape == x.shape
    pgd(lambda x: x.sum(), x, eps=0.1)
    assert not torch.equal(torch.get_rng_state(), before)


def test_the_last_iterate_is_returned_and_the_default_step_is_stated() -> None:
    """On |x| from 0.01 a step of 2.5 * 0.4 / 2 = 0.5 is cut to 0.4; the loss -|x| falls back and forth over 0."""
    seen: list[float] = []

    def loss(x: Tensor) -> Tensor:
        seen.append(x.item())
        return -x.abs().sum()

    found = pgd(loss, torch.tensor([[0.01]], dtype=torch.float64), eps=0.4, steps=2, random_start=False, clip=None)
    assert seen == pytest.approx([0.01, -0.39])  # a gradient a step, and none at the end
    assert found.item() == pytest.approx(0.11)


def test_only_gradients_of_the_input_are_computed() -> None:
    model = nn.Linear(3, 1)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    x = torch.rand(2, 3, generator=generator())
    given = x.clone()
    with torch.no_grad():  # gradients are taken wherever it is called
        pgd(lambda x: model(x).sum(), x, eps=0.1)
    assert all((parameter.grad == 7).all() for parameter in model.parameters())
    assert torch.equal(x, given)
    assert x.grad is None


def test_the_loss_may_change_its_input_in_place() -> None:
    x = torch.rand(4, 3, generator=generator())
    found = pgd(lambda x: x.sub_(0.5).mul(2).sum(), x, eps=0.1, random_start=False)
    torch.testing.assert_close(found, pgd(lambda x: ((x - 0.5) * 2).sum(), x, eps=0.1, random_start=False))


@both_norms
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_keeps_the_type_and_stands_still_without_a_gradient(norm: Any, dtype: torch.dtype) -> None:
    x = torch.rand(4, 3, generator=generator()).to(dtype)
    found = pgd(lambda x: (x * 0).sum(), x, eps=0.1, norm=norm, random_start=False)
    assert found.dtype == dtype
    assert torch.equal(found, x)


@both_norms
@pytest.mark.parametrize("shape", [(4,), (0, 3)], ids=str)
def test_any_shape_with_a_first_dimension(norm: Any, shape: tuple[int, ...]) -> None:
    found = pgd(lambda x: x.sum(), torch.full(shape, 0.5), eps=0.1, norm=norm)
    assert found.shape == shape
    torch.testing.assert_close(found, torch.full(shape, 0.6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": -0.1}, "`eps` is a radius .* at least 0, got -0.1"),
        ({"eps": float("nan")}, "`eps` .* got nan"),
        ({"steps": 0}, "`steps` counts gradients .* got 0"),
        ({"step_size": 0.0}, "`step_size` must be None or positive, got 0.0"),
        ({"norm": "l1"}, r"`norm` must be one of \('linf', 'l2'\), got 'l1'"),
        ({"mode": "test"}, r"`mode` must be one of \('eval', 'train'\), got 'test'"),
        ({"clip": (1.0, 1.0)}, r"`clip` must be None or \(lowest, highest\), ascending, got \(1.0, 1.0\)"),
    ],
    ids=str,
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PGD(**options)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.tensor([[0.5, 1.1]]), r"`clip` is \(0.0, 1.0\) and the input reaches from 0.5 to 1.1: .* `clip=None`"),
        (torch.tensor([[-0.1]]), "the attack works in the units of the batch"),
        (
            torch.tensor([[3]]),
            "must be a floating tensor, got torch.int64: indices cannot be perturbed; let `input_key`",
        ),
        ([[0.5]], "must be a floating tensor, got list"),
    ],
    ids=str,
)
def test_bad_inputs(x: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PGD()(lambda x: x.sum(), x)


def test_rounding_beyond_the_bounds_is_no_error() -> None:
    x = torch.tensor([[1.0 + 5e-7, -5e-7]])
    torch.testing.assert_close(PGD(eps=0.1)(lambda x: x.sum(), x), torch.tensor([[1.0, 0.1]]))


@pytest.mark.parametrize(
    "loss",
    [
        lambda x: torch.tensor(1.0),
        lambda x: x.detach().sum(),
        lambda x: torch.ones(2, requires_grad=True).sum(),
    ],
    ids=["constant", "detached", "of something else"],
)
def test_a_loss_that_does_not_depend_on_the_input(loss: Any) -> None:
    with pytest.raises(ValueError, match="the loss does not depend on the attacked input: `input_key`"):
        PGD()(loss, torch.rand(2, 2))


def test_can_be_built_from_yaml(tmp_path: Path) -> None:
    def build(attack: PGD) -> PGD:
        return attack

    path = tmp_path / "attack.yaml"
    path.write_text("attack: {eps: 0.5, norm: l2, clip: [-1.0, 2.0], step_size: 0.25}")
    assert CLI(build, args=[f"--config={path}"]) == PGD(eps=0.5, norm="l2", clip=(-1.0, 2.0), step_size=0.25)
    assert CLI(build, args=["--attack.clip=null"]) == PGD(clip=None)
