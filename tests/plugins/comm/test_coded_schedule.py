from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fulgurite.plugins.comm.coded_schedule import (
    GradientCodeSchedule,
    MultiplexedSchedule,
    Schedule,
    SelectiveRepeatSchedule,
)
from fulgurite.plugins.comm.gradient_codes import (
    ArbitraryModel,
    BurstyModel,
    BurstyOrFewModel,
    PerRoundModel,
    conforms,
)
from tests.plugins.comm.patterns import advance, columns, undecoded

MULTIPLEXED = [
    *((3, 1, 2, lam, 7) for lam in (1, 2, 3)),
    (4, 1, 2, 2, 6),
    (3, 1, 3, 2, 7),
    *((3, 2, 3, lam, 7) for lam in (1, 2, 3)),
    (4, 1, 3, 2, 6),
    (3, 2, 4, 2, 8),
    (2, 3, 4, 1, 8),
    pytest.param(3, 3, 4, 2, 8, marks=pytest.mark.slow),
]
SELECTIVE = [(3, 1, 2, 2, 7, 30175), (3, 2, 3, 2, 8, 111655), (4, 1, 3, 3, 6, 33749)]  # the last: number of patterns


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize(("n", "B", "W", "lam", "rounds"), MULTIPLEXED)
def test_multiplexed_bears_every_admitted_pattern(n: int, B: int, W: int, lam: int, rounds: int, bounded: bool) -> None:
    def make() -> Schedule:
        return MultiplexedSchedule(n, B, W, lam, rounds - (W - 2 + B) if bounded else None)

    for model in (BurstyModel(B, W, lam), ArbitraryModel(B, W + B - 1, lam)):
        count, failed = undecoded(make, n, rounds, model)
        assert count > 100
        assert failed == 0


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize(("n", "B", "W", "lam", "rounds", "patterns"), SELECTIVE)
def test_selective_repeat_bears_every_admitted_pattern(
    n: int, B: int, W: int, lam: int, rounds: int, patterns: int, bounded: bool
) -> None:
    def make() -> Schedule:
        return SelectiveRepeatSchedule(n, B, W, lam, rounds - B if bounded else None)

    count, failed = undecoded(make, n, rounds, BurstyOrFewModel(B, W, lam, make().s))
    assert (count, failed) == (patterns, 0)


def test_a_wider_model_is_not_borne() -> None:
    assert undecoded(lambda: MultiplexedSchedule(3, 1, 2, 1), 3, 5, BurstyModel(1, 2, 2))[1] > 0
    assert undecoded(lambda: MultiplexedSchedule(3, 1, 3, 2), 3, 6, BurstyModel(2, 3, 2))[1] > 0
    assert undecoded(lambda: SelectiveRepeatSchedule(3, 1, 2, 1), 3, 5, BurstyModel(1, 2, 3))[1] > 0
    assert undecoded(lambda: GradientCodeSchedule(4, 1), 4, 3, PerRoundModel(2))[1] > 0


SMALL: list[Callable[[], Schedule]] = [
    lambda: GradientCodeSchedule(4, 2),
    lambda: SelectiveRepeatSchedule(3, 1, 2, 2),
    lambda: SelectiveRepeatSchedule(3, 2, 3, 2),
    lambda: SelectiveRepeatSchedule(4, 1, 3, 3, jobs=3),
    *(lambda lam=lam: MultiplexedSchedule(3, 1, 2, lam) for lam in range(4)),
    lambda: MultiplexedSchedule(3, 1, 3, 2),
    lambda: MultiplexedSchedule(3, 2, 3, 2),
    lambda: MultiplexedSchedule(3, 2, 3, 3, jobs=3),
]


def is_made_whole(make: Callable[[], Schedule], state: dict[str, Any], r: int) -> bool:
    """Whether every job that has begun is whole in time when nobody is late from now on."""
    schedule = make()
    schedule.load_state_dict(state)
    nobody = (False,) * schedule.n
    for step in range(r, r + schedule.delay + 1):
        if step > r:
            schedule = advance(make, state, step, nobody)
            state = schedule.state_dict()
        due = step - schedule.delay
        if 0 <= due <= min(r, schedule.jobs - 1) and not schedule.is_complete(due):
            return False
    return True


