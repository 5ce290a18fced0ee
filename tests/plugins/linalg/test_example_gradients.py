"""The judge is ``vmap(grad)`` of the loss of one example, in float64."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from fulgurite.plugins.linalg import Uses, example_gradients, per_example_sq_norms

B, V, D, L = 6, 11, 8, 5
Seq = nn.Sequential


class Block(nn.Module):
    """A transformer block over token ids."""

    def __init__(self, tied: bool = False, padding: int | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, D, padding_idx=padding)
        self.norm, self.rms = nn.LayerNorm(D), nn.RMSNorm(D)
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.mlp = nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))
        self.head = nn.Linear(D, V, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.out((q @ k.transpose(-1, -2) / D**0.5).softmax(-1) @ v)
        return self.head(self.rms(x + self.mlp(x)))


class Recurrent(nn.Module):
    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), 4)
        for step in x.unbind(1):
            state = self.cell(step, state)
        return state


class Twice(nn.Module):
    """One linear map used twice, on axes of different length, and a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.map(self.map(x).tanh().mean(1))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(D, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Residual(nn.Linear):
    """Not what its base class computes."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.inner, x, use_reentrant=False))


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[[], nn.Module]
    x: tuple[int, ...]

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("mlp", lambda: nn.Sequential(nn.Linear(4, 7), nn.ReLU(inplace=True), nn.Linear(7, 3)), (B, 4)),
    Case("long linear", lambda: nn.Sequential(nn.Linear(4, 3, bias=False), nn.Tanh()), (B, 40, 4)),
    Case("short linear", lambda: nn.Linear(30, 20), (B, 3, 30)),
    Case("conv", lambda: Seq(nn.Conv2d(3, 6, 3, 2, 1), nn.ELU(), nn.Conv2d(6, 4, (1, 2), dilation=2)), (B, 3, 9, 7)),
    Case("grouped conv", lambda: Seq(nn.Conv2d(6, 4, 3, groups=2, padding=1, padding_mode="circular")), (B, 6, 5, 5)),
    Case("long conv", lambda: Seq(nn.Conv2d(1, 2, 3)), (B, 1, 12, 12)),
    Case("conv1d", lambda: Seq(nn.Conv1d(2, 4, 3, padding=2, dilation=2, padding_mode="reflect")), (B, 2, 11)),
    Case("transposed", lambda: Seq(nn.ConvTranspose2d(4, 6, 3, 2, 1, output_padding=1, groups=2)), (B, 4, 4, 4)),
    Case("transposed 1d", lambda: Seq(nn.ConvTranspose1d(3, 2, 4, 3, dilation=2)), (B, 3, 5)),
    Case("conv3d", lambda: Seq(nn.Conv3d(2, 3, 2)), (B, 2, 3, 3, 3)),
    Case("norms", lambda: Seq(nn.GroupNorm(2, 4), nn.BatchNorm1d(4).eval(), nn.ELU(), nn.LayerNorm([4, 5])), (B, 4, 5)),
    Case("instance norm", lambda: Seq(nn.InstanceNorm1d(4, affine=True)), (B, 4, 5)),
    Case("flat norms", lambda: Seq(nn.Linear(4, 6), nn.BatchNorm1d(6).eval(), nn.LayerNorm(6), nn.RMSNorm(6)), (B, 4)),
    Case("prelu", lambda: Seq(nn.Linear(4, 6), nn.PReLU(6)), (B, 4)),
    Case("transformer", Block, (B, L)),
    Case("padded", lambda: Block(padding=2), (B, L)),
    Case("tied", lambda: Block(tied=True), (B, L)),
    Case("tied and long", lambda: Block(tied=True), (B, 40)),
    Case("attention", Attention, (B, L, D)),
    Case("rnn cell", lambda: Recurrent(nn.RNNCell(3, 4)), (B, 7, 3)),
    Case("gru cell", lambda: Recurrent(nn.GRUCell(3, 4)), (B, 3, 3)),
    Case("twice", Twice, (B, 3, 4)),
    Case("overridden", lambda: Residual(4, 4), (B, 4)),
    Case("checkpointed", Checkpointed, (B, 4)),
]  # fmt: skip
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def data(case: Case) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if len(case.x) == 2 and case.x[1] in (L, 40):
        return torch.randint(V, case.x, generator=generator)
    return torch.randn(case.x, dtype=torch.float64, generator=generator)


def made(case: Case) -> nn.Module:
    torch.manual_seed(0)
    return case.make().double()


def losses(output: Tensor) -> Tensor:
    """One for each example, of different size."""
    weights = torch.linspace(0.5, 1.5, output[0].numel(), dtype=output.dtype)
    return (output.flatten(1).sin() * weights).sum(1).square()


def reference(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    params = {name: param.detach() for name, param in module.named_parameters() if param.requires_grad}

    def loss(params: dict[str, Tensor], row: Tensor) -> Tensor:
        return losses(functional_call(module, params, (row[None],)))[0]

    with sdpa_kernel([SDPBackend.MATH]):
        return vmap(grad(loss), in_dims=(None, 0))(params, x)


def one_by_one(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """As the reference, without vmap."""
    rows: list[dict[str, Tensor]] = []
    for row in x:
        params = dict(module.named_parameters())
        gradients = torch.autograd.grad(losses(module(row[None]))[0], list(params.values()))
        rows.append(dict(zip(params, gradients, strict=True)))
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def norms_of(
    module: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor] = losses, **options: Any
) -> dict[str, Tensor]:
    with per_example_sq_norms(module, **options) as norms:
        loss(module(x)).sum().backward()
    return norms


@every_case
@pytest.mark.parametrize("max_bytes", [2**28, 1], ids=["whole", "row by row"])
def test_equals_gradients_of_each_example(case: Case, max_bytes: int) -> None:
    module, x = made(case), data(case)
    expected = one_by_one(module, x) if case.name == "checkpointed" else reference(module, x)
    found = norms_of(module, x, max_bytes=max_bytes)
    assert found.keys() == expected.keys()
    for name, rows in expected.items():
        torch.testing.assert_close(found[name], rows.flatten(1).square().sum(1), rtol=1e-10, atol=1e-14)


@every_case
def test_shows_the_gradients_themselves(case: Case) -> None:
    module, x = made(case), data(case)
    found: dict[str, Tensor] = {}

    def visit(name: str, param: nn.Parameter, uses: Uses) -> None:
        found[name] = uses.gradients()
        torch.testing.assert_close(found[name].sum(0), param.grad)

    with example_gradients(module, visit):
        losses(module(x)).sum().backward()
    expected = one_by_one(module, x)
    for name, rows in expected.items():
        torch.testing.assert_close(found[name], rows, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("factor", [7.0, B])
def test_follows_the_scale_of_the_loss(factor: float) -> None:
    module, x = made(CASES[0]), data(CASES[0])
    scaled = norms_of(module, x, lambda output: factor * losses(output))
    for name, norm in norms_of(module, x).items():
        torch.testing.assert_close(scaled[name], factor**2 * norm)


def test_batch_norm_in_training_shows_what_a_row_adds() -> None:
    """With the statistics in the graph: the rows' shares make up the gradient."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double()
    x = torch.randn(B, 4, dtype=torch.float64)
    shares: dict[str, Tensor] = {}

    def visit(name: str, param: nn.Parameter, uses: Uses) -> None:
        shares[name] = uses.gradients()

    with example_gradients(module, visit):
        losses(module(x)).sum().backward()
    for name, param in module.named_parameters():
        torch.testing.assert_close(shares[name].sum(0), param.grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_does_not_overflow(dtype: torch.dtype) -> None:
    module = nn.Linear(4, 3).to(dtype)
    norms = norms_of(module, torch.full((2, 4), 300.0, dtype=dtype), lambda output: 300 * output)
    assert norms["weight"].dtype == torch.float32
    assert norms["weight"].tolist() == pytest.approx([12 * 9e4**2] * 2, rel=0.01)


def test_under_autocast() -> None:
    module, x = made(Case("", lambda: Block(), (B, L))).float(), data(Case("", Block, (B, L)))
    with per_example_sq_norms(module) as norms, torch.autocast("cpu", torch.bfloat16):
        losses(module(x)).sum().backward()
    exact = norms_of(module, x)
    for name, norm in norms.items():
        assert norm.dtype == torch.float32
        torch.testing.assert_close(norm, exact[name], rtol=0.2, atol=0.02 * float(exact[name].max()))


def test_batch_on_another_axis() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 6), nn.PReLU(), nn.LayerNorm(6)).double()
    x = torch.randn(7, B, 4, dtype=torch.float64)
    turned = norms_of(module, x, lambda output: losses(output.transpose(0, 1)), batch_dim=1)
    straight = norms_of(module, x.transpose(0, 1))
    for name, norm in straight.items():
        torch.testing.assert_close(turned[name], norm)


