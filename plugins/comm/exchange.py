"""Asynchronous averages of one tensor over the workers, in 4, 16 or 32 bits a value."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from fulgurite.plugins.comm.e3m0 import Rounding, dequantize_e3m0, quantize_e3m0

Quantize = Literal["e3m0", "bf16", "fp32"]
Reduction = Literal["gather", "scatter"]
# One tensor in, one out: torch 2.13 renames this collective and warns of the old name.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_CHUNK_BLOCKS = 8192  # decoded at a time: the workers' messages never stand in memory as float32 as a whole


@dataclass
class Average:
    """What an exchange yields.

    Attributes:
        mean: ``(n,)`` float32, the mean over the workers, bit-equal on all of them.
        gram: ``(W, W)`` float64 inner products of the workers' tensors as they arrived, where they arrive singly.
    """

    mean: Tensor
    gram: Tensor | None = None


@dataclass
class Flight:
    """An exchange under way.

    Attributes:
        work: the collective's handle; ``land`` may be called once it is done.
        land: yields the average.
        bytes_sent: payload that this process sends to others; ``bytes_received`` likewise.
        message_bytes: size of the payload that is handed to the network at once.
        relay: for an exchange of two legs, launches the second once the first is done; to be called by all workers
            in the same order, so it is not left to a completion callback.
    """

    work: dist.Work
    land: Callable[[], Average]
    bytes_sent: int
    bytes_received: int
    message_bytes: int
    relay: "Callable[[], Flight] | None" = None


@dataclass(frozen=True)
class Exchange:
    """How a tensor is averaged over the processes of ``group``.

    Args:
        group: a process group of its own, so that no other collective queues behind bulk data.
        quantize: ``"e3m0"`` sends 4 bits a value and adds in float32; ``"bf16"`` and ``"fp32"`` are one all-reduce.
        reduction: for ``"e3m0"``: ``"gather"`` sends everything to everybody, ``(W-1) n / 2`` bytes; ``"scatter"``
            sends a W-th to each and gathers the means in bfloat16, ``(W-1)/W n 2.5`` bytes, rounding a second time.
        block_size: values that share a scale.
        rounding: ``"nearest"`` or ``"stochastic"``.
    """

    group: dist.ProcessGroup
    quantize: Quantize = "e3m0"
    reduction: Reduction = "gather"
    block_size: int = 128
    rounding: Rounding = "nearest"

    def launch(self, values: Tensor, generator: torch.Generator | None = None) -> Flight:
        """Starts averaging ``values``, ``(n,)`` float32, and returns at once.

        Args:
            values: this worker's share; may be changed afterwards.
            generator: for stochastic rounding; to differ between workers.
        """
        if self.quantize != "e3m0":
            return self._all_reduce(values, torch.bfloat16 if self.quantize == "bf16" else torch.float32)
        return self._gather(values, generator) if self.reduction == "gather" else self._scatter(values, generator)

    def _all_reduce(self, values: Tensor, dtype: torch.dtype) -> Flight:
        size = dist.get_world_size(self.group)
        payload = values.to(dtype, copy=True)
        work = dist.all_reduce(payload, group=self.group, async_op=True)
        message = payload.numel() * payload.element_size()
        on_ring = 2 * (size - 1) * message // size
        return Flight(work, lambda: Average(payload.float() / size), on_ring, on_ring, message)

    def _gather(self, values: Tensor, generator: torch.Generator | None) -> Flight:
        size = dist.get_world_size(self.group)
        message = torch.cat(quantize_e3m0(values, self.block_size, self.rounding, generator))
        inbox = message.new_empty(size * message.numel())
        work = all_gather_single(inbox, message, group=self.group, async_op=True)
        numel, others = values.numel(), (size - 1) * message.numel()
        return Flight(work, lambda: self._decode(inbox.view(size, -1), numel), others, others, message.numel())

    def _scatter(self, values: Tensor, generator: torch.Generator | None) -> Flight:
        size, numel = dist.get_world_size(self.group), values.numel()
        share = -(-numel // (size * self.block_size)) * self.block_size
        padded = torch.nn.functional.pad(values, (0, size * share - numel))
        codes, scales = quantize_e3m0(padded, self.block_size, self.rounding, generator)
        outbox = torch.cat([codes.view(size, -1), scales.view(size, -1)], dim=1)
        inbox = torch.empty_like(outbox)
        work = dist.all_to_all_single(inbox, outbox, group=self.group, async_op=True)
        first_leg = (size - 1) * outbox.shape[1]

        def relay() -> Flight:
            average = self._decode(inbox, share)
            mean = average.mean.bfloat16()
            means = mean.new_empty(size * share)
            work = all_gather_single(means, mean, group=self.group, async_op=True)
            total = first_leg + (size - 1) * share * mean.element_size()
            message = max(outbox.numel(), share * mean.element_size())
            return Flight(work, lambda: Average(means[:numel].float()), total, total, message)

        def land() -> Average:
            raise RuntimeError("a scattered exchange lands after its relay")

        return Flight(work, land, first_leg, first_leg, outbox.numel(), relay)

    def _decode(self, messages: Tensor, numel: int) -> Average:
        """Averages ``(W, message)`` uint8 in rank order, the same on every worker, and measures how they agree."""
        size, block = messages.shape[0], self.block_size
        codes = messages[:, : -(-numel // block) * block // 2]
        scales = messages[:, codes.shape[1] :]
        mean = torch.empty(numel, device=messages.device)
        gram = torch.zeros(size, size, dtype=torch.float64, device=messages.device)
        for start in range(0, numel, _CHUNK_BLOCKS * block):
            stop = min(start + _CHUNK_BLOCKS * block, numel)
            ends = -(-stop // block)  # in blocks
            part = codes[:, start // 2 : ends * block // 2], scales[:, start // block : ends]
            rows = torch.stack([dequantize_e3m0(*row, stop - start, block) for row in zip(*part, strict=True)])
            total = rows[0].clone()
            for row in rows[1:]:
                total += row
            torch.div(total, size, out=mean[start:stop])
            gram += rows @ rows.T
        return Average(mean, gram)


def mean_cosine(gram: Tensor) -> float:
    """Mean cosine over the pairs of workers, from the ``(W, W)`` inner products of their tensors; nan for one."""
    norms = gram.diagonal().sqrt()
    cosines = gram / norms.outer(norms)
    size = len(gram)
    return ((cosines.sum() - cosines.diagonal().sum()) / (size * (size - 1))).item() if size > 1 else float("nan")
