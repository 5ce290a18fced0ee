"""Outer optimisation of one fragment: what all workers agree on, and how it moves."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
import torch.distributed as dist
from torch import Tensor

from fulgurite.plugins.comm.exchange import Exchange, Flight, all_gather_single


@dataclass(frozen=True)
class OuterSGD:
    """SGD with momentum as a pure function, so that a step can be previewed; equals :class:`torch.optim.SGD`.

    Args:
        lr: outer step size, above 0.
        momentum: in ``[0, 1)``.
        nesterov: look ahead along the momentum.
    """

    lr: float = 0.4
    momentum: float = 0.9
    nesterov: bool = True

    def __call__(self, value: Tensor, velocity: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the next value and velocity for the outer gradient ``delta``; all of one shape."""
        velocity = velocity * self.momentum + delta
        step = delta + velocity * self.momentum if self.nesterov else velocity
        return value - self.lr * step, velocity


class OuterFragment:
    """The outer copy of a fragment: its value ``g``, its velocity, and the way it is exchanged (arXiv 2501.18512).

    With a ``shard_group`` of ``D`` processes, which hold equal local tensors, each keeps, sends and receives one
    ``D``-th of the fragment: outer memory and traffic a process fall by ``D``.

    Args:
        local: this worker's tensors, at most one device; float tensors of any shape and type.
        exchange: averages outer gradients over the workers.
        optimizer: the outer step.
        shard_group: processes that share this worker's part; None for one process a worker.
        offload: keep value and velocity on the host, and only the fragment at hand on the device.

    Attributes:
        value: ``(ceil(n / D),)`` this process's shard of ``g``, in the local type or float32, whichever is wider.
        velocity: likewise, the outer momentum.
    """

    def __init__(
        self,
        local: Sequence[Tensor],
        exchange: Exchange,
        optimizer: OuterSGD,
        shard_group: dist.ProcessGroup | None = None,
        offload: bool = False,
    ) -> None:
        self.local = list(local)
        self.numel = sum(tensor.numel() for tensor in self.local)
        self.exchange, self.optimizer, self.shard_group = exchange, optimizer, shard_group
        self._dtype = reduce(torch.promote_types, (tensor.dtype for tensor in self.local), torch.float32)
        self._device = self.local[0].device
        self._home = torch.device("cpu") if offload else self._device
        self.value = self.shard(self.flat()).to(self._home, copy=True)
        self.velocity = torch.zeros_like(self.value)

    def flat(self) -> Tensor:
        """The local tensors in one, ``(n,)``."""
        return torch.cat([tensor.detach().reshape(-1).to(self._dtype) for tensor in self.local])

    def shard(self, flat: Tensor) -> Tensor:
        """This process's part of an ``(n,)`` tensor, padded with zeros to the size that all parts have."""
        if self.shard_group is None:
            return flat
        size, rank = dist.get_world_size(self.shard_group), dist.get_rank(self.shard_group)
        blocks = -(-self.numel // (size * self.exchange.block_size))
        padded = torch.nn.functional.pad(flat, (0, size * blocks * self.exchange.block_size - self.numel))
        return padded.chunk(size)[rank]

    def full(self, shard: Tensor) -> Tensor:
        """The ``(n,)`` tensor on this device whose part is ``shard``; all processes of the shard group must call it."""
        shard = shard.to(self._device)
        if self.shard_group is None:
            return shard
        whole = shard.new_empty(dist.get_world_size(self.shard_group) * shard.numel())
        all_gather_single(whole, shard.contiguous(), group=self.shard_group)
        return whole[: self.numel]

    def views(self, flat: Tensor) -> list[Tensor]:
        """An ``(n,)`` tensor in the local tensors' shapes."""
        parts = torch.split(flat, [tensor.numel() for tensor in self.local])
        return [part.view(tensor.shape) for part, tensor in zip(parts, self.local, strict=True)]

    def launch(self, generator: torch.Generator | None = None) -> Flight:
        """Starts the exchange of the outer gradient ``g - local``, measured from ``g``, which all workers share."""
        delta = self.value.to(self._device) - self.shard(self.flat())
        return self.exchange.launch(delta.float(), generator)

    def preview(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        """The value and velocity after an outer step, which is not taken yet."""
        return self.optimizer(self.value.to(self._device), self.velocity.to(self._device), delta.to(self._dtype))

    def commit(self, value: Tensor, velocity: Tensor) -> None:
        """Takes the outer step that ``preview`` has shown."""
        self.value.copy_(value)
        self.velocity.copy_(velocity)

    def mix(self, value: Tensor, alpha: float) -> float:
        """Moves the local tensors to ``alpha * local + (1 - alpha) * value``; with 1 they are not touched.

        Args:
            value: this process's shard of the outer value to mix in.
            alpha: weight of the local value, in ``[0, 1]``.

        Returns:
            The drift before mixing, ``|local - value| / |value|`` over the fragment.
        """
        outer = self.full(value)
        drift = torch.linalg.vector_norm(self.flat() - outer) / torch.linalg.vector_norm(outer)
        if alpha < 1:
            for tensor, part in zip(self.local, self.views(outer), strict=True):
                tensor.copy_(part.lerp(tensor.to(self._dtype), alpha) if alpha > 0 else part)
        return float(drift)


@dataclass
class Pending:
    """An outer gradient between its start and its outer step.

    Attributes:
        fragment: index of the fragment.
        due: for each worker, the step at which it mixes; the outer step is taken by all at the last of them.
        relay_at: the step at which an exchange of two legs is passed on.
        flight: the exchange, until it has landed.
        delta: this process's shard of the averaged outer gradient, once it has landed.
        gram: inner products of the workers' outer gradients, where known.
        mixed: whether this worker has mixed.
    """

    fragment: int
    due: list[int]
    relay_at: int
    flight: Flight | None = None
    delta: Tensor | None = None
    gram: Tensor | None = None
    mixed: bool = False

    def relay(self) -> None:
        """Passes on an exchange of two legs, waiting for the first; nothing where there is one."""
        if self.flight is not None and self.flight.relay is not None:
            self.flight.work.wait()
            self.flight = self.flight.relay()

    def wait(self) -> None:
        """Blocks until the exchange is done."""
        self.relay()
        if self.flight is not None:
            self.flight.work.wait()

    def land(self) -> Tensor:
        """The averaged outer gradient of an exchange that is done."""
        if self.flight is not None:
            average = self.flight.land()
            self.delta, self.gram, self.flight = average.mean, average.gram, None
        assert self.delta is not None
        return self.delta
