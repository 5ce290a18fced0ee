"""Streaming DiLoCo: workers train alone and exchange one fragment of the model at a time, behind computation."""

import os
import time
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from fulgurite.plugins.comm.e3m0 import Rounding
from fulgurite.plugins.comm.exchange import Exchange, Quantize, Reduction, mean_cosine
from fulgurite.plugins.comm.fragments import Pattern, partition_parameters
from fulgurite.plugins.comm.outer import OuterFragment, OuterSGD, Pending
from fulgurite.plugins.optim.exponentiated_gradient import keeps_signs
from fulgurite.plugins.seeds import derived_seed
from fulgurite.strategies.replicas import ReplicaStrategy, WorkerState

_PROG_BAR = ("diloco/drift", "diloco/wait_seconds")


class StreamingDiLoCoStrategy(ReplicaStrategy):
    """Trains across slow links by 4-bit outer gradients, a fragment at a time, behind computation (arXiv 2501.18512).

    Every ``sync_every`` optimizer steps, staggered over the fragments, a fragment's outer gradient ``g - local`` is
    averaged over the workers without waiting; ``overlap_steps`` later an outer Nesterov step moves the outer copy
    ``g``, and the local weights are mixed with it. The module shows ``g`` during validation, in checkpoints and
    after the fit.

    Args:
        sync_every: optimizer steps between two exchanges of the same fragment (H in the paper), at least 1.
        num_fragments: ``"auto"`` makes one of the model's outer parts and one of each ``blocks_per_fragment`` blocks; a
            number deals out whole tensors.
        blocks_per_fragment: blocks in a fragment, at least 1.
        pattern: ``"strided"`` or ``"sequential"`` choice of a fragment's blocks.
        overlap_steps: optimizer steps that an exchange may take before a worker waits for it (tau), from 0 to below
            ``sync_every``; a list gives each worker its own.
        alpha: weight of the local value when the outer one arrives, in [0, 1]; without overlap it is 0.
        outer_lr: step size of the outer SGD, above 0.
        outer_momentum: its momentum, in [0, 1).
        nesterov: whether that momentum is Nesterov's.
        quantize: ``"e3m0"`` (4 bits a value), ``"bf16"`` or ``"fp32"`` on the wire.
        block_size: values that share a scale in ``"e3m0"``, even and at least 2.
        rounding: ``"nearest"`` or, unbiased, ``"stochastic"``.
        reduction: ``"gather"``, or ``"scatter"`` for more than four workers: fewer bytes, rounded once more.
        devices_per_worker: processes of a worker (D), under DDP over the fast links between them; None takes 1 on one
            node, else the devices of a node. Each carries a D-th of the outer state and traffic.
        offload: keep the outer state, 8 bytes a parameter / D, in host memory.
        worker_state: ``"gather"`` saves each worker's state in checkpoints, for an exact resume; ``"none"`` does not.
        partition: the fragments as lists of parameter names, from the module; each trainable name once.
        **kwargs: for :class:`~lightning.pytorch.strategies.DDPStrategy`.

    Attributes:
        stats: the ``diloco/*`` metrics, current; see the documentation for their units.

    Raises:
        ValueError: for an argument out of its range.
        MisconfigurationException: at setup, for a module or Trainer that cannot train this way.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(strategy="streaming_diloco", accelerator="cpu", devices=2, logger=False)
        >>> type(trainer.strategy).__name__
        'StreamingDiLoCoStrategy'
    """

    checkpoint_key: ClassVar[str] = "streaming_diloco"

    def __init__(
        self,
        sync_every: int = 100,
        num_fragments: int | Literal["auto"] = "auto",
        blocks_per_fragment: int = 3,
        pattern: Pattern = "strided",
        overlap_steps: int | list[int] = 1,
        alpha: float = 0.5,
        outer_lr: float = 0.4,
        outer_momentum: float = 0.9,
        nesterov: bool = True,
        quantize: Quantize = "e3m0",
        block_size: int = 128,
        rounding: Rounding = "nearest",
        reduction: Reduction = "gather",
        devices_per_worker: int | None = None,
        offload: bool = False,
        worker_state: WorkerState = "gather",
        partition: Callable[[nn.Module], list[list[str]]] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(devices_per_worker=devices_per_worker, worker_state=worker_state, **kwargs)
        self.sync_every = sync_every
        self.num_fragments = num_fragments
        self.blocks_per_fragment = blocks_per_fragment
        self.pattern = pattern
        self.overlap_steps = overlap_steps
        self.alpha = alpha
        self.outer_lr = outer_lr
        self.outer_momentum = outer_momentum
        self.nesterov = nesterov
        self.quantize = quantize
        self.block_size = block_size
        self.rounding = rounding
        self.reduction = reduction
        self.offload = offload
        self.partition = partition
        self._validate()
        self.stats: dict[str, float] = {}
        self._step = 0  # optimizer steps taken (t in the paper); the same on all processes, by count and never by time
        self._names: list[list[str]] = []
        self._fragments: list[OuterFragment] = []
        self._pending: list[tuple[Pending, Callable[[], bool]]] = []

    def _validate(self) -> None:
        """Ranges of the arguments; what depends on the world or the module is checked at setup."""
        fragments, overlaps = self.num_fragments, self.overlap_steps
        overlap_list = overlaps if isinstance(overlaps, list) else [overlaps]
        rules = {
            "sync_every": (_whole(self.sync_every, 1), "counts optimizer steps and must be at least 1"),
            "num_fragments": (fragments == "auto" or _whole(fragments, 1), "must be 'auto' or at least 1"),
            "blocks_per_fragment": (_whole(self.blocks_per_fragment, 1), "must be at least 1"),
            "overlap_steps": (
                all(_whole(overlap, 0) and overlap < self.sync_every for overlap in overlap_list),
                f"must be from 0 to below `sync_every` ({self.sync_every}), else a fragment would be sent before its"
                " last exchange arrived",
            ),
            "alpha": (0 <= self.alpha <= 1, "is the weight of the local value and must be in [0, 1]"),
            "outer_lr": (0 < self.outer_lr < float("inf"), "must be positive and finite"),
            "outer_momentum": (0 <= self.outer_momentum < 1, "must be in [0, 1)"),
            "block_size": (
                _whole(self.block_size, 2) and self.block_size % 2 == 0,
                "must be even, since two values share a byte, and at least 2",
            ),
        }
        choices = {"pattern": Pattern, "quantize": Quantize, "rounding": Rounding, "reduction": Reduction}
        for name, choice in choices.items():
            rules[name] = (getattr(self, name) in get_args(choice), f"must be one of {get_args(choice)}")
        for name, (holds, meaning) in rules.items():
            if not holds:
                raise ValueError(f"`{name}` {meaning}, got {getattr(self, name)!r}")

    # ---- setup -------------------------------------------------------------------------------------------------------

    @override
    def start(self, trainer: Trainer) -> None:
        self._refuse_sign_changes()
        self._overlaps = self._overlap_of_each_worker()
        self._names = self._partition()
        parameters = dict(self._module.named_parameters())
        exchange = Exchange(self._outer_group(), self.quantize, self.reduction, self.block_size, self.rounding)
        optimizer = OuterSGD(self.outer_lr, self.outer_momentum, self.nesterov)
        self._fragments = [
            OuterFragment([parameters[name] for name in names], exchange, optimizer, self._worker_group, self.offload)
            for names in self._names
        ]
        self._step, self._pending = 0, []
        self.stats = dict.fromkeys(
            (f"diloco/{name}" for name in ("bytes_sent", "bytes_received", "peak_bytes", "wait_seconds", "syncs")), 0.0
        )

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        # Not in `setup`: the estimate loads the training data, and a stateful loader would miss its state from a
        # checkpoint, which Lightning hands over between the two.
        trainer = self._module.trainer
        self._refuse_different_steps()
        steps = trainer.estimated_stepping_batches
        unknown = steps < 0  # a loader without length
        if not self._module.automatic_optimization and trainer.max_steps > 0:
            steps = min(steps, trainer.max_steps // len(self.optimizers))  # Lightning counts those of all optimizers
        if unknown or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if steps < self.sync_every:
            raise MisconfigurationException(
                f"`sync_every` is {self.sync_every} and the run has {steps} optimizer steps: the workers would never"
                " exchange, and the trained model would be the initial one; lower `sync_every`, or train longer"
            )
        if steps < 10 * self.sync_every:
            rank_zero_warn(
                f"`sync_every` is {self.sync_every} and the run has {steps} optimizer steps: under ten outer steps a"
                " fragment, in which the outer momentum still swings; lower `sync_every`, or set `outer_lr=1` and"
                " `outer_momentum=0`"
            )

    def _refuse_sign_changes(self) -> None:
        """An outer step is a mean of weights, which keeps a sign that they share, in some settings alone."""
        if self.outer_momentum == 0 and self.outer_lr <= 1 and self.quantize == "fp32":
            return
        if any(keeps_signs(optimizer) for optimizer in self.optimizers):
            raise MisconfigurationException(
                "ExponentiatedGradient keeps the signs of weights, and an outer step with `outer_momentum`"
                f" {self.outer_momentum}, `outer_lr` {self.outer_lr} and `quantize` {self.quantize!r} may go beyond the"
                " workers' mean and change them: set `outer_momentum=0`, `outer_lr` at most 1 and `quantize='fp32'`, or"
                " give its groups `hypentropy` above 0"
            )

    def _refuse_different_steps(self) -> None:
        """Workers that count from different steps would exchange different fragments with each other."""
        taken: list[int] = [0] * self.world_size
        dist.all_gather_object(taken, self._step, group=self._object_group)
        if len(set(taken)) > 1:
            raise MisconfigurationException(
                f"the processes start at different steps, by rank {taken}: `ckpt_path` was found on some of them alone;"
                " copy the checkpoint to all, under the same path"
            )

    def _overlap_of_each_worker(self) -> list[int]:
        if self.num_workers == 1:
            rank_zero_warn(
                "there is one worker, so nothing is exchanged and Streaming DiLoCo runs as Lookahead: raise `devices`"
                " or `num_nodes`, or lower `devices_per_worker`"
            )
        if not isinstance(self.overlap_steps, list):
            return [self.overlap_steps] * self.num_workers
        if len(self.overlap_steps) != self.num_workers:
            raise MisconfigurationException(
                f"`overlap_steps` must have one number a worker, that is {self.num_workers},"
                f" got {len(self.overlap_steps)}: {self.overlap_steps}"
            )
        return self.overlap_steps

    def _partition(self) -> list[list[str]]:
        module = self._module
        if self.partition is None:
            return partition_parameters(module, self.num_fragments, self.pattern, self.blocks_per_fragment)
        fragments = [list(names) for names in self.partition(module) if names]
        given = [name for names in fragments for name in names]
        trainable = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
        problems = {
            "leaves out": trainable.difference(given),
            "repeats": {name for name in given if given.count(name) > 1},
            "names, though not a trainable parameter,": set(given) - trainable,
        }
        for problem, names in problems.items():
            if names:
                raise MisconfigurationException(
                    f"`partition` must hold each trainable parameter once, but it {problem} {sorted(names)}"
                )
        return fragments

    def _outer_group(self) -> dist.ProcessGroup:
        """The processes at this one's place in their workers; a group apart from DDP's and Lightning's collectives."""
        size = self.worker_size
        groups = [self.new_group(range(place, self.world_size, size)) for place in range(size)]
        self._outer_ranks = list(range(self.global_rank % size, self.world_size, size))
        return groups[self.global_rank % size]

    # ---- the protocol ------------------------------------------------------------------------------------------------

    @override
    def after_step(self) -> None:
        self._step += 1
        for index in range(len(self._fragments)):
            offset = index * self.sync_every // len(self._fragments)
            if (self._step - offset) % self.sync_every == 0:
                self._send(index)
        for entry in list(self._pending):
            self._receive(*entry)

    def _send(self, index: int) -> None:
        self.refuse_unfrozen()
        pending = Pending(
            fragment=index,
            due=[self._step + overlap for overlap in self._overlaps],
            relay_at=self._step + (min(self._overlaps) + 1) // 2,
            flight=self._fragments[index].launch(self._generator(index)),
        )
        self._pending.append((pending, self.ask_to_stop()))

    def _generator(self, index: int) -> torch.Generator | None:
        if self.rounding == "nearest":
            return None
        # From what identifies the exchange, so that a resumed run rounds alike and no state need be saved.
        seed = derived_seed(os.environ.get("PL_GLOBAL_SEED", 0), self._step, index, self.global_rank)
        return torch.Generator(self.root_device).manual_seed(seed)

    def _receive(self, pending: Pending, told_to_stop: Callable[[], bool]) -> None:
        mixes = not pending.mixed and self._step >= pending.due[self.worker]
        commits = self._step >= max(pending.due)
        if self._step >= pending.relay_at:
            self._blocking(pending.relay, pending)
        if not (mixes or commits):
            return
        fragment = self._fragments[pending.fragment]
        delta = self._land(pending)
        value, velocity = fragment.preview(delta)  # a worker that mixes early must not move what all share
        if mixes:
            alpha = self.alpha if self._overlaps[self.worker] else 0.0
            self.stats["diloco/drift"] = fragment.mix(value, alpha)
            pending.mixed = True
        if commits:
            fragment.commit(value, velocity)
            self._pending = [entry for entry in self._pending if entry[0] is not pending]
            self._measure(pending, delta)
            self.log_scalars(self.stats, _PROG_BAR)
            if told_to_stop():
                self.stop()

    def _land(self, pending: Pending) -> Tensor:
        """The averaged outer gradient, waited for if need be; nothing has been moved by it yet."""
        self._blocking(pending.wait, pending)
        if pending.flight is not None:
            self.stats["diloco/bytes_sent"] += pending.flight.bytes_sent
            self.stats["diloco/bytes_received"] += pending.flight.bytes_received
            self.stats["diloco/peak_bytes"] = max(self.stats["diloco/peak_bytes"], pending.flight.message_bytes)
        delta = pending.land()
        if not self._finite(delta):
            raise RuntimeError(
                f"the outer gradient of fragment {pending.fragment} that arrived at step {self._step} is not finite, so"
                " a worker diverged; the shared weights were not touched: resume from the last checkpoint with a lower"
                " `lr` or gradient clipping"
            )
        return delta

    def _finite(self, delta: Tensor) -> bool:
        """Whether the whole fragment is; each process of a worker holds a shard, and all must come to the same end."""
        finite = delta.isfinite().all().int()
        if self._worker_group is not None:
            dist.all_reduce(finite, op=dist.ReduceOp.MIN, group=self._worker_group)
        return bool(finite)

    def _blocking(self, action: Callable[[], None], pending: Pending) -> None:
        """Runs what may block on the network; counts the time and says what was waited for when it fails."""
        started = time.perf_counter()
        try:
            action()
        except RuntimeError as error:
            raise RuntimeError(
                f"the exchange of fragment {pending.fragment}, due at steps {pending.due} and waited for at step"
                f" {self._step}, failed on the group of ranks {self._outer_ranks}: a worker died, or ran out of batches"
                " before the others (loaders of unequal length)"
            ) from error
        self.stats["diloco/wait_seconds"] += time.perf_counter() - started

    def _measure(self, pending: Pending, delta: Tensor) -> None:
        sums = [delta.double().square().sum().view(1)]
        if pending.gram is not None:
            sums.append(pending.gram.flatten())
        total = torch.cat(sums)
        if self._worker_group is not None:  # each process holds a shard
            dist.all_reduce(total, group=self._worker_group)
        self.stats["diloco/syncs"] += 1
        self.stats["diloco/outer_grad_norm"] = total[0].sqrt().item()
        if pending.gram is not None:
            self.stats["diloco/outer_cosine"] = mean_cosine(total[1:].view_as(pending.gram))

    @override
    def finish(self) -> None:
        for pending, told_to_stop in self._pending:  # none may be left on the wire when the processes part
            self._land(pending)
            told_to_stop()
        at_rest = [index for index, fragment in enumerate(self._fragments) if not fragment.velocity.any()]
        if at_rest and not self._module.trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_warn(
                f"the training ended after {self._step} steps, before the outer values of fragments {at_rest} moved:"
                " the trained module holds their initial weights; train longer, or lower `sync_every`"
                f" ({self.sync_every})"
            )
        self.to_loggers(self.stats)

    # ---- shared weights and checkpoints ------------------------------------------------------------------------------

    @override
    def shared_values(self) -> dict[str, Tensor]:
        shared: dict[str, Tensor] = {}
        for names, fragment in zip(self._names, self._fragments, strict=True):
            shared.update(zip(names, fragment.views(fragment.full(fragment.value)), strict=True))
        return shared

    def outer_state_dict(self) -> dict[str, Tensor]:
        """The outer parameters ``g`` by name, on the CPU; to be called on all processes."""
        return {name: value.detach().cpu().clone() for name, value in self.shared_values().items()}

    @override
    def rule_state(self) -> dict[str, Any]:
        deltas = [self._land(pending) for pending, _ in self._pending]  # stored as it arrived, applied when it is due
        return {
            "step": self._step,
            "sync_every": self.sync_every,
            "fragments": self._names,
            "value": [fragment.full(fragment.value).cpu().clone() for fragment in self._fragments],
            "velocity": [fragment.full(fragment.velocity).cpu().clone() for fragment in self._fragments],
            "pending": [
                {
                    "fragment": pending.fragment,
                    "due": pending.due,
                    "delta": self._fragments[pending.fragment].full(delta).cpu(),
                }
                for (pending, _), delta in zip(self._pending, deltas, strict=True)
            ],
            "stats": dict(self.stats),
        }

    @override
    def load_rule_state(self, state: Mapping[str, Any], same_workers: bool) -> None:
        layout: list[tuple[str, Any, Any]] = [("sync_every", self.sync_every, state["sync_every"])]
        layout += [("num_fragments", len(self._names), len(state["fragments"]))]
        layout += [
            (f"fragment {i}", *both) for i, both in enumerate(zip(self._names, state["fragments"], strict=False))
        ]
        for name, now, before in layout:
            if now != before:
                raise MisconfigurationException(
                    f"`{name}` is {now} and was {before} in the checkpoint, so its outer state does not fit: set back"
                    " what changed, or start a new run from the checkpoint's weights"
                )
        self._step, self._pending = state["step"], []
        self.stats |= state["stats"]
        for fragment, value, velocity in zip(self._fragments, state["value"], state["velocity"], strict=True):
            fragment.commit(fragment.shard(value), fragment.shard(velocity))
        for entry in state["pending"]:
            fragment = self._fragments[entry["fragment"]]
            delta = fragment.shard(entry["delta"]).to(self.root_device)
            if same_workers:
                mixed = entry["due"][self.worker] <= self._step
                pending = Pending(entry["fragment"], entry["due"], self._step, delta=delta, mixed=mixed)
                self._pending.append((pending, lambda: False))
            else:
                fragment.commit(*fragment.preview(delta))
        if not same_workers:
            for fragment in self._fragments:
                fragment.mix(fragment.value, alpha=0.0)


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and value >= least