@pytest.mark.parametrize("make", SMALL)
def test_complete_means_whole_if_nobody_is_late_any_more(make: Callable[[], Schedule]) -> None:
    """For every state that the rule leads to within some rounds, and every set of late workers in it."""
    states: list[dict[str, Any] | None] = [None]
    verdicts = {True: 0, False: 0}
    for r in range(4):
        following: dict[bytes, dict[str, Any]] = {}
        for state in states:
            for late in columns(make().n):
                schedule = advance(make, state, r, late)
                untouched = advance(make, state, r, (True,) * schedule.n)
                whole = is_made_whole(make, schedule.state_dict(), r)
                assert untouched.affordable(np.array(late), "complete") == whole
                verdicts[whole] += 1
                if whole:
                    following[schedule.state_dict()["have"].tobytes()] = schedule.state_dict()
        states = list(following.values())
    assert min(verdicts.values()) > 0


@pytest.mark.parametrize(
    ("make", "models"),
    [
        (lambda: GradientCodeSchedule(4, 2), [PerRoundModel(2)]),
        (lambda: SelectiveRepeatSchedule(4, 1, 3, 3), [BurstyOrFewModel(1, 3, 3, 1)]),
        (lambda: MultiplexedSchedule(4, 2, 3, 2), [BurstyModel(2, 3, 2), ArbitraryModel(2, 4, 2)]),
    ],
)
def test_conform_means_that_one_model_holds_from_the_first_round_on(make: Any, models: list[Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    verdicts = {True: 0, False: 0}
    for _ in range(60):
        schedule, pattern = make(), torch.zeros(4, 0, dtype=torch.bool)
        for r in range(8):
            schedule.begin(r)
            late = torch.rand(4, generator=generator) < 0.3
            longer = torch.cat((pattern, late[:, None]), 1)
            fits = any(conforms(longer, model) for model in models)
            assert schedule.affordable(late.numpy(), "conform") == fits
            verdicts[fits] += 1
            if not fits:
                late[:] = False
            pattern = torch.cat((pattern, late[:, None]), 1)
            schedule.mark(r, ~late.numpy())
    assert min(verdicts.values()) > 20


def test_fewer_late_workers_are_affordable_too() -> None:
    for make in SMALL:
        schedule = make()
        for r in range(3):
            schedule.begin(r)
            schedule.mark(r, np.arange(schedule.n) != 0)
            for rule in ("complete", "conform"):
                borne = {late for late in columns(schedule.n) if schedule.affordable(np.array(late), rule)}
                for late in borne:
                    fewer = {tuple(x and i != j for j, x in enumerate(late)) for i in range(schedule.n)}
                    assert fewer <= borne


def test_selective_repeat_repeats_no_more_than_it_must() -> None:
    schedule = SelectiveRepeatSchedule(6, 1, 2, 4)  # s = 2
    schedule.begin(0)
    schedule.mark(0, np.array([False, True, False, False, True, False]))
    plan = schedule.begin(1)
    assert plan.jobs.tolist() == [[0, 1, 0, 1, 1, 1]]
    schedule.mark(1, np.ones(6, dtype=bool))
    assert schedule.is_complete(0)
    assert schedule.begin(2).jobs.tolist() == [[2] * 6]  # job 1 lacks two results, as it may


def test_selective_repeat_skips_rounds_in_which_nothing_is_due() -> None:
    schedule = SelectiveRepeatSchedule(3, 2, 3, 2, jobs=2)
    for r in range(2):
        schedule.begin(r)
        schedule.mark(r, np.array([r == 0, True, r == 0]))
    assert not schedule.begin(2).busy.any()
    assert schedule.affordable(np.ones(3, dtype=bool), "conform")
    assert schedule.begin(3).busy.tolist() == [True, False, False]


def test_multiplexed_repeats_the_lowest_chunk_and_codes_when_none_is_lost() -> None:
    schedule = MultiplexedSchedule(2, 2, 3, 1)
    for r in range(2):
        schedule.begin(r)
        schedule.mark(r, np.array([False, True]))
    plan = schedule.begin(2)
    assert plan.jobs.tolist() == [[2, 2], [1, 1], [0, 0], [-1, -1]]
    assert plan.columns.tolist() == [[0, 0], [1, 1], [0, 2], [-1, -1]]
    schedule.mark(2, np.ones(2, dtype=bool))
    assert schedule.begin(3).columns.tolist() == [[0, 0], [1, 1], [0, 2], [1, 3]]


def test_bad_rule_and_round() -> None:
    schedule = GradientCodeSchedule(4, 1)
    with pytest.raises(ValueError, match="`r` must be the round after the last, 0, got 1"):
        schedule.begin(1)
    schedule.begin(0)
    with pytest.raises(ValueError, match=r"`rule` must be one of .*, got 'any'"):
        schedule.affordable(np.array([True, False, False, False]), "any")
