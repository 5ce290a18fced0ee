"""How many values a second one core rounds to four bits and back, against a copy of them and a plain implementation.

``python benchmarks/e3m0.py`` takes half a minute. All contenders take turns, so that whatever else the machine does
meets each of them. Each makes new tensors, but for the copy, which writes into one that is there already.
"""

import math
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from _record import record, spread, write
from torch import Tensor

from fulgurite.plugins.comm.e3m0 import dequantize_e3m0, quantize_e3m0

BLOCK_SIZE = 128


def naive_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, operation by operation over the whole tensor; no subnormal, inf or nan."""

    def nearest_exponent(magnitude: Tensor) -> Tensor:
        mantissa, exponent = magnitude.frexp()  # mantissa in [0.5, 1)
        return exponent - (mantissa < 0.75).int()

    rows = F.pad(x, (0, -x.numel() % BLOCK_SIZE)).view(-1, BLOCK_SIZE)
    magnitude = rows.abs()
    peak = magnitude.amax(1, keepdim=True)
    scale = nearest_exponent(peak).clamp(-126, 127)
    k = (nearest_exponent(magnitude) - (scale - 7)).clamp(1, 7)
    k = torch.where(magnitude >= torch.exp2(scale - 7.0), k, 0)
    codes = k + 8 * ((rows < 0) & (k > 0)).int()
    scales = torch.where(peak > 0, scale + 127, 0)
    return (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8).flatten(), scales.to(torch.uint8).flatten()


def naive_dequantize(codes: Tensor, scales: Tensor, numel: int) -> Tensor:
    unpacked = torch.stack([codes & 15, codes >> 4], dim=1).int().view(-1, BLOCK_SIZE)
    k, sign = unpacked & 7, 1 - 2.0 * (unpacked >> 3)
    value = torch.ldexp(sign, k + scales.view(-1, 1).int() - 127 - 7)
    return torch.where(k > 0, value, 0).view(-1)[:numel]


def contenders(x: Tensor) -> dict[str, Callable[[], object]]:
    n, target = x.numel(), torch.empty_like(x)
    sent = quantize_e3m0(x, BLOCK_SIZE)
    assert all(torch.equal(ours, naive) for ours, naive in zip(sent, naive_quantize(x), strict=True))
    assert torch.equal(dequantize_e3m0(*sent, n, BLOCK_SIZE), naive_dequantize(*sent, n))
    return {
        "copy": lambda: target.copy_(x),
        "clone": lambda: x.clone(),
        "quantize": lambda: quantize_e3m0(x, BLOCK_SIZE),
        "quantize_stochastic": lambda: quantize_e3m0(x, BLOCK_SIZE, "stochastic"),
        "dequantize": lambda: dequantize_e3m0(*sent, n, BLOCK_SIZE),
        "both": lambda: dequantize_e3m0(*quantize_e3m0(x, BLOCK_SIZE), n, BLOCK_SIZE),
        "naive_quantize": lambda: naive_quantize(x),
        "naive_dequantize": lambda: naive_dequantize(*sent, n),
        "naive_both": lambda: naive_dequantize(*naive_quantize(x), n),
    }


def seconds(function: Callable[[], object], calls: int) -> float:
    """Seconds a call, over so many of them."""
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def values_per_second(n: int, rounds: int = 15, seed: int = 0) -> dict[str, dict[str, float]]:
    """Median and quartiles of each contender, and of ours as a multiple of the others in the same round."""
    functions = contenders(torch.randn(n, generator=torch.Generator().manual_seed(seed)))
    calls = math.ceil(1_000_000 / n)  # a timing of microseconds would be one of the clock
    rates: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            rates[name].append(n / seconds(function, calls))
    figures = {name: spread(rate) for name, rate in rates.items()}
    for peer in ("copy", "naive_both"):
        ratios = [ours / theirs for ours, theirs in zip(rates["both"], rates[peer], strict=True)]
        figures[f"both_over_{peer}"] = spread(ratios)
    return figures


def main(sizes: tuple[int, ...] = (100_000, 1_000_000, 10_000_000)) -> None:
    torch.set_num_threads(1)
    figures = {str(n): values_per_second(n) for n in sizes}
    for n, by_name in figures.items():
        print(f"{n} values: " + ", ".join(f"{name} {figure['median']:.3g}" for name, figure in by_name.items()))
    print(write("e3m0", record(unit="values per second", seed=0, block_size=BLOCK_SIZE, values=figures)))


if __name__ == "__main__":
    main()
