"""FedSpeed against what its paper implies: identities, methods it contains, and the rule written out."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from pytorch_optimizer import SAM
from torch import Tensor, nn

from fulgurite.plugins.optim import FedSpeed, FedSpeedServer
from fulgurite.plugins.optim.fedspeed import check_pair

Loss = Callable[[Tensor], Tensor]


@dataclass
class Federation:
    """Rounds of clients with losses of one vector, run as a strategy runs them.

    Args:
        losses: one a client.
        start: the server's first parameters.
        local_steps: of each client (K).
        weights: samples of each client; their shares weigh the updates and make up the participation.
        lrs: the clients' own step sizes, instead of the optimizer's.
        options: for FedSpeed.
    """

    losses: Sequence[Loss]
    start: Tensor
    local_steps: int
    weights: Sequence[float] = ()
    lrs: Sequence[float] = ()
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.weights = self.weights or [1.0] * len(self.losses)
        self.p = nn.Parameter(self.start.clone())
        self.client = FedSpeed([self.p], **self.options)
        corrects = self.client.server == "all" and self.options.get("correction", True)
        self.server = (FedSpeedServer if corrects else torch.optim.SGD)([self.p], lr=1.0)
        check_pair(self.client, self.server, full_participation=True)
        self.duals: dict[int, list[Tensor]] = {}
        self.models: dict[int, Tensor] = {}

    def round(self, active: Sequence[int] | None = None) -> Tensor:
        active = range(len(self.losses)) if active is None else active
        groups, x = self.client.state_dict()["param_groups"], self.p.detach().clone()
        self.models = {}
        for i in active:
            self.client.load_state_dict({"state": {}, "param_groups": groups})
            with torch.no_grad():
                self.p.copy_(x)
            self.client.begin_round(self.duals.get(i))
            if self.lrs:
                self.client.param_groups[0]["lr"] = self.lrs[i]
            for _ in range(self.local_steps):
                self.client.step(closure_of(self.client, self.p, self.losses[i]))
            self.duals[i] = self.client.end_round()
            self.models[i] = self.p.detach().clone()
        total = sum(self.weights[i] for i in active)
        with torch.no_grad():
            self.p.copy_(x)
        self.p.grad = -sum(self.weights[i] / total * (self.models[i] - x) for i in active)
        for group in self.server.param_groups:
            group["participation"] = total / sum(self.weights)
        self.server.step()
        return self.p.detach().clone()

    def mean_dual(self) -> Tensor:
        """Over all clients; those that never took part have none."""
        return sum(self.weights[i] * dual for i, [dual] in self.duals.items()) / sum(self.weights)


def closure_of(optimizer: torch.optim.Optimizer, p: Tensor, loss: Loss) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(p)
        value.backward()
        return value

    return closure


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def bowls(count: int, seed: int, dim: int = 5) -> tuple[list[Loss], list[float], Tensor]:
    """Losses ``a/2 |x - b|^2``, their curvatures, and the minimiser of their mean."""
    curvatures = [1.0 + i / count for i in range(count)]
    centres = random(count, dim, seed=seed)
    losses = [lambda x, a=a, b=b: a / 2 * (x - b).square().sum() for a, b in zip(curvatures, centres, strict=True)]
    return losses, curvatures, vector(*curvatures) @ centres / sum(curvatures)


def exact(curvatures: Sequence[float], lam: float) -> list[float]:
    """Step sizes that minimise ``a/2 |x - b|^2 + |x - c|^2 / (2 lam)`` in one step."""
    return [1 / (a + 1 / lam) for a in curvatures]


# ---- identities ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first_round", [True, False])
def test_dual_is_an_average_of_gradients(first_round: bool) -> None:
    """``dual_new = (1 - gamma) dual + sum gamma_k g_k``, with ``gamma_k = (lr/lam) (1 - lr/lam)^(K-1-k)``."""
    lr, lam, steps, alpha = 0.05, 0.7, 7, 0.5
    gammas = [(lr / lam) * (1 - lr / lam) ** (steps - 1 - k) for k in range(steps)]
    assert sum(gammas) == pytest.approx(0.40473929222578, abs=1e-14)
    p = nn.Parameter(random(4, seed=0))
    optimizer = FedSpeed([p], lr=lr, lam=lam, rho=0.1, alpha=alpha)
    dual = torch.zeros(4, dtype=torch.float64) if first_round else random(4, seed=1)
    start = p.detach().clone()
    seen: list[Tensor] = []
    optimizer.begin_round(None if first_round else [dual])
    for k in range(steps):
        slope = random(4, seed=10 + k)

        def closure(slope: Tensor = slope) -> Tensor:
            loss = (slope * p).sin().sum()
            optimizer.zero_grad()
            loss.backward()
            seen.append(p.grad.clone())
            return loss

        optimizer.step(closure)
    [after] = optimizer.end_round()
    gradients = [(1 - alpha) * g1 + alpha * g2 for g1, g2 in zip(seen[::2], seen[1::2], strict=True)]
    averaged = sum(gamma * g for gamma, g in zip(gammas, gradients, strict=True))
    torch.testing.assert_close(after, (1 - sum(gammas)) * dual + averaged, rtol=0, atol=1e-14)
    moved = -lam * sum(gamma * (g - dual) for gamma, g in zip(gammas, gradients, strict=True))
    torch.testing.assert_close(p.detach() - start, moved, rtol=0, atol=1e-14)
    assert optimizer.round_metrics == {"fedspeed/dual_norm": pytest.approx(float(after.norm()))}


def test_exact_rounds_are_douglas_rachford() -> None:
    """``s_i <- z + s_i - prox_i(s_i)``, ``z = mean(2 prox_i(s_i) - s_i)``: consensus ADMM, by its own formula."""
    lam, clients, dim = 0.8, 4, 3
    shapes = [random(dim, dim, seed=i) for i in range(clients)]
    hessians = [torch.eye(dim, dtype=torch.float64) + m @ m.T / torch.linalg.matrix_norm(m @ m.T, 2) for m in shapes]
    slopes = [random(dim, seed=20 + i) for i in range(clients)]
    losses = [lambda x, h=h, b=b: x @ h @ x / 2 - b @ x for h, b in zip(hessians, slopes, strict=True)]
    # Curvatures from 1 + 1/lam to 2 + 1/lam: with this step size each step leaves at most a fifth of the distance.
    run = Federation(losses, torch.zeros(dim).double(), 30, options={"lr": 1 / (1.5 + 1 / lam), "lam": lam, "rho": 0.0})

    def prox(i: int, s: Tensor) -> Tensor:
        return torch.linalg.solve(torch.eye(dim).double() + lam * hessians[i], s + lam * slopes[i])

    shadows = [torch.zeros(dim).double() for _ in range(clients)]
    for _ in range(40):
        points = [prox(i, s) for i, s in enumerate(shadows)]
        z = sum(2 * point - s for point, s in zip(points, shadows, strict=True)) / clients
        torch.testing.assert_close(run.round(), z, rtol=0, atol=1e-13)
        shadows = [z + s - point for point, s in zip(points, shadows, strict=True)]
    minimiser = torch.linalg.solve(sum(hessians), sum(slopes))
    torch.testing.assert_close(run.p.detach(), minimiser, rtol=0, atol=1e-11)


@pytest.mark.parametrize("server", ["all", "active"])
def test_one_client_is_the_proximal_point_method(server: str) -> None:
    run = Federation(
        [lambda x: x.square().sum()], vector(1.0), 1, options={"lr": 0.25, "lam": 0.5, "rho": 0.0, "server": server}
    )
    for power in range(1, 6):
        run.round()
        [dual] = run.duals[0]
        assert float(dual) == pytest.approx(2 * 0.5**power, abs=1e-15)  # the gradient at x_K = 2^-power
        if server == "all":  # else the client's model is corrected already
            assert float(run.models[0]) == pytest.approx(0.5**power, abs=1e-15)


@pytest.mark.parametrize("weights", [(), (1.0, 5.0, 2.0, 2.0, 7.0)], ids=["uniform", "samples"])
def test_server_holds_the_mean_dual(weights: Sequence[float]) -> None:
    losses, _, _ = bowls(5, seed=0)
    lam = 0.9
    run = Federation(losses, random(5, seed=1), 4, weights, options={"lr": 0.1, "lam": lam, "rho": 0.2, "alpha": 0.6})
    generator = torch.Generator().manual_seed(2)
    for _ in range(12):
        run.round(torch.randperm(5, generator=generator)[:2].tolist())
        h = run.server.state[run.p]["h"]
        torch.testing.assert_close(h, -lam * run.mean_dual(), rtol=0, atol=1e-14)
        assert run.server.round_metrics["fedspeed/dual_residual"] == pytest.approx(float(run.mean_dual().norm()))


def test_two_rounds_by_hand() -> None:
    losses = [lambda x: (x.square() / 2 - 2 * x).sum(), lambda x: (3 * x.square() / 2).sum()]
    run = Federation(losses, vector(1.0), 2, options={"lr": 0.1, "lam": 2.0, "rho": 0.1, "alpha": 0.5})
    expected = [
        ((1.19425, 0.48025), (-0.097125, 0.259875), -0.16275, 0.6745),
        ((0.910999375, 0.358751875), (-0.2153746875, 0.4177490625), -0.202374375, 0.43250125),
    ]
    for models, duals, h, x in expected:
        run.round()
        assert [float(run.models[i]) for i in (0, 1)] == pytest.approx(models, abs=1e-11)
        assert [float(run.duals[i][0]) for i in (0, 1)] == pytest.approx(duals, abs=1e-11)
        assert float(run.server.state[run.p]["h"]) == pytest.approx(h, abs=1e-11)
        assert run.p.item() == pytest.approx(x, abs=1e-11)


@pytest.mark.parametrize("server", ["all", "active"])
def test_partial_participation_converges_with_all_duals_alone(server: str) -> None:
    losses, curvatures, minimiser = bowls(6, seed=0)
    options = {"lam": 1.0, "rho": 0.0, "server": server}
    run = Federation(losses, torch.zeros(5).double(), 1, lrs=exact(curvatures, 1.0), options=options)
    generator = torch.Generator().manual_seed(1)
    for _ in range(800):
        run.round(torch.randperm(6, generator=generator)[:2].tolist())
    distance = float((run.p - minimiser).detach().norm())
    assert distance < 1e-10 if server == "all" else distance > 0.1


def test_full_participation_makes_the_servers_equal() -> None:
    losses, _, _ = bowls(4, seed=3)
    runs = [Federation(losses, random(5, seed=4), 3, options={"lam": 0.5, "server": s}) for s in ("all", "active")]
    for _ in range(10):
        torch.testing.assert_close(runs[0].round(), runs[1].round(), rtol=0, atol=1e-13)


@pytest.mark.parametrize("seed", [0, 1])
def test_dual_of_an_exact_round_is_the_gradient(seed: int) -> None:
    """The sign of both updates: were one wrong, the dual would be its negative, or the round would not end there."""
    losses, curvatures, _ = bowls(1, seed=seed)
    run = Federation(losses, random(5, seed=9), 1, lrs=exact(curvatures, 2.0), options={"lam": 2.0, "rho": 0.0})
    for _ in range(3):
        run.round()
        model = run.models[0].requires_grad_()
        torch.testing.assert_close(run.duals[0][0], torch.autograd.grad(losses[0](model), model)[0], rtol=0, atol=1e-14)


# ---- the rule written out, in double precision -----------------------------------------------------------------------

SETTINGS = [
    {},
    {"alpha": 0.3},
    {"alpha": 0.0},
    {"rho": 0.0},
    {"weight_decay": 0.3},
    {"correction": False},
    {"normalize": False},
    {"max_grad_norm": 0.05},
    {"max_grad_norm": 0.05, "alpha": 0.5, "weight_decay": 0.3, "maximize": True},
    {"maximize": True},
    {"lam": math.inf, "weight_decay": 0.2},
]


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("zeroes", ["in place", "to None"])
@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_equals_the_rule(options: dict[str, Any], zeroes: str, foreach: bool) -> None:
    o = {"lr": 0.1, "lam": 0.7, "rho": 0.2, "alpha": 1.0, "weight_decay": 0.0, "max_grad_norm": None, **options}
    params = [nn.Parameter(random(3, 2, seed=0)), nn.Parameter(random(4, seed=1))]
    duals = [random(3, 2, seed=2), random(4, seed=3)]

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return (a.square().sum() * b.cos().sum() / 9).sin() + (a.sum() * b).square().sum() / 99

    def gradient(x: list[Tensor]) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in x]
        sign = -1 if o.get("maximize") else 1
        return [sign * g for g in torch.autograd.grad(loss(*leaves), leaves)]

    def norm(parts: list[Tensor]) -> Tensor:
        return torch.cat([part.flatten() for part in parts]).norm()

    optimizer = FedSpeed(params, **o, eps=0.0, foreach=foreach)
    optimizer.begin_round(duals)
    x = start = [p.detach().clone() for p in params]
    corrects = o.get("correction", True) and o["lam"] < math.inf
    for _ in range(3):
        g1 = gradient(x)
        length = o["rho"] / norm(g1) if o.get("normalize", True) else o["rho"]
        g2 = gradient([v + length * g for v, g in zip(x, g1, strict=True)])
        direction = [
            (1 - o["alpha"]) * a
            + o["alpha"] * b
            - (dual if corrects else 0)
            + (v - v0) / o["lam"]
            + o["weight_decay"] * v
            for a, b, dual, v, v0 in zip(g1, g2, duals, x, start, strict=True)
        ]
        clip = min(1.0, o["max_grad_norm"] / (norm(direction) + 1e-6)) if o["max_grad_norm"] else 1.0
        x = [v - o["lr"] * clip * d for v, d in zip(x, direction, strict=True)]

        def closure() -> Tensor:
            optimizer.zero_grad(set_to_none=zeroes == "to None")
            value = loss(*params)
            value.backward()
            return value

        optimizer.step(closure)
        torch.testing.assert_close([p.detach() for p in params], x, rtol=0, atol=1e-13)


# ---- the methods it contains -----------------------------------------------------------------------------------------


def classifier(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, sam: bool = False) -> list[Tensor]:
    dtype = next(model.parameters()).dtype
    inputs, labels = random(24, 4, seed=6).to(dtype), torch.arange(24) % 3
    for k in range(steps):
        rows = slice(8 * (k % 3), 8 * (k % 3) + 8)

        def closure(rows: slice = rows) -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(inputs[rows]), labels[rows])
            loss.backward()
            return loss

        if sam:
            closure()
        optimizer.step(closure)
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
@pytest.mark.parametrize("without_ascent", [{"rho": 0.0}, {"alpha": 0.0}], ids=str)
def test_without_terms_it_is_sgd(without_ascent: dict[str, float], weight_decay: float) -> None:
    ours, theirs = classifier(torch.float32), classifier(torch.float32)
    optimizer = FedSpeed(ours.parameters(), lr=0.1, lam=math.inf, weight_decay=weight_decay, **without_ascent)
    optimizer.begin_round(None)
    sgd = torch.optim.SGD(theirs.parameters(), lr=0.1, weight_decay=weight_decay)
    expected = train(theirs, sgd, 1 if weight_decay else 10)  # the decay is rounded elsewhere: 1 ulp in a step
    ulp = torch.finfo(torch.float32).eps if weight_decay else 0.0
    torch.testing.assert_close(train(ours, optimizer, 1 if weight_decay else 10), expected, rtol=ulp, atol=ulp / 10)


def test_without_proximal_term_it_is_sam() -> None:
    ours, theirs = classifier(), classifier()
    optimizer = FedSpeed(ours.parameters(), lr=0.1, lam=math.inf, rho=0.3)
    optimizer.begin_round(None)
    sam = SAM(theirs.parameters(), torch.optim.SGD, rho=0.3, lr=0.1)
    got, expected = train(ours, optimizer, 10), train(theirs, sam, 10, sam=True)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)  # it takes the norm in single precision


def test_without_correction_it_is_fedprox() -> None:
    losses, _, _ = bowls(3, seed=0)
    mu, lr, x = 0.4, 0.1, random(5, seed=1)
    run = Federation(losses, x, 6, options={"lr": lr, "lam": 1 / mu, "rho": 0.0, "correction": False})
    for _ in range(5):
        models = []
        for loss in losses:
            w = x.clone()
            for _ in range(6):
                leaf = w.clone().requires_grad_()
                objective = loss(leaf) + mu / 2 * (leaf - x).square().sum()
                w = w - lr * torch.autograd.grad(objective, leaf)[0]
            models.append(w)
        x = sum(models) / len(models)
        torch.testing.assert_close(run.round(), x, rtol=0, atol=1e-14)
        assert all(not dual.any() for [dual] in run.duals.values())


def test_without_ascent_it_is_feddyn() -> None:
    """By FedDyn's own listing (arXiv 2111.04263), where ``alpha`` is ``1 / lam`` and the server's ``h`` a gradient."""
    losses, _, _ = bowls(5, seed=0)
    lam, lr, clients = 0.6, 0.1, 5
    theta, h, gradients = random(5, seed=1), torch.zeros(5).double(), [torch.zeros(5).double()] * clients
    run = Federation(losses, theta, 4, options={"lr": lr, "lam": lam, "rho": 0.0})
    generator = torch.Generator().manual_seed(2)
    for _ in range(10):
        active = torch.randperm(clients, generator=generator)[:3].tolist()
        models = {}
        for i in active:
            w = theta.clone()
            for _ in range(4):
                leaf = w.clone().requires_grad_()
                objective = losses[i](leaf) - gradients[i] @ leaf + (leaf - theta).square().sum() / (2 * lam)
                w = w - lr * torch.autograd.grad(objective, leaf)[0]
            models[i] = w
            gradients[i] = gradients[i] - (w - theta) / lam
        h = h - sum(models[i] - theta for i in active) / (lam * clients)
        theta = sum(models.values()) / len(active) - lam * h
        torch.testing.assert_close(run.round(active), theta, rtol=0, atol=1e-13)


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_foreach_equals_the_loop_to_one_ulp(options: dict[str, Any]) -> None:
    runs = []
    for foreach in (True, False, None):
        model = classifier(torch.float32)
        optimizer = FedSpeed(model.parameters(), foreach=foreach, local_steps=3, **options)
        runs.append(train(model, optimizer, 8))
    for other in runs[1:]:
        torch.testing.assert_close(runs[0], other, rtol=torch.finfo(torch.float32).eps, atol=0)
