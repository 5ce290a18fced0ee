"""Blocking exchanges of many tensors over all processes, sent together so that latency counts once."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor


def broadcast_(tensors: Iterable[Tensor]) -> None:
    """Copies rank 0's tensors to all processes, in place."""
    flights = []
    for tensor in tensors:
        dense = tensor.detach().contiguous()  # collectives take no strided layout, such as channels_last
        flights.append((tensor, dense, dist.broadcast(dense, src=0, async_op=True)))
    for tensor, dense, work in flights:
        work.wait()
        if dense.data_ptr() != tensor.data_ptr():
            tensor.copy_(dense)


def average_(buffers: Iterable[Tensor]) -> None:
    """Replaces floating buffers by their mean over all processes and the others by rank 0's, in place."""
    every = list(buffers)
    broadcast_(buffer for buffer in every if not buffer.is_floating_point())
    flights = []
    for buffer in filter(Tensor.is_floating_point, every):
        total = buffer.detach().to(torch.promote_types(buffer.dtype, torch.float32), copy=True).contiguous()
        flights.append((buffer, total, dist.all_reduce(total, async_op=True)))
    for buffer, total, work in flights:
        work.wait()
        buffer.copy_(total / dist.get_world_size())
