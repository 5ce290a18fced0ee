"""How busy a slow link leaves the accelerators: a simulation as in Table 4 of Streaming DiLoCo (arXiv 2501.18512)."""

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import pairwise
from typing import Literal, NotRequired, TypedDict, Unpack, get_args

import numpy as np
from numpy.typing import NDArray

from fulgurite.plugins.comm.fragments import Pattern

Method = Literal["ddp", "diloco", "streaming"]
DEFAULT_GRID = np.logspace(-1, 3, 50)  # Gbit/s, the grid of the paper's table
_DDP_STEPS, _ROUNDS = 12, 3  # long enough for the last exchange, which nothing hides, to weigh little


class Setting(TypedDict):
    """The keyword arguments of :func:`compute_utilization`, for :func:`required_bandwidth` and for wrappers."""

    method: Method
    params: float
    layers: int
    step_seconds: float
    sync_every: NotRequired[int]
    blocks_per_fragment: NotRequired[int]
    overlap_steps: NotRequired[int]
    bits_per_param: NotRequired[float]
    pattern: NotRequired[Pattern]
    forward_fraction: NotRequired[float]
    latency: NotRequired[float]
    payload_factor: NotRequired[float]


def compute_utilization(
    bandwidth_gbps: float,
    *,
    method: Method,
    params: float,
    layers: int,
    step_seconds: float,
    sync_every: int = 100,
    blocks_per_fragment: int = 3,
    overlap_steps: int = 0,
    bits_per_param: float = 16.0,
    pattern: Pattern = "strided",
    forward_fraction: float = 1 / 3,
    latency: float = 0.0,
    payload_factor: float = 1.0,
) -> float:
    """Share of the time in which a worker computes rather than waits for its link (arXiv 2501.18512, Table 4).

    The model: compute is one sequence, forward through layers ``0..L-1`` and backward through ``L-1..0``, and the link
    is one queue. On a step that synchronises, the exchange of each synchronised layer joins the queue when the layer's
    backward ends, and the forward of that layer ``1 + overlap_steps`` steps later waits for it. All layers have equal
    size and duration, all workers equal speed; the optimizer, memory copies and (de)quantisation cost nothing; there
    are no embeddings or heads. DDP runs for 12 steps, the others for 3 rounds, each until the last exchange has ended.
    Streaming spreads its ``n = layers // blocks_per_fragment`` fragments evenly over ``sync_every`` steps; several
    share a step where ``n`` exceeds that.

    With ``payload_factor=5/6`` the smallest bandwidths for 50, 80, 90, 95 and 99 % equal the paper's in 69 of 75 cells
    and lie within one grid point (a factor of 1.21) in all; the paper does not give this factor, it is fitted.

    Args:
        bandwidth_gbps: speed of a worker's link in Gbit/s each way, above 0; ``inf`` leaves the latency alone.
        method: ``"ddp"`` exchanges every layer each step, ``"diloco"`` every layer each ``sync_every`` steps,
            ``"streaming"`` one fragment at a time.
        params: parameters of the model, above 0.
        layers: equal layers (L in the paper) they are spread over, at least 1.
        step_seconds: duration of a step without communication in seconds, above 0.
        sync_every: optimizer steps (H in the paper) between two exchanges of the same parameter; unused by DDP.
        blocks_per_fragment: layers a fragment holds, 1 to ``layers``; used by ``"streaming"`` alone.
        overlap_steps: steps (tau in the paper) for which compute goes on while an exchange is under way, 0 to
            ``sync_every - 1``; 0 for DDP.
        bits_per_param: bits a worker sends for each parameter of an exchange, above 0.
        pattern: ``"strided"`` puts layers ``i, i + n, ...`` into fragment ``i``, ``"sequential"`` neighbours.
        forward_fraction: share of a step that the forward pass takes, 0 to 1.
        latency: seconds that each layer's exchange occupies the link beyond its payload, at least 0.
        payload_factor: what to multiply ``bits_per_param`` with, above 0.

    Returns:
        Compute utilisation between 0 and 1; it never falls as the bandwidth grows.

    Raises:
        ValueError: an argument is out of its range.

    Example:
        >>> # a layer that takes 1.6 s to compute and 1.6 s to send, one after the other
        >>> compute_utilization(10.0, method="ddp", params=1e9, layers=1, step_seconds=1.6)
        0.5
        >>> setting = {"params": 1e9, "layers": 24, "step_seconds": 0.1}
        >>> round(compute_utilization(5.0, method="ddp", **setting), 3)
        0.031
        >>> round(compute_utilization(5.0, method="streaming", overlap_steps=1, bits_per_param=4.0625, **setting), 3)
        0.999
    """
    period = 1 if method == "ddp" else sync_every
    _validate(
        (bandwidth_gbps > 0, f"`bandwidth_gbps` is the speed of the link and must be positive, got {bandwidth_gbps}"),
        (method in get_args(Method), f"`method` must be one of {get_args(Method)}, got {method!r}"),
        (0 < params < math.inf, f"`params` counts the parameters of the model and must be positive, got {params}"),
        (layers >= 1, f"`layers` counts the layers of the model and must be at least 1, got {layers}"),
        (0 < step_seconds < math.inf, f"`step_seconds` is the time of a step and must be positive, got {step_seconds}"),
        (sync_every >= 1, f"`sync_every` counts optimizer steps and must be at least 1, got {sync_every}"),
        (
            method != "streaming" or 1 <= blocks_per_fragment <= layers,
            f"`blocks_per_fragment` must be between 1 and `layers` ({layers}), got {blocks_per_fragment}",
        ),
        (overlap_steps >= 0, f"`overlap_steps` counts optimizer steps and must be at least 0, got {overlap_steps}"),
        (
            overlap_steps < period,
            f"`overlap_steps` must be below the steps between two exchanges ({period} for {method}), got "
            f"{overlap_steps}: a fragment would be sent before the last one arrived",
        ),
        (0 < bits_per_param < math.inf, f"`bits_per_param` must be positive, got {bits_per_param}"),
        (pattern in get_args(Pattern), f"`pattern` must be one of {get_args(Pattern)}, got {pattern!r}"),
        (0 <= forward_fraction <= 1, f"`forward_fraction` is a share of the step, 0 to 1, got {forward_fraction}"),
        (0 <= latency < math.inf, f"`latency` is a time in seconds and must be at least 0, got {latency}"),
        (0 < payload_factor < math.inf, f"`payload_factor` must be positive, got {payload_factor}"),
    )
    fragments = _fragments(layers, blocks_per_fragment if method == "streaming" else layers, pattern)
    rounds = _DDP_STEPS if method == "ddp" else _ROUNDS
    syncs = _syncs(fragments, period, rounds)
    exchange_s = bits_per_param * params * payload_factor / layers / (bandwidth_gbps * 1e9) + latency
    stall = _stall_seconds(syncs, exchange_s, step_seconds, layers, forward_fraction, overlap_steps)
    computing = rounds * period * step_seconds
    return computing / (computing + stall)


