"""A global batch in chunks: which samples a worker computes, and what it needs to read (arXiv 2211.13802)."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler
from typing_extensions import override


class Chunks:
    """The chunks of a batch of ``size`` samples: neighbours, in sizes as near to their weights as whole numbers are.

    Args:
        weights: ``(chunks,)``, which sum to 1.
        size: samples of the batch.
    """

    def __init__(self, weights: Tensor, size: int) -> None:
        self.size = size
        ends = (weights.double().cumsum(0) * size).round().long().tolist()
        self.bounds: list[tuple[int, int]] = list(pairwise([0, *ends]))  # first sample, and the first after it

    def share(self, chunk: int) -> float:
        """Part of the batch that a chunk is."""
        start, stop = self.bounds[chunk]
        return (stop - start) / self.size

    @property
    def smallest(self) -> int:
        """Samples of the smallest chunk."""
        return min(stop - start for start, stop in self.bounds)

    def places(self, held: Sequence[int] | None = None) -> dict[int, tuple[int, int]]:
        """Where chunks lie in a batch that has the samples of ``held`` alone, one chunk after another; None for all."""
        if held is None:
            return dict(enumerate(self.bounds))
        places, at = {}, 0
        for chunk in held:
            start, stop = self.bounds[chunk]
            places[chunk] = at, at + stop - start
            at += stop - start
        return places


def batch_size(batch: Any) -> int:
    """Length of the first tensor of a batch.

    Raises:
        ValueError: there is none with a dimension.
    """
    sizes: list[int] = []
    apply_to_collection(batch, Tensor, lambda tensor: sizes.append(len(tensor)) if tensor.dim() else None)
    if not sizes:
        raise ValueError(f"the batch has no tensor of several samples to cut into chunks, got {type(batch).__name__}")
    return sizes[0]


def cut(batch: Any, start: int, stop: int) -> Any:
    """Rows ``start`` to ``stop`` of all that has as many as the first tensor: tensors, and lists of texts or objects.

    All else is as it was, and so are lists of another length, of tensors or of lists, what is in which is cut instead.
    """
    size = batch_size(batch)

    def parts(value: Any) -> Any:
        return apply_to_collection(value, (Tensor, list, tuple), rows)

    def rows(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[start:stop] if value.dim() and len(value) == size else value
        if any(isinstance(item, Tensor | Mapping | list | tuple) for item in value):
            made = [parts(item) for item in value]
            return type(value)(*made) if hasattr(value, "_fields") else type(value)(made)
        return value[start:stop] if len(value) == size else value

    return parts(batch)


class HeldBatches(BatchSampler):
    """Of each batch the samples of some chunks alone, in the order of the chunks.

    Args:
        loader: a map-style loader, whose ``sampler`` and ``batch_size`` make the batches.
        weights: of the chunks, ``(chunks,)``.
        held: the chunks to read.

    Raises:
        ValueError: the loader's batches are not made by a plain sampler and ``batch_size``.
    """

    def __init__(self, loader: DataLoader[Any], weights: Tensor, held: Sequence[int]) -> None:
        plain = SequentialSampler, RandomSampler, DistributedSampler
        if loader.batch_size is None or type(loader.batch_sampler) is not BatchSampler:
            raise ValueError("a loader with a batch sampler of its own cannot be read in parts")
        if not isinstance(loader.sampler, plain):
            raise ValueError(f"a loader with the sampler {type(loader.sampler).__name__} cannot be read in parts")
        super().__init__(loader.sampler, loader.batch_size, loader.drop_last)
        self._weights, self._held = weights, held
        self.first: list[int] = []  # samples of the first batch, all chunks counted; empty before it is drawn

    @override
    def __iter__(self) -> Iterator[list[int]]:
        for indices in super().__iter__():
            self.first = self.first or indices
            chunks = Chunks(self._weights, len(indices))
            held = [indices[i] for chunk in self._held for i in range(*chunks.bounds[chunk])]
            yield held or indices[:1]  # of nothing no batch can be made; it is in no chunk's place

    def size(self, batch_idx: int) -> int:
        """Samples of a batch, all chunks counted."""
        return min(self.batch_size, len(self.sampler) - batch_idx * self.batch_size)  # type: ignore[arg-type]
