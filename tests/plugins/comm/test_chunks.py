from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
)

from fulgurite.plugins.comm.chunks import Chunks, HeldBatches, batch_size, cut
from fulgurite.plugins.comm.gradient_codes import make_code
from fulgurite.plugins.loaders import with_batches


@given(
    parts=st.lists(st.integers(1, 50), min_size=1, max_size=40),
    size=st.integers(1, 5000),
)
def test_chunks_are_neighbours_that_make_up_the_batch(parts: list[int], size: int) -> None:
    weights = torch.tensor(parts, dtype=torch.float64)
    weights /= weights.sum()
    chunks = Chunks(weights, size)
    assert [start for start, _ in chunks.bounds] == [0, *(stop for _, stop in chunks.bounds[:-1])]
    assert chunks.bounds[-1][1] == size
    sizes = torch.tensor([stop - start for start, stop in chunks.bounds])
    assert sizes.min() == chunks.smallest >= 0
    assert float((sizes - weights * size).abs().max()) <= 1
    assert [chunks.share(chunk) for chunk in range(len(parts))] == (sizes.double() / size).tolist()


def test_sizes() -> None:
    assert Chunks(torch.full((4,), 0.25), 8).bounds == [(0, 2), (2, 4), (4, 6), (6, 8)]
    assert Chunks(torch.tensor([0.5, 0.25, 0.25]), 4).bounds == [(0, 2), (2, 3), (3, 4)]
    few = Chunks(torch.full((4,), 0.25), 1)
    assert sum(stop - start for start, stop in few.bounds) == 1
    assert few.smallest == 0
    assert sorted(few.share(chunk) for chunk in range(4)) == [0, 0, 0, 1]


def test_places_of_what_is_held_lie_one_after_another() -> None:
    chunks = Chunks(torch.tensor([0.5, 0.25, 0.0, 0.25]), 8)
    assert chunks.places() == {0: (0, 4), 1: (4, 6), 2: (6, 6), 3: (6, 8)}
    assert chunks.places([1, 2, 3]) == {1: (0, 2), 2: (2, 2), 3: (2, 4)}
    assert chunks.places([3, 0]) == {3: (0, 2), 0: (2, 6)}
    assert chunks.places([]) == {}


class Pair(NamedTuple):
    first: Tensor
    second: Any


@dataclass
class Nested:
    x: Tensor
    y: list[Tensor]
    name: str


def test_cut_takes_rows_of_all_that_has_rows() -> None:
    x, y = torch.arange(12.0).view(6, 2), torch.arange(6)
    weights, scalar = torch.ones(3), torch.tensor(2.0)
    batch = {"x": x, "more": (y, [weights, scalar]), "nested": Nested(x, [y], "a"), "texts": [*"abcdef"], "n": 6}
    batch["pair"], batch["few"] = Pair(x, ("a",) * 6), ["a", "b"]
    part = cut(batch, 2, 5)
    assert torch.equal(part["x"], x[2:5])
    assert torch.equal(part["more"][0], y[2:5])
    assert part["more"][1][0] is weights
    assert part["more"][1][1] is scalar
    assert torch.equal(part["nested"].x, x[2:5])
    assert torch.equal(part["nested"].y[0], y[2:5])
    assert (part["nested"].name, part["texts"], part["n"]) == ("a", ["c", "d", "e"], 6)
    assert isinstance(part["pair"], Pair)
    assert torch.equal(part["pair"].first, x[2:5])
    assert (part["pair"].second, part["few"]) == (("a",) * 3, ["a", "b"])
    assert torch.equal(batch["nested"].x, x)  # what was cut is as before
    assert batch_size(batch) == 6
    assert len(cut(x, 3, 3)) == 0


def test_a_batch_without_rows() -> None:
    with pytest.raises(ValueError, match="the batch has no tensor of several samples to cut into chunks, got dict"):
        batch_size({"scalar": torch.tensor(1.0), "texts": ["a", "b"]})


SCHEMES: list[tuple[int, Any, dict[str, int]]] = [
    (4, "gc", {"s": 0}),
    (4, "gc", {"s": 2}),
    (3, "sr_sgc", {"B": 1, "W": 2, "lam": 2}),
    (3, "m_sgc", {"B": 2, "W": 3, "lam": 1}),
    (3, "m_sgc", {"B": 1, "W": 3, "lam": 3}),
]


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("samples", [40, 43])
@pytest.mark.parametrize(("n", "scheme", "params"), SCHEMES)
def test_what_all_hold_is_each_batch(n: int, scheme: Any, params: Any, samples: int, drop_last: bool) -> None:
    """Whoever computes a chunk finds its samples where the places say."""
    dataset = TensorDataset(torch.arange(samples))
    code = make_code(scheme, n, **params)
    plain: list[Tensor] = [batch for (batch,) in shuffled(dataset, drop_last)]
    seen = [set[int]() for _ in plain]
    for worker in range(n):
        loader, held = shuffled(dataset, drop_last), code.chunks_of(worker)
        sampler = HeldBatches(loader, code.chunk_weights, held)
        batches = [batch for (batch,) in with_batches(loader, sampler)]
        assert len(sampler) == len(batches) == len(plain)
        for i, (whole, part) in enumerate(zip(plain, batches, strict=True)):
            assert sampler.size(i) == len(whole)
            chunks = Chunks(code.chunk_weights, len(whole))
            for chunk, place in chunks.places(held).items():
                assert torch.equal(cut(part, *place), cut(whole, *chunks.bounds[chunk]))
            seen[i] |= set(part.tolist()) if any(chunks.share(chunk) for chunk in held) else set()
    assert seen == [set(whole.tolist()) for whole in plain]


def shuffled(dataset: Dataset[Any], drop_last: bool) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(3)
    return DataLoader(dataset, 12, shuffle=True, drop_last=drop_last, generator=generator)


def test_a_worker_without_samples_in_a_small_batch_has_something_to_collate() -> None:
    code = make_code("gc", 8, s=0)
    loader = DataLoader(TensorDataset(torch.arange(11)), 8)
    lengths = []
    for worker in range(8):
        batches = list(with_batches(loader, HeldBatches(loader, code.chunk_weights, code.chunks_of(worker))))
        lengths.append([len(batch) for (batch,) in batches])
    assert lengths == [[1, 1]] * 8


def test_samplers_that_are_known() -> None:
    dataset = TensorDataset(torch.arange(10))
    weights = torch.full((2,), 0.5)
    for loader in (
        DataLoader(dataset, 5),
        DataLoader(dataset, sampler=RandomSampler(dataset), batch_size=5),
        DataLoader(dataset, sampler=DistributedSampler(dataset, 1, 0), batch_size=5),
    ):
        assert [len(batch) for batch in HeldBatches(loader, weights, [1])] == [3, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": None}, "a batch sampler of its own"),
        ({"batch_sampler": [[0, 1], [2, 3]]}, "a batch sampler of its own"),
        ({"batch_sampler": type("Own", (BatchSampler,), {})(range(4), 2, False)}, "a batch sampler of its own"),
        ({"sampler": SubsetRandomSampler(range(4)), "batch_size": 2}, "with the sampler SubsetRandomSampler cannot"),
        ({"sampler": [1, 2, 3], "batch_size": 2}, "with the sampler list cannot"),
    ],
)
def test_loaders_that_cannot_be_read_in_parts(arguments: dict[str, Any], message: str) -> None:
    loader = DataLoader(TensorDataset(torch.arange(4)), **arguments)
    with pytest.raises(ValueError, match=message):
        HeldBatches(loader, torch.full((2,), 0.5), [0])
