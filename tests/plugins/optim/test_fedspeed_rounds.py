"""FedSpeed's rounds, what becomes of its state, how it sits in a Trainer, and what it refuses."""

import gc
import io
import math
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pytorch_optimizer.base.exception import NoClosureError, NoComplexParameterError, NoSparseGradientError
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
from torchmetrics import MeanMetric
from typing_extensions import override

from fulgurite.plugins.optim import FederatedOptimizer, FedSpeed, FedSpeedServer
from fulgurite.plugins.optim.fedspeed import check_pair
from tests.suites.fits import fit
from tests.suites.models import Regressor


def parameters(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, dtype=dtype, generator=generator)) for shape in ((2, 3), (4,))]


class Closure:
    """A smooth loss of two parameters, another at each step; counts its runs."""

    def __init__(self, optimizer: FedSpeed, params: list[nn.Parameter]) -> None:
        self.optimizer, self.params, self.runs, self.batch = optimizer, params, 0, 1.0

    def __call__(self) -> Tensor:
        self.runs += 1
        self.optimizer.zero_grad()
        a, b = self.params
        loss = (a.sum() * b / 9 + self.batch).sin().sum() + (a.square().sum() + b.square().sum()) / 2
        loss.backward()
        return loss

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.batch += 1
            self.optimizer.step(self)


def opened(params: list[nn.Parameter], dual: list[Tensor] | None = None, **options: Any) -> tuple[FedSpeed, Closure]:
    optimizer = FedSpeed(params, **{"lr": 0.05, "lam": 0.9, **options})
    optimizer.begin_round(dual)
    return optimizer, Closure(optimizer, params)


def values(params: Iterable[nn.Parameter]) -> list[Tensor]:
    return [p.detach().clone() for p in params]


# ---- rounds ----------------------------------------------------------------------------------------------------------


def test_speaks_the_protocol() -> None:
    assert isinstance(FedSpeed(parameters()), FederatedOptimizer)
    assert not isinstance(torch.optim.SGD(parameters()), FederatedOptimizer)


def test_anchor_stays_where_the_round_began() -> None:
    params = parameters()
    start = values(params)
    optimizer, closure = opened(params)
    closure.steps(3)
    assert not torch.equal(params[0], start[0])
    torch.testing.assert_close([optimizer.state[p]["anchor"] for p in params], start, rtol=0, atol=0)


def test_each_step_pulls_towards_the_anchor() -> None:
    p = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = FedSpeed([p], lr=0.1, lam=0.5)
    optimizer.begin_round(None)
    with torch.no_grad():
        p.add_(1)
    optimizer.step(lambda: (p * 0).sum().backward())
    torch.testing.assert_close(p.detach(), torch.full((2,), 2 - 0.1 / 0.5, dtype=torch.float64))


def test_none_goes_on_with_the_present_dual() -> None:
    runs = []
    for given in (False, True):
        params = parameters()
        optimizer, closure = opened(params)
        closure.steps(3)
        duals = optimizer.end_round()
        optimizer.begin_round(duals if given else None)
        closure.steps(3)
        runs.append((optimizer.end_round(), duals, values(params)))
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=0)
    assert not torch.equal(runs[0][0][0], runs[0][1][0])


def test_duals_belong_to_the_caller() -> None:
    params = parameters()
    given = [torch.ones_like(p) for p in params]
    optimizer, closure = opened(params, given)
    closure.steps(2)
    returned = optimizer.end_round()
    before = [dual.clone() for dual in returned]
    optimizer.begin_round(returned)
    closure.steps(2)
    optimizer.end_round()
    torch.testing.assert_close(returned, before, rtol=0, atol=0)
    torch.testing.assert_close(given, [torch.ones_like(p) for p in params], rtol=0, atol=0)


def test_loading_an_empty_state_forgets_the_round_and_the_dual() -> None:
    params = parameters()
    optimizer, closure = opened(params)
    groups = optimizer.state_dict()["param_groups"]
    start = values(params)
    results = []
    for _ in range(2):  # of two clients the second knows nothing of the first
        optimizer.load_state_dict({"state": {}, "param_groups": groups})
        with pytest.raises(RuntimeError, match="without an open round"):
            optimizer.end_round()
        with torch.no_grad():
            for p, value in zip(params, start, strict=True):
                p.copy_(value)
        optimizer.begin_round(None)
        closure.batch = 1.0
        closure.steps(3)
        results.append((values(params), optimizer.end_round()))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


