"""Exponentiated gradient against its mirror map: identities, limits, the rule written out, and what it refuses."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils.data import DataLoader

from fulgurite.plugins.optim import ExponentiatedGradient, dale_groups, dale_init_
from tests.suites.fits import fit, make
from tests.suites.models import Regressor
from tests.suites.processes import in_processes

W = torch.tensor([0.5, -0.25, 2.0, -1.0], dtype=torch.float64)
G = torch.tensor([1.0, 1.0, -2.0, -0.5], dtype=torch.float64)
SETTINGS: list[dict[str, Any]] = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.3},
    {"momentum": 0.9, "nesterov": True},
    {"betas": (0.9, 0.99), "eps": 1e-6},
    {"hypentropy": 0.3, "momentum": 0.5},
    {"weight_decay": 0.2, "momentum": 0.9},
    {"hypentropy": 0.3, "weight_decay": 0.2},
    {"max_log_step": 0.02},
    {"maximize": True, "momentum": 0.9},
    {"normalize": "row", "norm": 2.0},
]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def stepped(w: Tensor, *gradients: Tensor, lr: float = 0.1, **options: Any) -> Tensor:
    p = nn.Parameter(w.clone())
    optimizer = ExponentiatedGradient([p], lr=lr, **options)
    for gradient in gradients:
        p.grad = gradient.clone()
        optimizer.step()
    return p.detach()


def assert_exact(got: Tensor, expected: Tensor, tolerance: float = 1e-14) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * 1e-3)


# ---- oracles and identities ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "options", "expected"),
    [
        (1, {}, [0.4524187090179798, -0.2762927295189119, 2.4428055163203397, -0.9512294245007140]),
        (
            3,
            {"momentum": 0.9},
            [w * math.exp(-0.1 * math.copysign(g, w * g) * 5.61) for w, g in zip(W, G, strict=True)],
        ),
        (1, {"hypentropy": 0.3}, [0.44409533394503115, -0.29036740835790636, 2.4473103774887286, -0.9490269745362645]),
    ],
    ids=["plain", "momentum", "hypentropy"],
)
def test_known_numbers(steps: int, options: dict[str, Any], expected: list[float]) -> None:
    assert_exact(stepped(W, *[G] * steps, **options), torch.tensor(expected, dtype=torch.float64))


@given(
    seed=st.integers(0, 2**16), scale=st.floats(-3, 3), b=st.sampled_from([0.01, 0.3, 1.0, 50.0]), lr=st.floats(0.01, 5)
)
def test_moves_the_mirror_coordinate_by_the_gradient(seed: int, scale: float, b: float, lr: float) -> None:
    w, g = random(20, seed=seed) * 10**scale, random(20, seed=seed + 1)
    w_sparse = stepped(w, g, lr=lr)
    moved = w.sign() * (w_sparse.abs().log() - w.abs().log())  # of logarithms about 10, which round
    torch.testing.assert_close(moved, -lr * g, rtol=1e-12, atol=1e-13)
    hypentropy = stepped(w, g, lr=lr, hypentropy=b)
    torch.testing.assert_close((hypentropy / b).asinh() - (w / b).asinh(), -lr * g, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("b", [0.0, 0.3, 10.0])
def test_two_steps_are_one_of_both_lengths(b: float) -> None:
    w, g = random(50, seed=0), random(50, seed=1)
    twice = stepped(stepped(w, g, lr=0.3, hypentropy=b), g, lr=0.9, hypentropy=b)
    assert_exact(twice, stepped(w, g, lr=1.2, hypentropy=b), 1e-12)


def test_hypentropy_is_eg_of_two_positive_copies() -> None:
    b, w = 0.4, random(30, seed=0)
    u = (w + (w.square() + b**2).sqrt()) / 2
    v = u - w
    p = nn.Parameter(w.clone())
    optimizer = ExponentiatedGradient([p], lr=0.2, hypentropy=b)
    for seed in range(1, 20):
        p.grad = random(30, seed=seed)
        u, v = u * (-0.2 * p.grad).exp(), v * (0.2 * p.grad).exp()
        optimizer.step()
        torch.testing.assert_close(p.detach(), u - v, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(u * v, torch.full_like(u, b**2 / 4), rtol=1e-12, atol=0)
    assert (p.detach().sign() != w.sign()).any()


def test_hypentropy_tends_to_gradient_descent() -> None:
    w, g = random(30, seed=0), random(30, seed=1)
    errors = [(stepped(w, g, lr=0.1 / b, hypentropy=b) - (w - 0.1 * g)).abs().max() for b in (1e2, 1e4)]
    assert errors[0] < 1e-4
    assert errors[1] < errors[0] / 1e3  # of second order in 1 / b


def test_hypentropy_tends_to_signed_eg() -> None:
    w, g = random(30, seed=0), random(30, seed=1)
    assert_exact(stepped(w, g, hypentropy=1e-9), stepped(w, g), 1e-12)


def test_a_long_hypentropy_step_is_exact() -> None:
    """The addition theorem alone would lose all digits here."""
    w = torch.tensor([3.0, -3.0], dtype=torch.float64)
    got = stepped(w, torch.tensor([1.0, -1.0], dtype=torch.float64), lr=20.0, hypentropy=1e-3)
    expected = [1e-3 * math.sinh(math.asinh(3 / 1e-3) - 20), -1e-3 * math.sinh(math.asinh(3 / 1e-3) - 20)]
    assert_exact(got, torch.tensor(expected, dtype=torch.float64), 1e-12)


def test_row_normalised_is_a_softmax() -> None:
    w, gradients = random(4, 7, seed=0).exp(), [random(4, 7, seed=seed) for seed in range(1, 6)]
    got = stepped(w / w.sum(1, keepdim=True), *gradients, normalize="row")
    assert_exact(got, (w.log() - 0.1 * sum(gradients)).softmax(1), 1e-13)
    vector = stepped(w[0], *[gradient[0] for gradient in gradients], normalize="row", norm=3.0)
    assert_exact(vector, 3 * (w[0].log() - 0.1 * sum(g[0] for g in gradients)).softmax(0), 1e-13)


def reference(w: Tensor, gradients: list[Tensor], lr: float, **o: Any) -> Tensor:
    """The rule element by element, in Python's floats."""
    result = []
    for i, x in enumerate(w.flatten().tolist()):
        buf, m, s = 0.0, 0.0, 0.0
        for t, gradient in enumerate(gradients, start=1):
            g = gradient.flatten()[i].item() * (-1 if o.get("maximize") else 1)
            if "betas" in o:
                b1, b2 = o["betas"]
                m, s = b1 * m + (1 - b1) * g, b2 * s + (1 - b2) * g * g
                d = (m / (1 - b1**t)) / (math.sqrt(s / (1 - b2**t)) + o["eps"])
            else:
                mu = o.get("momentum", 0.0)
                buf = g if t == 1 else mu * buf + (1 - o.get("dampening", 0.0)) * g
                d = g + mu * buf if o.get("nesterov") else buf if mu else g
            e = -lr * d
            if "max_log_step" in o:
                e = max(-o["max_log_step"], min(o["max_log_step"], e))
            b = o.get("hypentropy", 0.0)
            x = b * math.sinh(math.asinh(x / b) + e) if b else x * math.exp(math.copysign(e, e * x))
            x *= math.exp(-lr * o.get("weight_decay", 0.0))
        result.append(x)
    return torch.tensor(result, dtype=torch.float64).view_as(w)


