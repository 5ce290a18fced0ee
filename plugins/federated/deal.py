"""How a dataset comes to be the property of clients."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fulgurite.plugins.federated.partition import (
    Indices,
    check_partition,
    dataset_labels,
    dirichlet_partition,
    iid_partition,
    load_partition,
    pathological_partition,
)

Partition = Sequence[Sequence[int]] | str
_NAMED = ("iid", "dirichlet", "pathological")


@dataclass
class Deal:
    """A partition that is known before the dataset is: by name, from a file, or as index lists.

    Args:
        partition: index lists, one a client; a path to such (``.npz``, ``.json``); or the name of a partition.
        num_clients: of a named partition; otherwise how many index lists there are.
        alpha: of ``"dirichlet"``.
        classes_per_client: of ``"pathological"``.
        label_key: where the dataset has its labels, for these two.
        seed: of named partitions.

    Attributes:
        clients: how many there are.

    Raises:
        ValueError: for an argument out of its range.
    """

    partition: Partition
    num_clients: int | None
    alpha: float
    classes_per_client: int
    label_key: int | str
    seed: int
    clients: int = field(init=False)

    def __post_init__(self) -> None:
        named = self.partition in _NAMED if isinstance(self.partition, str) else False
        self._lists: Sequence[Sequence[int]] | list[Indices] | None = None
        if not named:
            self._lists = load_partition(self.partition) if isinstance(self.partition, str) else self.partition
        count = self.num_clients if self._lists is None else len(self._lists)
        if count is None or count < 1:
            raise ValueError(
                f"`num_clients` must be at least 1 for `partition={self.partition!r}`, got {self.num_clients}: it says"
                " to how many clients the samples are dealt out"
            )
        if self.num_clients not in (None, count):
            raise ValueError(
                f"`num_clients` is {self.num_clients}, but `partition` has {count} index lists: leave it out"
            )
        if self.partition == "dirichlet" and not self.alpha > 0:
            raise ValueError(f"`alpha` is a concentration and must be positive, got {self.alpha}")
        if self.partition == "pathological" and self.classes_per_client < 1:
            raise ValueError(f"`classes_per_client` must be at least 1, got {self.classes_per_client}")
        self.clients = count

    def __call__(self, dataset: Any) -> list[Indices]:
        """For each client the indices of its samples in ``dataset``, checked."""
        size = len(dataset)
        if self._lists is not None:
            return check_partition(self._lists, size)
        if self.partition == "iid":
            return iid_partition(size, self.clients, self.seed)
        labels = dataset_labels(dataset, self.label_key)
        if self.partition == "dirichlet":
            return dirichlet_partition(labels, self.clients, self.alpha, self.seed)
        return pathological_partition(labels, self.clients, self.classes_per_client, self.seed)