def test_attention_with_the_batch_second() -> None:
    torch.manual_seed(0)
    first = nn.MultiheadAttention(D, 2, batch_first=True).double()
    second = nn.MultiheadAttention(D, 2).double()
    second.load_state_dict(first.state_dict())
    x = torch.randn(B, L, D, dtype=torch.float64)
    with per_example_sq_norms(first) as norms:
        losses(first(x, x, x)[0]).sum().backward()
    turned = x.transpose(0, 1)
    with per_example_sq_norms(second, batch_dim=1) as others:
        losses(second(turned, turned, turned)[0].transpose(0, 1)).sum().backward()
    for name, norm in norms.items():
        torch.testing.assert_close(others[name], norm)
    with pytest.raises(RuntimeError, match="batch_first=True"), per_example_sq_norms(second):
        second(turned, turned, turned)[0].sum().backward()


@pytest.mark.parametrize("size", [2, 3])
def test_memory_is_that_of_a_chunk(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never is a gradient of all examples at once made."""
    inner = importlib.import_module("fulgurite.plugins.linalg.example_uses")
    largest = 0
    whole = inner._square

    def watched(gradients: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, len(gradients))
        return whole(gradients)

    monkeypatch.setattr(inner, "_square", watched)
    module = nn.Sequential(nn.Linear(16, 8, bias=False), nn.Tanh())
    norms_of(module, torch.randn(10, 50, 16), max_bytes=size * (16 * 8 + 50 * 24) * 4)
    assert largest == size


def test_leaves_the_backward_as_it_was() -> None:
    module, x = made(CASES[14]), data(CASES[14])
    losses(module(x)).sum().backward()
    plain = [param.grad for param in module.parameters()]
    module.zero_grad()
    state = torch.get_rng_state()
    norms_of(module, x)
    assert torch.equal(torch.get_rng_state(), state)
    for param, gradient in zip(module.parameters(), plain, strict=True):
        assert torch.equal(param.grad, gradient)
        assert not param._post_accumulate_grad_hooks
    assert not any(part._forward_hooks for part in module.modules())


def test_frozen_and_unused_parameters_do_not_enter() -> None:
    module = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
    module["a"].requires_grad_(False)
    with per_example_sq_norms(module) as norms:
        module["b"](module["a"](torch.randn(B, 4))).sum().backward()
    assert set(norms) == {"b.weight", "b.bias"}


def test_only_some() -> None:
    module, x = made(CASES[0]), data(CASES[0])
    everything = norms_of(module, x)
    some = norms_of(module, x, only=["2.weight"])
    assert set(some) == {"2.weight"}
    torch.testing.assert_close(some["2.weight"], everything["2.weight"])


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(L, D), nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.embed(torch.arange(L)))


class Outside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x @ self.inner.weight)


@pytest.mark.parametrize(
    ("module", "shape", "options", "message"),
    [
        (Positions(), (B, L, D), {}, r"`embed.weight`: `embed`, Embedding, returns 5 rows, .* the loss 6"),
        (Outside(), (B, 4), {}, r"`inner.weight`: used outside of a call of its module. Remedy: pass .*skip"),
        (nn.LSTM(4, 3, batch_first=True), (B, L, 4), {}, r"LSTM, fused: use `nn.LSTMCell`"),
        (nn.PReLU(), (B, 4), {"unsupported": "error"}, r"`weight`: ``, PReLU, has no rule"),
        (nn.LSTM(4, 3), (5, B, 4), {"unsupported": "skip", "batch_dim": 1}, r"LSTM, has no rule"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)  # fmt: skip
def test_refuses_what_is_no_example(module: nn.Module, shape: Any, options: Any, message: str) -> None:
    def loss(output: Any) -> Tensor:
        return output[0] if isinstance(output, tuple) else output

    with pytest.raises(RuntimeError, match=message):
        norms_of(module, torch.randn(shape), loss, **options)
    kept = {name for name, _ in module.named_parameters() if name.startswith("head")}
    if kept:
        assert set(norms_of(module, torch.randn(shape), loss, unsupported="skip")) == kept


def test_says_what_vmap_cannot_run() -> None:
    module = nn.TransformerEncoderLayer(D, 2, 2 * D, dropout=0.1, batch_first=True)
    with pytest.raises(RuntimeError, match=r"`self_attn`, MultiheadAttention, cannot run once an example"):
        norms_of(module, torch.randn(B, L, D))
    found = norms_of(module, torch.randn(B, L, D), unsupported="skip")
    assert "linear1.weight" in found
    assert "self_attn.in_proj_weight" not in found


def test_an_attention_mask_is_of_no_example() -> None:
    module, x = made(CASES[18]).attention, torch.randn(B, B, D, dtype=torch.float64)
    mask = torch.triu(torch.full((B, B), -9.0, dtype=torch.float64), 1)
    with per_example_sq_norms(module) as norms:
        losses(module(x, x, x, attn_mask=mask)[0]).sum().backward()
    params = {name: param.detach() for name, param in module.named_parameters()}

    def loss(params: dict[str, Tensor], row: Tensor) -> Tensor:
        row = row[None]
        return losses(functional_call(module, params, (row, row, row), {"attn_mask": mask})[0])[0]

    with sdpa_kernel([SDPBackend.MATH]):
        expected = vmap(grad(loss), in_dims=(None, 0))(params, x)
    for name, rows in expected.items():
        torch.testing.assert_close(norms[name], rows.flatten(1).square().sum(1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unsupported": "ignore"}, r"`unsupported` .*'ignore'"),
        ({"batch_dim": -1}, r"`batch_dim` .*-1"),
        ({"max_bytes": 0}, r"`max_bytes` .*0"),
        ({"only": ["bias2"]}, r"`only` .*\['weight', 'bias'\]"),
    ],
    ids=str,
)
def test_refuses_arguments(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        norms_of(nn.Linear(2, 2), torch.ones(2, 2), **options)
