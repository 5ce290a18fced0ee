"""The weighted average of the clients' models."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class ClientAverage:
    """Sums what clients change, in float64, and averages it over all processes.

    A change of float32 values times a number of samples is exact in float64, and so nearly are sums of them: the
    average does not depend on the order of the clients, nor on how many processes share them.

    Args:
        parameters: floating tensors that clients train in place.
        buffers: tensors that they change in place; of those that are not floating the average is the maximum.
        kept: tensors whose changes end with the client that made them.

    Attributes:
        tensors: parameters, buffers and kept ones.
        anchor: their values at the start of the round.
    """

    def __init__(
        self, parameters: Sequence[Tensor], buffers: Sequence[Tensor] = (), kept: Sequence[Tensor] = ()
    ) -> None:
        self.parameters = list(parameters)
        self.tensors = [*parameters, *buffers, *kept]
        self.anchor: list[Tensor] = []
        averaged = [*parameters, *buffers]
        self._floating = [index for index, tensor in enumerate(averaged) if tensor.is_floating_point()]
        self._counts = [index for index, tensor in enumerate(averaged) if not tensor.is_floating_point()]
        floating = [averaged[index] for index in self._floating]
        size = sum(tensor.numel() for tensor in floating)
        self._flat = torch.zeros(size, dtype=torch.float64, device=parameters[0].device)
        parts = torch.split(self._flat, [tensor.numel() for tensor in floating])
        self._sums = [part.view_as(tensor) for part, tensor in zip(parts, floating, strict=True)]

    @property
    def nbytes(self) -> int:
        """Size of a client's model: what a network would carry one way."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def open(self) -> None:
        """Takes the present values as those from which all clients of the round start."""
        self.anchor = [tensor.detach().clone() for tensor in self.tensors]
        self._flat.zero_()
        self._highest = [self.anchor[index].clone() for index in self._counts]

    @torch.no_grad()
    def add(self, weight: float) -> float:
        """Adds the present values as a client's model, and puts those of the start back.

        Returns:
            The squared norm of what the client has changed in the parameters.
        """
        for highest, index in zip(self._highest, self._counts, strict=True):
            torch.maximum(highest, self.tensors[index], out=highest)
        changes = [self.tensors[index] for index in self._floating]  # in place: fresh memory costs more than arithmetic
        torch._foreach_sub_(changes, [self.anchor[index] for index in self._floating])
        for total, change in zip(self._sums, changes, strict=True):
            total.add_(change, alpha=weight)
        norms = torch.stack(torch._foreach_norm(changes[: len(self.parameters)], dtype=torch.float64))
        torch._foreach_copy_(self.tensors, self.anchor)
        return float(norms.square().sum())

    @torch.no_grad()
    def close(self, total_weight: float, scalars: Sequence[float] = ()) -> tuple[list[Tensor], list[float]]:
        """Averages over all processes; buffers get their average.

        Args:
            total_weight: of all clients on all processes.
            scalars: sums of this process that are added up on the way.

        Returns:
            The mean changes of the parameters, float64, and the sums over all processes of ``scalars``.
        """
        tail = self._flat.new_tensor([*scalars])
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self._flat)
            dist.all_reduce(tail)
            for highest in self._highest:
                dist.all_reduce(highest, op=dist.ReduceOp.MAX)
        self._flat /= total_weight
        number = len(self.parameters)
        for index, change in zip(self._floating[number:], self._sums[number:], strict=True):
            self.tensors[index].copy_(self.anchor[index] + change)
        for index, highest in zip(self._counts, self._highest, strict=True):
            self.tensors[index].copy_(highest)
        return self._sums[:number], tail.tolist()