def required_bandwidth(
    levels: Iterable[float],
    *,
    grid: Sequence[float] | NDArray[np.float64] | None = None,
    **setting: Unpack[Setting],
) -> list[float]:
    """Smallest bandwidth of a grid that reaches each compute utilisation, as in Table 4 of arXiv 2501.18512.

    Args:
        levels: utilisations to reach, each above 0 and at most 1.
        grid: bandwidths to try in Gbit/s, in any order; 50 from 0.1 to 1000, evenly spaced in the logarithm, if None.
        **setting: the keyword arguments of :func:`compute_utilization`, which describes the model.

    Returns:
        One bandwidth in Gbit/s a level; ``inf`` where no value of the grid reaches it.

    Raises:
        ValueError: a level is out of its range, the grid is empty, or :func:`compute_utilization` refuses a value.

    Example:
        The 1 billion row of "Streaming DiLoCo with overlapped communication" in the paper:

        >>> needed = required_bandwidth(
        ...     (0.5, 0.8, 0.9, 0.95, 0.99), method="streaming", params=1e9, layers=24, step_seconds=0.1,
        ...     overlap_steps=1, payload_factor=5 / 6)
        >>> [round(gbps, 1) for gbps in needed]
        [1.4, 4.3, 6.3, 9.1, 11.0]
    """
    levels = list(levels)
    bandwidths = sorted(float(gbps) for gbps in (DEFAULT_GRID if grid is None else grid))
    _validate(
        *((0 < level <= 1, f"`levels` are utilisations above 0 and at most 1, got {level}") for level in levels),
        (bool(bandwidths), "`grid` must hold at least one bandwidth, got none"),
    )

    @cache
    def utilization(gbps: float) -> float:
        return compute_utilization(gbps, **setting)

    # Bisection is exact: sums and maxima are monotone in each exchange's time, in floating point too.
    found = (bisect_left(bandwidths, level, key=utilization) for level in levels)
    return [bandwidths[i] if i < len(bandwidths) else math.inf for i in found]


def _fragments(layers: int, blocks_per_fragment: int, pattern: Pattern) -> list[list[int]]:
    """Splits the layers, each fragment in the order of the backward pass."""
    n = layers // blocks_per_fragment
    if pattern == "strided":
        members = [range(p, layers, n) for p in range(n)]
    else:
        edges = [-(-p * layers // n) for p in range(n + 1)]
        members = [range(start, stop) for start, stop in pairwise(edges)]
    return [list(reversed(layers_of)) for layers_of in members]


def _syncs(fragments: list[list[int]], period: int, rounds: int) -> dict[int, list[int]]:
    """Maps each step that sends, from 1, to its layers in the order of the backward pass."""
    syncs: dict[int, list[int]] = {}
    for k, fragment in enumerate(fragments * rounds, 1):
        step = -(-k * period // len(fragments))
        syncs[step] = sorted(syncs.get(step, []) + fragment, reverse=True)
    return syncs


def _stall_seconds(
    syncs: dict[int, list[int]],
    exchange_s: float,
    step_seconds: float,
    layers: int,
    forward_fraction: float,
    overlap_steps: int,
) -> float:
    """Time that a run with these syncs takes beyond that of its computation.

    Only steps that send are visited. All times are relative to when the visited step would end without any stall, so
    that a link which never delays gives exactly 0.
    """
    forward_s = forward_fraction * step_seconds / layers
    backward_s = (1 - forward_fraction) * step_seconds / layers
    stall, link_free = 0.0, -math.inf
    waits: deque[tuple[int, float]] = deque()  # (step that waits, stall it must have reached by then)
    last = 0
    for step, fragment in syncs.items():
        link_free -= (step - last) * step_seconds
        last = step
        while waits and waits[0][0] <= step:
            stall = max(stall, waits.popleft()[1])
        arrival = -math.inf
        for layer in fragment:
            link_free = max(link_free, stall - layer * backward_s) + exchange_s
            arrival = max(arrival, link_free - layer * forward_s)  # the forward reaches later layers later
        waits.append((step + 1 + overlap_steps, arrival - overlap_steps * step_seconds))
    return max(stall, link_free)  # the run ends with its last exchange


def _validate(*checks: tuple[bool, str]) -> None:
    for holds, message in checks:
        if not holds:
            raise ValueError(message)