@pytest.mark.parametrize("after", [2, 3, 5], ids=["first step of a round", "last", "middle"])
def test_goes_on_exactly_from_the_middle_of_a_round(after: int) -> None:
    def run(resumed_after: int | None) -> tuple[list[Tensor], list[Tensor], int]:
        params = parameters()
        duals = [torch.full_like(p, 0.3) for p in params]
        optimizer, closure = opened(params, duals, local_steps=3, alpha=0.5, max_grad_norm=2.0)
        for step in range(8):
            if step == resumed_after:
                torch.save(optimizer.state_dict(), buffer := io.BytesIO())
                buffer.seek(0)
                optimizer = FedSpeed(params, local_steps=3, alpha=0.5, max_grad_norm=2.0)
                optimizer.load_state_dict(torch.load(buffer, weights_only=True))
                closure.optimizer = optimizer
            closure.steps(1)
        return values(params), optimizer.end_round(), optimizer.param_groups[0]["local_step"]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(run(after), run(None), rtol=0, atol=0)


@pytest.mark.parametrize("server", ["all", "active"])
def test_local_steps_are_rounds_of_one_client(server: str) -> None:
    alone, federated = parameters(), parameters()
    Closure(optimizer := FedSpeed(alone, lr=0.05, lam=0.9, local_steps=4, server=server), alone).steps(12)
    client = FedSpeed(federated, lr=0.05, lam=0.9)
    master = FedSpeedServer(federated)
    check_pair(client, master, full_participation=True)
    closure = Closure(client, federated)
    for _ in range(3):
        start = values(federated)
        client.begin_round(None)
        closure.steps(4)
        client.end_round()
        for p, x in zip(federated, start, strict=True):
            p.grad = x - p.detach()
            p.data.copy_(x)
        master.step()
    torch.testing.assert_close(values(alone), values(federated), rtol=0, atol=1e-14)
    assert optimizer.round_metrics == pytest.approx(client.round_metrics)
    assert master.round_metrics["fedspeed/dual_residual"] == pytest.approx(client.round_metrics["fedspeed/dual_norm"])


def test_parameters_may_join_within_a_round() -> None:
    params = parameters()
    optimizer = FedSpeed(params[:1], lr=0.05, lam=0.9)
    optimizer.begin_round(None)
    closure = Closure(optimizer, params)
    closure.steps(1)
    optimizer.add_param_group({"params": params[1:]})
    joined_at = params[1].detach().clone()
    closure.steps(2)
    dual = optimizer.end_round()[1]
    torch.testing.assert_close(dual, (joined_at - params[1].detach()) / 0.9, rtol=0, atol=1e-14)


# ---- a step ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "runs"), [({}, 2), ({"alpha": 0.5}, 2), ({"rho": 0.0}, 1), ({"alpha": 0.0}, 1)])
def test_runs_the_closure_as_often_as_needed(options: dict[str, float], runs: int) -> None:
    _, closure = opened(parameters(), **options)
    closure.steps(1)
    assert closure.runs == runs


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("rho", [0.1, 0.0])
def test_gradients_that_are_not_finite_make_no_step(bad: float, rho: float) -> None:
    params = parameters()
    optimizer, closure = opened(params, rho=rho)
    before = values(params)

    def broken() -> Tensor:
        loss = closure()
        params[0].grad[0, 0] = bad
        return loss

    assert optimizer.step(broken).isfinite()
    assert closure.runs == 1
    assert optimizer.param_groups[0]["skipped_steps"] == 1
    torch.testing.assert_close(values(params), before, rtol=0, atol=0)
    closure.steps(1)
    assert optimizer.param_groups[0]["skipped_steps"] == 1
    assert not torch.equal(params[0], before[0])


