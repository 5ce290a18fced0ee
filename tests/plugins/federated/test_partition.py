import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Dataset, Subset, TensorDataset

from fulgurite.plugins.federated import dirichlet_partition, iid_partition, pathological_partition
from fulgurite.plugins.federated.partition import check_partition, dataset_labels, load_partition

N, CLASSES = 600, 10
LABELS = np.random.default_rng(0).integers(CLASSES, size=N)

MAKERS: dict[str, Callable[[int, int], list[Any]]] = {
    "iid": lambda clients, seed: iid_partition(N, clients, seed),
    "dirichlet": lambda clients, seed: dirichlet_partition(LABELS, clients, 0.5, seed),
    "balanced": lambda clients, seed: dirichlet_partition(LABELS, clients, 0.5, seed, balanced=True),
    "pathological": lambda clients, seed: pathological_partition(LABELS, clients, 2, seed),
}
every_kind = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def marginals(parts: list[Any]) -> Any:
    """``(clients, classes)``, shares of the classes in each client."""
    return np.stack([np.bincount(LABELS[part], minlength=CLASSES) / len(part) for part in parts])


@every_kind
@given(clients=st.integers(5, 20), seed=st.integers(0, 2**16))
def test_each_sample_has_one_client(make: Callable[[int, int], list[Any]], clients: int, seed: int) -> None:
    parts = make(clients, seed)
    assert len(parts) == clients
    assert all(part.dtype == np.int64 and len(part) for part in parts)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(N))
    check_partition(parts, N)


@every_kind
def test_the_seed_decides(make: Callable[[int, int], list[Any]]) -> None:
    first, again, other = make(7, 1), make(7, 1), make(7, 2)
    for one, two in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, two)
    assert any(len(one) != len(two) or (one != two).any() for one, two in zip(first, other, strict=True))


@pytest.mark.parametrize("make", [MAKERS["iid"], MAKERS["balanced"]], ids=["iid", "balanced"])
def test_equal_sizes_with_the_remainder_first(make: Callable[[int, int], list[Any]]) -> None:
    assert [len(part) for part in make(7, 0)] == [86] * 5 + [85] * 2  # 600 = 7 * 85 + 5


def test_large_alpha_gives_the_marginals_of_the_dataset() -> None:
    parts = dirichlet_partition(LABELS, 5, alpha=1e8)
    # Shares of clients in a class are 1/5 to 1e-4: the rounding of two ends, one sample in about 12 * 10, remains.
    np.testing.assert_allclose(marginals(parts), np.tile(np.bincount(LABELS) / N, (5, 1)), atol=0.015)


def test_large_alpha_balanced_draws_evenly() -> None:
    shares = marginals(dirichlet_partition(LABELS, 5, alpha=1e8, balanced=True))
    # The first client draws 120 samples of 10 equal classes: sd of a share sqrt(0.09 / 120) = 0.027, here 5 of them.
    np.testing.assert_allclose(shares[0], 0.1, atol=0.137)


@pytest.mark.parametrize("balanced", [False, True])
def test_small_alpha_gives_mostly_one_class(balanced: bool) -> None:
    parts = dirichlet_partition(LABELS, 5, alpha=0.01, balanced=balanced, seed=3)
    largest = marginals(parts).max(1)
    if balanced:  # 120 samples a client, about 60 a class: two classes make a client
        assert (np.sort(marginals(parts), 1)[:, -3:].sum(1) > 0.9).mean() > 0.5
    else:  # 10 classes to 5 clients, each class nearly whole
        holders = np.stack([np.bincount(LABELS[part], minlength=CLASSES) for part in parts])
        assert np.median(holders.max(0) / holders.sum(0)) > 0.99
    assert largest.min() > 0.2  # 0.1 where all are alike


def test_a_client_whose_only_class_is_used_up_takes_what_is_left() -> None:
    """At this concentration the other shares are zero in floating point."""
    parts = dirichlet_partition(LABELS, 20, alpha=1e-4, balanced=True)
    assert [len(part) for part in parts] == [30] * 20
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(N))


def test_min_size() -> None:
    assert min(map(len, dirichlet_partition(LABELS, 10, alpha=0.5, min_size=30))) >= 30
    assert min(map(len, dirichlet_partition(LABELS, 10, alpha=0.5))) < 30


@pytest.mark.parametrize(("clients", "classes"), [(20, 2), (5, 2), (4, 10), (11, 3)])
def test_pathological_clients_have_few_classes_and_share_them_equally(clients: int, classes: int) -> None:
    parts = pathological_partition(LABELS, clients, classes)
    held = np.stack([np.bincount(LABELS[part], minlength=CLASSES) for part in parts])
    assert ((held > 0).sum(1) == classes).all()
    owners = (held > 0).sum(0)
    assert owners.max() - owners.min() <= 1
    for counts in held.T:
        assert np.ptp(counts[counts > 0]) <= 1


