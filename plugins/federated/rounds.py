"""Who trains in a round, on which rank, and on which samples."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Sampler
from typing_extensions import override

from fulgurite.plugins.seeds import derived_seed, seed_all


def plan_round(
    steps: Sequence[int], clients_per_round: int, world_size: int = 1, *, round: int = 0, seed: int = 0
) -> list[list[int]]:
    """Draws the clients of a round and deals them to the ranks, the longest first, each to the least loaded rank.

    The largest load is at most 4/3 of the best possible one (Graham, 1969).

    Args:
        steps: local steps of each client.
        clients_per_round: how many of them train, from 1 to ``len(steps)``.
        world_size: ranks, at least 1.
        round: the same round has the same clients, whatever ``world_size`` is.
        seed: of the draw.

    Returns:
        For each rank its clients, in the order in which they train; some may have none.
    """
    generator = torch.Generator().manual_seed(derived_seed(seed, "sample", round))
    drawn = sorted(torch.randperm(len(steps), generator=generator)[:clients_per_round].tolist())
    plan: list[list[int]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for client in sorted(drawn, key=lambda client: -steps[client]):  # stable: of equals the lower number first
        rank = loads.index(min(loads))
        plan[rank].append(client)
        loads[rank] += steps[client]
    return plan


class Turn(NamedTuple):
    """One batch of a rank in a round.

    Attributes:
        client: who trains on it.
        step: its local step, from 0.
        last: whether the client is done after it.
    """

    client: int
    step: int
    last: bool


class ClientBatchSampler(Sampler[list[int]]):
    """Yields the batches of this rank's clients, client by client, then fillers until all ranks have as many.

    A client's samples are shuffled anew in each of its local epochs, from a seed that knows the round and the client
    and not the rank. A filler is a batch of one index, for a loop that needs as many batches on each rank.

    Args:
        parts: index arrays, one a client.
        batch_size: of a local step; the last batch of an epoch may be smaller.
        clients_per_round: see :func:`plan_round`.
        local_steps: local steps of a client in a round; None takes ``local_epochs`` passes over its samples instead.
        local_epochs: at least 1.
        rank: of this process; ``world_size`` counts them.
        world_size: at least 1.
        seed: of the draw and the order.
        limit: cuts a round off after so many batches.

    Attributes:
        sampler: where Lightning looks for a ``set_epoch`` to call.
        round: number of the round, see ``set_round``.
        plan: the clients of each rank in this round.
        turns: this rank's batches before the fillers.
    """

    def __init__(
        self,
        parts: Sequence[NDArray[np.int64]],
        batch_size: int,
        clients_per_round: int,
        *,
        local_steps: int | None = None,
        local_epochs: int = 1,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        limit: int | None = None,
    ) -> None:
        self.parts, self.batch_size, self.clients_per_round = parts, batch_size, clients_per_round
        self.batches_per_epoch = [-(-len(part) // batch_size) for part in parts]
        self.steps = [local_steps or local_epochs * batches for batches in self.batches_per_epoch]
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.limit = limit
        self.sampler: object = None
        self.set_round(0)

    def set_round(self, round: int) -> None:
        """Plans the round with this number."""
        self.round = round
        self.plan = plan_round(self.steps, self.clients_per_round, self.world_size, round=round, seed=self.seed)
        longest = max(sum(self.steps[client] for client in clients) for clients in self.plan)
        self._length = longest if self.limit is None else min(longest, self.limit)
        turns = [(client, step) for client in self.plan[self.rank] for step in range(self.steps[client])]
        turns = turns[: self._length]
        last_step = dict(turns)
        self.turns = [Turn(client, step, step == last_step[client]) for client, step in turns]

    @property
    def clients(self) -> list[int]:
        """All clients of the round."""
        return sorted(client for clients in self.plan for client in clients)

    @property
    def filler_share(self) -> float:
        """Share of the batches of all ranks that are fillers."""
        work = sum(min(self._length, sum(self.steps[client] for client in clients)) for clients in self.plan)
        return 1 - work / (self._length * self.world_size)

    def turn(self, batch_idx: int) -> Turn | None:
        """Whose batch it is; None for a filler."""
        return self.turns[batch_idx] if batch_idx < len(self.turns) else None

    def __len__(self) -> int:
        """Batches of the round, the same on all ranks."""
        return self._length

    @override
    def __iter__(self) -> Iterator[list[int]]:
        order: list[int] = []
        for client, step, _ in self.turns:
            epoch, batch = divmod(step, self.batches_per_epoch[client])
            if batch == 0:
                order = self._order(client, epoch)
            # A dataset may draw random numbers as it loads the batch, before the loop tells anybody about it.
            seed_all(self.seed, "data", self.round, client, step)
            yield order[batch * self.batch_size : (batch + 1) * self.batch_size]
        filler = [int(self.parts[self.clients[0]][0])]
        for _ in range(self._length - len(self.turns)):
            yield filler

    def _order(self, client: int, epoch: int) -> list[int]:
        part = self.parts[client]
        generator = torch.Generator().manual_seed(derived_seed(self.seed, "order", self.round, client, epoch))
        return part[torch.randperm(len(part), generator=generator).numpy()].tolist()  # type: ignore[no-any-return]