@pytest.mark.parametrize("eps", [0.0, 1e-12])
def test_no_gradient_no_ascent(eps: float) -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = FedSpeed([p], eps=eps)
    optimizer.begin_round(None)
    seen = []

    def closure() -> None:
        optimizer.zero_grad()
        seen.append(p.detach().clone())
        (p * 0).sum().backward()

    optimizer.step(closure)
    torch.testing.assert_close(seen, [torch.ones(3)] * 2, rtol=0, atol=0)
    assert torch.equal(p, torch.ones(3))


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("has_gradient_in", [0, 1])
def test_a_gradient_in_one_pass_alone(has_gradient_in: int, foreach: bool) -> None:
    """Without one in the first, a parameter is left alone; without one in the second, that gradient is zero."""
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = FedSpeed([p, q], lr=0.1, lam=math.inf, rho=1.0, alpha=0.5, foreach=foreach)
    optimizer.begin_round(None)
    runs = []

    def closure() -> None:
        optimizer.zero_grad()
        runs.append(q.detach().clone())
        (p.sum() + (3 * q.sum() if len(runs) - 1 == has_gradient_in else 0)).backward()

    optimizer.step(closure)
    assert torch.equal(runs[1], runs[0]) == (has_gradient_in == 1)  # not ascended
    torch.testing.assert_close(q.detach(), torch.full((2,), 1 - 0.1 * 0.5 * 3 if has_gradient_in == 0 else 1.0))
    torch.testing.assert_close(p.detach(), torch.full((2,), 0.9))


def test_a_failing_second_pass_leaves_the_weights() -> None:
    params = parameters()
    optimizer, closure = opened(params)
    before = values(params)

    def failing() -> Tensor:
        loss = closure()
        if closure.runs == 2:
            raise KeyboardInterrupt
        return loss

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(failing)
    torch.testing.assert_close(values(params), before, rtol=0, atol=0)


# ---- the server ------------------------------------------------------------------------------------------------------


def test_server_step_by_hand() -> None:
    p, idle = (nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64)) for _ in range(2))
    server = FedSpeedServer([p, idle], lr=0.5)
    x, h = p.detach().clone(), torch.zeros(2, dtype=torch.float64)
    for share, update in ((1.0, [0.5, -1.0]), (0.25, [2.0, 0.5])):
        d = torch.tensor(update, dtype=torch.float64)
        server.param_groups[0]["participation"] = share
        p.grad = -d
        server.step()
        h = h + share * d
        x = x + 0.5 * (d + h)
        torch.testing.assert_close(p.detach(), x, rtol=0, atol=1e-15)
    assert torch.equal(idle, torch.tensor([1.0, 2.0], dtype=torch.float64))
    assert server.round_metrics == {}  # it was never told `lam`


def test_server_knows_the_residual_of_one_lam_only() -> None:
    params = parameters()
    server = FedSpeedServer(params)
    check_pair(FedSpeed([{"params": params[:1]}, {"params": params[1:], "lam": 3.0}]), server, True)
    for p in params:
        p.grad = torch.ones_like(p)
    server.step()
    assert server.round_metrics == {}
    check_pair(FedSpeed(params, lam=2.0), server, True)
    server.step()  # the second: h is -2 in each of ten entries
    assert server.round_metrics == {"fedspeed/dual_residual": pytest.approx(2 * math.sqrt(10) / 2)}


SGD = torch.optim.SGD
PLAIN = [{"correction": False}, {"lam": math.inf}]


