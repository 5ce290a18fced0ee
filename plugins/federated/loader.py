"""A loader of clients' batches in place of the user's."""

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, IterableDataset
from typing_extensions import override

from fulgurite.plugins.federated.rounds import ClientBatchSampler
from fulgurite.plugins.loaders import settings_of


def batch_size_of(loader: object) -> int:
    """Samples in a batch of a loader whose dataset can be dealt out to clients.

    Raises:
        ValueError: the samples have no index, or the loader has no batch size.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        kind = type(loader.dataset if isinstance(loader, DataLoader) else loader).__name__
        raise ValueError(
            f"the training data come as {kind}, of which no client can own samples by index: give a DataLoader over a"
            " dataset with `__getitem__` and `__len__`"
        )
    size: int | None = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
    if size is None:
        raise ValueError(
            "the training DataLoader has no `batch_size`, and a client's batches are cut anew: give it one"
        )
    return size


class ClientLoader(DataLoader[Any]):
    """Loads a sampler's batches from the dataset of another loader, in the other's way.

    It resumes at the end of a round, and there it has no more batches. A loop that finds no ``state_dict`` may train on
    one batch too many when it goes on (seen in lightning 2.6.6).

    Args:
        like: the user's loader, of which all is kept but the sampler.
        sampler: whose batches to load.
    """

    def __init__(self, like: DataLoader[Any], sampler: ClientBatchSampler) -> None:
        self._exhausted = False
        super().__init__(like.dataset, batch_sampler=sampler, **settings_of(like))

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the strategy knows the round."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes the place in which checkpoints are saved, after the last batch."""
        self._exhausted = True

    @override
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        if self._exhausted:
            self._exhausted = False
            return iter(())
        return super().__iter__()
