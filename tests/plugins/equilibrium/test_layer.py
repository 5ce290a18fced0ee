import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from fulgurite.plugins.equilibrium import ConvField, DenseField, DSiLU, EquilibriumField, EquilibriumLayer
from tests.plugins.equilibrium.dense import BATCH, INPUTS, dense_field, inputs, system

FINE: dict[str, Any] = {"free_steps": 600, "nudged_steps": 300, "tol": 0.0}


def layer(angle: float = 90.0, gain: float = 0.5, **options: Any) -> EquilibriumLayer:
    return EquilibriumLayer(dense_field(angle, gain), **FINE | options)


def gradients(net: EquilibriumLayer, x: Tensor, factor: float = 1.0, reduce: str = "mean") -> dict[str, Tensor]:
    net.zero_grad()
    x = x.clone().requires_grad_()
    out = net(x)
    loss = mse_loss(out, inputs(len(x), out.shape[1], seed=7).to(out.dtype), reduction=reduce)
    (factor * loss).backward()
    assert x.grad is not None
    return {"x": x.grad} | {name: param.grad.clone() for name, param in net.field.named_parameters()}


def assert_close(one: dict[str, Tensor], two: dict[str, Tensor], factor: float = 1.0, atol: float = 0.0) -> None:
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name] * factor, two[name], rtol=1e-9 if not atol else 0, atol=atol, msg=name)


@pytest.mark.parametrize("angle", [0.0, 90.0])
def test_the_adjoint_is_unrolled_autograd(angle: float) -> None:
    unrolled = gradients(layer(angle, gradient="unroll"), inputs())
    assert_close(gradients(layer(angle, gradient="adjoint"), inputs()), unrolled, atol=1e-14)


def test_propagation_is_unrolled_autograd_for_a_symmetric_field() -> None:
    unrolled = gradients(layer(0.0, gradient="unroll"), inputs())
    found = gradients(layer(0.0, beta=0.05, points=8), inputs())
    assert_close(found, unrolled, atol=1e-10)


def test_propagation_is_the_untransposed_system_for_others() -> None:
    net, x = layer(90.0, beta=0.05, points=8), inputs()
    found = gradients(net, x)
    exact = gradients(layer(90.0, gradient="adjoint"), x)
    u = net.last_state
    d = torch.linalg.solve(system(net.field, net.activation, u, x), net.last_backward.signal)
    torch.testing.assert_close(net.last_backward.response, d, rtol=0, atol=1e-10)
    for name in ("weights.in-l1", "weights.l1-l2", "x"):
        cosine = torch.cosine_similarity(found[name].flatten(), exact[name].flatten(), 0)
        assert cosine < 0.99, name


def test_gradcheck_holds_where_the_field_is_symmetric_and_not_elsewhere() -> None:
    """Perturbing one weight of a symmetric field is what its own gradient is of, so that the check may do that."""
    x = inputs(2, INPUTS).requires_grad_()

    def check(angle: float) -> bool:
        net = layer(angle, beta=0.05, points=8)
        return torch.autograd.gradcheck(net, (x,), atol=1e-6, rtol=0, raise_exception=False)

    assert check(0.0)
    assert not check(90.0)


@pytest.mark.parametrize("points", [2, 3, 4])
@pytest.mark.parametrize("factor", [1000.0, 2.0**-20])
def test_gradients_scale_with_the_loss(points: int, factor: float) -> None:
    net = layer(points=points)
    assert_close(gradients(net, inputs()), gradients(net, inputs(), factor), factor)


def test_a_mean_is_a_sum_over_the_batch_size() -> None:
    net = layer()
    size = BATCH * net.field.sizes["out"]
    assert_close(gradients(net, inputs(), reduce="sum"), gradients(net, inputs()), 1 / size)