@pytest.mark.parametrize("options", SETTINGS[:-1], ids=str)
@pytest.mark.parametrize("shape", [(3, 4), (600, 600)], ids=["small", "in blocks"])
def test_follows_the_rule(options: dict[str, Any], shape: tuple[int, int]) -> None:
    w, gradients = random(*shape, seed=0), [random(*shape, seed=seed) for seed in range(1, 5)]
    got = stepped(w, *gradients, **options)
    probe = slice(0, 300) if shape == (3, 4) else slice(262_000, 262_300)  # where one block ends and the next begins
    expected = reference(w.flatten()[probe], [gradient.flatten()[probe] for gradient in gradients], 0.1, **options)
    torch.testing.assert_close(got.flatten()[probe], expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_together_in_blocks_or_one_by_one(options: dict[str, Any]) -> None:
    shapes = [(5, 3), (7,), (700, 400), (), (640, 420), (2, 3, 3, 3)]
    start = [random(*shape, seed=i).float() for i, shape in enumerate(shapes)]
    start[4] = start[4].t().contiguous().t()  # strides that no flat view has
    runs = []
    for foreach in (None, True, False):
        params = [nn.Parameter(w.clone()) for w in start]
        optimizer = ExponentiatedGradient(params, foreach=foreach, **options)
        for step in range(3):
            for i, p in enumerate(params):
                late = i == 1 and step == 0  # then its buffers are younger than the others'
                p.grad = None if late else random(*shapes[i], seed=10 * step + i).float()
            optimizer.step()
        runs.append([p.detach() for p in params])
    for other in runs[1:]:
        torch.testing.assert_close(runs[0], other, rtol=2 * torch.finfo(torch.float32).eps, atol=0)


# ---- signs -----------------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 2**16), lr=st.floats(1e-3, 50), decay=st.floats(0, 50))
def test_no_weight_changes_its_sign_and_zeros_stay(seed: int, lr: float, decay: float) -> None:
    w = random(40, seed=seed).float()
    w[::4] = 0
    gradients = [random(40, seed=seed + k).float() for k in range(1, 4)]
    got = stepped(w, *gradients, lr=lr, weight_decay=decay, max_log_step=20.0)
    assert torch.equal(got.sign(), w.sign())


@pytest.mark.parametrize("options", [{}, {"normalize": "row"}], ids=str)
def test_an_underflow_keeps_the_sign(options: dict[str, Any]) -> None:
    w, g = torch.tensor([[1e-30, -1e-30, 1.0]]), torch.tensor([[1.0, -1.0, -1.0]])
    got = stepped(w, g, g, lr=80.0, **options)
    assert torch.equal(got.sign(), w.sign())
    assert got.isfinite().all() or not options
    assert (got.abs() >= torch.finfo(torch.float32).tiny).all()
    back = stepped(stepped(w, g, lr=80.0)[:, :2], -g[:, :2], lr=1.0)
    assert (back.abs() > torch.finfo(torch.float32).tiny).all()


def test_decay_shrinks_both_signs_alike() -> None:
    got = stepped(torch.tensor([0.5, -0.5]), torch.zeros(2), lr=0.1, weight_decay=2.0)
    torch.testing.assert_close(got, torch.tensor([0.5, -0.5]) * math.exp(-0.2))


def test_a_pruning_mask_survives_training() -> None:
    module = dale_init_(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1)))
    mask = torch.rand(16, 8) < 0.5
    with torch.no_grad():
        module[0].weight.mul_(mask)
    before = module[0].weight.detach().clone()
    optimizer = ExponentiatedGradient(dale_groups(module), lr=0.3, momentum=0.9)
    for _ in range(30):
        optimizer.zero_grad()
        module(torch.randn(16, 8)).square().mean().backward()
        optimizer.step()
    after = module[0].weight.detach()
    assert torch.equal(after.sign(), before.sign())
    assert not torch.equal(after, before)


