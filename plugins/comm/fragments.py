"""Fragments: the pieces of a model that are exchanged one at a time."""

from collections.abc import Sequence
from itertools import accumulate
from math import ceil
from typing import Literal, get_args

from torch import nn

Pattern = Literal["strided", "sequential"]


def partition_parameters(
    module: nn.Module,
    num_fragments: int | Literal["auto"] = "auto",
    pattern: Pattern = "strided",
    blocks_per_fragment: int = 3,
) -> list[list[str]]:
    """Splits the trainable parameters of ``module`` into fragments (arXiv 2501.18512, section 2.2).

    With ``"auto"`` the blocks are the children of the largest ``nn.ModuleList`` or ``nn.Sequential`` whose two or more
    children are of one class: fragment 0 holds what is outside of them (embedding, norms, head), each further fragment
    ``blocks_per_fragment`` blocks. Where there is no such list, and with a number, whole tensors are dealt out.

    Args:
        module: the model; frozen parameters are left out, tied ones stand once, under their first name.
        num_fragments: ``"auto"``, or how many fragments to deal the tensors into, at least 1. A model of fewer tensors
            yields one fragment a tensor.
        pattern: ``"strided"`` interleaves the blocks (or tensors), so that a fragment spans the depth of the model;
            ``"sequential"`` keeps neighbours together.
        blocks_per_fragment: blocks in a fragment, at least 1; used with ``"auto"`` alone.

    Returns:
        Names as in ``module.named_parameters()``, a list a fragment; no fragment is empty.

    Raises:
        ValueError: for an argument out of its range, or a module without trainable parameters.

    Example:
        >>> partition_parameters(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), num_fragments=2)
        [['0.weight', '2.weight'], ['0.bias', '2.bias']]
    """
    if num_fragments != "auto" and num_fragments < 1:
        raise ValueError(f"`num_fragments` must be 'auto' or at least 1, got {num_fragments}")
    if blocks_per_fragment < 1:
        raise ValueError(f"`blocks_per_fragment` must be at least 1, got {blocks_per_fragment}")
    if pattern not in get_args(Pattern):
        raise ValueError(f"`pattern` must be one of {get_args(Pattern)}, got {pattern!r}")
    sizes = {name: parameter.numel() for name, parameter in module.named_parameters() if parameter.requires_grad}
    if not sizes:
        raise ValueError("the module has no trainable parameter: nothing would be exchanged")

    blocks = _block_prefixes(module, sizes) if num_fragments == "auto" else []
    if blocks:
        return _deal_blocks(list(sizes), blocks, blocks_per_fragment, pattern)
    count = min(8 if num_fragments == "auto" else num_fragments, len(sizes))
    return _deal_tensors(sizes, count, pattern)


def _block_prefixes(module: nn.Module, sizes: dict[str, int]) -> list[str]:
    """Name prefixes of the model's blocks, in order; empty where it has none."""
    best: list[str] = []
    best_size = 0
    for name, candidate in module.named_modules():
        if not isinstance(candidate, nn.ModuleList | nn.Sequential):
            continue
        if len(candidate) < 2 or len({type(child) for child in candidate}) != 1:
            continue
        prefix = f"{name}." if name else ""
        size = sum(numel for parameter, numel in sizes.items() if parameter.startswith(prefix))
        if size > best_size:
            best, best_size = [f"{prefix}{key}." for key, _ in candidate.named_children()], size
    return best


def _deal_blocks(names: list[str], blocks: Sequence[str], per_fragment: int, pattern: Pattern) -> list[list[str]]:
    count = ceil(len(blocks) / per_fragment)
    fragments: list[list[str]] = [[] for _ in range(1 + count)]
    for name in names:
        block = next((index for index, prefix in enumerate(blocks) if name.startswith(prefix)), None)
        if block is None:
            fragments[0].append(name)
        else:
            fragments[1 + (block % count if pattern == "strided" else block // per_fragment)].append(name)
    return [fragment for fragment in fragments if fragment]


def _deal_tensors(sizes: dict[str, int], count: int, pattern: Pattern) -> list[list[str]]:
    names = list(sizes)
    if pattern == "strided":
        return [names[index::count] for index in range(count)]
    fragments: list[list[str]] = [[] for _ in range(count)]
    ends = list(accumulate(sizes.values()))
    for name, end in zip(names, ends, strict=True):  # a tensor goes where its first value lies
        fragments[(end - sizes[name]) * count // max(ends[-1], 1)].append(name)
    return [fragment for fragment in fragments if fragment]