def test_a_sample_learns_alike_in_any_batch() -> None:
    net, x = layer(), inputs()
    target = inputs(BATCH, 4, seed=7)
    whole = gradients(net, x, reduce="sum")
    total = {name: torch.zeros_like(value) for name, value in whole.items() if name != "x"}
    for row, wanted in zip(x, target, strict=True):
        net.zero_grad()
        mse_loss(net(row[None]), wanted[None], reduction="sum").backward()
        for name, param in net.field.named_parameters():
            total[name] += param.grad
    assert_close(total, {name: whole[name] for name in total}, atol=1e-12)


def test_a_sample_without_gradient_has_no_response() -> None:
    net, x = layer(), inputs().requires_grad_()
    net(x)[0].sum().backward()
    assert torch.count_nonzero(x.grad[1:]) == 0
    assert torch.count_nonzero(x.grad[0]) == INPUTS


def test_an_empty_batch_gives_zeros() -> None:
    for points in (2, 4):
        net = layer(points=points, tol=1e-6)
        out = net(inputs(0, INPUTS))
        assert out.shape == (0, 4)
        out.sum().backward()
        assert all(torch.count_nonzero(param.grad) == 0 for param in net.parameters())


class Spare(EquilibriumField):
    """With a weight that nothing reads."""

    def __init__(self) -> None:
        super().__init__({"out": 4})
        self.used, self.spare = nn.Linear(INPUTS, 4), nn.Parameter(torch.ones(3))

    def forward(self, r: Tensor, x: Tensor) -> Tensor:
        return self.used(x) - 0.1 * r


def test_a_weight_without_a_path_gets_zeros_and_a_frozen_one_nothing() -> None:
    net = EquilibriumLayer(Spare())
    net.field.used.bias.requires_grad_(False)
    net(torch.rand(2, INPUTS)).sum().backward()
    assert torch.equal(net.field.spare.grad, torch.zeros(3))
    assert net.field.used.bias.grad is None
    assert net.field.used.weight.grad.abs().sum() > 0


def test_no_graph_no_nudge() -> None:
    net = layer()
    with torch.no_grad():
        assert not net(inputs()).requires_grad
    with torch.inference_mode():
        net(inputs())
    net.requires_grad_(False)
    assert not net(inputs()).requires_grad
    assert net.last_backward is None


@pytest.mark.parametrize("gradient", ["ep", "adjoint", "unroll"])
def test_what_a_call_leaves(gradient: Any) -> None:
    net, x = layer(gradient=gradient, tol=1e-8), inputs()
    out = net(x)
    assert 0 < net.last_steps < 600
    assert net.last_steps % 10 == 0
    assert net.last_residual < 1e-8
    assert not net.last_state.requires_grad
    torch.testing.assert_close(net.activation(net.last_state)[:, net.readout], out)
    torch.testing.assert_close(net.field(net.activation(net.last_state), x), net.last_state, rtol=0, atol=1e-8)


def test_any_block_can_be_read_out() -> None:
    net, x = layer(readout="l2"), inputs()
    assert net(x).shape == (BATCH, 5)
    assert_close(
        gradients(layer(0.0, readout="l1", beta=0.05, points=8), x),
        gradients(layer(0.0, readout="l1", gradient="unroll"), x),
        atol=1e-10,
    )


def test_not_to_converge_is_no_error() -> None:
    net = EquilibriumLayer(dense_field(gain=8.0), free_steps=7, nudged_steps=2)
    net(inputs()).sum().backward()
    assert net.last_steps == 7
    assert net.last_residual > 1e-3


def test_two_calls_before_one_backward_keep_apart() -> None:
    net, x, y = layer(), inputs(), inputs(seed=8)
    (net(x).sum() + net(y).sum()).backward()
    both = [param.grad.clone() for param in net.parameters()]
    net.zero_grad()
    net(x).sum().backward()
    net(y).sum().backward()
    for one, param in zip(both, net.parameters(), strict=True):
        torch.testing.assert_close(one, param.grad)


