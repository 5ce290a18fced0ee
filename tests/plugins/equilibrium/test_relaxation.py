from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fulgurite.plugins.equilibrium import (
    ConvField,
    DenseField,
    DSiLU,
    EquilibriumField,
    ScaledSigmoid,
    adjoint_response,
    free_phase,
    nudged_response,
)
from tests.plugins.equilibrium.dense import BATCH, Opaque, dense_field, inputs, system

PHI = ScaledSigmoid()
SETTLED = {"steps": 400}


def settled(field: EquilibriumField, x: Tensor, phi: nn.Module = PHI) -> tuple[Tensor, Tensor]:
    """A state and unit gradients on the last block."""
    with torch.no_grad():
        u, residual = free_phase(field, phi, x, steps=2000, step_size=0.7)
    assert residual < 1e-13
    g = torch.zeros_like(u)
    g[:, field.block("out")] = nn.functional.normalize(inputs(len(x), field.sizes["out"], seed=5) - 0.5, dim=1)
    return u, g


def exact(field: EquilibriumField, u: Tensor, x: Tensor, g: Tensor, phi: nn.Module = PHI) -> Tensor:
    return torch.linalg.solve(system(field, phi, u, x).mT, g)


def limit(field: EquilibriumField, u: Tensor, x: Tensor, g: Tensor, phi: nn.Module = PHI) -> Tensor:
    return torch.linalg.solve(system(field, phi, u, x), g)


def test_the_free_phase_ends_where_the_field_is_the_state() -> None:
    field, x = dense_field(), inputs()
    u, residual = free_phase(field, PHI, x, steps=500)
    torch.testing.assert_close(field(PHI(u), x), u, rtol=0, atol=1e-12)
    assert residual == (field(PHI(u), x) - u).abs().max()


def test_step_sizes_share_a_fixed_point_and_a_tolerance_stops() -> None:
    field, x = dense_field(), inputs()
    whole, _ = free_phase(field, PHI, x, steps=500)
    for options in ({"step_size": 0.5}, {"tol": 1e-10}, {"u0": whole + 0.1}):
        torch.testing.assert_close(free_phase(field, PHI, x, steps=500, **options)[0], whole, rtol=0, atol=1e-9)
    few, residual = free_phase(field, PHI, x, steps=3)
    assert residual == (field(PHI(few), x) - few).abs().max() > 1e-6


def test_a_network_that_swings_settles_by_smaller_steps() -> None:
    field = DenseField(1, {"out": 1}, {"in-out": True, "out-out": False}).double()
    nn.init.constant_(field.weights["out-out"], -3.0)  # where it is 1/2, its slope is 1: a step multiplies by -3
    nn.init.constant_(field.biases["in-out"], 2.0)
    x = torch.zeros(1, 1, dtype=torch.float64)
    _, swinging = free_phase(field, PHI, x, steps=500)
    u, residual = free_phase(field, PHI, x, steps=500, step_size=0.4)
    assert swinging > 0.1
    assert residual < 1e-12
    torch.testing.assert_close(u.item(), 0.5)


@pytest.mark.parametrize("phi", [ScaledSigmoid(), DSiLU()], ids=lambda phi: type(phi).__name__)
def test_the_response_is_exact_for_a_symmetric_field(phi: nn.Module) -> None:
    field, x = dense_field(angle=0.0, gain=0.5), inputs()
    u, g = settled(field, x, phi)
    d = nudged_response(field, phi, u, x, g, beta=0.05, points=8, **SETTLED)
    torch.testing.assert_close(d, exact(field, u, x, g, phi), rtol=0, atol=1e-10)


def test_the_response_for_other_fields_is_the_untransposed_system() -> None:
    field, x = dense_field(angle=90.0), inputs()
    u, g = settled(field, x)
    d = nudged_response(field, PHI, u, x, g, beta=0.05, points=8, **SETTLED)
    torch.testing.assert_close(d, limit(field, u, x, g), rtol=0, atol=1e-10)
    assert torch.cosine_similarity(d, exact(field, u, x, g)).max() < 0.99


def test_convolutions_respond_likewise() -> None:
    field, x = ConvField((1, 8, 8), (3,), 4, angle=90.0).double(), inputs(BATCH, 1, 8, 8)
    u, g = settled(field, x)
    d = nudged_response(field, PHI, u, x, g, beta=0.05, points=8, **SETTLED)
    torch.testing.assert_close(d, limit(field, u, x, g), rtol=0, atol=1e-10)
    a = adjoint_response(field, PHI, u, x, g, steps=400, tol=0)
    torch.testing.assert_close(a, exact(field, u, x, g), rtol=0, atol=1e-12)


def error(points: int, beta: float) -> float:
    field, x = dense_field(), inputs()
    u, g = settled(field, x)
    d = nudged_response(field, PHI, u, x, g, beta=beta, points=points, **SETTLED)
    return (d - limit(field, u, x, g)).norm().item()


@pytest.mark.parametrize(("points", "order"), [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (6, 6)])
def test_the_error_falls_as_the_power_of_the_radius(points: int, order: int) -> None:
    ratio = error(points, 0.2) / error(points, 0.1)
    assert 2 ** (order - 1) <= ratio <= 2 ** (order + 1)


