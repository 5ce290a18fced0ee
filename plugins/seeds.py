"""Random numbers that depend on what is being done, not on who does it or when."""

import hashlib
import random

import numpy as np
import torch


def derived_seed(*key: object) -> int:
    """A seed for what ``key`` names, such as ``(seed, "client", round, client)``; the same in every process and run.

    Args:
        key: numbers and strings; each key has a stream of its own.

    Returns:
        From 0 to ``2**56 - 1``.
    """
    text = " ".join(map(str, key))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest())


def seed_all(*key: object) -> None:
    """Seeds the global generators of torch, NumPy and Python for what ``key`` names."""
    seed = derived_seed(*key)
    torch.default_generator.manual_seed(seed)  # `torch.manual_seed` asks every backend, for a tenth of a millisecond
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
