"""The common suite for optimizers: a new one adds a row to ``CASES`` and passes."""

import io
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from pytorch_optimizer.base.exception import NoClosureError
from torch import Tensor, nn
from torch.optim import Optimizer

from fulgurite.plugins.optim import ExponentiatedGradient, FedSpeed, FedSpeedServer, GradientRegularizedNewton
from tests.suites.fits import assert_same, fit, make
from tests.suites.models import Compiled, Regressor


@dataclass(frozen=True)
class Case:
    """An optimizer under test.

    Args:
        make: the optimizer of parameters or groups, with settings for a small smooth problem; takes ``lr`` as well.
        steps: after which the distance to the minimiser of a quadratic fell to a hundredth.
        foreach: whether it has that argument.
        lr: whether it has that argument, and so schedulers and groups of parameters.
        clipped: whether it takes gradients that the Trainer clipped; else it says why not.
        closure: whether a step needs one.
        low_precision: whether it takes bfloat16 parameters.
    """

    make: partial[Optimizer]
    steps: int = 300
    foreach: bool = True
    lr: bool = True
    clipped: bool = True
    closure: bool = True
    low_precision: bool = True

    def __str__(self) -> str:
        return self.make.func.__name__


CASES = [
    Case(partial(FedSpeed, lr=0.05, lam=1.0, rho=0.01, alpha=0.7, local_steps=5)),
    Case(partial(FedSpeedServer, lr=0.01), steps=1500, foreach=False, closure=False),
    Case(partial(GradientRegularizedNewton, curvature="hessian"), steps=20, foreach=False, lr=False, clipped=False),
    Case(partial(ExponentiatedGradient, lr=0.03, momentum=0.5, hypentropy=1.0), low_precision=False, closure=False),
]
every_optimizer = pytest.mark.parametrize("case", CASES, ids=str)
with_an_lr = pytest.mark.parametrize("case", [case for case in CASES if case.lr], ids=str)


