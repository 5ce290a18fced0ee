"""GradientRegularizedNewton against the paper's numbers, closed forms and an independent dense implementation."""

import copy
import math
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import LearningRateFinder, LearningRateMonitor, StochasticWeightAveraging
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from pytorch_optimizer.base.exception import NoClosureError, NoSparseGradientError
from torch import Tensor, nn
from torch.func import grad, hessian
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from fulgurite.plugins.optim import GradientRegularizedNewton
from tests.plugins.linalg.dense import Dense, batch, network
from tests.suites.fits import assert_same, fit, make
from tests.suites.models import Regressor
from tests.suites.processes import in_processes

Function = Callable[[Tensor], Tensor]


class Run:
    """Steps on a function of one vector, in double precision."""

    def __init__(self, function: Function, x: Any, curvature: str = "hessian", **options: Any) -> None:
        self.x = nn.Parameter(torch.as_tensor(x, dtype=torch.float64).clone())
        self.function, self.evaluations = function, 0
        self.optimizer = GradientRegularizedNewton([self.x], curvature, **options)

    @property
    def value(self) -> float:
        return float(self.function(self.x.detach()))

    def closure(self) -> Tensor:
        self.evaluations += 1
        self.optimizer.zero_grad()
        loss = self.function(self.x)
        loss.backward()
        return loss

    def step(self) -> dict[str, float]:
        """The metrics, without their prefix."""
        self.optimizer.step(self.closure)
        return {name.removeprefix("grn/"): value for name, value in self.optimizer.metrics.items()}

    def steps_below(self, bar: float, limit: int = 200) -> int:
        for count in range(1, limit + 1):
            self.step()
            if self.value < bar:
                return count
        raise AssertionError(f"{self.value} after {limit} steps")


