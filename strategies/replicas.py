"""Replicas: processes that share a model and train it apart."""

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from fulgurite.plugins.comm.collectives import average_
from fulgurite.strategies._lightning import (
    ddp_over,
    sync_batchnorm_over,
    wants_sync_batchnorm,
)
from fulgurite.strategies.unwrapped import UnwrappedStrategy

WorkerState = Literal["gather", "none"]


class ReplicaStrategy(UnwrappedStrategy):
    """Trains one replica a worker, without averaging gradients between workers; a subclass adds the rule they share.

    A worker is ``devices_per_worker`` processes under ordinary DDP, by default one process without it. All workers
    start from rank 0's weights. Between exchanges their weights differ; the user sees the *shared* weights wherever it
    counts: during validation, in checkpoints and after the fit.

    A subclass defines ``start``, ``after_step``, ``shared_values``, ``rule_state`` and ``load_rule_state``.

    Args:
        devices_per_worker: processes of a worker, which must divide the world; None takes 1 on one node, else the
            devices of a node.
        worker_state: ``"gather"`` keeps each worker's weights, buffers and optimizer in a checkpoint, so that a resumed
            run goes on exactly; ``"none"`` keeps the shared state alone, and all workers resume from it.
        **kwargs: for :class:`~lightning.pytorch.strategies.DDPStrategy`.

    Attributes:
        checkpoint_key: where a checkpoint holds the state of the rule and of the workers.
        worker: index of this process's worker; ``num_workers`` counts them.

    Raises:
        ValueError: for an argument out of its range.
        MisconfigurationException: at setup, for a module or Trainer that cannot train this way.
    """

    checkpoint_key: ClassVar[str] = "replicas"

    def __init__(
        self,
        devices_per_worker: int | None = None,
        worker_state: WorkerState = "gather",
        **kwargs: Any,
    ) -> None:
        if devices_per_worker is not None and devices_per_worker < 1:
            raise ValueError(f"`devices_per_worker` must be None or at least 1, got {devices_per_worker}")
        if worker_state not in get_args(WorkerState):
            raise ValueError(f"`worker_state` must be one of {get_args(WorkerState)}, got {worker_state!r}")
        super().__init__(**kwargs)
        self.devices_per_worker = devices_per_worker
        self.worker_state = worker_state
        self._worker_group: dist.ProcessGroup | None = None
        self._object_group: dist.ProcessGroup | None = None
        self._own: frozenset[str] = frozenset()  # names of what a worker has of its own, fixed when the fit starts
        self._local: dict[str, Tensor] | None = None  # this worker's values, while the module shows the shared ones

    # ---- what a subclass defines -------------------------------------------------------------------------------------

    @abstractmethod
    @override
    def start(self, trainer: Trainer) -> None:
        """Called in ``setup`` before a fit: weights are equal everywhere, optimizers exist, nothing is restored yet."""

    @abstractmethod
    def after_step(self) -> None:
        """Called after each step of the first optimizer, without gradients; steps are counted, also skipped ones."""

    @abstractmethod
    def shared_values(self) -> dict[str, Tensor]:
        """What the workers agree on, ``name -> value``; called on all processes.

        Of a buffer that is not in it, the workers' mean is shown, and rank 0's where that is not floating.
        """

    @abstractmethod
    def rule_state(self) -> dict[str, Any]:
        """The rule's state for a checkpoint: tensors and plain types; called on all processes."""

    @abstractmethod
    def load_rule_state(self, state: Mapping[str, Any], same_workers: bool) -> None:
        """Restores what ``rule_state`` gave; unless ``same_workers``, local weights must start from the shared ones."""

    @property
    def apart(self) -> bool:
        """Whether the workers' values differ from the shared ones; a rule under which they meet says when they do."""
        return True

    def finish(self) -> None:
        """Called at the end of training, before the module is left with the shared weights."""

    # ---- workers -----------------------------------------------------------------------------------------------------

    @property
    def worker_size(self) -> int:
        """Processes of a worker (D)."""
        if self.devices_per_worker is not None:
            return self.devices_per_worker
        return 1 if self.num_nodes == 1 else self.num_processes

    @property
    def num_workers(self) -> int:
        """Workers in the world (W)."""
        return self.world_size // self.worker_size

    @property
    def worker(self) -> int:
        """Index of this process's worker, ``rank // D``."""
        return self.global_rank // self.worker_size

    def new_group(self, ranks: Collection[int], backend: str | None = None) -> dist.ProcessGroup:
        """A process group with the strategy's timeout; all processes must make all groups, in the same order."""
        group: dist.ProcessGroup = dist.new_group(list(ranks), timeout=self._group_timeout, backend=backend)
        return group

    @override
    def make_groups(self) -> None:
        self._local = None
        self._own = self._name_own()
        size = self.worker_size
        self._worker_group = None
        if size > 1:
            for first in range(0, self.world_size, size):
                group = self.new_group(range(first, first + size))
                if first // size == self.worker:
                    self._worker_group = group
        self._object_group = self.new_group(range(self.world_size), backend="gloo")
        if self._worker_group is not None and wants_sync_batchnorm(self):
            sync_batchnorm_over(self, self._worker_group)

    @override
    def setup_optimizers(self, trainer: Trainer) -> None:
        """Those that reduce by themselves, such as Newton's method, do so within their worker."""
        super().setup_optimizers(trainer)
        over_the_world = [each for each in self.optimizers if getattr(each, "process_group", self) is None]
        if over_the_world and self.num_workers > 1:
            group = self._worker_group or self._group_of_one()
            for optimizer in over_the_world:
                optimizer.process_group = group  # type: ignore[attr-defined]

    def _group_of_one(self) -> dist.ProcessGroup:
        return [self.new_group([rank]) for rank in range(self.world_size)][self.global_rank]

    # ---- a fit, in the order of Lightning's calls --------------------------------------------------------------------

    @override
    def check(self, trainer: Trainer) -> None:
        name = type(self).__name__
        super().check(trainer)
        if self.world_size % self.worker_size:
            raise MisconfigurationException(
                f"`devices_per_worker` must divide the {self.world_size} processes of the world,"
                f" got {self.worker_size}: change it, or `devices` and `num_nodes` of the Trainer"
            )
        if self.worker_size == 1 and wants_sync_batchnorm(self):
            raise MisconfigurationException(
                f"`sync_batchnorm=True` averages batch statistics over the world in each step, which {name} avoids:"
                " remove it, or form workers of several devices by `devices_per_worker`"
            )
        if self.worker_size == 1 and self._has_comm_hook:
            raise MisconfigurationException(
                f"`ddp_comm_hook` changes how gradients are averaged, and {name} with one device a worker averages"
                " none: remove it, or form workers of several devices by `devices_per_worker`"
            )
        if isinstance(self.cluster_environment, SLURMEnvironment) and self.cluster_environment.auto_requeue:
            rank_zero_warn(
                "SLURM auto-requeue saves a checkpoint in each process at the step where the signal finds it, and"
                " workers in different steps then wait for each other until `timeout`: pass"
                " `plugins=SLURMEnvironment(auto_requeue=False)` to the Trainer, and let SLURM send SIGTERM before the"
                " end"
            )

    @override
    def configure_ddp(self) -> None:
        """Without the wrapper no gradient crosses the wire; a worker of several devices has one over these."""
        super().configure_ddp()
        if self._worker_group is not None:
            ddp_over(self, self._worker_group)

    @override
    def reduce(self, tensor: Tensor, group: Any | None = None, reduce_op: Any = "mean") -> Tensor:
        if self._in_training_step and group is None:
            rank_zero_warn(
                "`self.log(..., sync_dist=True)` in `training_step` waits for all workers in each step, over the slow"
                " link: log without `sync_dist`, or with `on_step=False, on_epoch=True`"
            )
        return super().reduce(tensor, group, reduce_op)

    @override
    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: LightningModule | nn.Module | None = None,
        **kwargs: Any,
    ) -> Any:
        output = super().optimizer_step(optimizer, closure, model, **kwargs)
        if optimizer is self.optimizers[0]:  # with several, in manual optimization, the first one counts the steps
            with torch.no_grad():
                self.after_step()
        return output

    @override
    def on_train_start(self) -> None:
        self._give_back_local()  # of a trial fit that was done, such as the learning rate finder's

    @override
    def on_validation_start(self) -> None:
        if self._module.trainer.state.fn == TrainerFn.FITTING:
            self._show_shared()

    @override
    def on_validation_end(self) -> None:
        # Callbacks' hooks ran before: a ModelCheckpoint has saved while the shared weights were on show.
        if self._module.trainer.state.fn == TrainerFn.FITTING:
            self._give_back_local()

    @override
    def on_train_end(self) -> None:
        self.finish()
        self._show_shared()  # for good; the local values stay for a checkpoint that is saved after the fit
        for callback in self._module.trainer.checkpoint_callbacks:
            # Monitored values may differ between workers: rank 0 wrote the files, so its choice of the best one holds.
            callback.load_state_dict(self.broadcast(callback.state_dict()))

    # ---- SIGTERM -----------------------------------------------------------------------------------------------------

    def ask_to_stop(self) -> Callable[[], bool]:
        """Asks all processes, without waiting, whether one of them was told to end by SIGTERM.

        Returns:
            Yields the answer; to be called by all in one later step, so that all can ``stop`` in the same.
        """
        flag = torch.tensor(int(self._stop_requested))
        work = dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._object_group, async_op=True)

        def answer() -> bool:
            work.wait()
            return bool(flag)

        return answer

    # ---- shared and local weights ------------------------------------------------------------------------------------

    def local_values(self) -> dict[str, Tensor]:
        """This worker's own trainable parameters and its buffers, also while the shared ones are on show."""
        return self._local if self._local is not None else {name: tensor.detach() for name, tensor in self._tensors()}

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in (*self._module.named_parameters(), *self._module.named_buffers()):
            if name in self._own:
                yield name, tensor

    def _name_own(self) -> frozenset[str]:
        trainable = {name for name, parameter in self._module.named_parameters() if parameter.requires_grad}
        persistent = self._module.state_dict().keys()  # caches and masks need not cross the wire
        return frozenset(trainable | {name for name, _ in self._module.named_buffers() if name in persistent})

    def _show_shared(self) -> None:
        """Puts the shared values into the module in place; optimizers keep their parameters."""
        if self._local is not None or not self.apart:
            return
        self._local = {name: tensor.detach().clone() for name, tensor in self._tensors()}
        shared = self.shared_values()
        with torch.no_grad():
            for name, tensor in self._tensors():
                if name in shared:
                    tensor.copy_(shared[name])
            average_(
                tensor
                for name, tensor in self._tensors()
                if name not in shared and not isinstance(tensor, nn.Parameter)
            )

    def _give_back_local(self) -> None:
        if self._local is None:
            return
        with torch.no_grad():
            for name, tensor in self._tensors():
                tensor.copy_(self._local[name])
        self._local = None

    @contextmanager
    def _shared_on_show(self) -> Iterator[None]:
        shown_before = self._local is not None
        self._show_shared()
        try:
            yield
        finally:
            if not shown_before:
                self._give_back_local()

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The shared weights, under every name; clones, since the module goes on with the local ones."""
        if self._object_group is None:  # no fit has started
            return super().lightning_module_state_dict()
        with self._shared_on_show():
            state = super().lightning_module_state_dict()
            return {key: value.clone() if isinstance(value, Tensor) else value for key, value in state.items()}

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        if "optimizer_states" in checkpoint and self._object_group is not None:  # else weights alone were asked for
            workers = self._gather_workers(checkpoint) if self.apart else []
            checkpoint[self.checkpoint_key] = {**self.rule_state(), "apart": self.apart, "workers": workers}
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def _gather_workers(self, checkpoint: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Each worker's state on rank 0, one after the other, so that no more than one is in flight."""
        if self.worker_state == "none":
            return []
        mine = {"values": self.local_values(), "optimizers": checkpoint["optimizer_states"]}
        states = [mine]
        for source in range(self.worker_size, self.world_size, self.worker_size):
            received: list[Any] = [None]
            if self.global_rank == source:
                dist.send_object_list([to_cpu(mine)], dst=0, group=self._object_group)
            elif self.global_rank == 0:
                dist.recv_object_list(received, src=source, group=self._object_group)
                states.append(received[0])
        return states

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Restores the rule and this worker's state; Lightning calls it after ``setup``, the weights came before."""
        self._local = None  # what a trial fit has left, such as the learning rate finder's
        state = checkpoint.get(self.checkpoint_key)
        if state is None:
            rank_zero_warn(
                f"the checkpoint was not written by {type(self).__name__}: all workers start from its weights and"
                " optimizer, the rule from its beginning"
            )
            super().load_optimizer_state_dict(checkpoint)
            return
        try:
            optimizers = self._load_state(state, checkpoint)
        except (LookupError, RuntimeError, TypeError, ValueError) as error:
            raise MisconfigurationException(
                f"the checkpoint's state under {self.checkpoint_key!r} is not one of {type(self).__name__} for this"
                f" module ({type(error).__name__}: {error}): resume from another checkpoint, or start anew from"
                " its weights"
            ) from error
        super().load_optimizer_state_dict({"optimizer_states": optimizers})
        if self._module.trainer.fit_loop.done:  # nothing is left to train, and Lightning calls no hook any more
            self._show_shared()

    def _load_state(self, state: Mapping[str, Any], checkpoint: Mapping[str, Any]) -> Any:
        """Restores the rule and this worker's values; returns the states of its optimizers."""
        workers = state["workers"]
        same = len(workers) == self.num_workers
        mine = workers[self.worker % len(workers)] if workers else {"optimizers": checkpoint["optimizer_states"]}
        with torch.no_grad():
            self.load_rule_state(state, same)  # first: it refuses what does not fit
            if same:
                for name, tensor in self._tensors():
                    tensor.copy_(mine["values"][name])
            elif state["apart"]:
                rank_zero_warn(
                    f"the checkpoint holds the state of {len(workers)} workers and the run has {self.num_workers}:"
                    " all start from the shared weights, and the run does not go on bit for bit"
                )
        return mine["optimizers"]


def to_cpu(state: Any) -> Any:
    """A copy of nested dicts and lists with their tensors on the host."""
    if isinstance(state, Tensor):
        return state.detach().cpu()
    if isinstance(state, Mapping):
        return {key: to_cpu(value) for key, value in state.items()}
    return [to_cpu(value) for value in state] if isinstance(state, list) else state