def test_weights_changed_before_the_backward_pass_are_noticed() -> None:
    net = layer()
    out = net(inputs())
    with torch.no_grad():
        net.field.weights["l1-l2"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("loss", [lambda out: out.square().sum(), lambda out: out.sum()], ids=["square", "sum"])
@pytest.mark.parametrize("gradient", ["ep", "adjoint"])
def test_there_is_no_second_derivative_and_the_message_says_so(gradient: Any, loss: Any) -> None:
    net, x = layer(gradient=gradient), inputs().requires_grad_()
    weight = net.field.weights["l1-l2"]
    for wanted in (x, weight):
        (grad,) = torch.autograd.grad(loss(net(x)), wanted, create_graph=True)
        assert grad.requires_grad
        with pytest.raises(RuntimeError, match="no second derivative with `gradient` 'ep' or 'adjoint': use 'unroll'"):
            torch.autograd.grad(grad.square().sum(), wanted, retain_graph=True, allow_unused=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            grad.square().sum().backward()


def test_a_backward_pass_leaves_one_record() -> None:
    net, x, other = layer(gradient="adjoint"), inputs(), inputs(2, INPUTS, seed=8)
    out = net(x)
    with torch.no_grad():
        net(other)
    out.sum().backward()
    record = net.last_backward
    assert torch.equal(record.input, x)
    torch.testing.assert_close(net.field(net.activation(record.state), x), record.state, rtol=0, atol=1e-12)
    exact = torch.linalg.solve(system(net.field, net.activation, record.state, x).mT, record.signal)
    torch.testing.assert_close(record.response, exact, rtol=0, atol=1e-12)
    assert not any(tensor.requires_grad for tensor in record)
    assert len(net.last_state) == 2


@pytest.mark.parametrize("gradient", ["ep", "adjoint", "unroll"])
@pytest.mark.parametrize("angle", [0.0, 90.0])
def test_lbfgs_takes_the_weights(gradient: Any, angle: float) -> None:
    net, x = layer(angle, gradient=gradient, free_steps=50, nudged_steps=10), inputs()
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = net(x).square().sum()
        loss.backward()
        return loss

    before = closure().item()
    assert all(p.is_contiguous() and p.grad.is_contiguous() for p in net.parameters())
    optimizer.step(closure)
    assert closure().item() < before


class Clamped(EquilibriumField):
    """Without complex numbers."""

    def forward(self, r: Tensor, x: Tensor) -> Tensor:
        return x[:, :4] + 0.1 * r.clamp(0, 1)


def test_a_field_without_complex_numbers_is_named() -> None:
    out = EquilibriumLayer(Clamped({"out": 4}), points=4)(inputs().requires_grad_())
    message = r"`points` is 4, above 2, .* field that is holomorphic .*; Clamped is not \(clamp .*\): use at most 2"
    with pytest.raises(ValueError, match=message):
        out.sum().backward()


@pytest.mark.parametrize("activation", [torch.relu, "relu", nn.ReLU], ids=str)
def test_an_activation_is_a_module(activation: Any) -> None:
    with pytest.raises(
        TypeError, match=r"`activation` must be a module, got .*(?i:relu).*use an instance, .* nn.ReLU\(\)"
    ):
        EquilibriumLayer(dense_field(), activation)


def test_a_field_is_one() -> None:
    with pytest.raises(TypeError, match="`field` must be an EquilibriumField, such as a DenseField, got Linear"):
        EquilibriumLayer(nn.Linear(2, 2))  # type: ignore[arg-type]


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Tanh(), nn.Softplus(), nn.Hardtanh(), nn.Dropout(0.0), DSiLU()])
def test_elementwise_activations_pass(activation: nn.Module) -> None:
    EquilibriumLayer(dense_field(), activation)