@pytest.mark.parametrize("full", [True, False])
def test_pairs_that_are_right(full: bool) -> None:
    pairs = [(FedSpeed(parameters()), FedSpeedServer(parameters())), (SGD(parameters()), SGD(parameters()))]
    for options in PLAIN:  # no dual variables: any server but ours, whatever `server` says
        pairs += [(FedSpeed(parameters(), server=mode, **options), SGD(parameters())) for mode in ("all", "active")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for client, server in pairs:
            check_pair(client, server, full)
        if full:
            check_pair(FedSpeed(parameters(), server="active"), SGD(parameters()), full)


def test_active_server_warns_when_some_sit_out() -> None:
    with pytest.warns(UserWarning, match=r'server="active".* no fixed point .*FedSpeedServer'):
        check_pair(FedSpeed(parameters(), server="active"), SGD(parameters()), full_participation=False)


@pytest.mark.parametrize(
    ("client", "server", "message"),
    [
        (lambda p: FedSpeed(p), SGD, r"`server_optimizer` is SGD: pass FedSpeedServer"),
        (lambda p: SGD(p), FedSpeedServer, r"FedSpeedServer.* needs FedSpeed\(server=\"all\", correction=True\)"),
        (lambda p: FedSpeed(p, server="active"), FedSpeedServer, "FedSpeedServer.* needs FedSpeed"),
        (lambda p: FedSpeed(p, **PLAIN[0]), FedSpeedServer, "FedSpeedServer.* needs FedSpeed"),
        (lambda p: FedSpeed(p, **PLAIN[1]), FedSpeedServer, "finite `lam` in all groups"),
        (
            lambda p: FedSpeed([{"params": p[:1]}, {"params": p[1:], **PLAIN[1]}]),
            FedSpeedServer,
            "finite `lam` in all groups",
        ),
        (lambda p: FedSpeed([{"params": p[:1]}, {"params": p[1:], **PLAIN[1]}]), SGD, "pass FedSpeedServer"),
        (lambda p: FedSpeed(p, local_steps=5), FedSpeedServer, "`local_steps` of FedSpeed is 5, .*to the strategy"),
    ],
)
def test_pairs_that_are_silently_wrong(client: Callable[..., Any], server: type, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_pair(client(parameters()), server(parameters()), full_participation=True)


# ---- under a Trainer -------------------------------------------------------------------------------------------------


class Counting(Regressor):
    """Counts the samples that its metric and its batch norm see."""

    def __init__(self, quietly: bool, **options: Any) -> None:
        super().__init__(blocks=1)
        self.quietly, self.options = quietly, options
        self.norm, self.seen, self.calls = nn.BatchNorm1d(6), MeanMetric(), 0
        self.counted: list[int] = [0]

    @override
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.counted[0] += 1
        self.seen.update(torch.ones(len(batch[0])))
        return super().training_step([self.norm(batch[0]), batch[1]], batch_idx)

    @override
    def configure_optimizers(self) -> FedSpeed:
        return FedSpeed(self.parameters(), module=self if self.quietly else None, **self.options)


@pytest.mark.parametrize("quietly", [True, False])
def test_two_passes_a_step_and_each_sample_counted_once(quietly: bool, tmp_path: Path) -> None:
    module = Counting(quietly, local_steps=4)
    counted = module.counted  # within quiet the module has a list of its own
    forwards: list[int] = []
    module.head.register_forward_hook(lambda *_: forwards.append(1))
    fit(tmp_path, module, "auto", devices=1, max_steps=10)
    assert module.trainer.global_step == 10
    assert len(forwards) == 20
    once = 1 if quietly else 2
    assert counted[0] == 10 * once
    assert float(module.seen.weight) == 10 * 4 * once
    assert int(module.norm.num_batches_tracked) == 10 * once


def test_rounds_under_a_trainer_go_as_by_hand(tmp_path: Path) -> None:
    def module() -> Regressor:
        torch.manual_seed(3)
        return Regressor(blocks=1, make_optimizer=lambda params: FedSpeed(params, lr=0.05, local_steps=3))

    trained, by_hand = module(), module()
    torch.manual_seed(4)
    fit(tmp_path, trained, "auto", devices=1, max_steps=16)
    optimizer = by_hand.configure_optimizers()
    torch.manual_seed(4)
    for inputs, targets in by_hand.train_dataloader():

        def closure(inputs: Tensor = inputs, targets: Tensor = targets) -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(by_hand(inputs), targets)
            loss.backward()
            return loss

        optimizer.step(closure)
    torch.testing.assert_close(values(trained.parameters()), values(by_hand.parameters()), rtol=0, atol=0)


def test_without_rounds_warns_once() -> None:
    optimizer = FedSpeed(params := parameters())
    with pytest.warns(UserWarning, match=r"nothing will end.*FederatedStrategy.*`local_steps`") as caught:
        Closure(optimizer, params).steps(5)
    assert len(caught) == 1


def test_module_is_held_weakly_and_not_saved() -> None:
    params, module = parameters(), nn.Linear(2, 2)
    optimizer, closure = opened(params, module=module)
    closure.steps(1)
    assert "module" not in optimizer.state_dict()["param_groups"][0]
    del module
    gc.collect()
    assert optimizer._module() is None
    closure.steps(1)


def test_refuses_to_accumulate_batches(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`accumulate_grad_batches` must be 1 with FedSpeed, got 3: .*batch size"):
        fit(tmp_path, Counting(True, local_steps=4), "auto", devices=1, accumulate_grad_batches=3)


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", 0.0),
        ("lr", -0.1),
        ("lr", math.nan),
        ("lam", 0.0),
        ("lam", -1.0),
        ("lam", math.nan),
        ("rho", -0.1),
        ("rho", math.nan),
        ("alpha", -0.1),
        ("alpha", 1.1),
        ("weight_decay", -0.1),
        ("weight_decay", 10.0),
        ("eps", -1e-12),
        ("max_grad_norm", 0.0),
        ("max_grad_norm", -1.0),
        ("local_steps", 0),
        ("server", "some"),
    ],
)
def test_refuses_values_out_of_range(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"`{name}` .*got {value!r}"):
        FedSpeed(parameters(), **{name: value})


def test_refuses_them_in_a_group_too() -> None:
    with pytest.raises(ValueError, match=r"`lam` .*got -1"):
        FedSpeed([{"params": parameters(), "lam": -1}])


def test_warns_when_steps_overshoot_the_proximal_term() -> None:
    with pytest.warns(UserWarning, match=r"`lr` \(0.1\) is not below `lam` \(0.1\)"):
        FedSpeed(parameters(), lr=0.1, lam=0.1)


def test_refuses_a_step_without_closure() -> None:
    with pytest.raises(NoClosureError, match=r"FedSpeed requires closure.*use bf16-mixed or 32-true"):
        FedSpeed(parameters()).step()


def test_refuses_sparse_complex_and_sharded(tmp_path: Path) -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = FedSpeed([p], local_steps=1)

    def closure() -> None:
        p.grad = torch.ones(3).to_sparse()

    with pytest.raises(NoSparseGradientError, match="FedSpeed"):
        optimizer.step(closure)
    with pytest.raises(NoComplexParameterError, match="FedSpeed"):
        FedSpeed([nn.Parameter(torch.ones(3, dtype=torch.complex64))])
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    sharded = distribute_tensor(torch.ones(3), init_device_mesh("cpu", (1,)))
    with pytest.raises(ValueError, match="`params` must not be sharded"):
        FedSpeed([nn.Parameter(sharded)])


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ([torch.ones(2, 3).double()], "`state` must have a tensor for each of the 2 parameters, got 1"),
        ([torch.ones(2, 3).double(), torch.ones(3).double()], r"`state\[1\]` .* parameter 1, \(4,\).* got \(3,\)"),
        ([torch.ones(2, 3), torch.ones(4).double()], r"`state\[0\]` .* parameter 0, .*float64, got .*float32"),
    ],
)
def test_refuses_a_state_that_does_not_fit(state: list[Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FedSpeed(parameters()).begin_round(state)


def test_refuses_rounds_out_of_order() -> None:
    optimizer = FedSpeed(parameters())
    with pytest.raises(RuntimeError, match="`end_round` was called without an open round: call `begin_round`"):
        optimizer.end_round()
    optimizer.begin_round(None)
    with pytest.raises(RuntimeError, match="`begin_round` was called in an open round: call `end_round`"):
        optimizer.begin_round(None)
    optimizer.end_round()
    optimizer.begin_round(None)


def test_refuses_the_state_of_another_optimizer() -> None:
    state = torch.optim.SGD(parameters(), lr=0.1).state_dict()
    with pytest.raises(ValueError, match=r"another optimizer than FedSpeed, .* no `lam`, .*fresh"):
        FedSpeed(parameters()).load_state_dict(state)
