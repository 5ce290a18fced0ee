from typing import Any

import pytest

from fulgurite.plugins.comm.coding_schemes import make_schedule
from fulgurite.plugins.comm.gradient_codes import delay, lower_bound, normalized_load

LOADS = [
    ("m_sgc", {"B": 1, "W": 2, "lam": 27}, 0.007543103448),
    ("m_sgc", {"B": 1, "W": 2, "lam": 24}, 0.007512019231),
    ("m_sgc", {"B": 1, "W": 2, "lam": 52}, 0.007667824074),
    ("m_sgc", {"B": 1, "W": 2, "lam": 9}, 0.007102272727),
    ("sr_sgc", {"B": 2, "W": 3, "lam": 23}, 13 / 256),
    ("gc", {"s": 15}, 0.0625),
    ("gc", {"s": 0}, 1 / 256),
]


@pytest.mark.parametrize(("scheme", "params", "load"), LOADS)
def test_loads_of_256_workers(scheme: Any, params: dict[str, int], load: float) -> None:
    assert normalized_load(scheme, 256, **params) == pytest.approx(load, abs=5e-13)


def test_loads_with_all_or_all_but_one_late_meet_the_lower_bound() -> None:
    for W in range(2, 7):
        for B in range(1, W):
            for lam in range(9):
                bound, load = lower_bound(8, B, W, lam), normalized_load("m_sgc", 8, B=B, W=W, lam=lam)
                assert load >= bound * (1 - 1e-12)
                if lam >= 7:
                    assert load == pytest.approx(bound, rel=1e-12)
            assert normalized_load("m_sgc", 8, B=B, W=W, lam=8) == pytest.approx((W - 1 + B) / (8 * (W - 1)))


def test_delays() -> None:
    assert delay("gc", 8, s=3) == 0
    assert delay("sr_sgc", 8, B=2, W=5, lam=3) == 2
    assert delay("m_sgc", 8, B=2, W=5, lam=3) == 5


@pytest.mark.parametrize(
    ("scheme", "params", "message"),
    [
        ("gc", {"s": 4}, "`s` is how many of the 4 workers may be missing and must be from 0 to 3, got 4"),
        ("gc", {"s": -1}, "`s` .* got -1"),
        ("gc", {}, "`s` is missing: 'gc' needs"),
        ("gc", {"s": 1, "B": 1}, "`B`, `W` and `lam` do not belong to 'gc': give `s`; got B=1, W=None, lam=None"),
        (
            "m_sgc",
            {"s": 1, "B": 1, "W": 2, "lam": 1},
            "`s` does not belong to 'm_sgc': give `B`, `W` and `lam`; got s=1",
        ),
        ("sr_sgc", {"B": 1, "W": 2}, "'sr_sgc' needs `B`, `W` and `lam`, got B=1, W=2, lam=None"),
        (
            "m_sgc",
            {"B": 2, "W": 2, "lam": 1},
            r"`B` is the length of a burst and must be from 1 to `W` - 1 \(1\), got 2",
        ),
        ("m_sgc", {"B": 0, "W": 2, "lam": 1}, "`B` .* got 0"),
        ("m_sgc", {"B": 1, "W": 2, "lam": 5}, "`lam` counts late workers and must be at most the 4 .* got 5"),
        ("m_sgc", {"B": 1, "W": 2, "lam": -1}, "`lam` .* at least 0, got -1"),
        (
            "sr_sgc",
            {"B": 2, "W": 4, "lam": 1},
            "`B` must divide `W` - 1 for 'sr_sgc', got B=2 and W=4; nearest W: [35]",
        ),
        ("sr_sgc", {"B": 3, "W": 6, "lam": 1}, "nearest W: 7"),
        ("ddp", {"s": 1}, "`scheme` must be one of .*, got 'ddp'"),
        ("gc", {"s": 1, "jobs": 0}, "`jobs` counts gradients and must be at least 1, got 0"),
    ],
)
def test_bad_parameters(scheme: Any, params: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_schedule(scheme, 4, **params)
