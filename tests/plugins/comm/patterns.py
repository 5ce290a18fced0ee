"""All patterns of late workers that a model admits, and what a schedule makes of them, state by state."""

from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product

import numpy as np
import torch

from fulgurite.plugins.comm.coded_schedule import Schedule
from fulgurite.plugins.comm.straggler_models import StragglerModel, conforms

Column = tuple[bool, ...]


def columns(n: int) -> list[Column]:
    return list(product((False, True), repeat=n))


@cache
def admitted(window: tuple[Column, ...], model: StragglerModel) -> bool:
    return conforms(torch.tensor(window).T, model)


def extensions(tail: tuple[Column, ...], n: int, model: StragglerModel) -> Iterator[tuple[Column, tuple[Column, ...]]]:
    """The columns that may follow the last ones, and what the last ones are then."""
    for column in columns(n):
        window = (*tail, column)
        if admitted(window, model):
            yield column, window[max(0, len(window) - model.window + 1) :]


def count_patterns(n: int, rounds: int, model: StragglerModel) -> int:
    tails = Counter({(): 1})
    for _ in range(rounds):
        following: Counter[tuple[Column, ...]] = Counter()
        for tail, count in tails.items():
            for _, after in extensions(tail, n, model):
                following[after] += count
        tails = following
    return sum(tails.values())


def all_patterns(n: int, rounds: int, model: StragglerModel) -> Iterator[tuple[Column, ...]]:
    def grow(pattern: tuple[Column, ...], tail: tuple[Column, ...]) -> Iterator[tuple[Column, ...]]:
        if len(pattern) == rounds:
            yield pattern
            return
        for column, after in extensions(tail, n, model):
            yield from grow((*pattern, column), after)

    return grow((), ())


def advance(make: Callable[[], Schedule], state: dict | None, r: int, late: Column) -> Schedule:
    """A schedule that goes on from a state with round r, in which these workers are late."""
    schedule = make()
    if state is not None:
        schedule.load_state_dict(state)
    schedule.begin(r)
    schedule.mark(r, ~np.array(late))
    return schedule


def undecoded(make: Callable[[], Schedule], n: int, rounds: int, model: StragglerModel) -> tuple[int, int]:
    """The number of patterns, and of those in which a job is not whole in time.

    Patterns that agree in their last rounds and in what has come in have the same future: they are followed once.
    """
    states: dict[tuple, tuple[dict | None, int]] = {((), b""): (None, 1)}
    failed = 0
    for r in range(rounds):
        following: dict[tuple, tuple[dict | None, int]] = {}
        for (tail, _), (state, count) in states.items():
            for column, after in extensions(tail, n, model):
                schedule = advance(make, state, r, column)
                due = r - schedule.delay
                if 0 <= due < schedule.jobs and not schedule.is_complete(due):
                    failed += count
                new = schedule.state_dict()
                key = (after, new["have"].tobytes())
                following[key] = (new, count + following.get(key, (None, 0))[1])
        states = following
    return sum(count for _, count in states.values()), failed
