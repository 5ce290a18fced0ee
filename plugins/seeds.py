"""Random numbers that depend on what is being done, not on who does it or when."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

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


@contextmanager
def isolate_generators() -> Iterator[None]:
    """Puts the global generators of torch, NumPy and Python back at the end of the block, also after an exception."""
    has_cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    on_host, on_devices = torch.get_rng_state(), torch.cuda.get_rng_state_all() if has_cuda else []
    of_numpy, of_python = np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(on_host)
        torch.cuda.set_rng_state_all(on_devices)
        np.random.set_state(of_numpy)
        random.setstate(of_python)
