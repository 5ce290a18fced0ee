import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fulgurite.plugins.comm.simulate import DEFAULT_GRID, compute_utilization, required_bandwidth

LEVELS = (0.5, 0.8, 0.9, 0.95, 0.99)
MODELS: dict[str, dict[str, Any]] = {
    "1B": {"params": 1e9, "layers": 24, "step_seconds": 0.1},
    "10B": {"params": 1e10, "layers": 48, "step_seconds": 0.8},
    "100B": {"params": 1e11, "layers": 108, "step_seconds": 4.9},
}
METHODS: list[dict[str, Any]] = [
    {"method": "ddp"},
    {"method": "diloco"},
    {"method": "streaming"},
    {"method": "streaming", "overlap_steps": 1},
    {"method": "streaming", "overlap_steps": 1, "bits_per_param": 4.0},
]
PAPER = {  # Gbit/s in the order of LEVELS, one row a method: Table 4 of arXiv 2501.18512
    "1B": [
        (86.8, 152.6, 184.2, 222.3, 569.0),
        (1.4, 6.2, 13.3, 23.3, 86.8),
        (1.4, 5.2, 9.1, 16.0, 28.1),
        (1.4, 4.3, 6.2, 9.1, 11.0),
        (0.4, 0.9, 1.7, 2.0, 3.0),
    ],
    "10B": [
        (104.8, 222.3, 222.3, 268.3, 471.5),
        (1.7, 7.5, 16.0, 33.9, 104.8),
        (1.7, 5.2, 9.1, 13.3, 19.3),
        (1.7, 3.6, 5.2, 6.2, 7.5),
        (0.4, 0.9, 1.4, 1.4, 1.7),
    ],
    "100B": [
        (184.2, 323.8, 390.7, 390.7, 471.5),
        (3.0, 11.0, 23.3, 49.4, 184.2),
        (2.4, 6.2, 9.1, 11.0, 19.3),
        (1.7, 3.6, 4.3, 5.2, 5.2),
        (0.5, 0.9, 1.1, 1.1, 1.4),
    ],
}


def grid_points(gbps: Iterable[float]) -> np.ndarray:
    return np.array([np.abs(np.log(DEFAULT_GRID / value)).argmin() for value in gbps])


def test_reproduces_the_table_of_the_paper() -> None:
    off = np.concatenate(
        [
            grid_points(required_bandwidth(LEVELS, payload_factor=5 / 6, **MODELS[name], **method)) - grid_points(row)
            for name, table in PAPER.items()
            for method, row in zip(METHODS, table, strict=True)
        ]
    )
    assert off.size == 75
    assert (off == 0).sum() == 69
    assert np.abs(off).max() == 1