def test_two_points_are_the_central_difference_bit_for_bit() -> None:
    field, x = dense_field(), inputs()
    u, g = settled(field, x)

    drive = torch.cat([g * 0.1, g * -0.1])  # both in one batch: products of other sizes round otherwise
    with torch.no_grad():
        v = u.repeat(2, 1)
        for _ in range(20):
            v = torch.lerp(v, field(PHI(v), x.repeat(2, 1)) + drive, 0.6)
        ahead, behind = PHI(v).chunk(2)
        expected = (ahead - behind) / 0.2
    assert torch.equal(nudged_response(field, PHI, u, x, g, beta=0.1, points=2, steps=20, step_size=0.6), expected)


@pytest.mark.parametrize("points", [3, 4, 7])
def test_conjugates_are_counted_and_not_computed(points: int) -> None:
    field, x, beta = dense_field(), inputs(), 0.3
    u, g = settled(field, x)
    with torch.no_grad():
        total = torch.zeros_like(u)
        for b in beta * torch.exp(2j * torch.pi * torch.arange(points, dtype=torch.float64) / points):
            v = u.to(torch.complex128)
            for _ in range(30):
                v = field(PHI(v), x) + g * b
            total += (PHI(v) / b).real / points
    d = nudged_response(field, PHI, u, x, g, beta=beta, points=points, steps=30)
    torch.testing.assert_close(d, total, rtol=0, atol=1e-13)


def test_a_state_dependent_nudge_has_the_same_limit() -> None:
    """The paper nudges by dL/dr at the nudged state; at b = 0 the two have the same derivative."""
    field, x, beta = dense_field(), inputs(), 1e-4
    u, _ = settled(field, x)
    out, target = field.block("out"), inputs(BATCH, field.sizes["out"], seed=9)
    mask = torch.zeros(field.n, dtype=torch.float64)
    mask[out] = 1
    whole = torch.zeros_like(u)
    whole[:, out] = target

    def ends(b: float) -> Tensor:
        v = u
        for _ in range(400):
            v = field(PHI(v), x) + b * mask * (PHI(v) - whole)
        return PHI(v)

    with torch.no_grad():
        theirs = (ends(beta) - ends(-beta)) / (2 * beta)
        ours = nudged_response(field, PHI, u, x, mask * (PHI(u) - whole), beta=beta, points=2, **SETTLED)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)


@pytest.mark.parametrize("wrap", [lambda field: field, Opaque], ids=["matrix", "products"])
@pytest.mark.parametrize("step_size", [1.0, 0.6])
def test_the_adjoint_is_the_transposed_system(wrap: Any, step_size: float) -> None:
    field, x = wrap(dense_field()), inputs()
    u, g = settled(field, x)
    d = adjoint_response(field, PHI, u, x, g, steps=400, tol=0, step_size=step_size)
    torch.testing.assert_close(d, exact(field, u, x, g), rtol=0, atol=1e-14)
    early = adjoint_response(field, PHI, u, x, g, steps=400, step_size=step_size)
    assert 0 < (early - d).abs().max() < 1e-5


def test_an_empty_batch_has_an_empty_response() -> None:
    field, x = dense_field(), inputs(0, 6)
    u, residual = free_phase(field, PHI, x, steps=20, tol=1e-6)
    assert (u.shape, residual) == ((0, field.n), 0)
    for points in (1, 2, 4):
        assert nudged_response(field, PHI, u, x, u, beta=0.1, points=points, steps=3).shape == u.shape
    assert adjoint_response(field, PHI, u, x, u, steps=20).shape == u.shape


class Short(EquilibriumField):
    def forward(self, r: Tensor, x: Tensor) -> Tensor:
        return r[:, 1:]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"points": 0}, "`points` .* at least 1, got 0"),
        ({"beta": 0.0}, "`beta` .* above 0, got 0.0"),
        ({"beta": float("nan")}, "`beta` .* above 0, got nan"),
        ({"steps": 0}, "`steps` .* at least 1, got 0"),
        ({"step_size": 1.5}, r"^`step_size` must be in \(0, 1\], got 1.5"),
        ({"step_size": 0.0}, r"^`step_size` must be in \(0, 1\], got 0.0"),
    ],
)
def test_bad_nudges(options: dict[str, Any], message: str) -> None:
    field, x = dense_field(), inputs()
    u = x.new_zeros(BATCH, field.n)
    with pytest.raises(ValueError, match=message):
        nudged_response(field, PHI, u, x, u, **{"beta": 0.1, "points": 2, "steps": 5} | options)


def test_bad_relaxations() -> None:
    with pytest.raises(ValueError, match=r"the field returned \(5, 3\) for a state of \(5, 4\)"):
        free_phase(Short({"out": 4}), PHI, inputs(), steps=5)
    with pytest.raises(ValueError, match=r"`steps` .* at least 1, got 0"):
        free_phase(dense_field(), PHI, inputs(), steps=0)
    u = inputs(BATCH, 16)
    with pytest.raises(ValueError, match="`step_size`"):
        adjoint_response(dense_field(), PHI, u, inputs(), u, steps=5, step_size=2.0)


def test_complex_nudges_are_refused_on_mps() -> None:
    class OnMps(Tensor):
        device = torch.device("mps")

    u = inputs(BATCH, 16)
    with pytest.raises(ValueError, match="MPS lacks complex kernels: use at most 2"):
        nudged_response(dense_field(), PHI, u.as_subclass(OnMps), inputs(), u, beta=0.1, points=4, steps=5)
