from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, TensorDataset

from fulgurite.plugins.loaders import settings_of, with_batches


def doubled(samples: list[tuple[Tensor]]) -> Tensor:
    return torch.stack([2 * sample for (sample,) in samples])


def started(worker: int) -> None:
    torch.set_num_threads(1)


def test_other_batches_are_loaded_in_the_same_way() -> None:
    settings: dict[str, Any] = {
        "num_workers": 1,
        "collate_fn": doubled,
        "pin_memory": False,
        "timeout": 30.0,
        "worker_init_fn": started,
        "prefetch_factor": 3,
        "multiprocessing_context": "fork",
        "persistent_workers": True,
        "generator": torch.Generator().manual_seed(1),
    }
    loader = DataLoader(TensorDataset(torch.arange(6)), batch_size=2, **settings)
    other = with_batches(loader, BatchSampler([5, 1, 3], 2, False))
    assert other.dataset is loader.dataset
    assert settings_of(other) == settings_of(loader)
    assert settings_of(loader).keys() == settings.keys()
    assert settings_of(loader)["multiprocessing_context"].get_start_method() == "fork"
    assert [batch.tolist() for batch in other] == [[10, 2], [6]]
    assert [batch.tolist() for batch in loader] == [[0, 2], [4, 6], [8, 10]]
