"""What the ranks of a data-parallel group tell each other: means, rank 0's decisions, and rows of vectors."""

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.functional import pad


def in_pieces(param: Tensor) -> bool:
    """Whether FSDP, tensor parallelism or DeepSpeed divide a parameter among ranks."""
    return isinstance(param, DTensor) or hasattr(param, "_is_flat_param") or hasattr(param, "ds_id")


class Peers:
    """The ranks over which a loss is averaged; one rank alone exchanges nothing.

    Args:
        group: None for all ranks.
        sync: False for this rank alone.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, sync: bool = True) -> None:
        joined = sync and dist.is_available() and dist.is_initialized()
        self.group = group
        self.size = dist.get_world_size(group) if joined else 1
        self.rank = dist.get_rank(group) if joined else 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def mean_(self, tensor: Tensor) -> Tensor:
        """The mean over the ranks, in place: one all-reduce."""
        return self.sum_(tensor).div_(self.size) if self.size > 1 else tensor

    def agree_(self, tensor: Tensor) -> Tensor:
        """Rank 0's numbers for all, in place.

        Ranks that round differently would decide differently and then wait for each other for ever.
        """
        if self.size > 1:
            dist.broadcast(tensor, dist.get_global_rank(self.group, 0) if self.group else 0, group=self.group)
        return tensor

    def decide(self, choice: bool, device: torch.device) -> bool:
        """Rank 0's choice."""
        if self.size == 1:
            return choice
        return bool(self.agree_(torch.tensor(choice, dtype=torch.uint8, device=device)))


class _Operator(Protocol):
    shape: tuple[int, int]
    peers: Peers

    def matvec(self, vector: Tensor) -> Tensor: ...
    def local(self, vectors: Tensor) -> Tensor: ...


class Whole:
    """Vectors that every rank holds whole."""

    def __init__(self, op: _Operator) -> None:
        self.op = op
        self.rows = op.shape[0]

    def own(self, vector: Tensor) -> Tensor:
        """This rank's rows of ``(P,)``."""
        return vector

    def whole(self, rows: Tensor) -> Tensor:
        """All rows, ``(P,)``."""
        return rows

    def total_(self, products: Tensor) -> Tensor:
        """Inner products from those of the rows, in place."""
        return products

    def product(self, rows: Tensor) -> Tensor:
        """This rank's rows of the product with the vector whose rows are given."""
        return self.op.matvec(rows)


class Sharded(Whole):
    """Vectors of which each rank holds ``ceil(P / W)`` rows: as much traffic a product, a W-th of the memory."""

    def __init__(self, op: _Operator) -> None:
        super().__init__(op)
        self.rows = -(-op.shape[0] // op.peers.size)

    def own(self, vector: Tensor) -> Tensor:  # noqa: D102
        return self._parts(vector)[self.op.peers.rank].clone()

    def whole(self, rows: Tensor) -> Tensor:  # noqa: D102
        if self.op.peers.size == 1:
            return rows
        parts = rows.new_empty(self.op.peers.size, self.rows)
        dist.all_gather(list(parts), rows.contiguous(), group=self.op.peers.group)
        return parts.flatten()[: self.op.shape[0]]

    def total_(self, products: Tensor) -> Tensor:  # noqa: D102
        return self.op.peers.sum_(products)

    def product(self, rows: Tensor) -> Tensor:  # noqa: D102
        if self.op.peers.size == 1:
            return self.op.matvec(rows)
        mine = torch.empty_like(rows)
        parts = self._parts(self.op.local(self.whole(rows)[None])[0])
        dist.reduce_scatter(mine, list(parts), group=self.op.peers.group)
        return mine.div_(self.op.peers.size)

    def _parts(self, vector: Tensor) -> Tensor:
        size = self.op.peers.size
        return pad(vector, (0, size * self.rows - len(vector))).view(size, self.rows)