def event_by_event(gbps: float, setting: dict[str, Any]) -> float:
    """The model once more, the slow way: every layer of every step, in absolute time."""
    defaults = {"overlap_steps": 0, "bits_per_param": 16.0, "latency": 0.0, "forward_fraction": 1 / 3}
    s: dict[str, Any] = defaults | setting
    layers, every, step_seconds = s["layers"], s["sync_every"], s["step_seconds"]
    n = layers // s["blocks_per_fragment"]
    steps = 12 if s["method"] == "ddp" else 3 * every
    due = {(-(-p * every // n) % every, p - 1) for p in range(1, n + 1)}  # (step modulo sync_every, fragment)
    exchange = s["bits_per_param"] * s["params"] / layers / gbps / 1e9 + s["latency"]
    arrives: dict[tuple[int, int], float] = {}
    now = link = 0.0
    for step in range(1, steps + 1):
        for layer in range(layers):
            now = max(now, arrives.get((step, layer), 0.0)) + s["forward_fraction"] * step_seconds / layers
        for layer in reversed(range(layers)):
            now += (1 - s["forward_fraction"]) * step_seconds / layers
            fragment = layer % n if s["pattern"] == "strided" else layer // s["blocks_per_fragment"]
            streams = s["method"] == "streaming" and (step % every, fragment) in due
            if streams or s["method"] == "ddp" or (s["method"] == "diloco" and step % every == 0):
                link = max(link, now) + exchange
                arrives[step + 1 + s["overlap_steps"], layer] = link
    return float(steps * step_seconds / max(now, link))


@st.composite
def settings_of_any_method(draw: st.DrawFn) -> dict[str, Any]:
    method = draw(st.sampled_from(["ddp", "diloco", "streaming"]))
    blocks, sync_every = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    pattern = draw(st.sampled_from(["strided", "sequential"]))
    layers = draw(st.integers(blocks, 12)) if pattern == "strided" else blocks * draw(st.integers(1, 12 // blocks))
    return {
        "method": method,
        "params": 10 ** draw(st.floats(5, 9)),
        "layers": layers,
        "step_seconds": 10 ** draw(st.floats(-2, 1)),
        "sync_every": sync_every,
        "blocks_per_fragment": blocks,
        "pattern": pattern,
        "overlap_steps": 0 if method == "ddp" else draw(st.integers(0, sync_every - 1)),
        "bits_per_param": draw(st.floats(1, 32)),
        "forward_fraction": draw(st.floats(0, 1)),
        "latency": draw(st.sampled_from([0.0, 0.01])),
    }


any_setting = settings_of_any_method()
any_gbps = st.floats(-3, 3).map(lambda exponent: 10**exponent)


@given(setting=any_setting, gbps=any_gbps)
@settings(deadline=None)
def test_equals_event_by_event_simulation(setting: dict[str, Any], gbps: float) -> None:
    assert compute_utilization(gbps, **setting) == pytest.approx(event_by_event(gbps, setting), rel=1e-9)


@given(setting=any_setting)
@settings(deadline=None)
def test_limits_of_the_bandwidth(setting: dict[str, Any]) -> None:
    setting["latency"] = 0.0
    assert compute_utilization(math.inf, **setting) == 1.0
    assert compute_utilization(1e-9, **setting) < 0.02
    assert compute_utilization(5e-324, **setting) == 0.0  # the exchange takes forever, and nothing is nan


@given(setting=any_setting, gbps=any_gbps, factor=st.floats(1, 100))
@settings(deadline=None)
def test_faster_links_and_smaller_payloads_never_hurt(setting: dict[str, Any], gbps: float, factor: float) -> None:
    before = compute_utilization(gbps, **setting)
    assert compute_utilization(gbps * factor, **setting) >= before
    assert compute_utilization(gbps, **setting | {"bits_per_param": setting["bits_per_param"] / factor}) >= before
    assert compute_utilization(gbps, payload_factor=1 / factor, **setting) >= before
    assert compute_utilization(gbps, **setting | {"latency": setting["latency"] / factor}) >= before


@given(setting=any_setting, gbps=any_gbps)
@settings(deadline=None)
def test_overlap_never_hurts(setting: dict[str, Any], gbps: float) -> None:
    assert compute_utilization(gbps, **setting) >= compute_utilization(gbps, **setting | {"overlap_steps": 0}) - 1e-12


@given(setting=any_setting, gbps=any_gbps, factor=st.floats(0.01, 100))
@settings(deadline=None)
def test_only_ratios_matter(setting: dict[str, Any], gbps: float, factor: float) -> None:
    setting["latency"] = 0.0
    before = pytest.approx(compute_utilization(gbps, **setting), rel=1e-9)
    assert compute_utilization(gbps * factor, **setting | {"params": setting["params"] * factor}) == before
    assert compute_utilization(gbps / factor, **setting | {"step_seconds": setting["step_seconds"] * factor}) == before


@pytest.mark.parametrize("seconds", [0.01, 1.0, 30.0])
def test_one_layer_has_a_closed_form(seconds: float) -> None:
    one_layer: dict[str, Any] = {"params": 1e9, "layers": 1, "step_seconds": 2.0}
    gbps = 16 / seconds  # so that an exchange takes `seconds`
    assert compute_utilization(gbps, method="ddp", **one_layer) == pytest.approx(2 / (2 + seconds))
    diloco = compute_utilization(gbps, method="diloco", sync_every=50, **one_layer)
    assert diloco == pytest.approx(100 / (100 + seconds))


def test_overlap_hides_what_ends_in_time_and_nothing_more() -> None:
    setting: dict[str, Any] = {"params": 1e9, "layers": 1, "step_seconds": 2.0, "sync_every": 50, "overlap_steps": 3}
    in_time = compute_utilization(16 / 6, method="diloco", **setting)  # 6 s, three steps
    late = compute_utilization(16 / 7, method="diloco", **setting)
    assert in_time == pytest.approx(300 / (300 + 6))  # three rounds, and the last exchange drains
    assert late == pytest.approx(300 / (300 + 1 + 1 + 7))  # two rounds waited a second each


@pytest.mark.parametrize("pattern", ["strided", "sequential"])
def test_one_fragment_is_diloco(pattern: Any) -> None:
    setting: dict[str, Any] = {"params": 1e9, "layers": 7, "step_seconds": 0.1, "pattern": pattern}
    streaming = compute_utilization(5.0, method="streaming", blocks_per_fragment=7, **setting)
    assert streaming == compute_utilization(5.0, method="diloco", **setting)


@pytest.mark.parametrize(("layers", "blocks"), [(6, 3), (7, 3), (8, 3), (11, 4)])
@pytest.mark.parametrize("pattern", ["strided", "sequential"])
def test_each_layer_is_exchanged_once_a_round(layers: int, blocks: int, pattern: Any) -> None:
    # On a link so slow that computation vanishes, the time is that of the bytes: three models.
    slow = compute_utilization(
        1e-6, method="streaming", params=1e9, layers=layers, step_seconds=1.0, blocks_per_fragment=blocks,
        pattern=pattern, sync_every=8,
    )  # fmt: skip
    assert slow == pytest.approx(8 / (16e9 / 1e3), rel=1e-3)


@given(setting=any_setting, level=st.floats(0.01, 1.0), exponents=st.lists(st.floats(-3, 3), min_size=1, max_size=6))
@settings(deadline=None)
def test_required_bandwidth_is_the_smallest_of_the_grid(
    setting: dict[str, Any], level: float, exponents: list[float]
) -> None:
    grid = [10**exponent for exponent in exponents]
    enough = [gbps for gbps in grid if compute_utilization(gbps, **setting) >= level]
    assert required_bandwidth([level], grid=grid, **setting) == [min(enough, default=math.inf)]


def test_required_bandwidth_answers_each_level_in_order() -> None:
    setting: dict[str, Any] = {"method": "diloco", **MODELS["1B"]}
    assert required_bandwidth([], **setting) == []
    assert required_bandwidth([0.9, 0.5], **setting) == required_bandwidth([0.5, 0.9], **setting)[::-1]
    assert required_bandwidth([0.5], grid=np.array([0.1, 0.2]), **setting) == [math.inf]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"bandwidth_gbps": 0.0}, "`bandwidth_gbps` is the speed of the link and must be positive, got 0.0"),
        ({"bandwidth_gbps": math.nan}, "`bandwidth_gbps` .* got nan"),
        ({"method": "fsdp"}, r"`method` must be one of \('ddp', .*\), got 'fsdp'"),
        ({"params": 0.0}, "`params` counts the parameters of the model and must be positive, got 0.0"),
        ({"params": math.inf}, "`params` .* got inf"),
        ({"layers": 0}, "`layers` counts the layers of the model and must be at least 1, got 0"),
        ({"step_seconds": -1.0}, "`step_seconds` is the time of a step and must be positive, got -1.0"),
        ({"sync_every": 0}, "`sync_every` counts optimizer steps and must be at least 1, got 0"),
        ({"blocks_per_fragment": 0}, r"`blocks_per_fragment` must be between 1 and `layers` \(24\), got 0"),
        ({"blocks_per_fragment": 25}, r"`blocks_per_fragment` must be between 1 and `layers` \(24\), got 25"),
        ({"overlap_steps": -1}, "`overlap_steps` counts optimizer steps and must be at least 0, got -1"),
        ({"overlap_steps": 100}, r"`overlap_steps` must be below .* \(100 for streaming\), got 100: a fragment would"),
        ({"method": "ddp", "overlap_steps": 1}, r"`overlap_steps` must be below .* \(1 for ddp\), got 1"),
        ({"bits_per_param": 0.0}, "`bits_per_param` must be positive, got 0.0"),
        ({"pattern": "random"}, r"`pattern` must be one of \('strided', .*\), got 'random'"),
        ({"forward_fraction": 1.5}, "`forward_fraction` is a share of the step, 0 to 1, got 1.5"),
        ({"latency": -0.1}, "`latency` is a time in seconds and must be at least 0, got -0.1"),
        ({"payload_factor": 0.0}, "`payload_factor` must be positive, got 0.0"),
    ],
)
def test_refuses(changed: dict[str, Any], message: str) -> None:
    setting: dict[str, Any] = {"bandwidth_gbps": 1.0, "method": "streaming", **MODELS["1B"]} | changed
    with pytest.raises(ValueError, match=message):
        compute_utilization(**setting)


@pytest.mark.parametrize("level", [0.0, 1.01, math.nan])
def test_refuses_a_level_that_is_no_utilisation(level: float) -> None:
    with pytest.raises(ValueError, match=f"`levels` are utilisations above 0 and at most 1, got {level}"):
        required_bandwidth([0.5, level], method="ddp", params=1e9, layers=24, step_seconds=0.1)


def test_refuses_an_empty_grid() -> None:
    with pytest.raises(ValueError, match="`grid` must hold at least one bandwidth"):
        required_bandwidth([0.5], grid=[], method="ddp", params=1e9, layers=24, step_seconds=0.1)
