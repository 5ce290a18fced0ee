import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fulgurite.plugins.comm.e3m0 import dequantize_e3m0, message_bytes, quantize_e3m0

FLOAT32_MAX = torch.finfo(torch.float32).max
BOTH = pytest.mark.parametrize("rounding", ["nearest", "stochastic"])

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)  # subnormal and huge ones too
moderate = st.floats(2**-30, 2**30, width=32).flatmap(lambda x: st.sampled_from([x, -x, 0.0]))  # far from any clamp
block_sizes = st.sampled_from([2, 4, 6, 32])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def roundtrip(x: Tensor, block_size: int = 128, **kwargs: Any) -> Tensor:
    return dequantize_e3m0(*quantize_e3m0(x, block_size, **kwargs), x.numel(), block_size)


def heavy_tailed(n: int) -> Tensor:
    rng = np.random.default_rng(0)
    return torch.from_numpy((rng.standard_cauchy(n) * np.exp(2 * rng.standard_normal(n))).astype(np.float32))


def nearest(magnitude: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """The index of the nearest of the ascending levels (last axis), by trying them all; the greater one of two."""
    distance = np.abs(magnitude[..., None] - levels)
    return levels.shape[-1] - 1 - distance[..., ::-1].argmin(-1)


def brute_force(x: Tensor, block_size: int) -> Tensor:
    """What nearest rounding means, in float64 and without a single bit trick."""
    padded = np.zeros(-(-len(x) // block_size) * block_size)
    padded[: len(x)] = x.double().numpy()
    rows = padded.reshape(-1, block_size)
    scale = nearest(np.abs(rows).max(1), 2.0 ** np.arange(-126, 128)) - 126.0
    levels = np.concatenate([np.zeros((len(rows), 1)), 2.0 ** (scale[:, None] + np.arange(-6, 1))], 1)
    index = nearest(np.abs(rows), levels[:, None, :])
    return torch.from_numpy(np.sign(rows) * np.take_along_axis(levels, index, 1)).flatten()[: len(x)].float()


# ---- nearest rounding


@pytest.mark.parametrize(("n", "block_size"), [(10_007, 32), (10_007, 128), (10_007, 256), (300_001, 128)])
def test_equals_search_for_the_nearest_level(n: int, block_size: int) -> None:  # 300 001 takes more than one chunk
    x = heavy_tailed(n)
    assert torch.equal(roundtrip(x, block_size), brute_force(x, block_size))


def test_block_may_be_larger_than_a_chunk() -> None:
    x = heavy_tailed(300_001)
    assert torch.equal(roundtrip(x, 200_000), brute_force(x, 200_000))


@given(st.lists(finite, min_size=1, max_size=40), block_sizes)
def test_equals_search_whatever_the_values(values: list[float], block_size: int) -> None:
    x = torch.tensor(values)
    assert torch.equal(roundtrip(x, block_size), brute_force(x, block_size))


@pytest.mark.parametrize("exponent", range(-8, 2))
@pytest.mark.parametrize("mantissa", [1.0, 1.5])
def test_midpoints_round_away_from_zero(exponent: int, mantissa: float) -> None:
    at = torch.tensor(mantissa * 2.0**exponent)
    around = torch.stack([at.nextafter(torch.tensor(0.0)), at, at.nextafter(torch.tensor(9.0)), torch.tensor(1.0)])
    assert torch.equal(roundtrip(around, 4), brute_force(around, 4))


@given(st.lists(moderate, min_size=1, max_size=40), st.integers(-60, 60))
def test_scales_with_powers_of_two(values: list[float], j: int) -> None:
    x = torch.tensor(values)
    assert torch.equal(roundtrip(x * 2.0**j, 6), roundtrip(x, 6) * 2.0**j)


@given(st.lists(finite, min_size=1, max_size=40), block_sizes)
def test_is_idempotent_and_odd(values: list[float], block_size: int) -> None:
    x = torch.tensor(values)
    once = roundtrip(x, block_size)
    assert torch.equal(roundtrip(once, block_size), once)
    assert torch.equal(roundtrip(-x, block_size), -once)


@pytest.mark.parametrize("exponent", [-126, 0, 126])
def test_scale_is_the_power_of_two_nearest_to_the_peak(exponent: int) -> None:
    midpoint = torch.tensor(1.5 * 2.0**exponent)
    _, scales = quantize_e3m0(torch.stack([midpoint.nextafter(torch.tensor(0.0)), -midpoint]).repeat_interleave(2), 2)
    assert (scales.int() - 127).tolist() == [exponent, exponent + 1]


def test_worked_example() -> None:
    x = torch.tensor([1, 0.75, 0.74, 0.0157, 0.0155, -1.5])  # smallest level 2^-5, threshold 2^-6 = 0.015625
    codes, scales = quantize_e3m0(x, 6)
    assert codes.tolist() == [6 | 6 << 4, 5 | 1 << 4, 0 | 15 << 4]  # the even value is the low half
    assert scales.tolist() == [127 + 1]  # 1.5 is as near to 2^1 as to 2^0
    assert dequantize_e3m0(codes, scales, 6, 6).tolist() == [1, 1, 0.5, 0.03125, 0, -2]


def test_gaussian_error_is_that_of_rounding_to_powers_of_two() -> None:
    # Rounding to the nearest of all 2^j; that the levels end below 2^(E-6) changes the sums by 1e-4 at most.
    def density(x: float) -> float:
        return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)

    levels = [(2.0**j, 0.75 * 2.0**j, 1.5 * 2.0**j) for j in range(-40, 6)]
    xq = sum(2 * level * (density(low) - density(high)) for level, low, high in levels)
    qq = sum(level**2 * (math.erf(high / math.sqrt(2)) - math.erf(low / math.sqrt(2))) for level, low, high in levels)
    error, cosine = math.sqrt(1 - 2 * xq + qq), xq / math.sqrt(qq)
    assert [round(figure, 3) for figure in (error, cosine, xq)] == [0.194, 0.981, 0.961]

    n = 1_000_000
    x = torch.randn(n, generator=seeded())
    q = roundtrip(x).double()
    x = x.double()
    residual = q - xq * x
    slope_sigma = (x * residual).std() / math.sqrt(n)  # of sum(xq) / sum(xx), as sum(xx) is n to first order
    square_sigma = ((q - x).square() - error**2 * x.square()).std() / math.sqrt(n)
    slope, square = x @ q / (x @ x), (q - x).square().sum() / (x @ x)
    assert slope.item() == pytest.approx(xq, abs=5 * slope_sigma.item() + 1e-4)
    assert square.item() == pytest.approx(error**2, abs=5 * square_sigma.item() + 1e-4)
    assert (slope * x.norm() / q.norm()).item() == pytest.approx(cosine, abs=5 * slope_sigma.item() + 1e-4)


# ---- stochastic rounding


def neighbours(x: Tensor, exponent: int) -> tuple[Tensor, Tensor]:
    """The levels under scale ``2^exponent`` that lie around each magnitude, float64."""
    levels = torch.tensor([0.0, *(2.0 ** (exponent - 6 + k) for k in range(7))], dtype=torch.float64)
    below = torch.searchsorted(levels, x.abs().double(), right=True) - 1
    return levels[below], levels[(below + 1).clamp(max=7)]


@pytest.mark.parametrize("exponent", [-126, -120, 0, 127])
def test_stochastic_mean_is_the_value(exponent: int) -> None:
    x = torch.tensor([1, -0.9, 0.7, 0.5001, -0.3, 0.13, 0.1, -0.017, 0.01, 0.003, -0.0008, 0]) * 2.0**exponent
    draws = 20_000
    q = roundtrip(x.repeat(draws), len(x), rounding="stochastic", generator=seeded()).view(draws, -1).double()
    low, high = neighbours(x, exponent)
    assert ((q.abs() == low) | (q.abs() == high)).all()
    assert (q * x >= 0).all()
    sigma = ((x.abs() - low) * (high - x.abs()) / draws).sqrt()
    assert ((q.mean(0) - x).abs() <= 5 * sigma).all()


def test_stochastic_mean_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    n = 1 << 10  # every multiple of 1/n once instead of random ones: then a mean of probability k/n is exact
    grid = torch.arange(n, dtype=torch.float64) / n
    x = torch.tensor([1, 513 / 1024, 1.75 * 2**-3, -5 / 1024 * 2**-6, 1023 / 1024 * 2**-6, 2**-16])
    monkeypatch.setattr(torch, "rand", lambda shape, **kwargs: grid[:, None].expand(shape))
    q = roundtrip(x.repeat(n), len(x), rounding="stochastic").view(n, -1)
    assert torch.equal(q.double().mean(0), x.double())


def test_stochastic_sees_values_far_below_the_smallest_level(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.tensor([1, 2**-40, 0, 2**-40])  # 2^-34 of the smallest level: uniform float32 has steps of 2^-24
    uniform = torch.tensor([[0, 2**-34, 0, 2**-35]], dtype=torch.float64)
    drawn: list[torch.dtype] = []
    monkeypatch.setattr(torch, "rand", lambda shape, *, dtype, **kwargs: drawn.append(dtype) or uniform)
    assert roundtrip(x, 4, rounding="stochastic").tolist() == [1, 0, 0, 2**-6]
    assert drawn == [torch.float64]


@given(st.lists(finite, min_size=1, max_size=40), block_sizes, st.integers(0, 2**16))
def test_stochastic_keeps_what_is_a_level(values: list[float], block_size: int, seed: int) -> None:
    q = roundtrip(torch.tensor(values), block_size, rounding="stochastic", generator=seeded(seed))
    assert torch.equal(roundtrip(q, block_size, rounding="stochastic", generator=seeded(seed + 1)), q)
    assert torch.equal(roundtrip(q, block_size), q)


@pytest.mark.parametrize(("peak", "exponent"), [(1.0, 0), (1.0000001, 1), (0.51, 0), (1e-42, -126), (2.0**127, 127)])
def test_stochastic_scale_is_the_smallest_power_of_two_not_exceeded(peak: float, exponent: int) -> None:
    _, scales = quantize_e3m0(torch.tensor([0.0, -peak]), 2, "stochastic", seeded())
    assert scales.tolist() == [127 + exponent]


def test_stochastic_draws_come_from_the_generator() -> None:
    x = heavy_tailed(1000)
    first, again, other = (roundtrip(x, rounding="stochastic", generator=seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        assert torch.equal(roundtrip(x, rounding="stochastic"), first)


def test_nearest_draws_nothing() -> None:
    generator = seeded()
    before = generator.get_state()
    quantize_e3m0(heavy_tailed(100), generator=generator)
    assert torch.equal(generator.get_state(), before)


# ---- layout and edges


@pytest.mark.parametrize("block_size", [2, 128, 130])
@pytest.mark.parametrize("n", [0, 1, 127, 128, 129, 1000])
def test_sizes_and_padding(n: int, block_size: int) -> None:
    x = heavy_tailed(n)
    codes, scales = quantize_e3m0(x, block_size)
    blocks = math.ceil(n / block_size)
    assert (codes.shape, scales.shape) == ((blocks * block_size // 2,), (blocks,))
    assert message_bytes(n, block_size) == torch.cat([codes, scales]).numel()
    padded = torch.cat([x, torch.zeros(blocks * block_size - n)])
    assert all(torch.equal(a, b) for a, b in zip(quantize_e3m0(padded, block_size), (codes, scales), strict=True))
    assert dequantize_e3m0(codes, scales, n, block_size).shape == (n,)


def test_a_byte_holds_two_codes_of_sign_and_exponent() -> None:
    magnitudes = [0.0, *(2.0 ** (k - 7) for k in range(1, 8))]
    x = torch.tensor([*magnitudes, -0.0, *(-m for m in magnitudes[1:])])
    codes, scales = quantize_e3m0(x, 16)
    assert scales.tolist() == [127]
    assert codes.tolist() == [0x10, 0x32, 0x54, 0x76, 0x90, 0xBA, 0xDC, 0xFE]  # -0.0 is sent as 0, never as 8
    assert torch.equal(dequantize_e3m0(codes, scales, 16, 16), x)
    codes, _ = quantize_e3m0(torch.tensor([1.0, -(2.0**-9)]), 2)
    assert codes.tolist() == [0x07]  # nor is a negative value that rounds to 0


@BOTH
def test_zeros(rounding: str) -> None:
    x = torch.cat([torch.zeros(128), -torch.zeros(128), torch.ones(128)])
    codes, scales = quantize_e3m0(x, rounding=rounding, generator=seeded())
    assert scales.tolist() == [0, 0, 127]
    assert not codes[:128].any()
    assert torch.equal(dequantize_e3m0(codes, scales, x.numel()), x)


@BOTH
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan, -math.nan])
def test_non_finite_blocks_decode_to_nan_and_spoil_no_other(rounding: str, bad: float) -> None:
    x = torch.ones(3, 4)
    x[1] = torch.tensor([1, bad, -2, 0])
    codes, scales = quantize_e3m0(x, 4, rounding, seeded())
    assert scales.tolist() == [127, 255, 127]
    assert codes[2:4].tolist() == [0, 0]  # the same bytes on every machine, whatever its nan looks like
    q = dequantize_e3m0(codes, scales, 12, 4).view(3, 4)
    assert q[1].isnan().all()
    assert (q[[0, 2]] == 1).all()


def test_scale_255_is_nan_whatever_the_codes() -> None:
    codes, scale = torch.arange(256, dtype=torch.uint8), torch.tensor([255], dtype=torch.uint8)
    assert dequantize_e3m0(codes, scale, 512, 512).isnan().all()


def test_subnormal_values() -> None:  # E is at its lower clamp: levels 2^-132 to 2^-126, threshold 2^-133
    x = torch.tensor([2.0**-126, 1.5 * 2.0**-130, 2.0**-132, 2.0**-133, 2.0**-134, -(2.0**-149)])
    codes, scales = quantize_e3m0(x, 6)
    assert scales.tolist() == [1]
    expected = [2.0**-126, 2.0**-129, 2.0**-132, 2.0**-132, 0, 0]
    assert dequantize_e3m0(codes, scales, 6, 6).tolist() == expected
    for value, rounded in zip(x, expected, strict=True):
        assert roundtrip(value, 2).item() == rounded  # alone, even the smallest have the same scale


@BOTH
def test_huge_values_saturate(rounding: str) -> None:  # E is at its upper clamp
    x = torch.tensor([FLOAT32_MAX, -FLOAT32_MAX, 2.0**126, -(2.0**121)])
    q = roundtrip(x, 4, rounding=rounding, generator=seeded())
    assert q.tolist() == [2.0**127, -(2.0**127), 2.0**126, -(2.0**121)]


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_types_are_read_as_float32(dtype: torch.dtype, rounding: str) -> None:
    x = torch.randn(1000, generator=seeded(), dtype=torch.float64).to(dtype)
    q = roundtrip(x, rounding=rounding, generator=seeded())
    assert q.dtype == torch.float32
    assert torch.equal(q, roundtrip(x.float(), rounding=rounding, generator=seeded()))


def test_double_beyond_float32_counts_as_inf() -> None:
    assert roundtrip(torch.tensor([1e39, 1.0], dtype=torch.float64), 2).isnan().all()


def test_any_shape_is_flattened_and_left_alone() -> None:
    x = torch.randn(40, 50, generator=seeded())
    before = x.clone()
    assert torch.equal(roundtrip(x.T), roundtrip(x.T.contiguous().flatten()))
    assert torch.equal(roundtrip(x[:, ::3]), roundtrip(x[:, ::3].flatten()))
    assert torch.equal(roundtrip(x[3, 4]), roundtrip(x[3, 4].view(1)))
    assert torch.equal(x, before)


def test_gradients_stop_here() -> None:
    q = roundtrip(torch.nn.Parameter(torch.ones(4)), 4)
    assert not q.requires_grad


def test_message_can_be_cut_at_any_byte() -> None:  # as it is after a gather: the codes start at an odd address
    x = heavy_tailed(1001)
    codes, scales = quantize_e3m0(x)
    message = torch.cat([torch.zeros(1, dtype=torch.uint8), codes, scales])[1:]
    assert torch.equal(dequantize_e3m0(*message.split([len(codes), len(scales)]), 1001), roundtrip(x))


def test_default_dtype_and_device_do_not_matter() -> None:
    x = torch.randn(300, generator=seeded())
    expected = roundtrip(x)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            q = roundtrip(x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert q.dtype == torch.float32
    assert torch.equal(q, expected)


@BOTH
def test_runs_without_looking_at_the_values(rounding: str) -> None:  # so an accelerator is never waited for
    codes, scales = quantize_e3m0(torch.empty(1000, device="meta"), rounding=rounding)
    q = dequantize_e3m0(codes, scales, 1000)
    assert (q.shape, q.device.type) == ((1000,), "meta")


# ---- errors


@pytest.mark.parametrize("block_size", [-2, 0, 1, 127])
def test_refuses_block_size(block_size: int) -> None:
    message = rf"`block_size` must be even and at least 2, got {block_size}"
    with pytest.raises(ValueError, match=message):
        quantize_e3m0(torch.ones(3), block_size)
    with pytest.raises(ValueError, match=message):
        dequantize_e3m0(*quantize_e3m0(torch.ones(3)), 3, block_size)
    with pytest.raises(ValueError, match=message):
        message_bytes(3, block_size)


def test_refuses_unknown_rounding() -> None:
    with pytest.raises(ValueError, match="`rounding` must be 'nearest' or 'stochastic', got 'up'"):
        quantize_e3m0(torch.ones(3), rounding="up")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
def test_refuses_what_is_not_floating_point(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=rf"`x` must be floating point, got {dtype}"):
        quantize_e3m0(torch.ones(3, dtype=dtype))


def test_refuses_what_does_not_fit() -> None:
    codes, scales = quantize_e3m0(torch.ones(300))
    for bad_codes, bad_scales, numel, block_size, message in [
        (codes, scales, 400, 128, r"`codes` must be 256 uint8 for `numel`=400 and `block_size`=128, got \(192,\)"),
        (codes, scales, 300, 64, r"`codes` must be 160 uint8 for `numel`=300 and `block_size`=64, got \(192,\)"),
        (codes, scales[1:], 300, 128, r"`scales` must be 3 uint8 .*, got \(2,\) of torch.uint8: pass what"),
        (codes.view(torch.int8), scales, 300, 128, r"`codes` must be 192 uint8 .*, got \(192,\) of torch.int8"),
        (codes, scales.float(), 300, 128, r"`scales` must be 3 uint8 .*, got \(3,\) of torch.float32"),
        (codes.view(2, 96), scales, 300, 128, r"`codes` must be 192 uint8 .*, got \(2, 96\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            dequantize_e3m0(bad_codes, bad_scales, numel, block_size)