def rosenbrock(x: Tensor) -> Tensor:
    return (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2


def quadratic(a: Tensor) -> Function:
    return lambda x: (a * x.square()).sum() / 2


# ---- the paper's numbers, and a dense reference ------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["lanczos", "cg"])
def test_rosenbrock_takes_the_papers_steps(solver: Any) -> None:
    run = Run(rosenbrock, [-2.0, 2.0], solver=solver, theta=0.0)
    gammas = []
    for _ in range(8):
        gammas.append(run.optimizer.param_groups[0]["gamma"])
        run.step()
    assert gammas == [1, 2, 4, 8, 2, 0.5, 0.5, 0.5]
    assert 8 + run.steps_below(1e-8) == 51
    assert run.value == pytest.approx(2.436e-9, rel=1e-3)


class Reference:
    """The method by dense matrices: exact solves, one class of its own."""

    def __init__(self, function: Function, matrix: Function, x: Tensor, metric: Tensor | None = None) -> None:
        self.function, self.matrix, self.x, self.gamma = function, matrix, x.clone(), 1.0
        self.b = torch.diag(torch.ones_like(x) if metric is None else metric)

    def step(self) -> None:
        g, a = grad(self.function)(self.x), self.matrix(self.x)
        dual = lambda v: float(v @ torch.linalg.solve(self.b, v)) ** 0.5  # noqa: E731
        for _ in range(20):
            lam = dual(g) / self.gamma
            shifted = a + lam * self.b
            if torch.linalg.eigvalsh(shifted)[0] > 0:
                trial = self.x - torch.linalg.solve(shifted, g)
                after = dual(grad(self.function)(trial))
                if self.function(self.x) - self.function(trial) >= after**2 / lam / 8:
                    self.x, self.gamma = trial, 2 * self.gamma
                    return
            self.gamma /= 2


@pytest.mark.parametrize("solver", ["lanczos", "cg"])
@pytest.mark.parametrize("metric", ["identity", "given"])
@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_exact_solves_take_the_dense_references_steps(curvature: Any, metric: str, solver: Any) -> None:
    net, (x, y) = network(), batch()
    dense = Dense(net, x, y, decay=0.01)
    numbers = torch.linspace(0.5, 2, len(dense.theta), dtype=torch.float64) if metric == "given" else None

    def matrix(theta: Tensor) -> Tensor:
        if curvature == "hessian":
            return hessian(dense.loss)(theta)
        jacobian = torch.func.jacrev(dense.output)(theta)
        bend = torch.stack(
            [hessian(lambda z, n=n: F.cross_entropy(z, y[n]))(dense.output(theta)[n]) for n in range(10)]
        )
        past = hessian(dense.past)(theta)
        return torch.einsum("ncp,ncd,ndq->pq", jacobian, bend / len(x), jacobian) + past

    reference = Reference(dense.loss, matrix, dense.theta, numbers)
    optimizer = GradientRegularizedNewton(
        net.parameters(),
        curvature,
        theta=0.0,
        max_krylov=1000,
        solver=solver,
        metric="identity" if numbers is None else numbers,
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y) + 0.01 * sum(p.square().sum() ** 2 for p in net.parameters())
        loss.backward()
        return loss

    for _ in range(6):
        optimizer.step(closure)
        reference.step()
        assert optimizer.param_groups[0]["gamma"] == reference.gamma
        theta = nn.utils.parameters_to_vector(net.parameters()).detach()
        torch.testing.assert_close(theta, reference.x, rtol=1e-7, atol=1e-8)


def log_sum_exp() -> Function:
    """Of 50 random planes, the paper's; its minimiser is 0."""
    numbers = np.random.RandomState(3124)
    a, b = torch.from_numpy(numbers.uniform(-1, 1, (50, 50))), torch.from_numpy(numbers.uniform(-1, 1, 50))
    a = a - torch.softmax(-b, 0) @ a
    return lambda x: torch.logsumexp(a @ x - b, 0)


@pytest.mark.parametrize(("theta", "steps"), [(1e-10, 9), (0.5, 10)])
def test_log_sum_exp_takes_as_many_steps_as_in_the_paper(theta: float, steps: int) -> None:
    """Nine with exact solves; inexact ones take one more, and two thirds of the products."""
    function = log_sum_exp()
    minimum = float(function(torch.zeros(50, dtype=torch.float64)))
    products = {}
    for solver in ("lanczos", "cg"):
        run = Run(lambda x: function(x) - minimum, torch.ones(50), theta=theta, max_krylov=300, solver=solver)
        products[solver] = 0.0
        for _ in range(steps):
            assert run.value > 1e-8
            products[solver] += run.step()["products"]
        assert run.value < 1e-8
    assert products["lanczos"] < 0.85 * products["cg"]


# ---- identities --------------------------------------------------------------------------------------------------


def test_a_quadratic_accepts_every_trial_and_follows_the_closed_form() -> None:
    a, x = torch.tensor([1.0, 3.0, 10.0, 0.2], dtype=torch.float64), torch.tensor([1.0, -2.0, 0.5, 3.0]).double()
    run = Run(quadratic(a), x, theta=0.0)
    for k in range(8):
        lam = float((a * x).norm()) / 2**k
        x = x * lam / (a + lam)
        metrics = run.step()
        assert metrics["trials"] == 1
        assert metrics["gamma"] == 2 ** (k + 1)
        assert metrics["lambda"] == pytest.approx(lam, rel=1e-10)
        assert run.value == pytest.approx(float(quadratic(a)(x)), rel=1e-10)


def test_without_curvature_the_step_is_gamma_along_the_gradient() -> None:
    run = Run(lambda x: 3 * x.square().sum() / 2, torch.tensor([3.0, 4.0]), "identity", gamma=0.7)
    metrics = run.step()
    assert metrics["step_norm"] == pytest.approx(0.7, rel=1e-12)
    torch.testing.assert_close(run.x.detach(), torch.tensor([3.0, 4.0]).double() * (5 - 0.7) / 5)
    assert metrics["products"] == 0


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99, 1.0])
def test_a_step_within_the_smoothness_of_a_sphere_is_accepted(share: float) -> None:
    run = Run(lambda x: 3 * x.square().sum() / 2, torch.tensor([3.0, 4.0]), "identity", gamma=share * 5.0)
    assert run.step()["trials"] == 1  # gamma(x) = |g| / L = |x|


@given(x=st.floats(1e-2, 1e2), share=st.floats(1e-3, 1.0))
def test_a_step_within_the_smoothness_of_a_quartic_is_accepted(x: float, share: float) -> None:
    t = 0.53209  # of t^3 + 3 t^2 = 1
    run = Run(lambda x: x.square().square().sum() / 4, [x], gamma=share * t * x)
    assert run.step()["trials"] == 1


