from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from fulgurite.plugins.federated.batch import get_entry, replace_entry

Named = namedtuple("Named", ["x", "y"])


@dataclass(frozen=True)
class Frozen:
    x: Any
    y: Any
    seen: list[str] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.seen.append("initialised")


@dataclass(slots=True)
class Slotted:
    x: Any
    y: Any


class Encoding(UserDict[str, Any]):
    """As tokenizers make them."""


CONTAINERS: list[tuple[Callable[[Any, Any], Any], int | str, int | str]] = [
    (lambda x, y: (x, y), 0, 1),
    (lambda x, y: [x, y], 0, 1),
    (Named, 0, 1),
    (Named, "x", "y"),
    (lambda x, y: {"x": x, "y": y}, "x", "y"),
    (lambda x, y: {0: x, 1: y}, 0, 1),
    (lambda x, y: OrderedDict(x=x, y=y), "x", "y"),
    (lambda x, y: Encoding(x=x, y=y), "x", "y"),
    (Frozen, "x", "y"),
    (Slotted, "x", "y"),
]


@pytest.mark.parametrize(("make", "x_key", "y_key"), CONTAINERS)
def test_rebuilt_as_it_was_but_for_one_entry(make: Any, x_key: Any, y_key: Any) -> None:
    x, y, other = torch.zeros(2), torch.ones(2), torch.full((2,), 7.0)
    batch = make(x, y)
    replaced = replace_entry(batch, x_key, other)
    assert type(replaced) is type(batch)
    assert get_entry(replaced, x_key) is other
    assert get_entry(replaced, y_key) is y
    assert get_entry(batch, x_key) is x
    assert get_entry(replace_entry(batch, y_key, other), x_key) is x


def test_a_dataclass_is_not_initialised_again() -> None:
    batch = Frozen(1, 2)
    assert replace_entry(batch, "x", 3).seen is batch.seen
    assert batch.seen == ["initialised"]


@pytest.mark.parametrize(
    ("batch", "key", "message"),
    [
        ((1, 2), 2, "the batch, a tuple, has no entry 2 but 0, 1: correct `input_key`"),
        ([1], "x", "a list, has no entry 'x' but 0"),
        (Named(1, 2), "image", "has no entry 'image' but 0, 1, 'x', 'y'"),
        ({"x": 1, "y": 2}, 0, "a dict, has no entry 0 but 'x', 'y'"),
        (Slotted(1, 2), "image", "a Slotted, has no entry 'image' but 'x', 'y'"),
        (Slotted(1, 2), 0, "has no entry 0"),
        ({}, "x", "has no entry 'x' but none"),
        (torch.zeros(2), 0, "must be a tuple, list, mapping or dataclass .*, got Tensor"),
    ],
    ids=str,
)
def test_missing_entry(batch: Any, key: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_entry(batch, key)
    with pytest.raises(ValueError, match=message):
        replace_entry(batch, key, 0)
