from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fulgurite.plugins.comm import partition_parameters


class Transformer(nn.Module):
    def __init__(self, layers: int, width: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.head = nn.Linear(width, 5, bias=False)


@pytest.mark.parametrize(("layers", "every"), [(24, 11), (48, 5), (108, 2)])
def test_the_paper_sends_a_fragment_every_11_5_2_steps(layers: int, every: int) -> None:
    assert 100 // len(partition_parameters(Transformer(layers))) == every


@pytest.mark.parametrize(
    ("pattern", "blocks"), [("strided", [[0, 3, 6], [1, 4], [2, 5]]), ("sequential", [[0, 1, 2], [3, 4, 5], [6]])]
)
def test_blocks_after_what_is_outside_of_them(pattern: Any, blocks: list[list[int]]) -> None:
    fragments = partition_parameters(Transformer(7), pattern=pattern)
    expected = [[f"blocks.{block}.{kind}" for block in group for kind in ("weight", "bias")] for group in blocks]
    assert fragments == [["embed.weight", "head.weight"], *expected]


def test_the_block_list_with_most_parameters_is_chosen() -> None:
    module = nn.ModuleDict({"small": nn.Sequential(*(nn.Linear(1, 1) for _ in range(9))), "large": Transformer(2, 8)})
    fragments = partition_parameters(module, blocks_per_fragment=1)
    assert fragments[1:] == [[f"large.blocks.{i}.weight", f"large.blocks.{i}.bias"] for i in range(2)]


def test_a_model_that_is_nothing_but_blocks_has_no_empty_fragment() -> None:
    assert len(partition_parameters(nn.Sequential(*(nn.Linear(1, 1) for _ in range(6))))) == 2


def test_without_blocks_tensors_are_dealt_out() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))
    assert partition_parameters(module) == [["0.weight"], ["0.bias"], ["2.weight"], ["2.bias"]]


def test_sequential_cuts_by_size() -> None:
    module = nn.ParameterDict(
        {name: nn.Parameter(torch.zeros(n)) for name, n in [("a", 6), ("b", 1), ("c", 1), ("d", 4)]}
    )
    assert partition_parameters(module, num_fragments=2, pattern="sequential") == [["a"], ["b", "c", "d"]]


def test_tied_parameters_stand_once_and_frozen_ones_not_at_all() -> None:
    module = Transformer(2)
    module.head.weight = module.embed.weight
    module.blocks[0].requires_grad_(False)
    names = [name for fragment in partition_parameters(module) for name in fragment]
    assert names == ["embed.weight", "blocks.1.weight", "blocks.1.bias"]


@given(
    layers=st.integers(1, 12),
    fragments=st.one_of(st.just("auto"), st.integers(1, 60)),
    pattern=st.sampled_from(["strided", "sequential"]),
    per_fragment=st.integers(1, 13),
)
def test_each_name_once_and_no_fragment_empty(layers: int, fragments: Any, pattern: Any, per_fragment: int) -> None:
    module = Transformer(layers)
    parts = partition_parameters(module, fragments, pattern, per_fragment)
    assert all(parts)
    assert sorted(name for part in parts for name in part) == sorted(name for name, _ in module.named_parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_fragments": 0}, "`num_fragments` must be 'auto' or at least 1, got 0"),
        ({"blocks_per_fragment": 0}, "`blocks_per_fragment` must be at least 1, got 0"),
        ({"pattern": "spiral"}, "`pattern` must be one of .*, got 'spiral'"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        partition_parameters(Transformer(2), **arguments)


def test_nothing_to_train() -> None:
    with pytest.raises(ValueError, match="no trainable parameter"):
        partition_parameters(nn.Linear(1, 1).requires_grad_(False))