@pytest.mark.parametrize("points", [2, 4])
def test_autocast_is_off_inside(points: int) -> None:
    net, x = EquilibriumLayer(dense_field().float(), points=points), inputs().float()
    plain = gradients(net, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(gradients(net, x), plain)
        net(x.bfloat16()).sum().backward()  # as a layer before it leaves it
    assert net.last_state.dtype == torch.float32


def test_it_keeps_no_steps() -> None:
    def saved(net: EquilibriumLayer) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            net(inputs()).sum()
        return sum(sizes.values())

    short, long = (saved(layer(free_steps=steps)) for steps in (10, 150))
    unrolled = saved(layer(gradient="unroll", free_steps=150))
    assert short == long <= unrolled / 20  # the rest is weights, of which there are as many as activities here


def test_convolutions_learn_too() -> None:
    torch.manual_seed(0)
    net = EquilibriumLayer(ConvField((1, 8, 8), (3,), 4, angle=0.0).double(), DSiLU(), beta=0.05, points=4, **FINE)
    exact = copy.deepcopy(net)
    exact.gradient = "unroll"
    assert_close(gradients(net, inputs(2, 1, 8, 8)), gradients(exact, inputs(2, 1, 8, 8)), atol=1e-7)


def test_it_can_be_copied_and_saved_after_a_backward_pass() -> None:
    net = layer()
    gradients(net, inputs())
    twin = copy.deepcopy(net)
    twin.load_state_dict(net.state_dict())
    assert torch.equal(twin(inputs()), net(inputs()))
    assert all(key.startswith("field.") for key in net.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"points": 0}, "`points` .* at least 1, got 0"),
        ({"beta": 0.0}, "`beta` .* above 0, got 0.0"),
        ({"beta": -1.0}, "`beta` .* above 0, got -1.0"),
        ({"step_size": 0.0}, r"^`step_size` must be in \(0, 1\], got 0.0"),
        ({"step_size": 1.1}, r"^`step_size` must be in \(0, 1\], got 1.1"),
        ({"free_steps": 0}, "`free_steps` must be at least 1, got 0"),
        ({"nudged_steps": 0}, "`nudged_steps` must be at least 1, got 0"),
        ({"tol": -1.0}, "`tol` must be at least 0, got -1.0"),
        ({"gradient": "backprop"}, "`gradient` must be 'ep', 'adjoint' or 'unroll', got 'backprop'"),
        ({"readout": "l9"}, r"`readout` must be a block of the field \(l1, l2, out\), got 'l9'"),
        ({"activation": nn.PReLU()}, r"`activation` \(PReLU\) has weights"),
        ({"activation": nn.Softmax(-1)}, "`activation` must be elementwise, got Softmax"),
        ({"activation": nn.Softmax(0)}, "`activation` must be elementwise, got Softmax"),
        ({"activation": nn.LayerNorm(16, elementwise_affine=False)}, "must be elementwise, got LayerNorm"),
        ({"activation": nn.Dropout(0.01)}, "`activation` must give each unit one value, .* got Dropout"),
        ({"activation": nn.RReLU()}, "`activation` must give each unit one value, .* got RReLU"),
        ({"activation": nn.GLU()}, "`activation` must give each unit one value, .* got GLU"),
        ({"activation": nn.ReLU(), "points": 4}, "ReLU is not .* ReLU, or any max.*: use ScaledSigmoid or DSiLU"),
    ],
    ids=str,
)
def test_bad_input(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EquilibriumLayer(dense_field(), **options)


def test_it_is_built_without_storage() -> None:
    with torch.device("meta"):
        net = EquilibriumLayer(DenseField(INPUTS, {"out": 3}), points=4)
    assert all(param.is_meta for param in net.parameters())


def test_two_points_take_any_activation() -> None:
    EquilibriumLayer(dense_field(), nn.ReLU(), points=2)(inputs()).sum().backward()


def test_bad_batches_and_weights() -> None:
    with pytest.raises(ValueError, match=r"`x` must be real and floating, got torch.int64: convert it"):
        layer()(torch.zeros(2, INPUTS, dtype=torch.long))
    with pytest.raises(ValueError, match=r"weights are torch.bfloat16, too coarse to settle: .* 'bf16-mixed'"):
        EquilibriumLayer(DenseField(INPUTS, {"out": 3}).bfloat16())(inputs())
