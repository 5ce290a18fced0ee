import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fulgurite.plugins.equilibrium import ConvField, DenseField, EquilibriumField, SoftmaxPool2d, jacobian_symmetry
from tests.plugins.equilibrium.dense import SIZES, dense_field, inputs, jacobian


def test_a_dense_field_is_a_sum_over_its_connections() -> None:
    field, x = dense_field(), inputs()
    with torch.no_grad():
        for bias in field.biases.values():
            bias.uniform_()
    r = inputs(len(x), field.n, seed=2)
    l1, l2, out = r.split(list(SIZES.values()), 1)
    w, b = field.weights, field.biases
    expected = [
        F.linear(x, w["in-l1"], b["in-l1"]) + l2 @ w["l2-l1"].T,
        F.linear(l1, w["l1-l2"], b["l1-l2"]) + out @ w["out-l2"].T,
        F.linear(l2, w["l2-out"], b["l2-out"]),
    ]
    torch.testing.assert_close(field(r, x), torch.cat(expected, 1))
    torch.testing.assert_close(field.at(x)(r), field(r, x), rtol=0, atol=0)
    torch.testing.assert_close(field.recurrent_matrix().expand(len(x), -1, -1), jacobian(field, r, x))


def test_images_are_flattened() -> None:
    field, x = dense_field(), inputs()
    r = inputs(len(x), field.n)
    assert torch.equal(field(r, x.view(-1, 2, 3)), field(r, x))


def test_a_loop_has_no_reciprocal_matrix() -> None:
    connections = {"in-l1": True, "l1-out": True, "out-l1": False, "out-out": False}
    field = DenseField(3, {"l1": 2, "out": 4}, connections)
    assert set(field.weights) == set(connections)
    assert set(field.biases) == {"in-l1", "l1-out"}
    assert field.weights["out-out"].shape == (4, 4)


@pytest.mark.parametrize("angle", [0.0, 30.0, 90.0])
def test_feedback_starts_at_its_angle(angle: float) -> None:
    torch.manual_seed(0)
    dense = DenseField(8, {"l1": 300, "out": 200}, angle=angle)
    conv = ConvField((1, 8, 8), (60,), 90, angle=angle)
    pairs = [
        (dense.weights["l1-out"], dense.weights["out-l1"].T),
        (conv.kernels["l1-out"], conv.kernels_back["out-l1"]),
    ]
    for forward, back in pairs:
        cosine = F.cosine_similarity(forward.flatten(), back.flatten(), 0).item()
        assert cosine == pytest.approx(math.cos(math.radians(angle)), abs=5 / math.sqrt(forward.numel()))
        assert (back.norm() / forward.norm()).item() == pytest.approx(1, abs=0.05)


def test_gain_scales_the_matrices() -> None:
    fields = [dense_field(gain=gain, seed=0) for gain in (0.5, 1.0)]
    for half, whole in zip(fields[0].weights.values(), fields[1].weights.values(), strict=True):
        torch.testing.assert_close(2 * half, whole)


def energy(field: ConvField, r: Tensor, x: Tensor) -> Tensor:
    """What a convolutional chain with shared kernels and without biases descends: each pair counts once."""
    blocks = zip(r.split([*field.sizes.values()], 1), field._shapes, strict=True)
    parts = [part.unflatten(1, shape) for part, shape in blocks]
    total = (field.pool(F.conv2d(x, field.kernels["in-l1"], padding=1)) * parts[0]).sum()
    for kernel, pre, post in zip([*field.kernels.values()][1:], parts, parts[1:], strict=False):
        padding = 0 if post is parts[-1] else 1
        total = total + (field.pool(F.conv2d(pre, kernel, padding=padding)) * post).sum()
    return total


@pytest.mark.parametrize(("size", "channels"), [(8, (3,)), (16, (2, 3))])
def test_a_symmetric_convolutional_field_is_the_gradient_of_an_energy(size: int, channels: tuple[int, ...]) -> None:
    field, x = ConvField((2, size, size), channels, 4, angle=0.0).double(), inputs(2, 2, size, size)
    r = inputs(2, field.n, seed=3).requires_grad_()
    (expected,) = torch.autograd.grad(energy(field, r, x), r)
    torch.testing.assert_close(field(r, x), expected)
    torch.testing.assert_close(jacobian_symmetry(field, r, x), torch.ones(2).double(), rtol=0, atol=1e-12)


def test_biases_leave_a_symmetric_field_symmetric() -> None:
    """They shift all of a window alike, and the shares of a softmax do not see that."""
    field, x = ConvField((1, 16, 16), (3, 2), 4, angle=0.0).double(), inputs(2, 1, 16, 16)
    r = inputs(2, field.n, seed=3)
    for bias in field.biases.values():
        torch.nn.init.normal_(bias)
    torch.testing.assert_close(jacobian_symmetry(field, r, x), torch.ones(2).double(), rtol=0, atol=1e-12)
    torch.nn.init.normal_(field.kernels_back["out-l2"])
    assert jacobian_symmetry(field, r, x).max() < 0.9


