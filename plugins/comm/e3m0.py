"""Four bits a value on the wire: blocks of E3M0 floats, each under a shared power-of-two scale (arXiv 2501.18512).

E3M0 has one sign bit, three exponent bits and no mantissa. Under a scale ``2^E`` a block holds 0 and ``+-2^(E-6)``,
``+-2^(E-5)``, ..., ``+-2^E``. The paper gives neither scale nor rounding; here both are the nearest power of two in
linear distance, ties upward, or, on request, a random neighbour with the right mean. With 128 values a block that is
4.0625 bits a value. On Gaussian input nearest rounding has relative error 0.194 and cosine 0.981, and shrinks by 4 %.
"""

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Rounding", "dequantize_e3m0", "message_bytes", "quantize_e3m0"]

Rounding = Literal["nearest", "stochastic"]

# Values worked on at a time: on a CPU, so that a chunk stays in the second-level cache; elsewhere, to bound the memory.
_CPU_CHUNK, _CHUNK = 1 << 17, 1 << 24
_INF = 0x7F800000  # as bits of a float32; whatever is greater is nan
_LEVELS = [0.0, *(2.0 ** (k - 6) for k in range(1, 8))]  # in units of 2^(E-1): the largest is 2
_NAN_SCALE = 255  # as in E8M0, the one-byte exponent of bias 127 that the scales are stored in

# Added to the bits of a magnitude, these carry into its exponent where it rounds up to the next power of two.
_CARRY = {"nearest": 0x400000, "stochastic": 0x7FFFFF}  # from 1.5 times a power of two on; from anything above it on