def test_the_first_step_starts_from_the_users_weights() -> None:
    for options in ({}, {"hypentropy": 1.0}, {"hypentropy": 1e-3}):
        assert torch.equal(stepped(W, torch.zeros_like(W), **options), W)


# ---- with others -----------------------------------------------------------------------------------------------------


def test_groups_of_a_module_by_name() -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 3, bias=False))
    weights, others = dale_groups(module, bias_hypentropy=0.5)
    assert [name for name, _ in weights["params"]] == ["0.weight", "2.weight"]
    assert [name for name, _ in others["params"]] == ["0.bias", "1.weight", "1.bias"]
    assert (weights["hypentropy"], others["hypentropy"]) == (0.0, 0.5)
    optimizer = ExponentiatedGradient(dale_groups(module), lr=0.3)
    assert optimizer.param_groups[1]["param_names"] == ["0.bias", "1.weight", "1.bias"]
    assert [group["lr"] for group in optimizer.param_groups] == [0.3, 0.3]
    (only,) = dale_groups(module[2])
    ExponentiatedGradient([only])


def test_a_bias_of_zeros_leaves_zero_in_its_group() -> None:
    module = nn.Linear(3, 2)
    nn.init.zeros_(module.bias)
    optimizer = ExponentiatedGradient(dale_groups(module))
    module(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    assert (module.bias != 0).all()


def test_a_grad_scaler_skips_what_overflows() -> None:
    p = nn.Parameter(W.float())
    optimizer = ExponentiatedGradient([p], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale((p * torch.inf).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(p.detach(), W.float())
    p.grad = None
    scaler.scale((p * G.float()).sum()).backward()
    scaler.step(optimizer)
    torch.testing.assert_close(p.detach(), stepped(W.float(), G.float()))


@pytest.mark.parametrize("options", [{"momentum": 0.9}, {"betas": (0.9, 0.99)}], ids=str)
def test_a_compiled_step_is_the_same(options: dict[str, Any]) -> None:
    runs = []
    for compiled in (False, True):
        params = [nn.Parameter(random(4, 5, seed=1)), nn.Parameter(random(3, seed=2))]
        optimizer = ExponentiatedGradient(params, hypentropy=0.2, **options)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for seed in range(3):
            for i, p in enumerate(params):
                p.grad = random(*p.shape, seed=10 * seed + i)
            step()
        runs.append([p.detach() for p in params])
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-14, atol=0)


@pytest.mark.parametrize("options", [{"momentum": 0.85}, {"betas": (0.9, 0.99)}], ids=str)
def test_follows_a_cyclic_schedule(options: dict[str, Any]) -> None:
    p = nn.Parameter(W.clone())
    optimizer = ExponentiatedGradient([p], **options)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.3, total_steps=5)
    p.grad = G.clone()
    optimizer.step()
    scheduler.step()
    optimizer.step()
    assert optimizer.param_groups[0].get("betas", [optimizer.param_groups[0]["momentum"]])[0] != 0.9


def test_averaged_weights_keep_their_signs(tmp_path: Path) -> None:
    module = make(make_optimizer=lambda parameters: ExponentiatedGradient(parameters, lr=0.1))
    before = module.embed.weight.detach().clone()
    fit(
        tmp_path,
        module,
        "auto",
        devices=1,
        max_steps=-1,
        max_epochs=3,
        callbacks=[StochasticWeightAveraging(0.05, 0.5)],
    )
    assert torch.equal(module.embed.weight.detach().sign(), before.sign())
    assert not torch.equal(module.embed.weight.detach(), before)


def test_accumulated_and_clipped_batches(tmp_path: Path) -> None:
    module = make(make_optimizer=lambda parameters: ExponentiatedGradient(parameters, momentum=0.9))
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    options = {"accumulate_grad_batches": 3, "gradient_clip_val": 0.5}
    fit(tmp_path, module, "auto", devices=1, max_steps=6, **options)
    for name, p in module.named_parameters():
        assert torch.equal(p.detach().sign(), before[name].sign())
        assert not torch.equal(p.detach(), before[name])


def test_two_processes_with_the_same_batches_as_one(tmp_path: Path) -> None:
    def trained(folder: str, strategy: str, devices: int, batch: int) -> dict[str, Tensor]:
        module = make(make_optimizer=lambda parameters: ExponentiatedGradient(parameters, momentum=0.9), worker=0)
        loader = Sharded(batch)
        module.train_dataloader = loader.of(module)  # type: ignore[method-assign]
        return fit(tmp_path / folder, module, strategy, devices=devices, max_steps=8).read(0)["local"]

    one, two = trained("one", "auto", 1, 8), trained("two", "ddp_fork", 2, 4)
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-5, atol=1e-6)