@pytest.mark.parametrize("make", [dense_field, lambda: ConvField((1, 8, 8), (3,), 4).double()], ids=["dense", "conv"])
def test_fields_are_holomorphic(make: object) -> None:
    field: EquilibriumField = make()  # type: ignore[operator]
    x = inputs() if isinstance(field, DenseField) else inputs(5, 1, 8, 8)
    r = torch.complex(inputs(5, field.n, seed=2), 0.3 * inputs(5, field.n, seed=3))
    e, step = inputs(5, field.n, seed=4), 1e-5
    along_1 = (field(r + step * e, x) - field(r - step * e, x)) / (2 * step)
    along_i = (field(r + 1j * step * e, x) - field(r - 1j * step * e, x)) / (2j * step)
    torch.testing.assert_close(along_1, along_i, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(field(r.real.to(r.dtype), x).real, field(r.real, x))


def test_the_papers_network() -> None:
    field = ConvField()
    assert field.sizes == {"l1": 128 * 16 * 16, "l2": 256 * 8 * 8, "l3": 512 * 4 * 4, "out": 512}
    assert field.kernels["l3-out"].shape == (512, 512, 3, 3)
    assert field.kernels_back["l2-l1"].shape == (256, 128, 3, 3)


@pytest.mark.parametrize("edge", [4, 5])
def test_soft_pooling_is_its_formula(edge: int) -> None:
    z, t = inputs(2, 3, edge, edge) * 5, 0.7
    windows = F.unfold(z[:, :, :4, :4].reshape(6, 1, 4, 4), 2, stride=2)  # (6, 4, 4): window, place
    weights = torch.exp(windows / t)
    expected = ((windows * weights).sum(1) / weights.sum(1)).view(2, 3, 2, 2)
    torch.testing.assert_close(SoftmaxPool2d(2, t)(z), expected)


def test_soft_pooling_lies_between_mean_and_maximum() -> None:
    z = inputs(2, 3, 4, 4) * 100
    torch.testing.assert_close(SoftmaxPool2d(2, 1e-3)(z), F.max_pool2d(z, 2))
    torch.testing.assert_close(SoftmaxPool2d(2, 1e9)(z), F.avg_pool2d(z, 2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("edge", [4, 5])
def test_the_transpose_of_pooling_is_autograds(edge: int) -> None:
    z, v, pool = inputs(2, 3, edge, edge).requires_grad_(), inputs(2, 3, 2, 2, seed=2), SoftmaxPool2d(2, 0.5)
    (expected,) = torch.autograd.grad((pool(z) * v).sum(), z)
    torch.testing.assert_close(pool.transpose(z, v), expected)


def test_pooling_survives_large_values() -> None:
    z = torch.tensor([[[[1e4, 0.0], [0.0, 0.0]]]])
    assert SoftmaxPool2d()(z).item() == 1e4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DenseField(4, {"l1": 3}, {"in-l2": True}), "`connections` has 'in-l2'.*blocks of `sizes`"),
        (lambda: DenseField(4, {"l1": 3}, {"l1-in": True}), "`connections` has 'l1-in'"),
        (lambda: DenseField(4, {"l1": 3}, {"l1": True}), "`connections` has 'l1'"),
        (lambda: DenseField(4, {"l1": 3}, {}), "`connections` is empty"),
        (lambda: DenseField(4, {"l1": 0}), "`sizes` has the entry 'l1': 0"),
        (lambda: DenseField(4, {"in": 3}), "`sizes` has the entry 'in'"),
        (lambda: DenseField(4, {"a-b": 3}), "`sizes` has the entry 'a-b'"),
        (lambda: DenseField(4, {}), "`sizes` is empty"),
        (lambda: DenseField(0, {"l1": 3}), "`in_features` must be at least 1"),
        (lambda: DenseField(4, {"l1": 3}, gain=-1.0), "`gain` must be at least 0, got -1.0"),
        (lambda: DenseField(4, {"l1": 3}, angle=math.inf), "`angle` must be a number of degrees, got inf"),
        (lambda: ConvField((8, 8), (4,), 4), r"`in_shape` must be \(C, H, W\), got \(8, 8\)"),
        (lambda: ConvField((1, 8, 8), (), 4), "`channels` is empty"),
        (lambda: ConvField((1, 8, 8), (4,), 4, pool=0), "`pool` must be at least 1.* got 0"),
        (lambda: ConvField((1, 8, 8), (4, 4), 4), r"`out` would have maps of \(0, 0\) pixels"),
        (lambda: ConvField((1, 16, 16), (4,), 4), r"`out` would have maps of \(3, 3\) pixels"),
        (lambda: ConvField((1, 8, 8), (4,), 4, kernel_size=2), "`kernel_size` must be odd.* got 2"),
        (lambda: SoftmaxPool2d(0), "`kernel_size` must be at least 1"),
        (lambda: SoftmaxPool2d(2, 0.0), "`temperature` must be above 0, got 0.0"),
        (lambda: dense_field().block("l9"), "there is no block 'l9'"),
    ],
)
def test_bad_input(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DenseField(4, [3, 2]), r"`sizes` must map .*, got \[3, 2\]"),  # type: ignore[arg-type]
        (
            lambda: DenseField(4, {"l1": 3}, [("in", "l1")]),  # type: ignore[arg-type]
            r"`connections` must map \"pre-post\" .*, got \[\('in', 'l1'\)\]",
        ),
    ],
)
def test_dictionaries_are_asked_for(make: object, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make()  # type: ignore[operator]


@pytest.mark.parametrize(("blocks", "pool", "kernel_size"), [(1, 2, 3), (2, 2, 3), (3, 2, 3), (2, 1, 5)])
def test_the_smallest_image(blocks: int, pool: int, kernel_size: int) -> None:
    edge = pool**blocks * (pool + kernel_size - 1)
    options = {"channels": (2,) * blocks, "out_features": 2, "pool": pool, "kernel_size": kernel_size}
    assert ConvField((1, edge, edge), **options).sizes["out"] == 2
    with pytest.raises(ValueError, match="`out` would have maps"):
        ConvField((1, edge - 1, edge - 1), **options)
