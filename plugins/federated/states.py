"""What clients remember from one of their rounds to the next."""

import os
from collections.abc import Iterable
from pathlib import Path

import fsspec  # type: ignore[import-untyped]
import torch
import torch.distributed as dist
from torch import Tensor

from fulgurite.plugins.reading import reading

_ALIGNMENT = 16  # bytes: a view of another type must start at a multiple of its size

Layout = list[tuple[torch.Size, torch.dtype]]


def client_folder(checkpoint: str | Path) -> str:
    """Where the states that belong to a checkpoint are; ``last.ckpt`` may be a link to it."""
    path = os.fspath(checkpoint)
    return (os.path.realpath(path) if os.path.islink(path) else path) + ".clients"


class ClientStates:
    """Holds each client's tensors at its owner, rank ``client % world_size``, and lends them to who trains it.

    All clients have tensors of the same shapes and types. A client that has not trained yet has none.

    Args:
        num_clients: N.
        rank: of this process; ``world_size`` counts them.
        world_size: at least 1.
        group: processes that exchange tensors on the host; None for the default group.
        folder: keeps the tensors in one sparse memory-mapped file a rank, so that only touched clients cost space;
            None keeps them in memory.

    Attributes:
        touched: clients that have tensors, the same on all ranks.
    """

    def __init__(
        self,
        num_clients: int,
        rank: int = 0,
        world_size: int = 1,
        group: dist.ProcessGroup | None = None,
        folder: str | Path | None = None,
    ) -> None:
        self.num_clients, self.rank, self.world_size, self.group = num_clients, rank, world_size, group
        self.folder = None if folder is None else Path(folder)
        self.touched: set[int] = set()
        self._layout: Layout = []
        self._agreed = world_size == 1
        self._owned: dict[int, Tensor] | _MappedRows = {}
        self._lent: dict[int, Tensor] = {}  # rows of this rank's clients in the round at hand

    def owner(self, client: int) -> int:
        """The rank that holds the client's tensors between rounds."""
        return client % self.world_size

    def __getitem__(self, client: int) -> list[Tensor] | None:
        """Tensors of a client that this rank trains in this round; None before its first."""
        row = self._lent.get(client)
        return None if row is None else _unpack(row, self._layout)

    def __setitem__(self, client: int, tensors: list[Tensor]) -> None:
        self._layout = self._layout or [(tensor.shape, tensor.dtype) for tensor in tensors]
        self._lent[client] = _pack(tensors)

    def borrow(self, plan: list[list[int]]) -> None:
        """Before a round: brings the tensors of ``plan``'s clients to the ranks that train them; called by all."""
        self._lent = {}
        if not self.touched:
            return
        self._agree_on_layout()
        moves = [(client, self.owner(client), rank) for client, rank in _pairs(plan) if client in self.touched]
        self._move(moves, self._owned, self._lent)

    def give_back(self, plan: list[list[int]]) -> None:
        """After a round: brings them to their owners; called by all."""
        self._agree_on_layout()
        if not self._layout:
            return
        self._open_rows()
        trained = [(client, rank) for client, rank in _pairs(plan)]
        self._move([(client, rank, self.owner(client)) for client, rank in trained], self._lent, self._owned)
        self.touched.update(client for client, _ in trained)
        self._lent = {}

    def owned(self) -> Iterable[tuple[int, list[Tensor]]]:
        """Clients whose tensors this rank holds, and the tensors."""
        for client in sorted(self.touched):
            if self.owner(client) == self.rank:
                yield client, _unpack(self._owned[client], self._layout)

    def save(self, folder: str, round: int) -> None:
        """Writes ``<client>-<round>.pt``, a list of tensors, for each client of this rank; ``folder`` may be a URL.

        What an earlier checkpoint of the same name has there stays whole, until ``forget_others``.
        """
        filesystem, path = fsspec.core.url_to_fs(folder)
        for client, tensors in self.owned():
            filesystem.makedirs(path, exist_ok=True)
            with filesystem.open(f"{path}/{client}-{round}.pt", "wb") as file:
                torch.save(tensors, file)

    @staticmethod
    def forget_others(folder: str, round: int) -> None:
        """Removes the files of other rounds: the checkpoint that they belonged to has been overwritten."""
        filesystem, path = fsspec.core.url_to_fs(folder)
        for name in filesystem.ls(path, detail=False) if filesystem.exists(path) else ():
            if not name.endswith(f"-{round}.pt"):
                filesystem.rm(name)

    def load(self, folder: str, round: int, clients: Iterable[int]) -> None:
        """Reads what ``save`` wrote, whatever the number of ranks was; ``clients`` are all that have tensors.

        Raises:
            FileNotFoundError: a client's file is not there.
            OSError: a client's file cannot be read.
        """
        self.touched = set(clients)
        filesystem, path = fsspec.core.url_to_fs(folder)
        for client in self.touched:
            if self.owner(client) != self.rank:
                continue
            name = f"{client}-{round}.pt"
            if not filesystem.exists(f"{path}/{name}"):
                raise FileNotFoundError(
                    f"the checkpoint's client state {folder}/{name} is missing: copy the folder that ends in"
                    " `.clients` along with the checkpoint"
                )
            with reading(f"{folder}/{name}"), filesystem.open(f"{path}/{name}", "rb") as file:
                tensors = torch.load(file, map_location="cpu", weights_only=True)
            self._layout = self._layout or [(tensor.shape, tensor.dtype) for tensor in tensors]
            self._open_rows()
            self._owned[client] = _pack(tensors)

    def _open_rows(self) -> None:
        if self.folder is not None and not isinstance(self._owned, _MappedRows):
            rows = -(-self.num_clients // self.world_size)
            path = self.folder / f"clients_{self.rank}_of_{self.world_size}.bin"
            self._owned = _MappedRows(path, rows, _row_bytes(self._layout), self.world_size)

    def _agree_on_layout(self) -> None:
        """A rank that has neither trained nor restored a client does not know the shapes of what it will own."""
        if not self._agreed:
            layouts: list[Layout] = [[] for _ in range(self.world_size)]
            dist.all_gather_object(layouts, self._layout, group=self.group)
            self._layout = next((layout for layout in layouts if layout), [])
            self._agreed = bool(self._layout)

    def _move(
        self,
        moves: list[tuple[int, int, int]],
        source: "dict[int, Tensor] | _MappedRows",
        target: "dict[int, Tensor] | _MappedRows",
    ) -> None:
        """``moves`` are ``(client, from_rank, to_rank)``, the same list on all ranks."""
        operations, arriving = [], {}
        for client, sender, receiver in moves:
            if sender == receiver == self.rank:
                target[client] = source[client]
            elif sender == self.rank:
                operations.append(dist.P2POp(dist.isend, source[client], receiver, self.group))
            elif receiver == self.rank:
                arriving[client] = torch.empty(_row_bytes(self._layout), dtype=torch.uint8)
                operations.append(dist.P2POp(dist.irecv, arriving[client], sender, self.group))
        if operations:
            for work in dist.batch_isend_irecv(operations):
                work.wait()
        for client, row in arriving.items():
            target[client] = row


class _MappedRows:
    """Rows of bytes in a sparse file; this rank owns every ``world_size``-th client."""

    def __init__(self, path: Path, rows: int, row_bytes: int, world_size: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # an earlier fit's; what has not been written must be a hole
        self._file = torch.from_file(os.fspath(path), shared=True, size=rows * row_bytes, dtype=torch.uint8)
        self._rows, self._world_size = self._file.view(rows, row_bytes), world_size

    def __getitem__(self, client: int) -> Tensor:
        return self._rows[client // self._world_size]

    def __setitem__(self, client: int, row: Tensor) -> None:
        self._rows[client // self._world_size].copy_(row)


def _pairs(plan: list[list[int]]) -> Iterable[tuple[int, int]]:
    return ((client, rank) for rank, clients in enumerate(plan) for client in clients)


def _padded(shape: torch.Size, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of a tensor, and those that it takes in a row."""
    size = shape.numel() * dtype.itemsize
    return size, -(-size // _ALIGNMENT) * _ALIGNMENT


def _row_bytes(layout: Layout) -> int:
    return sum(_padded(*entry)[1] for entry in layout)


def _pack(tensors: list[Tensor]) -> Tensor:
    parts = []
    for tensor in tensors:
        size, padded = _padded(tensor.shape, tensor.dtype)
        row = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        parts.append(torch.nn.functional.pad(row, (0, padded - size)))
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)


def _unpack(row: Tensor, layout: Layout) -> list[Tensor]:
    tensors, start = [], 0
    for shape, dtype in layout:
        size, padded = _padded(shape, dtype)
        tensors.append(row[start : start + size].view(dtype).view(shape).clone())
        start += padded
    return tensors