@given(x=st.floats(-2, 2), constant=st.floats(0.1, 10.0))
def test_a_lipschitz_hessian_accepts_its_own_lambda(x: float, constant: float) -> None:
    """``f = L |x|^3 / 6`` has a Hessian with constant L: ``lambda = sqrt(L |g| / 2)`` is accepted."""
    x = x if abs(x) > 0.01 else 0.01
    slope = constant * x**2 / 2
    run = Run(lambda v: constant * v.abs().pow(3).sum() / 6, [x], gamma=(2 * slope / constant) ** 0.5)
    metrics = run.step()
    assert metrics["lambda"] == pytest.approx((constant * slope / 2) ** 0.5)
    assert metrics["trials"] == 1


@pytest.mark.parametrize("curvature", ["ggn", "fisher", "hessian", "identity", "diagonal", "low_rank"])
@pytest.mark.parametrize("metric", ["identity", "diagonal"])
def test_every_curvature_descends_within_its_bound(curvature: Any, metric: Any) -> None:
    net, (x, y) = network(), batch(n=40)
    optimizer = GradientRegularizedNewton(net.parameters(), curvature, metric=metric)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        return loss

    losses = []
    for _ in range(15):
        losses.append(float(optimizer.step(closure).detach()))
        step, gamma = optimizer.metrics["grn/step_norm"], optimizer.metrics["grn/gamma"]
        assert step > 0
        if curvature != "hessian":  # which is indefinite here
            assert step <= gamma / 2 * (1 + 1e-9)  # it has doubled since
        assert optimizer.metrics["grn/search_failed"] == 0
    assert all(later < earlier for earlier, later in pairwise(losses))


def test_retries_cost_no_products() -> None:
    run = Run(rosenbrock, [-2.0, 2.0], gamma=1e6)
    metrics = run.step()
    assert metrics["trials"] >= 4
    assert metrics["products"] <= 2  # P = 2
    assert run.evaluations == metrics["closures"]
    assert Run(rosenbrock, [-2.0, 2.0], gamma=1e6, solver="cg").step()["products"] > 4


def test_products_are_at_most_max_krylov() -> None:
    a = torch.logspace(-3, 3, 50, dtype=torch.float64)
    metrics = Run(quadratic(a), torch.ones(50), gamma=1e6, max_krylov=7).step()
    assert metrics["products"] == metrics["krylov_dim"] == 7


@pytest.mark.parametrize("theta", [0.1, 0.9])
def test_the_residual_is_bounded(theta: float) -> None:
    a = torch.logspace(-2, 2, 60, dtype=torch.float64)
    x = torch.ones(60, dtype=torch.float64)
    run = Run(quadratic(a), x, theta=theta, gamma=3.0, max_krylov=60)
    metrics = run.step()
    step = run.x.detach() - x
    residual = (a + metrics["lambda"]) * step + a * x
    assert float(residual.norm()) <= theta * metrics["lambda"] * metrics["step_norm"] * (1 + 1e-9)
    assert metrics["krylov_dim"] < 60


@given(power=st.integers(-8, 8))
def test_multiples_of_the_loss_take_the_same_steps(power: int) -> None:
    """Bit for bit where the factor is a power of two."""
    plain = Run(rosenbrock, [-2.0, 2.0])
    scaled = Run(lambda x: 2.0**power * rosenbrock(x), [-2.0, 2.0])
    for _ in range(6):
        assert plain.step()["lambda"] * 2.0**power == scaled.step()["lambda"]
        assert torch.equal(plain.x, scaled.x)


def test_gauss_newton_is_the_hessian_of_a_linear_model() -> None:
    x, y = batch()
    ends = []
    for curvature in ("ggn", "hessian"):
        torch.manual_seed(0)
        net = nn.Linear(4, 3).double()
        optimizer = GradientRegularizedNewton(net.parameters(), curvature)
        for _ in range(5):
            optimizer.step(closure_of(net, optimizer, x, y))
        ends.append(nn.utils.parameters_to_vector(net.parameters()).detach())
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-10)


def closure_of(net: nn.Module, optimizer: GradientRegularizedNewton, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        return loss

    return closure


def test_low_rank_of_full_rank_is_gauss_newton() -> None:
    x, y = batch(n=30)
    ends = []
    for curvature in ("ggn", "low_rank"):
        net = nn.Sequential(nn.Linear(4, 3).double())
        with torch.no_grad():
            for p in net.parameters():
                p.zero_()
        optimizer = GradientRegularizedNewton(net.parameters(), curvature, theta=0.0, max_krylov=15)
        optimizer.step(closure_of(net, optimizer, x, y))
        ends.append(nn.utils.parameters_to_vector(net.parameters()).detach())
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-10)


