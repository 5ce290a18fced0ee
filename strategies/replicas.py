"""Replicas: processes that share a model and train it apart."""

import atexit
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from inspect import signature
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from typing_extensions import override

from fulgurite.plugins.comm.collectives import average_, broadcast_
from fulgurite.strategies._lightning import (
    ddp_over,
    detach_sigterm,
    stop_on_sigterm,
    sync_batchnorm_over,
    validates_by_time,
    wants_sync_batchnorm,
)


class ReplicaStrategy(DDPStrategy):
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
    """

    checkpoint_key: ClassVar[str] = "replicas"

    def __init__(
        self,
        devices_per_worker: int | None = None,
        worker_state: Literal["gather", "none"] = "gather",
        **kwargs: Any,
    ) -> None:
        if devices_per_worker is not None and devices_per_worker < 1:
            raise ValueError(f"`devices_per_worker` must be None or at least 1, got {devices_per_worker}")
        if worker_state not in ("gather", "none"):
            raise ValueError(f"`worker_state` must be 'gather' or 'none', got {worker_state!r}")
        if kwargs.get("model_averaging_period") is not None:
            raise MisconfigurationException(
                f"`model_averaging_period` averages weights over the world, and {type(self).__name__} has a rule of its"
                " own for that: remove the argument, or use DDPStrategy with the post-local-SGD hook"
            )
        known = {*signature(DDPStrategy).parameters, *signature(DistributedDataParallel).parameters}
        if unknown := sorted(kwargs.keys() - known):
            raise TypeError(  # DDPStrategy takes anything for the wrapper, which a worker of one device does without
                f"{type(self).__name__} and DDPStrategy have no argument {', '.join(f'`{name}`' for name in unknown)}"
            )
        super().__init__(**kwargs)
        self.devices_per_worker = devices_per_worker
        self.worker_state = worker_state
        self._has_comm_hook = kwargs.get("ddp_comm_hook") is not None
        self._group_timeout: timedelta = kwargs.get("timeout") or dist.default_pg_timeout
        self._worker_group: dist.ProcessGroup | None = None
        self._object_group: dist.ProcessGroup | None = None
        self._restore_sigterm = ExitStack()
        self._stop_requested = False
        self._in_training_step = False
        self._own: frozenset[str] = frozenset()  # names of what a worker has of its own, fixed when the fit starts
        self._trained: set[int] = set()  # ids of the parameters that were trainable when the fit started
        self._local: dict[str, Tensor] | None = None  # this worker's values, while the module shows the shared ones

    # ---- what a subclass defines -------------------------------------------------------------------------------------

    @abstractmethod
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

    def _make_groups(self) -> None:
        if dist.get_world_size() != self.world_size:
            raise MisconfigurationException(
                f"the fit is to have {self.world_size} processes, but an earlier one in this script has left a group"
                f" of {dist.get_world_size()}: give each a script of its own, or a `start_method` that"
                " forks or spawns"
            )
        atexit.register(_leave)
        size = self.worker_size
        self._worker_group = None
        if size > 1:
            for first in range(0, self.world_size, size):
                group = self.new_group(range(first, first + size))
                if first // size == self.worker:
                    self._worker_group = group
        self._object_group = self.new_group(range(self.world_size), backend="gloo")

    # ---- a fit, in the order of Lightning's calls --------------------------------------------------------------------

    @override
    def setup(self, trainer: Trainer) -> None:
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting:
            self._local = None
            self._check_trainer(trainer)
            self._check_parameters()
            self._own = self._name_own()
            self._make_groups()
            if self._worker_group is not None and wants_sync_batchnorm(self):
                sync_batchnorm_over(self, self._worker_group)
            self._stop_requested = False
            self._restore_sigterm = detach_sigterm(trainer, self._request_stop)
        super().setup(trainer)
        if fitting:
            self._trained = {id(parameter) for parameter in self._module.parameters() if parameter.requires_grad}
            self.start(trainer)

    def _check_trainer(self, trainer: Trainer) -> None:
        name = type(self).__name__
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
        if validates_by_time(trainer):
            raise MisconfigurationException(
                "`val_check_interval` is a time, and each process would validate by its own clock, in different steps,"
                " and wait for the others until `timeout`: give it in batches"
            )
        if any(isinstance(callback, Timer) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            rank_zero_warn(
                "`max_time` (the Timer callback) asks rank 0 before each batch, over the slow link, and so keeps the"
                " workers in lockstep: use `max_epochs` or `max_steps`"
            )
        if isinstance(self.cluster_environment, SLURMEnvironment) and self.cluster_environment.auto_requeue:
            rank_zero_warn(
                "SLURM auto-requeue saves a checkpoint in each process at the step where the signal finds it, and"
                " workers in different steps then wait for each other until `timeout`: pass"
                " `plugins=SLURMEnvironment(auto_requeue=False)` to the Trainer, and let SLURM send SIGTERM before the"
                " end"
            )

    def _check_parameters(self) -> None:
        module, name = self._module, type(self).__name__
        for key, parameter in module.named_parameters():
            if isinstance(parameter, DTensor):
                raise MisconfigurationException(
                    f"parameter `{key}` is a DTensor (FSDP or tensor parallel); {name} shards nothing inside a worker:"
                    " do not wrap the module, and let `devices_per_worker` replicate it"
                )
            if parameter.requires_grad and parameter.is_complex():
                raise MisconfigurationException(
                    f"parameter `{key}` is complex, and its imaginary part would not be exchanged: keep it as two real"
                    " parameters (`torch.view_as_real`), or freeze it"
                )
            if nn.parameter.is_lazy(parameter):
                raise MisconfigurationException(
                    f"parameter `{key}` is lazy and has no shape yet, so the workers cannot start equal:"
                    " run one batch through the module in `configure_model`, or give the layer its input size"
                )
        if not any(parameter.requires_grad for parameter in module.parameters()):
            raise MisconfigurationException(
                f"the module has no trainable parameter: {name} would exchange nothing; unfreeze some, or use DDP"
            )

    def refuse_unfrozen(self) -> None:
        """For a rule to call before an exchange: what has become trainable since the start has no part in it."""
        for name, parameter in self._module.named_parameters():
            if parameter.requires_grad and id(parameter) not in self._trained:
                raise MisconfigurationException(
                    f"parameter `{name}` was unfrozen or replaced during the fit and is not exchanged, so the workers'"
                    " values would part: do so before the fit, or start a new fit from a checkpoint"
                )

    @property
    def _module(self) -> LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module

    @override
    def configure_ddp(self) -> None:
        """Without the wrapper no gradient crosses the wire, and neither do the weights: they are made equal here."""
        with torch.no_grad():
            broadcast_([*self._module.parameters(), *self._module.buffers()])
        if self._worker_group is not None:
            ddp_over(self, self._worker_group)

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self._in_training_step = True
        try:
            return super().training_step(*args, **kwargs)
        finally:
            self._in_training_step = False

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

    def log_scalars(self, values: Mapping[str, float], prog_bar: Collection[str] = ()) -> None:
        """Logs from ``after_step``: at once, whatever ``log_every_n_steps``, at ``trainer.global_step``.

        Args:
            values: ``method/quantity -> value``; also found in ``trainer.callback_metrics``.
            prog_bar: the names among them to show in the progress bar.
        """
        self.to_loggers(values)
        # Not `self.log` for all of them: each call copies what has been logged before, a quarter of a millisecond.
        self._module.trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})
        for name in prog_bar:
            self._module.log(name, values[name], logger=False, prog_bar=True, on_step=True, on_epoch=False)

    def to_loggers(self, values: Mapping[str, float]) -> None:
        """Logs where Lightning takes no metrics any more, such as in ``finish``."""
        trainer = self._module.trainer
        for logger in trainer.loggers:
            logger.log_metrics(dict(values), step=trainer.global_step)

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

    @override
    def teardown(self) -> None:
        self._restore_sigterm.close()
        super().teardown()

    # ---- SIGTERM -----------------------------------------------------------------------------------------------------

    def _request_stop(self) -> None:
        self._stop_requested = True

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

    def stop(self) -> None:
        """Ends the fit after this batch, as Lightning does on SIGTERM; to be called by all workers in the same step."""
        stop_on_sigterm(self._module.trainer)

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
        super().load_optimizer_state_dict({"optimizer_states": mine["optimizers"]})


def _leave() -> None:
    """Ends the process groups while Python still runs; gloo's threads, left to the C++ exit, abort it now and then."""
    if dist.is_initialized():
        dist.destroy_process_group()


def to_cpu(state: Any) -> Any:
    """A copy of nested dicts and lists with their tensors on the host."""
    if isinstance(state, Tensor):
        return state.detach().cpu()
    if isinstance(state, Mapping):
        return {key: to_cpu(value) for key, value in state.items()}
    return [to_cpu(value) for value in state] if isinstance(state, list) else state
