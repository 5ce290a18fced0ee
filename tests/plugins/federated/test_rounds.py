"""Who trains when, and on what."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fulgurite.plugins.federated import plan_round
from fulgurite.plugins.federated.rounds import ClientBatchSampler

Parts = list[NDArray[np.int64]]


@pytest.fixture
def parts() -> Parts:
    """Clients of 5, 1, 7, 3 and 4 samples."""
    return np.split(np.random.default_rng(0).permutation(20), np.cumsum([5, 1, 7, 3]))


def flat(rows: list[list[int]]) -> list[int]:
    return [index for row in rows for index in row]


@given(
    steps=st.lists(st.integers(1, 30), min_size=1, max_size=30),
    world_size=st.integers(1, 5),
    share=st.floats(0.01, 1),
    seed=st.integers(0, 9),
)
def test_plan_is_balanced_and_its_clients_do_not_depend_on_the_ranks(
    steps: list[int], world_size: int, share: float, seed: int
) -> None:
    count = max(1, round(share * len(steps)))
    plan = plan_round(steps, count, world_size, seed=seed)
    alone = plan_round(steps, count, seed=seed)
    clients = sorted(client for clients in plan for client in clients)
    assert clients == sorted(alone[0])
    assert len(clients) == count == len(set(clients))
    loads = [sum(steps[client] for client in clients) for clients in plan]
    # Graham: the largest load is at most 4/3 - 1/(3 ranks) of the best one, which no bound below exceeds.
    drawn = sorted((steps[client] for client in clients), reverse=True)
    two_on_one_rank = sum(drawn[world_size - 1 : world_size + 1]) if count > world_size else 0
    best_is_at_least = max(sum(loads) / world_size, drawn[0], two_on_one_rank)
    if 4 * best_is_at_least >= 3 * max(loads):
        assert max(loads) <= 4 / 3 * best_is_at_least + 1e-9
    assert max(loads) - min(loads) <= max(drawn)


def test_longest_first_to_the_least_loaded() -> None:
    assert plan_round([1, 5, 3, 3, 2], 5, 2) == [[1, 4], [2, 3, 0]]


def test_every_client_is_drawn_as_often() -> None:
    draws = 4000
    counts = np.zeros(8)
    for number in range(draws):
        counts[plan_round([1] * 8, 2, round=number)[0]] += 1
    deviation = np.sqrt(draws * 0.25 * 0.75)  # of a count, binomial
    assert np.all(np.abs(counts - draws / 4) < 4.5 * deviation)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_ranks_together_train_as_one(parts: Parts, world_size: int) -> None:
    def batches(rank: int, world_size: int) -> dict[tuple[int, int], list[int]]:
        sampler = ClientBatchSampler(parts, 2, 4, local_epochs=2, rank=rank, world_size=world_size, seed=3)
        sampler.set_round(5)
        rows = list(sampler)
        assert len(rows) == len(sampler)
        assert sampler.turn(len(sampler.turns)) is None
        return {(turn.client, turn.step): row for turn, row in zip(sampler.turns, rows, strict=False)}

    ranks = [batches(rank, world_size) for rank in range(world_size)]
    together: dict[tuple[int, int], list[int]] = {}
    for rank in ranks:
        assert not together.keys() & rank.keys()
        together |= rank
    assert together == batches(0, 1)


def test_fillers_make_all_ranks_equally_long(parts: Parts) -> None:
    samplers = [ClientBatchSampler(parts, 2, 3, rank=rank, world_size=2) for rank in range(2)]
    for number in range(20):
        for sampler in samplers:
            sampler.set_round(number)
        lengths = [len(list(sampler)) for sampler in samplers]
        work = [len(sampler.turns) for sampler in samplers]
        assert lengths == [max(work)] * 2
        assert samplers[0].filler_share == pytest.approx(1 - sum(work) / sum(lengths))
        filler = list(samplers[work[0] > work[1]])[-1]
        assert work[0] == work[1] or len(filler) == 1


def test_epochs_are_complete_and_shuffled_anew(parts: Parts) -> None:
    sampler = ClientBatchSampler(parts, 2, 5, local_epochs=3)
    rows: dict[int, list[list[int]]] = {}
    for turn, row in zip(sampler.turns, sampler, strict=True):
        rows.setdefault(turn.client, []).append(row)
    for client, part in enumerate(parts):
        per_epoch = -(-len(part) // 2)
        epochs = [flat(rows[client][start : start + per_epoch]) for start in range(0, 3 * per_epoch, per_epoch)]
        assert all(sorted(epoch) == sorted(part) for epoch in epochs)
    assert len({tuple(flat(rows[2][start : start + 4])) for start in (0, 4, 8)}) == 3  # 7! orders


def test_local_steps_run_on_into_the_next_epoch_or_stop_short(parts: Parts) -> None:
    sampler = ClientBatchSampler(parts, 2, 5, local_steps=3)
    assert sampler.steps == [3] * 5
    sizes: dict[int, list[int]] = {}
    for turn, row in zip(sampler.turns, sampler, strict=True):
        assert turn.last == (turn.step == 2)
        sizes.setdefault(turn.client, []).append(len(row))
    assert sizes == {0: [2, 2, 1], 1: [1, 1, 1], 2: [2, 2, 2], 3: [2, 1, 2], 4: [2, 2, 2]}


@pytest.mark.parametrize(("limit", "length"), [(None, 12), (4, 4), (99, 12)])
def test_a_round_can_be_cut_short(parts: Parts, limit: int | None, length: int) -> None:
    sampler = ClientBatchSampler(parts, 2, 5, limit=limit)
    assert len(list(sampler)) == len(sampler) == length
    assert sampler.turns[-1].last
    assert len({turn.client for turn in sampler.turns}) == sum(turn.last for turn in sampler.turns)