def quantize_e3m0(
    x: Tensor,
    block_size: int = 128,
    rounding: Rounding = "nearest",
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Rounds every value to a sign and three bits of exponent, relative to its block (E3M0 of arXiv 2501.18512).

    ``E`` is the exponent of the power of two nearest to the block's largest magnitude, in ``[-126, 127]``. A code is
    ``k + 8`` for ``-2^(E-7+k)``, ``k`` for ``+2^(E-7+k)`` with ``k`` in 1..7, and 0 for zero; byte ``j`` holds code
    ``2j`` in its low and code ``2j+1`` in its high half. A scale is ``E + 127``, 0 for a block of zeros, and 255 for a
    block with an inf or nan, all of which decodes to nan.

    Under ``rounding="stochastic"``, ``2^E`` is the smallest power of two that no value exceeds, and each value goes to
    one of its two neighbours at random so that the mean of the result is the value: ``low + gap * 1[u < p]`` with
    ``p = (|x| - low) / gap`` and ``u`` uniform, in steps of ``2^-53``. Only above ``2^127`` does it saturate.

    Args:
        x: any shape, floating point; flattened, and read as float32 (a float64 beyond its range counts as inf).
        block_size: values under one scale, even and at least 2; the last block is padded with zeros.
        rounding: ``"nearest"`` (ties away from zero), or ``"stochastic"``, unbiased at twice the mean squared error.
        generator: for stochastic rounding, on the device of ``x``; None draws from torch's global one.

    Returns:
        uint8 codes, ``(ceil(n / block_size) * block_size / 2,)``, and uint8 scales, ``(ceil(n / block_size),)``.

    Raises:
        ValueError: for an odd ``block_size`` or one below 2, an unknown ``rounding``, or ``x`` not floating point.

    Example:
        >>> codes, scales = quantize_e3m0(torch.tensor([1, 0.75, 0.74, 0.0157, 0.0155, -1.5]), block_size=6)
        >>> [f"{byte:02x}" for byte in codes], scales - 127
        (['66', '15', 'f0'], tensor([1], dtype=torch.uint8))
        >>> dequantize_e3m0(codes, scales, numel=6, block_size=6)
        tensor([ 1.0000,  1.0000,  0.5000,  0.0312,  0.0000, -2.0000])
    """
    if not x.is_floating_point():
        raise ValueError(f"`x` must be floating point, got {x.dtype}: convert it with `x.float()`")
    if rounding not in _CARRY:
        raise ValueError(f"`rounding` must be 'nearest' or 'stochastic', got {rounding!r}")
    blocks = _num_blocks(x.numel(), block_size)
    codes = torch.empty(blocks * block_size // 2, dtype=torch.uint8, device=x.device)
    scales = torch.empty(blocks, dtype=torch.uint8, device=x.device)
    table = _CODES.to(x.device)
    flat = x.detach().reshape(-1)
    for values, code, scale in _chunks(flat, codes, scales, block_size):
        rows = F.pad(values.float(), (0, -len(values) % block_size)).view(-1, block_size)
        exponent = _shared_exponent(rows, _CARRY[rounding])
        scale.copy_(exponent)
        # In units of 2^(E-1): unlike 2^-E, the factor is never subnormal. A block of zeros gets 0 * inf, hence nan.
        scaled = rows * _power_of_two(255 - exponent)
        if rounding == "stochastic":
            scaled = _random_neighbour(scaled, generator)
        index = scaled.view(torch.int32) >> 22 & 0x3FF
        pairs = table.index_select(0, index.view(-1)).view(torch.int16)  # little-endian: code 2j is the low byte
        code.copy_(pairs | pairs >> 4)  # narrowing drops the high byte
    return codes, scales


def dequantize_e3m0(codes: Tensor, scales: Tensor, numel: int, block_size: int = 128) -> Tensor:
    """Returns the values that :func:`quantize_e3m0` rounded to (E3M0 of arXiv 2501.18512).

    Args:
        codes: uint8, ``(ceil(numel / block_size) * block_size / 2,)``, two values a byte.
        scales: uint8, ``(ceil(numel / block_size),)``, one a block.
        numel: how many values were quantised; the padding after them is dropped.
        block_size: as it was for :func:`quantize_e3m0`.

    Returns:
        float32, ``(numel,)``, on the device of ``codes``; nan throughout a block that held an inf or nan.

    Raises:
        ValueError: for ``codes`` or ``scales`` of another dtype, or of a size that ``numel`` values would not give.

    Example:
        >>> values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
        >>> rounded = dequantize_e3m0(*quantize_e3m0(values), numel=1000)
        >>> torch.equal(dequantize_e3m0(*quantize_e3m0(rounded), numel=1000), rounded)
        True
    """
    blocks = _num_blocks(numel, block_size)
    for name, got, expected in (("codes", codes, blocks * block_size // 2), ("scales", scales, blocks)):
        if got.dtype != torch.uint8 or got.shape != (expected,):
            raise ValueError(
                f"`{name}` must be {expected} uint8 for `numel`={numel} and `block_size`={block_size}, got "
                f"{tuple(got.shape)} of {got.dtype}: pass what `quantize_e3m0` returned, and its `block_size`"
            )
    out = torch.empty(blocks * block_size, dtype=torch.float32, device=codes.device)
    table = _VALUES.to(codes.device)
    for values, code, scale in _chunks(out, codes, scales, block_size):
        pairs = table.index_select(0, code.int()).view(torch.float32)
        factor = _power_of_two(scale.int()).masked_fill_(scale.view(-1, 1) == _NAN_SCALE, torch.nan)
        torch.mul(pairs.view(-1, block_size), factor, out=values.view(-1, block_size))
    return out[:numel]


def message_bytes(numel: int, block_size: int = 128) -> int:
    """Returns how many bytes ``numel`` values take, codes and scales together.

    Example:
        >>> message_bytes(1_000_000)
        507845
    """
    return _num_blocks(numel, block_size) * (block_size // 2 + 1)


def _num_blocks(numel: int, block_size: int) -> int:
    if block_size < 2 or block_size % 2:
        raise ValueError(
            f"`block_size` must be even and at least 2, got {block_size}: two values share a byte; 128 costs 4.06 bits "
            "a value"
        )
    return -(-numel // block_size)


def _chunks(values: Tensor, codes: Tensor, scales: Tensor, block_size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Splits all three alike, between blocks."""
    blocks = max(1, (_CPU_CHUNK if values.device.type == "cpu" else _CHUNK) // block_size)
    sizes = (blocks * block_size, blocks * block_size // 2, blocks)
    return zip(*(torch.split(t, size) for t, size in zip((values, codes, scales), sizes, strict=True)), strict=True)


def _shared_exponent(rows: Tensor, carry: int) -> Tensor:
    """Returns ``E + 127`` of each row, int32. Magnitudes are compared by their bits, which are in the same order."""
    peak = (rows.view(torch.int32) & 0x7FFFFFFF).amax(1)
    exponent = ((peak + carry) >> 23).clamp_(1, 254)
    return exponent.masked_fill_(peak == 0, 0).masked_fill_(peak >= _INF, _NAN_SCALE)


def _power_of_two(exponent: Tensor) -> Tensor:
    """Returns ``2^(exponent - 127)`` as a float32 column; 0 for exponent 0, and inf for 255."""
    return (exponent << 23).view(torch.float32).view(-1, 1)


def _random_neighbour(scaled: Tensor, generator: torch.Generator | None) -> Tensor:
    """Moves each value, in units of ``2^(E-1)``, to the level below or above it so that its mean stays."""
    magnitude = scaled.abs()
    low = (magnitude.view(torch.int32) & _INF).view(torch.float32)  # the exponent alone: a power of two
    gap = low.clamp(min=_LEVELS[1])  # between two powers of two, the lower one; below the smallest level, that level
    low = low.masked_fill(magnitude < _LEVELS[1], 0)
    uniform = torch.rand(scaled.shape, dtype=torch.float64, device=scaled.device, generator=generator)
    return (low + gap * (uniform * gap < magnitude - low)).copysign(scaled)


def _code_table() -> Tensor:
    """Returns the code of each value in units of ``2^(E-1)`` by its top ten bits, ``(1024,)`` uint8.

    These are sign, exponent and the leading bit of the mantissa. No more is needed, for every midpoint of two
    neighbouring levels is a power of two or 1.5 times one. Inf and nan get 0.
    """
    value = (torch.arange(1024, dtype=torch.int32, device="cpu") << 22).view(torch.float32)
    levels = torch.tensor(_LEVELS, dtype=torch.float32, device="cpu")
    k = torch.bucketize(value.abs(), (levels[1:] + levels[:-1]) / 2, right=True)
    return torch.where(value.isfinite(), k + 8 * ((value < 0) & (k > 0)), 0).to(torch.uint8)


def _value_table() -> Tensor:
    """Returns the two values, in units of ``2^E``, of each byte of codes: pairs of float32 read as ``(256,)`` int64."""
    levels = torch.tensor(_LEVELS, dtype=torch.float32, device="cpu") / 2
    value = torch.cat([levels, -levels])  # by code
    byte = torch.arange(256, device="cpu")
    return torch.stack([value[byte & 15], value[byte >> 4]], dim=1).view(torch.int64).view(-1)


_CODES, _VALUES = _code_table(), _value_table()
