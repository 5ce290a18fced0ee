"""Files that a crash may have cut short."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def reading(path: str | os.PathLike[str]) -> Iterator[None]:
    """Names the file in what goes wrong while it is read: ``torch.load`` says that an archive has no directory.

    Raises:
        OSError: what it holds cannot be read.
    """
    try:
        yield
    except (FileNotFoundError, PermissionError):  # which name it themselves
        raise
    except Exception as error:
        raise OSError(
            f"{os.fspath(path)} cannot be read: if a crash has cut it short, resume from an earlier checkpoint"
            f" ({type(error).__name__}: {error})"
        ) from error