class Quadratic:
    """``1/2 |A (x - target)|^2`` over two tensors, with curvatures from 1 to 2."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 2), (5,))]
        self.targets = [torch.randn(p.shape, generator=generator) for p in self.params]
        self.curvatures = [1 + torch.rand(p.shape, generator=generator) for p in self.params]

    def loss(self) -> Tensor:
        parts = zip(self.params, self.targets, self.curvatures, strict=True)
        return torch.stack([(a * (p - t).square()).sum() / 2 for p, t, a in parts]).sum()

    def train(self, optimizer: Optimizer, steps: int) -> "Quadratic":
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
            return loss

        for _ in range(steps):
            optimizer.step(closure)
        return self

    def distance(self) -> float:
        return (
            sum(float((p - t).detach().square().sum()) for p, t in zip(self.params, self.targets, strict=True)) ** 0.5
        )

    def values(self) -> dict[str, Tensor]:
        return {str(i): p.detach().clone() for i, p in enumerate(self.params)}


@every_optimizer
def test_minimises_a_convex_problem(case: Case) -> None:
    problem = Quadratic()
    before = problem.distance()
    assert problem.train(case.make(problem.params), case.steps).distance() < before / 100


@every_optimizer
def test_step_returns_the_loss_at_the_iterate(case: Case) -> None:
    problem = Quadratic()
    optimizer = case.make(problem.params)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = problem.loss()
        loss.backward()
        return loss

    expected = float(problem.loss())
    assert float(optimizer.step(closure)) == expected


@every_optimizer
@pytest.mark.parametrize("through_a_file", [False, True])
def test_goes_on_exactly_from_its_state(case: Case, through_a_file: bool) -> None:
    whole = Quadratic()
    whole.train(case.make(whole.params), 12)

    first, second = Quadratic(), Quadratic()
    optimizer = case.make(first.params)
    first.train(optimizer, 7)
    state = optimizer.state_dict()
    if through_a_file:
        torch.save(state, buffer := io.BytesIO())
        buffer.seek(0)
        state = torch.load(buffer, weights_only=True)
    with torch.no_grad():
        for p, value in zip(second.params, first.params, strict=True):
            p.copy_(value)
    optimizer = case.make(second.params)
    for _ in range(2):  # the first time torch adds to the defaults
        optimizer.load_state_dict(state)
    assert_same(second.train(optimizer, 5).values(), whole.values())


@with_an_lr
def test_groups_have_their_own_lr(case: Case) -> None:
    problem = Quadratic()
    before = problem.values()
    slow = case.make([{"params": problem.params[:1]}, {"params": problem.params[1:], "lr": 1e-30}])
    after = problem.train(slow, 1).values()
    assert not torch.equal(after["0"], before["0"])
    assert torch.equal(after["1"], before["1"])


@every_optimizer
@pytest.mark.parametrize("how", ["frozen", "unused"])
def test_parameters_without_gradient_are_left_alone(case: Case, how: str) -> None:
    problem = Quadratic()
    idle = nn.Parameter(torch.ones(4), requires_grad=how == "unused")
    problem.train(case.make([*problem.params, idle]), 12)
    assert torch.equal(idle, torch.ones(4))


@every_optimizer
def test_foreach_or_not(case: Case) -> None:
    if not case.foreach:
        pytest.skip("has one path")
    runs = []
    for foreach in (True, False, None):
        problem = Quadratic()
        runs.append(problem.train(case.make(problem.params, foreach=foreach), 12).values())
    for other in runs[1:]:
        assert_same(runs[0], other, tolerance=torch.finfo(torch.float32).eps)


@with_an_lr
def test_follows_a_scheduler(case: Case) -> None:
    problem = Quadratic()
    optimizer = case.make(problem.params)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step == 0))
    before = problem.values()
    after = problem.train(optimizer, 1).values()
    assert not torch.equal(after["0"], before["0"])
    scheduler.step()
    assert_same(problem.train(optimizer, 2).values(), after)


@with_an_lr
@pytest.mark.parametrize("lr", [-1.0, 0.0, float("nan"), float("inf")])
def test_refuses_an_lr_that_is_not_positive(case: Case, lr: float) -> None:
    with pytest.raises(ValueError, match=rf"`lr` .*{lr}"):
        case.make([nn.Parameter(torch.ones(2))], lr=lr)


@every_optimizer
def test_says_what_it_is(case: Case) -> None:
    optimizer = case.make([nn.Parameter(torch.ones(2))], **({"lr": 0.07} if case.lr else {}))
    assert str(optimizer) == str(case)
    assert str(case) in repr(optimizer)
    assert ("lr: 0.07" in repr(optimizer)) == case.lr


@every_optimizer
def test_says_that_it_needs_a_closure(case: Case) -> None:
    optimizer = case.make([nn.Parameter(torch.ones(2))])
    if case.closure:
        with pytest.raises(NoClosureError, match=f"{case} requires closure.*bf16-mixed"):
            optimizer.step()
    else:
        optimizer.step()


# ---- under a Trainer -------------------------------------------------------------------------------------------------


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters()}


@every_optimizer
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_clip_val": 0.1},
        {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
    ],
    ids=str,
)
def test_fits(case: Case, options: dict[str, Any], tmp_path: Path) -> None:
    if options.get("precision") == "bf16-true" and not case.low_precision:
        pytest.skip("refuses such parameters")
    module = Regressor(make_optimizer=case.make)
    before = weights(module)
    if "gradient_clip_val" in options and not case.clipped:
        with pytest.raises(RuntimeError, match="remove `gradient_clip_val`"):
            fit(tmp_path, module, "auto", devices=1, **options | {"gradient_clip_val": 1e-6})
        return
    snapshot = fit(tmp_path, module, "auto", devices=1, **options)
    after = snapshot.read(0)["local"]
    assert all(value.isfinite().all() and not torch.equal(value.float(), before[name]) for name, value in after.items())
    for state in snapshot.read(0)["optimizer"].values():  # of their parameters' type
        assert all(value.dtype == after["embed.weight"].dtype for value in state.values())


@every_optimizer
def test_clipping_clips(case: Case, tmp_path: Path) -> None:
    if not case.clipped:
        pytest.skip("refuses it")
    runs = []
    for clip in (None, 1e-6):
        module = make(make_optimizer=case.make, worker=0)
        before = weights(module)
        fit(tmp_path, module, "auto", devices=1, max_steps=1, gradient_clip_val=clip)
        runs.append(max((value - before[name]).abs().max() for name, value in weights(module).items()))
    assert runs[1] < runs[0] / 100


@every_optimizer
def test_fits_a_compiled_module(case: Case, tmp_path: Path) -> None:
    torch.manual_seed(1)
    compiled = Compiled(make_optimizer=case.make)
    plain = Regressor(make_optimizer=case.make)
    plain.load_state_dict({name.replace("_orig_mod.", ""): value for name, value in compiled.state_dict().items()})
    for module in (compiled, plain):
        torch.manual_seed(2)
        fit(tmp_path, module, "auto", devices=1, max_steps=4)
    torch.testing.assert_close(list(compiled.parameters()), list(plain.parameters()))


@every_optimizer
def test_replicas_stay_equal(case: Case, tmp_path: Path) -> None:
    """Under DDP, though each process reads batches of its own."""
    snapshot = fit(tmp_path, make(make_optimizer=case.make), "ddp_fork", devices=2, max_steps=7)
    assert_same(snapshot.read(0)["local"], snapshot.read(1)["local"])
    alone = make(make_optimizer=case.make)
    fit(tmp_path / "alone", alone, "auto", devices=1, max_steps=7)
    assert not torch.equal(weights(alone)["head.weight"], snapshot.read(0)["local"]["head.weight"])


@every_optimizer
def test_resumes_bit_for_bit(case: Case, tmp_path: Path) -> None:
    def run(folder: str, max_steps: int, **options: Any) -> dict[str, Any]:
        module = make(make_optimizer=case.make, worker=0)  # whose loader resumes too
        return fit(tmp_path / folder, module, "auto", devices=1, max_steps=max_steps, **options).read(0)

    whole = run("whole", 36)
    run("first", 18, callbacks=[ModelCheckpoint(tmp_path / "kept", filename="at18", every_n_train_steps=18)])
    torch.load(tmp_path / "kept" / "at18.ckpt", weights_only=True)
    resumed = run("second", 36, ckpt_path=tmp_path / "kept" / "at18.ckpt")
    assert_same(resumed["local"], whole["local"])
    for index, state in whole["optimizer"].items():
        assert_same(resumed["optimizer"][index], state)
