"""Which client holds which samples of a dataset."""

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor
from torch.utils.data import Subset

Indices = npt.NDArray[np.int64]
_MAX_DRAWS = 1000


def iid_partition(n: int, num_clients: int, seed: int = 0) -> list[Indices]:
    """Deals ``n`` samples to the clients at random, in numbers that differ by at most one.

    Returns:
        For each client the indices of its samples, ascending; together ``range(n)``, as from the functions below.
    """
    _check_counts(n, num_clients)
    return _ascending(np.array_split(np.random.default_rng(seed).permutation(n), num_clients))


def dirichlet_partition(
    labels: npt.ArrayLike, num_clients: int, alpha: float, seed: int = 0, balanced: bool = False, min_size: int = 1
) -> list[Indices]:
    """Deals samples to the clients with shares drawn from a Dirichlet distribution (arXiv 1909.06335).

    Args:
        labels: ``(n,)``, the class of each sample.
        num_clients: at least 1.
        alpha: concentration, above 0: towards 0 a client sees one class, towards infinity all as in the dataset.
        seed: of the draw.
        balanced: give clients equal numbers of samples, and draw the shares of the classes in each client; else draw
            the shares of the clients in each class, and with them the clients' sizes.
        min_size: samples that each client must get; unless ``balanced``, shares are drawn again until it is so.

    Raises:
        ValueError: an argument is out of range, or no draw gave each client ``min_size`` samples.
    """
    classes = _samples_of_classes(labels)
    sizes = np.array([len(samples) for samples in classes])
    _check_counts(sizes.sum(), num_clients, min_size)
    if not 0 < alpha < np.inf:
        raise ValueError(f"`alpha` is a concentration and must be positive and finite, got {alpha}")
    generator = np.random.default_rng(seed)
    draw = _draw_balanced if balanced else _draw_shares
    counts = draw(sizes, num_clients, alpha, min_size, generator)
    return _deal(classes, counts, generator)


def pathological_partition(
    labels: npt.ArrayLike, num_clients: int, classes_per_client: int, seed: int = 0
) -> list[Indices]:
    """Gives each client samples of few classes, and each class in equal parts to its clients (arXiv 2102.02079).

    Args:
        labels: ``(n,)``, the class of each sample.
        num_clients: at least 1.
        classes_per_client: different classes in each client, from 1 to the number of classes. Every class must find
            a client, so ``num_clients`` times this is at least the number of classes.
        seed: of the draw.

    Raises:
        ValueError: an argument is out of range, or a client would be left without samples.
    """
    classes = _samples_of_classes(labels)
    _check_counts(sum(map(len, classes)), num_clients)
    if not 1 <= classes_per_client <= len(classes) <= num_clients * classes_per_client:
        raise ValueError(
            f"`classes_per_client` must be from 1 to the number of classes ({len(classes)}), and with {num_clients}"
            f" clients enough to hold all of them, got {classes_per_client}"
        )
    generator = np.random.default_rng(seed)
    holds = np.zeros((len(classes), num_clients), dtype=np.int64)
    for client in range(num_clients):  # takes the classes that the fewest clients have so far, ties by lot
        holds[np.lexsort((generator.random(len(classes)), holds.sum(1)))[:classes_per_client], client] = 1
    counts = holds.copy()
    for row, samples in zip(counts, classes, strict=True):
        row[row > 0] = _equal_sizes(len(samples), row.sum())
    if not counts.any(0).all():
        raise ValueError(
            f"`num_clients` is {num_clients}, and client {counts.any(0).argmin()} would hold no sample: its classes"
            " have fewer samples than clients; lower `num_clients`, or raise `classes_per_client`"
        )
    return _deal(classes, counts, generator)


def check_partition(parts: Sequence[npt.ArrayLike], size: int) -> list[Indices]:
    """The parts as arrays, after a check that clients share no sample and that all samples exist.

    Args:
        parts: for each client the indices of its samples.
        size: of the dataset.

    Raises:
        ValueError: names the client and the index that are wrong.
    """
    if not len(parts):
        raise ValueError("`partition` has no clients: give one list of indices a client")
    owner = np.full(size, -1)
    checked = []
    for client, part in enumerate(parts):
        indices = np.asarray(part)
        if not indices.size:
            raise ValueError(f"`partition` leaves client {client} without samples: drop the client, or give it some")
        if indices.ndim != 1 or indices.dtype.kind not in "iu":
            raise ValueError(
                f"`partition` must hold a list of whole numbers for client {client}, got {indices.dtype} of shape"
                f" {indices.shape}"
            )
        outside = indices[(indices < 0) | (indices >= size)]
        if outside.size:
            raise ValueError(
                f"`partition` gives index {outside[0]} to client {client}, and the dataset has {size} samples"
            )
        values, times = np.unique(indices, return_counts=True)
        taken = values[(owner[values] >= 0) | (times > 1)]
        if taken.size:
            first = owner[taken[0]]
            other = f"client {first}" if first >= 0 else "it once more"
            raise ValueError(
                f"`partition` gives index {taken[0]} to client {client} and to {other}: a sample has one client"
            )
        owner[values] = client
        checked.append(indices.astype(np.int64))
    return checked


