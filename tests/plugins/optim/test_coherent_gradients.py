import itertools

import pytest
import torch
from torch import Tensor

from fulgurite.plugins.optim.coherent_gradients import median_of_three, winsorized_mean


def rows(m: int, *shape: int) -> Tensor:
    return torch.randn(m, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(m))


@pytest.mark.parametrize("m", [1, 2, 5, 10, 11])
@pytest.mark.parametrize("c", [0.0, 0.1, 0.2, 0.35, 0.499])
def test_equals_sorting_by_hand(m: int, c: float) -> None:
    given = rows(m, 3, 2)
    k = int(c * m)
    expected = torch.empty(3, 2, dtype=torch.float64)
    for i, j in itertools.product(range(3), range(2)):
        values = sorted(given[:, i, j].tolist())
        clipped = [min(max(value, values[k]), values[m - 1 - k]) for value in given[:, i, j].tolist()]
        expected[i, j] = sum(clipped) / m
    torch.testing.assert_close(winsorized_mean(given, c), expected)


def test_runs_from_the_mean_to_the_median() -> None:
    given = rows(7, 4)
    assert torch.equal(winsorized_mean(given, 0.0), given.mean(0))
    torch.testing.assert_close(winsorized_mean(given, 0.499), given.median(0).values)


def test_median_of_three_in_any_order() -> None:
    given = rows(3, 50)
    for order in itertools.permutations(given):
        assert torch.equal(median_of_three(*order), given.median(0).values)
    assert torch.equal(median_of_three(given[0], given[0], given[0]), given[0])
