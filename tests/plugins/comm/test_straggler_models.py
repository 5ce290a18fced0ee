from itertools import product

import pytest
import torch
from torch import Tensor

from fulgurite.plugins.comm.gradient_codes import ArbitraryModel, BurstyModel, BurstyOrFewModel, PerRoundModel, conforms
from tests.plugins.comm.patterns import all_patterns, count_patterns


def windows(pattern: Tensor, length: int) -> list[list[list[int]]]:
    """For each window, the rounds in which each late worker is late."""
    rounds = pattern.shape[1]
    starts = range(max(1, rounds - length + 1))
    late = [[r for r in range(rounds) if pattern[i, r]] for i in range(len(pattern))]
    return [[inside for row in late if (inside := [r for r in row if a <= r < a + length])] for a in starts]


def bursty(pattern: Tensor, B: int, W: int, lam: int) -> bool:
    return all(len(rows) <= lam and all(row[-1] - row[0] <= B - 1 for row in rows) for rows in windows(pattern, W))


def arbitrary(pattern: Tensor, N: int, W: int, lam: int) -> bool:
    return all(len(rows) <= lam and all(len(row) <= N for row in rows) for rows in windows(pattern, W))


def bursty_or_few(pattern: Tensor, B: int, W: int, lam: int, s: int) -> bool:
    parts = [pattern[:, a : a + W] for a in range(max(1, pattern.shape[1] - W + 1))]
    return all(bursty(part, B, W, lam) or int(part.sum(0).max()) <= s for part in parts)


@pytest.mark.parametrize("density", [0.05, 0.2, 0.5])
def test_conforms_by_the_words_of_the_definition(density: float) -> None:
    generator = torch.Generator().manual_seed(0)
    seen = {True: 0, False: 0}
    for _ in range(150):
        n, rounds = torch.randint(1, 7, (2,), generator=generator).tolist()
        pattern = torch.rand(n, rounds, generator=generator) < density
        for W, lam in product((2, 3, 4), (0, 1, 2)):
            for B in range(1, W):
                assert conforms(pattern, BurstyModel(B, W, lam)) == bursty(pattern, B, W, lam)
                assert conforms(pattern, ArbitraryModel(B, W, lam)) == arbitrary(pattern, B, W, lam)
                expected = bursty_or_few(pattern, B, W, lam, s=1)
                assert conforms(pattern, BurstyOrFewModel(B, W, lam, s=1)) == expected
                seen[expected] += 1
        assert conforms(pattern, PerRoundModel(1)) == (int(pattern.sum(0).max()) <= 1)
    assert min(seen.values()) > 50


@pytest.mark.parametrize(
    ("n", "rounds", "model", "count"),
    [
        (3, 7, BurstyModel(1, 2, 2), 13399),
        (3, 7, BurstyModel(2, 3, 2), 11245),
        (3, 7, ArbitraryModel(2, 4, 2), 14545),
        (3, 7, BurstyOrFewModel(1, 2, 2, s=1), 30175),
        (3, 8, BurstyModel(2, 3, 2), 37135),
        (4, 6, BurstyModel(1, 3, 3), 15457),
        (3, 7, PerRoundModel(1), 4**7),
    ],
    ids=str,
)
def test_number_of_admitted_patterns(n: int, rounds: int, model: object, count: int) -> None:
    assert count_patterns(n, rounds, model) == count


def test_all_patterns_are_those_that_conform() -> None:
    model = BurstyModel(1, 2, 2)
    grown = {tuple(zip(*pattern, strict=True)) for pattern in all_patterns(3, 4, model)}
    rows = product((False, True), repeat=12)
    straight = {tuple(row[4 * i : 4 * i + 4] for i in range(3)) for row in rows if is_admitted(row, model)}
    assert grown == straight
    assert len(grown) == count_patterns(3, 4, model)


def is_admitted(row: tuple[bool, ...], model: BurstyModel) -> bool:
    return conforms(torch.tensor(row).reshape(3, 4), model)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BurstyModel(2, 2, 1), r"`B` is the length of a burst and must be from 1 to `W` - 1 \(1\), got 2"),
        (lambda: BurstyModel(0, 2, 1), "`B` .* got 0"),
        (lambda: BurstyModel(1, 2, -1), "`lam` counts late workers .* got -1"),
        (lambda: ArbitraryModel(-1, 2, 1), "`N` and `lam` must be at least 0 .* got N=-1, W=2, lam=1"),
        (lambda: PerRoundModel(-1), "`s` counts late workers .* got -1"),
        (lambda: conforms(torch.zeros(3), PerRoundModel(1)), r"`pattern` must have a row a worker .* \(3,\)"),
    ],
)
def test_bad_models(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