def load_partition(path: str | Path) -> list[Indices]:
    """Reads index lists: an ``.npz`` file with an array a client, in their order, or a ``.json`` list of lists.

    Raises:
        ValueError: another suffix, or not a list.
    """
    path = Path(path)
    if path.suffix == ".npz":
        with np.load(path) as archive:
            return [archive[name] for name in archive.files]
    if path.suffix != ".json":
        raise ValueError(f"`partition` is read from an .npz or .json file of index lists, got '{path}'")
    parts = json.loads(path.read_text())
    if not isinstance(parts, list):
        raise ValueError(
            f"`partition` must be a list with a list of indices a client, but '{path}' holds a {type(parts)}"
        )
    return [np.asarray(part) for part in parts]


def dataset_labels(dataset: Any, label_key: int | str = 1) -> npt.NDArray[Any]:
    """The class of each sample of a map-style dataset, without loading the samples.

    Args:
        dataset: with ``targets`` or ``labels``, ``tensors`` as of :class:`~torch.utils.data.TensorDataset`, or columns
            by name; or a :class:`~torch.utils.data.Subset` of such.
        label_key: index into ``tensors``, or the name of an attribute or a column.

    Returns:
        ``(n,)``

    Raises:
        ValueError: there are none to be found, or not one a sample.
    """
    if isinstance(dataset, Subset):
        every = dataset_labels(dataset.dataset, label_key)
        return np.take(every, dataset.indices)
    found = _find_labels(dataset, label_key)
    labels = None if found is None else np.asarray(found.cpu() if isinstance(found, Tensor) else found)
    if labels is None or labels.shape != (len(dataset),):
        what = "no labels" if labels is None else f"labels of shape {labels.shape} for {len(dataset)} samples"
        raise ValueError(
            f"{type(dataset).__name__} has {what} under `label_key` {label_key!r}, `targets` or `labels`: set"
            " `label_key`, or give `partition` as lists of indices"
        )
    return labels


def _find_labels(dataset: Any, label_key: int | str) -> Any:
    tensors = getattr(dataset, "tensors", ())
    names = (label_key, "targets", "labels") if isinstance(label_key, str) else ("targets", "labels")
    for name in names:
        if hasattr(dataset, name):
            return getattr(dataset, name)
        if name == label_key and not tensors:
            with suppress(KeyError, IndexError, TypeError, ValueError):  # has no columns, or none of that name
                return dataset[label_key]
    return tensors[label_key] if isinstance(label_key, int) and label_key < len(tensors) else None


def _check_counts(n: int, num_clients: int, min_size: int = 1) -> None:
    if num_clients < 1 or min_size < 1:
        name, got = ("num_clients", num_clients) if num_clients < 1 else ("min_size", min_size)
        raise ValueError(f"`{name}` must be at least 1, got {got}")
    if n < num_clients * min_size:
        raise ValueError(
            f"`num_clients` is {num_clients} with `min_size` {min_size}, and there are {n} samples: too few for all"
        )


def _samples_of_classes(labels: npt.ArrayLike) -> list[Indices]:
    """For each class the indices of its samples."""
    labels = np.asarray(labels)
    if labels.ndim != 1:
        raise ValueError(f"`labels` must hold one class a sample, got shape {labels.shape}")
    number = np.unique(labels, return_inverse=True)[1]
    return np.split(np.argsort(number, kind="stable"), np.cumsum(np.bincount(number))[:-1])


def _equal_sizes(n: int, parts: int) -> Indices:
    return np.full(parts, n // parts) + (np.arange(parts) < n % parts)


def _draw_shares(
    sizes: Indices, num_clients: int, alpha: float, min_size: int, generator: np.random.Generator
) -> Indices:
    """How many samples of each class (row) each client (column) gets, by shares of the clients in each class."""
    for _ in range(_MAX_DRAWS):
        shares = generator.dirichlet(np.full(num_clients, alpha), len(sizes))
        ends = np.rint(shares.cumsum(1) * sizes[:, None]).astype(np.int64)
        counts = np.diff(ends, axis=1, prepend=0)
        if counts.sum(0).min() >= min_size:
            return counts
    raise ValueError(
        f"`alpha` is {alpha}: in {_MAX_DRAWS} draws a client always got fewer than `min_size` ({min_size}) of the"
        f" {sizes.sum()} samples; raise `alpha`, lower `num_clients` ({num_clients}), or set `balanced`"
    )


def _draw_balanced(
    sizes: Indices, num_clients: int, alpha: float, min_size: int, generator: np.random.Generator
) -> Indices:
    """The same by shares of the classes in each client; a class that is used up leaves its share to the others."""
    left = sizes.copy()
    counts = np.zeros((len(sizes), num_clients), dtype=np.int64)
    for client, wanted in enumerate(_equal_sizes(sizes.sum(), num_clients)):
        shares = generator.dirichlet(np.full(len(sizes), alpha))
        while wanted:
            shares = np.where(left > 0, shares, 0)
            if not shares.sum() > 0:  # all that the client would take is gone
                shares = left.astype(float)
            taken = np.minimum(generator.multinomial(wanted, shares / shares.sum()), left)
            counts[:, client] += taken
            left -= taken
            wanted -= taken.sum()
    return counts


def _deal(classes: list[Indices], counts: Indices, generator: np.random.Generator) -> list[Indices]:
    """Deals each class's samples at random, ``counts[class, client]`` of them to a client."""
    dealt = [
        np.split(generator.permutation(samples), np.cumsum(row)[:-1])
        for samples, row in zip(classes, counts, strict=True)
    ]
    return _ascending([np.concatenate(parts) for parts in zip(*dealt, strict=True)])


def _ascending(parts: Sequence[npt.NDArray[Any]]) -> list[Indices]:
    return [np.sort(part).astype(np.int64) for part in parts]