def test_a_jacobi_metric_undoes_the_scales_of_a_diagonal() -> None:
    """The estimate is exact for a diagonal matrix, whose eigenvalues are all the same in its metric."""
    a = torch.logspace(0, 1.2, 30, dtype=torch.float64)
    metrics = Run(quadratic(a), torch.ones(30), metric="diagonal", theta=0.0, max_krylov=30).step()
    assert metrics["krylov_dim"] == 1
    assert Run(quadratic(a), torch.ones(30), theta=0.0, max_krylov=30).step()["krylov_dim"] > 10


def test_negative_curvature_is_a_rejection_that_needs_no_closure() -> None:
    run = Run(lambda x: (x.square() - 1).square().sum(), [0.1, 0.05], gamma=100.0)
    metrics = run.step()
    assert metrics["trials"] > metrics["closures"]  # the one at x counts as well
    assert run.value < 1.98
    run = Run(lambda x: (x.square() - 1).square().sum(), [0.1, 0.05], gamma=100.0, solver="cg")
    assert run.step()["search_failed"] == 0


def test_rounding_does_not_end_the_descent() -> None:
    """In single precision, where the decrease of the loss drowns in its rounding, the test is one of gradients."""
    torch.manual_seed(0)
    x, y = torch.randn(200, 10), torch.randint(3, (200,))
    net = nn.Linear(10, 3)
    optimizer = GradientRegularizedNewton(net.parameters())
    trials = 0.0
    for _ in range(14):
        optimizer.step(closure_of(net, optimizer, x, y))
        trials += optimizer.metrics["grn/trials"]
        assert optimizer.metrics["grn/search_failed"] == 0
    assert optimizer.metrics["grn/grad_norm"] < 1e-5
    assert trials < 40


def test_a_failed_search_puts_back_every_bit() -> None:
    """A gradient that points uphill: no trial can be accepted."""

    class Reversed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, slope: Tensor) -> Tensor:
            return -slope

    start = torch.tensor([0.1, -0.0, 1e-300, 3.0], dtype=torch.float64)
    run = Run(lambda x: Reversed.apply(x).square().sum(), start, "identity", max_search=5)
    metrics = run.step()
    assert metrics["search_failed"] == 1
    assert metrics["trials"] == 5
    assert metrics["step_norm"] == 0
    assert metrics["gamma"] == 2.0**-5
    assert torch.equal(run.x.detach().view(torch.int64), start.view(torch.int64))


def test_a_closure_that_fails_at_a_trial_leaves_x_as_it_was() -> None:
    def function(x: Tensor) -> Tensor:
        if float(x[0]) != 1:
            raise ValueError("not here")
        return x.square().sum()

    run = Run(function, [1.0, 2.0])
    with pytest.raises(ValueError, match="not here"):
        run.step()
    assert run.x.tolist() == [1, 2]


def test_gamma_stays_within_its_bounds() -> None:
    run = Run(quadratic(torch.ones(2)), [1.0, 1.0], gamma=4.0, gamma_max=8.0)
    assert [run.step()["gamma"] for _ in range(3)] == [8, 8, 8]


def test_nothing_happens_at_a_small_gradient() -> None:
    run = Run(quadratic(torch.ones(2)), [1.0, 1.0], tol_grad=10.0)
    metrics = run.step()
    assert metrics["trials"] == metrics["products"] == 0
    assert torch.equal(run.x.detach(), torch.ones(2).double())
    assert Run(quadratic(torch.ones(2)), [0.0, 0.0]).step()["trials"] == 0


# ---- what a trial must not change --------------------------------------------------------------------------------


