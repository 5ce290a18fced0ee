"""Batches of the training data for a callback to keep, without touching the iterator that training reads."""

import copy
from collections.abc import Generator, Iterator
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data import DataLoader, IterableDataset

from fulgurite.plugins.seeds import isolate_generators, seed_all


def training_batches(loader: Any, seed: int, otherwise: str) -> Generator[tuple[Any, Any]]:
    """``(index, batch)`` in the order that the loader would give with generators seeded by ``seed``.

    ``index`` is what :func:`batch_at` fetches the same batch by; None for data without indices, of which a fresh
    iterator is read. Workers are not started. The generators are as they were once the iterator is closed.

    Args:
        loader: a ``DataLoader`` or any iterable over batches; on each rank its own.
        seed: for the order, and for random augmentations.
        otherwise: the setting that needs none of this, for messages.

    Raises:
        ValueError: for several loaders, and for data that can be iterated only once.
    """
    if isinstance(loader, list | tuple | dict):
        raise ValueError(f"several training loaders have no batches of their own: set `{otherwise}`")
    with isolate_generators():
        seed_all("training batches", seed)
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            for batch in _fresh(loader, otherwise):
                yield None, batch
            return
        sampler = loader.batch_sampler if loader.batch_sampler is not None else loader.sampler
        # A copy, for a sampler may count its epochs or have a generator; of the sampler alone, not of the data.
        for index in copy.deepcopy(sampler, {id(loader.dataset): loader.dataset}):
            yield index, batch_at(loader, index, seed)


def batch_at(loader: DataLoader[Any], index: Any, seed: int) -> Any:
    """The batch of an index that :func:`training_batches` gave."""
    with isolate_generators():
        seed_all("training batch", seed, index)
        batched = {"batch_sampler": [index]} if loader.batch_sampler is not None else {"sampler": [index]}
        single = {} if loader.batch_sampler is not None else {"batch_size": None}
        return next(iter(DataLoader(loader.dataset, collate_fn=loader.collate_fn, **batched, **single)))  # type: ignore[arg-type]


def _fresh(loader: Any, otherwise: str) -> Iterator[Any]:
    source = loader.dataset if isinstance(loader, DataLoader) else loader
    first = iter(source)
    if first is source or first is iter(source):
        raise ValueError(
            f"the training data ({type(source).__name__}) can be iterated only once, and training needs that: "
            f"set `{otherwise}`"
        )
    if not isinstance(loader, DataLoader):
        return first
    options = (
        {"batch_size": loader.batch_size, "drop_last": loader.drop_last} if loader.batch_size else {"batch_size": None}
    )
    return iter(DataLoader(source, collate_fn=loader.collate_fn, **options))


def to_device(trainer: Trainer, pl_module: LightningModule, batch: Any) -> Any:
    """A batch from the host, as the Trainer moves it to the step."""
    data = getattr(trainer, "datamodule", None)  # set, but nowhere declared
    batch = trainer.precision_plugin.convert_input(batch)
    owner = data if data is not None and is_overridden("on_before_batch_transfer", data) else pl_module
    return trainer.strategy.batch_to_device(owner.on_before_batch_transfer(batch, 0), dataloader_idx=0)