class Sharded:
    """Each process reads its part of the same batches."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def of(self, module: LightningModule) -> Any:
        def loader() -> Any:
            inputs, targets = Regressor.train_dataloader(module).dataset.tensors  # type: ignore[arg-type]
            rank, world = module.trainer.global_rank, module.trainer.world_size
            rows = [slice(8 * k + self.batch * rank, 8 * k + self.batch * (rank + 1)) for k in range(8)]
            assert self.batch * world == 8
            return DataLoader([(inputs[row], targets[row]) for row in rows], batch_size=None)

        return loader


def test_can_be_built_from_yaml() -> None:
    optimizer = {
        "class_path": "fulgurite.plugins.optim.ExponentiatedGradient",
        "init_args": {"lr": 0.3, "momentum": 0.9, "hypentropy": 1.0, "normalize": None},
    }
    config = {"optimizer": optimizer, "trainer": {"accelerator": "cpu", "logger": False}}
    cli = LightningCLI(Bare, args=config, run=False, save_config_callback=None, auto_configure_optimizers=True)
    built = cli.model.configure_optimizers()
    assert isinstance(built, ExponentiatedGradient)
    assert (built.defaults["lr"], built.defaults["hypentropy"]) == (0.3, 1.0)


class Bare(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)


# ---- sharded ---------------------------------------------------------------------------------------------------------


def _sharded(rank: int, options: dict[str, Any]) -> list[Tensor]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3))
    nn.init.zeros_(module[0].bias)
    with torch.no_grad():
        module[0].weight[5:] = 0.0  # all of the second shard
    alone = copy.deepcopy(module)
    mesh = init_device_mesh("cpu", (2,))
    for layer in (module[0], module[2], module):
        fully_shard(layer, mesh=mesh)
        layer.set_force_sum_reduction_for_comms(True)  # asked for a mean, the gloo of torch 2.8 returns the sum
    optimizers = [ExponentiatedGradient(dale_groups(model), lr=0.1, **options) for model in (module, alone)]
    for step in range(3):
        inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        for model, optimizer, rows in (
            (module, optimizers[0], inputs[4 * rank : 4 * rank + 4]),
            (alone, optimizers[1], inputs),
        ):
            optimizer.zero_grad()
            model(rows).square().mean().backward()
            optimizer.step()
    assert all(isinstance(p, DTensor) for p in module.parameters())
    full = [p.full_tensor().detach() for p in module.parameters()]
    for mine, other in zip(full, alone.parameters(), strict=True):
        torch.testing.assert_close(mine, other.detach(), rtol=1e-5, atol=1e-6)
    return full


@pytest.mark.parametrize("options", [{"momentum": 0.9}, {"betas": (0.9, 0.99)}], ids=str)
def test_sharded_by_fsdp_as_alone(options: dict[str, Any]) -> None:
    first, second = in_processes(2, _sharded, options)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def _refuses_columns(rank: int) -> list[str]:
    mesh = init_device_mesh("cpu", (2,))
    messages = []
    for shape, dim in (((4, 4), 1), ((4,), 0)):
        sharded = nn.Parameter(distribute_tensor(torch.ones(shape), mesh, [Shard(dim)]))
        with pytest.raises(ValueError, match="`normalize=") as caught:
            ExponentiatedGradient([sharded], normalize="row")
        messages.append(str(caught.value))
    ExponentiatedGradient([nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)]))], normalize="row")
    dist.barrier()
    return messages


def test_rows_must_be_whole() -> None:
    for message in in_processes(2, _refuses_columns)[0]:
        assert "needs whole rows" in message


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -0.1}, "`lr` must be positive and finite, got -0.1"),
        ({"momentum": 1.0}, r"`momentum` must be in \[0, 1\), got 1.0"),
        ({"momentum": -0.1}, r"`momentum` must be in \[0, 1\), got -0.1"),
        ({"dampening": 1.5}, r"`dampening` must be in \[0, 1\], got 1.5"),
        ({"nesterov": True}, "`nesterov` needs `momentum` above 0"),
        ({"betas": (0.9, 0.99), "momentum": 0.5}, r"`betas` .* with `momentum` 0 \(it is 0.5\)"),
        ({"betas": (0.9, 1.0)}, r"`betas` must be two numbers in \[0, 1\)"),
        ({"eps": -1.0}, "`eps` must be at least 0, got -1.0"),
        ({"weight_decay": -1.0}, "`weight_decay` must be at least 0, got -1.0"),
        ({"hypentropy": -0.5}, "`hypentropy` must be at least 0 and finite, got -0.5"),
        ({"normalize": "column"}, "`normalize` must be None or \"row\", got 'column'"),
        ({"norm": 0.0}, "`norm` is the sum of a row and must be positive, got 0.0"),
        ({"max_log_step": 0.0}, "`max_log_step` must be positive, or None for no bound, got 0.0"),
        ({"zeros": "raise"}, r"`zeros` must be one of \('error', 'keep'\), got 'raise'"),
        (
            {"normalize": "row", "hypentropy": 1.0},
            '`normalize="row"` needs signs that stay, and a group has `hypentropy` 1.0, .* group of the weights alone',
        ),
        ({"lr": math.nan}, "`lr` .*got nan"),
    ],
    ids=str,
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExponentiatedGradient([nn.Parameter(torch.ones(2))], **options)
    with pytest.raises(ValueError, match=message):  # of a group as well
        ExponentiatedGradient([{"params": [nn.Parameter(torch.ones(2))], **options}])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.complex64], ids=str)
def test_refuses_other_types(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=rf"parameters are {dtype}, .* use `precision='bf16-mixed'`"):
        ExponentiatedGradient([nn.Parameter(torch.ones(2, dtype=dtype))])


def test_a_bf16_true_fit_does_not_start() -> None:
    module = make(make_optimizer=ExponentiatedGradient)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    with pytest.raises(TypeError, match="use `precision='bf16-mixed'` instead of 'bf16-true'"):
        Trainer(accelerator="cpu", precision="bf16-true", max_steps=1, **options).fit(module)


def test_refuses_sparse_gradients() -> None:
    embedding = nn.Embedding(5, 2, sparse=True)
    optimizer = ExponentiatedGradient(embedding.parameters())
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match=r"needs dense gradients, got torch.sparse_coo: .* `sparse=False`"):
        optimizer.step()


def test_a_tensor_of_zeros_is_named() -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    nn.init.zeros_(module[0].bias)
    message = (
        r"parameter {} is all zeros and cannot leave 0 under exponentiated gradient; give its group `hypentropy` above"
        r" 0 \(as `dale_groups` does\) or `zeros='keep'`"
    )
    for params, name in ((module.named_parameters(), "'0.bias'"), (module.parameters(), "1")):
        optimizer = ExponentiatedGradient(params)
        module(torch.ones(1, 2)).sum().backward()
        before = module[0].weight.detach().clone()
        for _ in range(2):
            with pytest.raises(ValueError, match=message.format(name)):
                optimizer.step()
        assert torch.equal(module[0].weight, before)
    kept = ExponentiatedGradient(module.parameters(), zeros="keep")
    kept.step()
    assert not module[0].bias.any()


def test_zeros_after_the_first_step_are_the_users() -> None:
    """Pruning a whole tensor later is no mistake, nor is going on from a checkpoint after it."""
    p = nn.Parameter(torch.ones(2))
    optimizer = ExponentiatedGradient([p])
    p.grad = torch.ones(2)
    optimizer.step()
    p.detach().zero_()
    optimizer.step()
    resumed = ExponentiatedGradient([p])
    resumed.load_state_dict(optimizer.state_dict())
    resumed.step()
    assert not p.any()


def test_biases_need_hypentropy() -> None:
    with pytest.raises(ValueError, match=r"`bias_hypentropy` must be positive, or biases of 0 never move, got 0.0"):
        dale_groups(nn.Linear(2, 2), bias_hypentropy=0.0)


def test_rows_of_the_weights_alone() -> None:
    module = nn.Linear(4, 3)
    with pytest.raises(ValueError, match="as `dale_groups` gives to biases: set `normalize` in the group of the weig"):
        ExponentiatedGradient(dale_groups(module), normalize="row")
    weights, others = dale_groups(module)
    optimizer = ExponentiatedGradient([weights | {"normalize": "row"}, others])
    module(torch.ones(2, 4)).square().sum().backward()
    optimizer.step()
    torch.testing.assert_close(module.weight.detach().abs().sum(1), torch.ones(3))


@pytest.mark.parametrize("other", [torch.optim.Adam, torch.optim.SGD])
def test_the_state_of_another_optimizer_is_refused(other: Any) -> None:
    module = nn.Linear(2, 2)
    optimizer = other(module.parameters(), lr=0.1)
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    mine = ExponentiatedGradient(module.parameters(), betas=(0.9, 0.99))
    with pytest.raises(ValueError, match=r"another optimizer than ExponentiatedGradient, .* no .*`hypentropy`.*fresh"):
        mine.load_state_dict(optimizer.state_dict())
    mine.load_state_dict(ExponentiatedGradient(module.parameters()).state_dict())
