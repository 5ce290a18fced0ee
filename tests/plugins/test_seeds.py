import random
from contextlib import suppress

import numpy as np
import pytest
import torch

from fulgurite.plugins.seeds import derived_seed, isolate_generators, seed_all


def draw() -> tuple[float, float, float]:
    return torch.rand(()).item(), float(np.random.rand()), random.random()


def test_a_key_has_one_stream_and_keys_have_different_ones() -> None:
    seeds = [derived_seed(0, purpose, step) for purpose in ("data", "step") for step in range(500)]
    assert len(set(seeds)) == 1000
    assert derived_seed(0, "data", 3) == seeds[3]
    assert 0 <= min(seeds) < max(seeds) < 2**56


def test_seeds_torch_numpy_and_python() -> None:
    seed_all(1, "step", 2)
    first = draw()
    draw()
    seed_all(1, "step", 2)
    assert draw() == first
    seed_all(1, "step", 3)
    assert all(number != before for number, before in zip(draw(), first, strict=True))


@pytest.mark.parametrize("fails", [False, True])
def test_generators_come_back(fails: bool) -> None:
    seed_all(1)
    expected = draw()
    seed_all(1)
    with suppress(ZeroDivisionError), isolate_generators():
        draw()
        _ = 1 / (not fails)
    assert draw() == expected