def test_labels_of_any_kind() -> None:
    names = np.array(["cat", "dog"])[LABELS % 2]
    for one, two in zip(
        dirichlet_partition(names, 3, 0.5), dirichlet_partition(torch.tensor(LABELS % 2), 3, 0.5), strict=True
    ):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: iid_partition(3, 4), "`num_clients` is 4 .* there are 3 samples"),
        (lambda: iid_partition(3, 0), "`num_clients` must be at least 1, got 0"),
        (lambda: dirichlet_partition(LABELS, 5, 0.0), "`alpha` .* must be positive and finite, got 0.0"),
        (lambda: dirichlet_partition(LABELS, 5, float("nan")), "`alpha` .* got nan"),
        (lambda: dirichlet_partition(LABELS, 5, 1.0, min_size=0), "`min_size` must be at least 1, got 0"),
        (lambda: dirichlet_partition(LABELS, 5, 1.0, min_size=121), "`min_size` 121, and there are 600"),
        (lambda: dirichlet_partition(LABELS, 300, 0.01), "`alpha` is 0.01: in 1000 draws .* `balanced`"),
        (lambda: dirichlet_partition(np.eye(3), 2, 1.0), r"`labels` must hold one class a sample, got shape \(3, 3\)"),
        (lambda: pathological_partition(LABELS, 5, 11), r"`classes_per_client` .* number of classes \(10\).* got 11"),
        (lambda: pathological_partition(LABELS, 5, 0), "`classes_per_client` .* got 0"),
        (lambda: pathological_partition(LABELS, 4, 2), "with 4 clients enough to hold all of them, got 2"),
        (lambda: pathological_partition([0, 0, 0, 0, 1], 4, 1), "client . would hold no sample"),
        (lambda: check_partition([], 5), "`partition` has no clients"),
        (lambda: check_partition([[0], []], 5), "leaves client 1 without samples"),
        (lambda: check_partition([[0], [1, 5]], 5), "gives index 5 to client 1, and the dataset has 5 samples"),
        (lambda: check_partition([[0, -1]], 5), "gives index -1 to client 0"),
        (lambda: check_partition([[0, 1], [2], [3, 1]], 5), "gives index 1 to client 2 and to client 0"),
        (lambda: check_partition([[0], [1, 1]], 5), "gives index 1 to client 1 and to it once more"),
        (lambda: check_partition([[0.5]], 5), "whole numbers for client 0, got float64"),
        (lambda: load_partition("parts.csv"), "read from an .npz or .json file of index lists, got 'parts.csv'"),
        (lambda: dataset_labels(TensorDataset(torch.zeros(3))), "TensorDataset has no labels under `label_key` 1"),
        (
            lambda: dataset_labels(TensorDataset(torch.zeros(3), torch.eye(3))),
            r"labels of shape \(3, 3\) for 3 samples",
        ),
        (lambda: dataset_labels(TensorDataset(torch.zeros(3)), "label"), "give `partition` as lists of indices"),
    ],
)
def test_bad_input(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_files(tmp_path: Path) -> None:
    parts = iid_partition(30, 12)
    np.savez(tmp_path / "parts.npz", *parts)
    (tmp_path / "parts.json").write_text(json.dumps([part.tolist() for part in parts]))
    for name in ("parts.npz", "parts.json"):
        for one, two in zip(check_partition(load_partition(tmp_path / name), 30), parts, strict=True):
            np.testing.assert_array_equal(one, two)
    (tmp_path / "parts.json").write_text("{}")
    with pytest.raises(ValueError, match="must be a list with a list of indices a client"):
        load_partition(tmp_path / "parts.json")


class Images(Dataset[Any]):
    """Whose samples must not be loaded to know their classes."""

    def __init__(self, **labels: Any) -> None:
        vars(self).update(labels)

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        raise AssertionError("a sample was loaded") if isinstance(index, int) else KeyError(index)


@pytest.mark.parametrize(
    ("dataset", "key"),
    [
        (Images(targets=[3, 1, 2, 1]), 1),
        (Images(labels=torch.tensor([3, 1, 2, 1])), 1),
        (Images(targets=[0, 0, 0, 0], genus=[3, 1, 2, 1]), "genus"),
        (Images(targets=[3, 1, 2, 1]), "genus"),
        (TensorDataset(torch.zeros(4, 2), torch.tensor([3, 1, 2, 1])), 1),
        (TensorDataset(torch.tensor([3, 1, 2, 1]), torch.zeros(4, 2)), 0),
    ],
)
def test_labels_of_datasets(dataset: Any, key: int | str) -> None:
    assert dataset_labels(dataset, key).tolist() == [3, 1, 2, 1]
    assert dataset_labels(Subset(Subset(dataset, [0, 1, 3]), [2, 0]), key).tolist() == [1, 3]


def test_labels_by_column() -> None:
    class Table(Images):
        def __getitem__(self, index: Any) -> Any:
            return {"label": [3, 1, 2, 1]}[index]

    assert dataset_labels(Table(), "label").tolist() == [3, 1, 2, 1]
    with pytest.raises(ValueError, match="no labels under `label_key` 'class'"):
        dataset_labels(Table(), "class")
