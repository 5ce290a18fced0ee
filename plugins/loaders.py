"""DataLoaders that load other batches in the way of a user's own."""

from typing import Any

from torch.utils.data import BatchSampler, DataLoader

_KEPT = (
    *("num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "prefetch_factor"),
    *("multiprocessing_context", "persistent_workers", "generator"),
)


def settings_of(loader: DataLoader[Any]) -> dict[str, Any]:
    """Arguments that make a loader load as this one does, but for what is in a batch."""
    return {name: getattr(loader, name) for name in _KEPT}


def with_batches(loader: DataLoader[Any], batch_sampler: BatchSampler) -> DataLoader[Any]:
    """A loader of the same dataset in the same way, with other batches."""
    return DataLoader(loader.dataset, batch_sampler=batch_sampler, **settings_of(loader))