def test_dropout_repeats_and_buffers_move_once() -> None:
    """The masks at each trial are those at x, and running statistics are what one forward at x leaves."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    x, y = batch(n=20)
    once = nn.BatchNorm1d(8).double()
    once(net[0](x))
    draws = []
    net[2].register_forward_hook(lambda module, args, output: draws.append((output == 0) | (args[0] == 0)))
    optimizer = GradientRegularizedNewton(net.parameters(), gamma=1e4)
    optimizer.step(closure_of(net, optimizer, x, y))
    assert len(draws) == optimizer.metrics["grn/closures"] > 3
    assert all(torch.equal(mask, draws[0]) for mask in draws)
    torch.testing.assert_close(net[1].running_mean, once.running_mean)
    torch.testing.assert_close(net[1].running_var, once.running_var)
    assert net[1].num_batches_tracked == 1


def test_users_may_zero_gradients_outside_the_closure() -> None:
    run = Run(rosenbrock, [-2.0, 2.0])

    def closure() -> Tensor:
        loss = run.function(run.x)
        loss.backward()
        return loss

    other = Run(rosenbrock, [-2.0, 2.0])
    for _ in range(5):
        run.optimizer.zero_grad(set_to_none=False)
        run.optimizer.step(closure)
        other.step()
    assert torch.equal(run.x, other.x)


# ---- state -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("options", [{"curvature": "diagonal"}, {"curvature": "low_rank"}, {"metric": "diagonal"}])
def test_state_resumes_bit_for_bit(options: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    x, y = batch(n=30)
    x = x.to(dtype)

    def begin() -> tuple[nn.Module, GradientRegularizedNewton]:
        net = network().to(dtype)
        return net, GradientRegularizedNewton(net.parameters(), max_krylov=5, **options)

    whole, optimizer = begin()
    for _ in range(13):
        optimizer.step(closure_of(whole, optimizer, x, y))
    first, optimizer = begin()
    for _ in range(4):
        optimizer.step(closure_of(first, optimizer, x, y))
    torch.save({"net": first.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "at4.pt")
    second, optimizer = begin()
    kept = torch.load(tmp_path / "at4.pt", weights_only=True)
    second.load_state_dict(kept["net"])
    optimizer.load_state_dict(kept["optimizer"])
    for _ in range(9):
        optimizer.step(closure_of(second, optimizer, x, y))
    assert_same(dict(second.named_parameters()), dict(whole.named_parameters()))


# ---- several processes -------------------------------------------------------------------------------------------


def train_part(rank: int, options: dict[str, Any], world: int = 2) -> list[Tensor]:
    net, (x, y) = network(), batch(n=24)
    part = slice(None) if world == 1 else slice(12 * rank, 12 * rank + 12)
    optimizer = GradientRegularizedNewton(net.parameters(), **options)
    model = net if world == 1 else nn.parallel.DistributedDataParallel(net)
    for _ in range(5):
        optimizer.step(closure_of(model, optimizer, x[part], y[part]))
    return [p.detach() for p in net.parameters()]


@pytest.mark.parametrize(
    "options",
    [{}, {"curvature": "hessian", "solver": "cg"}, {"curvature": "diagonal"}, {"metric": "diagonal"}],
    ids=str,
)
def test_two_halves_of_a_batch_are_the_batch(options: dict[str, Any]) -> None:
    first, second = in_processes(2, train_part, options)
    alone = train_part(0, options, world=1)
    for a, b, whole in zip(first, second, alone, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, whole, rtol=1e-6, atol=1e-6)


# ---- what it refuses ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"curvature": "kfac"}, "`curvature` must be one of .*'ggn'.*, got 'kfac'"),
        ({"solver": "qr"}, "`solver` must be one of .*, got 'qr'"),
        ({"gamma": 0.0}, "`gamma` must be positive and finite, got 0.0"),
        ({"gamma": math.nan}, "`gamma` must be positive"),
        ({"gamma_min": -1.0}, "`gamma_min` must be positive"),
        ({"gamma_max": math.inf}, "`gamma_max` must be positive and finite"),
        ({"theta": 1.5}, r"`theta` .*\[0, 1\], got 1.5"),
        ({"theta": -0.1}, r"`theta` .*\[0, 1\], got -0.1"),
        ({"max_krylov": 0}, "`max_krylov` counts .* at least 1, got 0"),
        ({"max_search": 0}, "`max_search` counts .* at least 1, got 0"),
        ({"subsample": 0.0}, "`subsample` is a fraction"),
        ({"tol_grad": -1.0}, "`tol_grad` .* at least 0"),
        ({"metric": "jacobi"}, "`metric` must be 'identity', 'diagonal' or a tensor, got 'jacobi'"),
        ({"metric": torch.ones(3)}, r"`metric` must be \(2,\), one positive number a parameter, got \(3,\)"),
        ({"metric": torch.tensor([1.0, 0.0])}, r"`metric` must be \(2,\), one positive number a parameter"),
    ],
    ids=str,
)
def test_refuses_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradientRegularizedNewton([nn.Parameter(torch.ones(2))], **options)


def test_refuses_parameters_it_cannot_take() -> None:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="one group"):
        GradientRegularizedNewton([{"params": [a]}, {"params": [b]}])
    with pytest.raises(ValueError, match="of one type"):
        GradientRegularizedNewton([a, nn.Parameter(torch.ones(2, dtype=torch.float64))])
    with pytest.raises(ValueError, match="on one device"):
        GradientRegularizedNewton([a, nn.Parameter(torch.ones(2, device="meta"))])
    with pytest.raises(ValueError, match="must be real"):
        GradientRegularizedNewton([nn.Parameter(torch.ones(2, dtype=torch.complex64))])
    flat = nn.Parameter(torch.ones(2))
    flat._is_flat_param = True  # type: ignore[attr-defined]  # as FSDP marks it
    with pytest.raises(ValueError, match=r"FSDP.*train with DDP"):
        GradientRegularizedNewton([flat])


@pytest.mark.parametrize("loaded", [False, True])
def test_refuses_a_scheduler(loaded: bool) -> None:
    optimizer = GradientRegularizedNewton([nn.Parameter(torch.ones(2))])
    if loaded:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with pytest.raises(KeyError, match=r"no `lr`.*remove .* a scheduler.*LearningRateFinder"):
        torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    with pytest.raises(KeyError, match=r"no `lr`"):
        optimizer.param_groups[0]["lr"] = 0.1


def test_refuses_the_state_of_another_optimizer() -> None:
    x = nn.Parameter(torch.ones(2))
    state = torch.optim.Adam([x]).state_dict()
    with pytest.raises(ValueError, match=r"another optimizer than GradientRegularizedNewton, .* no `gamma`, .*fresh"):
        GradientRegularizedNewton([x]).load_state_dict(state)


def test_a_state_brings_the_numbers_of_the_group() -> None:
    x = nn.Parameter(torch.ones(2))
    state = GradientRegularizedNewton([x], theta=0.9, gamma=3.0, max_krylov=7).state_dict()
    optimizer = GradientRegularizedNewton([x], theta=0.1, max_krylov=5)
    optimizer.load_state_dict(state)
    assert (optimizer.param_groups[0]["theta"], optimizer.param_groups[0]["gamma"]) == (0.9, 3)
    assert optimizer.max_krylov == 5


@pytest.mark.parametrize(
    ("closure", "error", "message"),
    [
        (None, NoClosureError, "16-mixed gives none: use bf16-mixed"),
        (lambda x: x.square().sum(), RuntimeError, r"call `loss.backward\(\)` inside the closure"),
        (lambda x: [x.sum().backward(), x.square().sum().backward()], RuntimeError, "`backward` ran twice"),
        (lambda x: x.square().sum().backward(), RuntimeError, "must return the loss, a scalar tensor, got NoneType"),
    ],
    ids=["none", "no backward", "two backwards", "no loss"],
)
def test_refuses_bad_closures(closure: Any, error: type[Exception], message: str) -> None:
    x = nn.Parameter(torch.ones(2))
    with pytest.raises(error, match=message):
        GradientRegularizedNewton([x], "hessian").step(closure if closure is None else lambda: closure(x))
    assert torch.equal(x, torch.ones(2))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_refuses_a_loss_that_is_not_finite(bad: float) -> None:
    run = Run(lambda x: x.square().sum() * bad, [1.0, 2.0])
    with pytest.raises(RuntimeError, match=f"the loss is {bad}"):
        run.step()
    assert run.x.tolist() == [1, 2]


def test_a_trial_that_is_not_finite_is_rejected() -> None:
    run = Run(lambda x: -x.log().sum() + x.sum(), [0.01, 0.01], "identity", gamma=64.0)  # x > 0, minimum at 1
    run.closure()
    metrics = run.step()
    assert metrics["search_failed"] == 0
    assert run.x.isfinite().all()


def test_refuses_an_unknown_loss_unless_told_where_to_split() -> None:
    net, (x, y) = network(), batch()
    for outputs, curvature, fails in (
        ("loss_input", "ggn", True),
        (net, "ggn", False),
        ("loss_input", "hessian", False),
    ):
        optimizer = GradientRegularizedNewton(net.parameters(), curvature, outputs=outputs)

        def closure() -> Tensor:
            optimizer.zero_grad()  # noqa: B023
            z = net(x)
            loss = (z.logsumexp(1) - z.gather(1, y[:, None])[:, 0]).mean()
            loss.backward()
            return loss

        if fails:
            with pytest.raises(ValueError, match=r"`GradientRegularizedNewton\(outputs=self.net\)`.*hessian"):
                optimizer.step(closure)
        else:
            optimizer.step(closure)


def test_refuses_accumulated_gradients() -> None:
    run = Run(rosenbrock, [-2.0, 2.0])
    run.closure()
    with pytest.raises(RuntimeError, match=r"`accumulate_grad_batches`.*raise the batch size.*CurvatureBatches"):
        run.optimizer.step(lambda: [loss := run.function(run.x), loss.backward()][0])


def test_refuses_changed_gradients() -> None:
    run = Run(rosenbrock, [-2.0, 2.0])

    def clipped() -> Tensor:
        loss = run.closure()
        nn.utils.clip_grad_norm_([run.x], 1.0)
        return loss

    with pytest.raises(RuntimeError, match="remove `gradient_clip_val`"):
        run.optimizer.step(clipped)


def wave(x: Tensor) -> Tensor:
    """A slope of -1/2, and waves above 1."""
    return (-0.5 * x + (x > 1) * 0.15 * (1 - torch.cos(12 * (x - 1)))).sum()


def test_a_steep_trial_is_rejected() -> None:
    run = Run(wave, [0.0], "identity", gamma=4.0)
    assert run.step()["trials"] == 2
    assert run.x.tolist() == [2]


@pytest.mark.parametrize("change", ["in place", "through data", "replaced"])
def test_refuses_gradients_that_change_at_a_trial_alone(change: str) -> None:
    run = Run(wave, [0.0], "identity", gamma=4.0)

    def closure() -> Tensor:
        loss = run.closure()
        if run.evaluations > 1:
            match change:
                case "in place":
                    run.x.grad.clamp_(-0.1, 0.1)
                case "through data":
                    run.x.grad.data.clamp_(-0.1, 0.1)
                case _:
                    run.x.grad = run.x.grad.clamp(-0.1, 0.1)
        return loss

    with pytest.raises(RuntimeError, match="not as `backward` left them"):
        run.optimizer.step(closure)
    assert run.evaluations == 2
    assert run.x.tolist() == [0]


def test_refuses_clipping_that_does_not_bite_yet() -> None:
    run = Run(wave, [0.0], "identity", gamma=4.0)

    def closure() -> Tensor:
        loss = run.closure()
        nn.utils.clip_grad_norm_([run.x], 0.6)  # of 0.5
        return loss

    with pytest.raises(RuntimeError, match="not as `backward` left them"):
        run.optimizer.step(closure)
    assert run.evaluations == 1


# ---- batches that are skipped ------------------------------------------------------------------------------------


def test_a_skipped_batch_changes_nothing() -> None:
    run = Run(rosenbrock, [-2.0, 2.0], metric="diagonal")
    run.step()
    before, state = run.x.detach().clone(), copy.deepcopy(run.optimizer.state_dict())
    assert run.optimizer.step(run.optimizer.zero_grad) is None
    assert torch.equal(run.x, before)
    assert str(run.optimizer.state_dict()) == str(state)
    metrics = run.optimizer.metrics
    assert (metrics["grn/closures"], metrics["grn/trials"], metrics["grn/step_norm"]) == (1, 0, 0)
    assert metrics["grn/gamma"] == state["param_groups"][0]["gamma"]
    assert "grn/grad_norm" not in metrics
    run.step()
    assert "grn/grad_norm" in run.optimizer.metrics


def test_a_trial_that_is_skipped_is_rejected() -> None:
    run = Run(wave, [0.0], "identity", gamma=1.0)
    assert run.step()["trials"] == 1
    run = Run(wave, [0.0], "identity", gamma=1.0)
    run.optimizer.step(lambda: None if float(run.x.detach()) > 0.6 else run.closure())
    assert run.optimizer.metrics["grn/trials"] == 2
    assert run.x.tolist() == [0.5]


def test_refuses_subsampling_a_closure() -> None:
    with pytest.raises(ValueError, match=r"`subsample` is 0.25.*CurvatureBatches"):
        Run(rosenbrock, [-2.0, 2.0], subsample=0.25).step()


def test_refuses_sparse_gradients() -> None:
    table = nn.Embedding(5, 2, sparse=True)
    optimizer = GradientRegularizedNewton(table.parameters(), "identity")

    def closure() -> Tensor:
        loss = table(torch.tensor([1, 2])).square().sum()
        loss.backward()
        return loss

    with pytest.raises(NoSparseGradientError):
        optimizer.step(closure)


def test_refuses_compiled_modules() -> None:
    net = torch.compile(nn.Linear(4, 3).double(), backend="aot_eager")
    optimizer = GradientRegularizedNewton(net.parameters())
    with pytest.raises(RuntimeError, match=r"`torch.compile` has no double backward"):
        optimizer.step(closure_of(net, optimizer, *batch()))


def test_warns_once_of_parameters_without_gradient() -> None:
    net, idle = network(), nn.Parameter(torch.ones(3).double())
    optimizer = GradientRegularizedNewton([*net.parameters(), idle])
    with pytest.warns(UserWarning, match="1 parameters got no gradient"):
        optimizer.step(closure_of(net, optimizer, *batch()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(closure_of(net, optimizer, *batch()))
    assert torch.equal(idle, torch.ones(3).double())


# ---- under a Trainer ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient_clip_val": 0.01}, "remove `gradient_clip_val`"),
        ({"gradient_clip_val": 1e9}, "remove `gradient_clip_val`"),
        ({"gradient_clip_val": 1e9, "gradient_clip_algorithm": "value"}, "remove `gradient_clip_val`"),
        ({"accumulate_grad_batches": 3}, "raise the batch size, or attach `fulgurite.callbacks.CurvatureBatches"),
    ],
    ids=str,
)
def test_a_trainer_that_changes_gradients_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=message):
        fit(tmp_path, make(make_optimizer=GradientRegularizedNewton), "auto", devices=1, **options, max_steps=1)


@pytest.mark.parametrize(
    "callback", [LearningRateFinder(update_attr=False), LearningRateMonitor(), StochasticWeightAveraging(0.01)], ids=str
)
def test_callbacks_that_ask_for_a_rate_are_refused(callback: Any, tmp_path: Path) -> None:
    options = {"logger": CSVLogger(tmp_path), "max_epochs": 4, "max_steps": -1, "default_root_dir": tmp_path}
    with pytest.raises(KeyError, match=f"no `lr`.*{type(callback).__name__}"):
        fit(tmp_path, Full(make_optimizer=GradientRegularizedNewton), "auto", 1, callbacks=[callback], **options)


class Manual(Regressor):
    """Calls ``step`` without a closure."""

    def __init__(self) -> None:
        super().__init__(blocks=1, make_optimizer=GradientRegularizedNewton)
        self.automatic_optimization = False

    @override
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


def test_refuses_a_manual_step_without_a_closure(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"call `loss.backward\(\)` inside the closure"):
        fit(tmp_path, Manual(), "auto", devices=1, max_steps=1)


class Skipping(Regressor):
    """Without a loss in every second batch."""

    @override
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        return None if batch_idx % 2 else super().training_step(batch, batch_idx)


def test_a_training_step_may_skip_batches(tmp_path: Path) -> None:
    module = Skipping(blocks=1, make_optimizer=GradientRegularizedNewton)
    fit(tmp_path, module, "auto", devices=1, max_steps=6)
    assert module.trainer.optimizers[0].param_groups[0]["n_steps"] == 3


class Full(Regressor):
    """One batch of all data; in each process the same."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(blocks=1, **kwargs)

    def train_dataloader(self) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(64, 6, generator=generator)
        return DataLoader(TensorDataset(x, x.sin().sum(1, keepdim=True)), batch_size=64)


def test_descends_far_under_a_trainer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Full(make_optimizer=GradientRegularizedNewton)
    fit(tmp_path, module, "auto", devices=1, max_steps=15)
    assert module.trainer.callback_metrics["train_loss"] < 0.1


def test_a_yaml_builds_it(tmp_path: Path) -> None:
    class Small(Full):
        def __init__(self) -> None:
            super().__init__()

        configure_optimizers = LightningModule.configure_optimizers

    trainer = {"accelerator": "cpu", "max_steps": 2, "logger": False, "enable_checkpointing": False}
    trainer |= {"enable_progress_bar": False, "limit_val_batches": 0, "default_root_dir": str(tmp_path)}
    optimizer = {
        "class_path": "fulgurite.plugins.optim.GradientRegularizedNewton",
        "init_args": {"curvature": "hessian", "max_krylov": 5},
    }
    cli = LightningCLI(Small, args={"fit": {"trainer": trainer, "optimizer": optimizer}, "subcommand": "fit"})
    (used,) = cli.trainer.optimizers
    assert isinstance(used, GradientRegularizedNewton)
    assert (used.curvature, used.max_krylov) == ("hessian", 5)
