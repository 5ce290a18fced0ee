"""One entry of a batch, whatever container a loader makes."""

from collections.abc import Mapping
from copy import copy
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

Batch = TypeVar("Batch")


def get_entry(batch: Any, key: int | str) -> Any:
    """The entry of a tuple, list, namedtuple, mapping or dataclass.

    Args:
        batch: what a loader yields.
        key: an index from 0, a mapping's key, or the name of a field.

    Raises:
        ValueError: the batch has no such entry, or is none of these containers.
    """
    known = _keys(batch)
    if key not in known:
        raise ValueError(
            f"the batch, a {type(batch).__name__}, has no entry {key!r} but {', '.join(map(repr, known)) or 'none'}:"
            " correct `input_key` or `target_key`"
        )
    return batch[key] if isinstance(batch, Mapping) or isinstance(key, int) else getattr(batch, key)


def replace_entry(batch: Batch, key: int | str, value: Any) -> Batch:
    """The same batch with another entry under ``key``: of the same type, the other entries shared.

    Raises:
        ValueError: as for :func:`get_entry`.
    """
    get_entry(batch, key)
    if isinstance(batch, tuple):
        if isinstance(key, str):
            key = _field_names(batch).index(key)
        items = [*batch[:key], value, *batch[key + 1 :]]
        return type(batch)._make(items) if hasattr(batch, "_make") else type(batch)(items)
    replaced: Any = copy(batch)
    if is_dataclass(batch):
        object.__setattr__(replaced, str(key), value)  # may be frozen, and must not be initialised again
    else:
        replaced[key] = value
    return replaced  # type: ignore[no-any-return]


def _keys(batch: Any) -> list[Any]:
    match batch:
        case Mapping():
            return list(batch)
        case tuple() | list():
            return [*range(len(batch)), *_field_names(batch)]
    if is_dataclass(batch):
        return [field.name for field in fields(batch)]
    raise ValueError(
        f"a batch must be a tuple, list, mapping or dataclass with the input as one entry, got {type(batch).__name__}:"
        " let `collate_fn` make one"
    )


def _field_names(batch: Any) -> tuple[str, ...]:
    """Of a namedtuple."""
    return getattr(batch, "_fields", ())
