"""Training that does not wait for slow workers, with exact gradients: sequential gradient coding (arXiv 2211.13802)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from hashlib import blake2b
from types import UnionType
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.apply_func import apply_to_collection
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset
from typing_extensions import override

from fulgurite.plugins.comm.chunks import Chunks, HeldBatches, batch_size
from fulgurite.plugins.comm.coded_messages import Ended
from fulgurite.plugins.comm.coded_root import Waiting
from fulgurite.plugins.comm.coded_rounds import CodedRounds
from fulgurite.plugins.comm.coded_schedule import Rule
from fulgurite.plugins.comm.coding_schemes import Scheme
from fulgurite.plugins.comm.collectives import broadcast_
from fulgurite.plugins.comm.encoding import Code
from fulgurite.plugins.comm.gradient_codes import make_code
from fulgurite.plugins.comm.straggler_sim import DelayProfile, InjectedDelays
from fulgurite.plugins.loaders import with_batches
from fulgurite.plugins.optim import GradientRegularizedNewton
from fulgurite.strategies._lightning import wants_sync_batchnorm
from fulgurite.strategies.chunked_step import ChunkedStep, Job, showing
from fulgurite.strategies.concurrent_modules import ConcurrentModules
from fulgurite.strategies.unwrapped import UnwrappedStrategy

Pipeline = Literal["exact", "delayed", "interleaved"]
Data = Literal["slice", "held"]
_HEAVY = 2**30  # bytes a round through rank 0's link


class SequentialGradientCodingStrategy(UnwrappedStrategy):
    """Trains on the exact gradient of each batch without waiting for slow workers (arXiv 1612.03301, 2211.13802).

    Each batch is cut into chunks, and workers compute more of them than their share, so that the results of some
    workers suffice to know the gradient. All processes then step on the same bits. The DataLoader's batch size is the
    *global* one, and the loss must be a mean over samples.

    Args:
        scheme: ``"gc"``, a gradient code alone; ``"sr_sgc"``, with selective repetition; ``"m_sgc"``, multiplexed.
        s: for ``"gc"``: late workers that each round bears, at least 0 and below the number of processes.
        B: for the other two: rounds of a burst, at least 1. ``B`` divides ``W - 1`` in ``"sr_sgc"``.
        W: rounds of a window, above ``B``.
        lam: different late workers that each window bears, at most the number of processes.
        code: how chunks are combined; see :func:`~fulgurite.plugins.comm.gradient_codes.encoding_matrix`.
        mu: patience, above 0: a round may end ``1 + mu`` times as late as its first result.
        wait: what a round may not do without then: ``"complete"``, gradients that become whole if nobody is late any
            more; ``"conform"``, late workers as the scheme promises to bear them.
        pipeline: where a gradient takes the delay ``T`` of its scheme: ``"exact"``, within the
            ``accumulate_grad_batches`` of a step, so that training equals the synchronous one; ``"delayed"``, steps on
            the gradients of ``T`` steps before; ``"interleaved"``, trains ``T + 1`` modules or more of
            :class:`ConcurrentModules` in turns.
        data: ``"slice"``, all processes read whole batches; ``"held"``, each reads the samples alone that it may have
            to compute, from a DataLoader with ``batch_size`` and an ordinary sampler.
        seed: of what is random in ``training_step``, which is the same for a chunk on all workers, and of the cyclic
            code.
        delay_injection: makes workers late as recorded or drawn, for tests and demonstrations.
        record: keep how long workers took, for :meth:`profile`.
        **kwargs: for :class:`~lightning.pytorch.strategies.DDPStrategy`; ``timeout`` is how long a result that is
            indispensable may be overdue.

    Raises:
        TypeError: an argument is of another type.
        ValueError: an argument is out of range, missing, or does not belong to the scheme.
        MisconfigurationException: at setup or in the first step, for a module, Trainer or data that cannot train so.
    """

    def __init__(
        self,
        scheme: Scheme = "gc",
        s: int | None = None,
        B: int | None = None,
        W: int | None = None,
        lam: int | None = None,
        *,
        code: Code = "balanced",
        mu: float = 1.0,
        wait: Rule = "complete",
        pipeline: Pipeline = "exact",
        data: Data = "slice",
        seed: int = 0,
        delay_injection: DelayProfile | None = None,
        record: bool = True,
        **kwargs: Any,
    ) -> None:
        _check_choices(code=(code, Code), wait=(wait, Rule), pipeline=(pipeline, Pipeline), data=(data, Data))
        _check_kinds(int, s=s, B=B, W=W, lam=lam, seed=seed)
        _check_kinds(int | float, mu=mu)
        _check_kinds(DelayProfile, delay_injection=delay_injection)
        if not 0 < mu < math.inf:
            raise ValueError(
                f"`mu` is the patience with late results and must be positive and finite, got {mu}: a round that waits"
                " for all is one of s=0, or of a `mu` of 1000"
            )
        self._make_code = partial(make_code, scheme, s=s, B=B, W=W, lam=lam, seed=seed)
        fewest = self._make_code(max(lam or 0, s or 0) + 1)  # refuses what no number of processes makes right
        super().__init__(**kwargs)
        self.scheme, self.code, self.mu, self.wait = scheme, code, mu, wait
        self.pipeline, self.data, self.seed, self.record = pipeline, data, seed, record
        self.delay_injection = delay_injection
        self.delay = fewest.delay
        self._rounds: CodedRounds | None = None
        self._vector: Tensor | None = None  # the gradient to step on
        self._stepping = False  # in the batch that ends with an optimizer step
        if pipeline == "delayed" and self.delay:
            _warn_of_old_gradients(self.delay)
        if delay_injection is not None:
            rank_zero_warn("`delay_injection` makes workers late on purpose: for tests and demonstrations alone")

    # ---- before the fit ----------------------------------------------------------------------------------------------

    @override
    def check(self, trainer: Trainer) -> None:
        super().check(trainer)
        if self.world_size < 2:
            raise MisconfigurationException(
                "gradient coding needs several processes, and `devices` * `num_nodes` is 1: raise it, or use another"
                " strategy"
            )
        self._make_code(self.world_size, code=self.code)
        self._check_pipeline(trainer.accumulate_grad_batches)
        if wants_sync_batchnorm(self) or any(isinstance(layer, nn.SyncBatchNorm) for layer in self._module.modules()):
            raise MisconfigurationException(
                "SyncBatchNorm has a collective inside forward, which would wait for stragglers: use BatchNorm, whose"
                " statistics are those of a chunk, or another normalization"
            )
        if self._has_comm_hook:
            raise MisconfigurationException(
                "`ddp_comm_hook` changes how gradients are averaged, and here they are coded instead: remove it"
            )

    def _check_pipeline(self, accumulate: int) -> None:
        """Refuses a module and windows of ``accumulate`` batches in which the delay has no place."""
        module = self._module
        modules = len(module.members) if isinstance(module, ConcurrentModules) else 0
        if self.pipeline == "interleaved" and modules <= self.delay:
            raise ValueError(
                f"`pipeline='interleaved'` hides a delay of {self.delay} rounds behind {self.delay + 1} modules or"
                f" more: fit `ConcurrentModules([...])` of as many, got {modules or type(module).__name__}"
            )
        if self.pipeline != "interleaved" and not module.automatic_optimization:
            raise MisconfigurationException(
                "gradients are coded between backward and step, which manual optimization does by itself: let Lightning"
                " step the optimizer, or wrap modules in `ConcurrentModules` with `pipeline='interleaved'`"
            )
        if self.pipeline == "exact" and self.delay and accumulate == 1:
            raise MisconfigurationException(
                f"`pipeline='exact'` with {self.scheme!r} takes {self.delay} more rounds for each optimizer step:"
                f" {1 + self.delay} times as long with `accumulate_grad_batches=1`; set it to {4 * self.delay} or more,"
                " use 'gc', or another `pipeline`"
            )
        if self.pipeline == "exact" and accumulate < 4 * self.delay:
            rank_zero_warn(
                f"each optimizer step takes {accumulate} + {self.delay} rounds: raise `accumulate_grad_batches` to"
                f" {4 * self.delay} or more for the delay to matter little"
            )
        if self.pipeline == "delayed" and accumulate > 1:
            raise MisconfigurationException(
                "`pipeline='delayed'` steps on one gradient a batch: set `accumulate_grad_batches=1`"
            )

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """All processes train on the same batches; validation and test are dealt out as usual."""
        if self._module.trainer.training:
            return {"num_replicas": 1, "rank": 0}
        return super().distributed_sampler_kwargs

    @override
    def process_dataloader(self, dataloader: object) -> object:
        """With ``data="held"`` this process reads its own chunks alone."""
        if self.data == "slice" or not self._module.trainer.training:
            return dataloader
        if not isinstance(dataloader, DataLoader) or isinstance(dataloader.dataset, IterableDataset):
            raise MisconfigurationException(
                "`data='held'` picks samples by their index, and the training data is iterable: use `data='slice'`"
            )
        code = self._make_code(self.world_size, code=self.code)
        self._held = code.chunks_of(self.global_rank)
        try:
            self._batches = HeldBatches(dataloader, code.chunk_weights, self._held)
        except ValueError as error:
            raise MisconfigurationException(f"`data='held'`: {error}; use `data='slice'`") from error
        return with_batches(dataloader, self._batches)

    # ---- a fit, in the order of Lightning's calls --------------------------------------------------------------------

    @override
    def start(self, trainer: Trainer) -> None:
        if self.pipeline != "interleaved" and len(self.optimizers) > 1:
            raise MisconfigurationException(
                f"`configure_optimizers` gave {len(self.optimizers)} optimizers, and coded rounds serve one: join their"
                " parameters as groups of one optimizer"
            )
        if any(isinstance(optimizer, GradientRegularizedNewton) for optimizer in self.optimizers):
            raise MisconfigurationException(
                "GradientRegularizedNewton takes products with the curvature of the loss that its closure computes, and"
                ' a coded step has a gradient alone: use `strategy="ddp"`, or another optimizer'
            )

    @override
    def on_train_start(self) -> None:
        module, trainer = self._module, self._module.trainer
        self._total = self.pipeline == "exact" and (bool(self.delay) or _accumulates(trainer))
        make = partial(self._make_code, self.world_size, code=self.code)
        self._coded = make()
        self._steps = ChunkedStep(module, self.precision_plugin, self._may_go_on)
        size = max(vector.size for vector in self._steps.vectors)
        warn_of_traffic(4 * size * (self._coded.schedule.slots + 1) * (self.world_size - 1))
        dtype = max((vector.dtype for vector in self._steps.vectors), key=lambda kind: kind.itemsize)
        waiting = Waiting(self.mu, self.wait, self._group_timeout.total_seconds())
        self._rounds = CodedRounds(make, size, waiting, total=self._total, dtype=dtype, record=self.record)
        self._vector = None
        self._step: tuple[int, int] | None = None  # epoch and batch of the last job
        self._same_batches = False
        self._delays = None
        if self.delay_injection is not None:
            self._delays = InjectedDelays(self.delay_injection, self.global_rank, self._coded.load)

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._batch_idx = batch_idx

    @override
    def training_step(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """A coded round: the loss of the batch whose gradient it brings, or of this worker's chunks if none."""
        assert self._rounds is not None
        self._in_training_step = True
        try:
            return self._coded_step(self._rounds, batch, args)
        except BaseException as error:
            self._rounds.fail(f"{type(error).__name__}: {error}")
            raise
        finally:
            self._in_training_step = False

    def _coded_step(self, rounds: CodedRounds, batch: Any, args: tuple[Any, ...]) -> Tensor | None:
        self.refuse_unfrozen()
        self._refuse_unlike(batch)
        self._begin_job(batch, args)
        rounds.stopped = self._stop_requested
        brought = [rounds.run(self._steps.compute)]
        if self._total and self._stepping:
            brought += self._flush(rounds)
        if self.pipeline == "interleaved":
            self._modes = [part.training for part in self._module.modules()]
            loss = self._step_members(brought)
            if self._module.trainer.is_last_batch:
                self._settle()
            return loss
        self._vector = brought[-1].vector
        loss = None if self._vector is None else self._steps.vectors[0].loss(self._vector)
        if loss is not None and self._total:
            loss /= self._summed
        self._log(brought, loss)
        return loss if loss is not None else self._steps.loss

    def _begin_job(self, batch: Any, args: tuple[Any, ...]) -> None:
        module, trainer = self._module, self._module.trainer
        step = trainer.current_epoch, self._batch_idx
        if step == self._step and (self._total or self.delay):
            raise MisconfigurationException(
                "the optimizer calls its closure more than once a step, as LBFGS does, and a call has no gradient of"
                " its own where gradients come rounds later or many at a time: use 'gc' with"
                " `accumulate_grad_batches=1`, or an optimizer that steps on one gradient"
            )
        if self._step is None or self._step[0] != step[0]:
            self._steps.ran.clear()
        self._step = step
        held = self._held if self.data == "held" else None
        size = batch_size(batch) if held is None else self._batches.size(self._batch_idx)
        chunks = Chunks(self._coded.chunk_weights, size)
        refuse_small(chunks, module)
        weights = None
        if self.pipeline == "delayed" and self.delay:
            weights = [parameter.detach().clone() for parameter in self._steps.vectors[0].parameters]
        member = module.take_turn() if isinstance(module, ConcurrentModules) else 0
        job = Job(batch, args, chunks, chunks.places(held), (self.seed, *step), member, weights)
        self._steps.begin(job, math.inf if self._total else self.delay)

    def _may_go_on(self, chunks: int) -> bool:
        assert self._rounds is not None
        if self._delays is not None:
            self._delays.sleep(self._rounds.round, self._coded.schedule.slots * chunks, self._rounds.is_over)
        return not self._rounds.is_over()

    def _flush(self, rounds: CodedRounds) -> list[Ended]:
        brought = rounds.flush(self._steps.compute)
        self._summed = len(self._steps.jobs)
        self._steps.jobs = []
        return brought

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Gives the parameters the decoded gradient, which the workers have computed in ``training_step``."""
        self.precision_plugin.pre_backward(closure_loss, self._module)
        if self._vector is not None:
            self._steps.give_gradient(0, self._vector, 1 / self._module.trainer.accumulate_grad_batches)
        return self.precision_plugin.post_backward(closure_loss, self._module)

    @override
    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], *args: Any, **kwargs: Any) -> Any:
        if self.pipeline == "delayed" and len(self._steps.jobs) < self.delay:
            return closure()  # no gradient yet, which a GradScaler would not bear
        self._stepping = True
        try:
            return super().optimizer_step(optimizer, closure, *args, **kwargs)
        finally:
            self._stepping = False

    def _step_members(self, brought: Sequence[Ended], jobs: Sequence[Job | None] | None = None) -> Tensor | None:
        """Steps the modules whose gradients have become whole; the last one's loss."""
        module, loss = self._module, None
        assert isinstance(module, ConcurrentModules)
        jobs = self._steps.jobs if jobs is None else jobs
        for ended in brought:
            if ended.vector is not None:
                job = jobs[ended.job]
                assert job is not None
                loss = self._steps.vectors[job.member].loss(ended.vector)
                self._steps.give_gradient(job.member, ended.vector)
                module.step_of(job.member)
        self._log(brought, loss)
        return loss

    # ---- what all processes must agree on ----------------------------------------------------------------------------

    def _refuse_unlike(self, batch: Any) -> None:
        """Compares the first batch, or which samples are in it, which all workers must have alike."""
        if self._same_batches:
            return
        self._same_batches = True
        alike = batch if self.data == "slice" else torch.tensor(self._batches.first)
        digest = torch.frombuffer(bytearray(_digest(alike)), dtype=torch.int64)
        of_root = digest.clone().to(self.root_device)
        dist.broadcast(of_root, 0)
        differ = torch.tensor(int(not torch.equal(of_root.cpu(), digest)), device=self.root_device)
        dist.all_reduce(differ)
        if differ:
            raise MisconfigurationException(
                f"{int(differ)} of {self.world_size} processes have read another first batch than rank 0, and a code"
                " needs the same everywhere: seed the order and random augmentations by `seed_everything(seed,"
                " workers=True)`, and give a sampler of your own the same order on all ranks"
            )

    @override
    def reduce(self, tensor: Tensor, group: Any | None = None, reduce_op: Any = "mean") -> Tensor:
        if self._in_training_step and group is None:
            raise MisconfigurationException(
                "`self.log(..., sync_dist=True)` in `training_step` is a collective, and workers do not call it equally"
                " often here: log with `on_step=False, on_epoch=True` or without `sync_dist`, or read"
                " `gradient_coding/loss`, which is the mean over the whole batch"
            )
        if reduce_op in ("mean", "avg") and not torch.is_floating_point(tensor):
            tensor = tensor.float()  # how often workers have logged, unequally: a mean must not be cut to whole numbers
        return super().reduce(tensor, group, reduce_op)

    def _log(self, brought: Sequence[Ended], loss: Tensor | None) -> None:
        if any(ended.stop for ended in brought):
            self.stop()
        trainer = self._module.trainer
        values = {name: float(value) for name, value in asdict(brought[-1].stats).items()}
        values |= {"load": self._coded.load, "delay_jobs": float(self.delay)}
        if loss is not None:
            values["loss"] = float(loss)
        named = {f"gradient_coding/{name}": value for name, value in values.items()}
        self.to_callbacks(named)
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self.to_loggers(named)

    # ---- where the rounds must be done -------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Ends the gradients that are under way, where each belongs to a module of its own that waits for it."""
        if self._rounds is not None and self.pipeline == "interleaved" and self._steps.jobs:
            jobs = self._steps.jobs
            module = self._module
            assert isinstance(module, ConcurrentModules)
            # Validation may have begun: without gradients, with the modules in evaluation mode, and with other logs.
            modes = showing(module.modules(), "training", self._modes)
            with torch.inference_mode(False), torch.enable_grad(), modes, module.silent():
                self._step_members(self._flush(self._rounds), jobs)

    @override
    def on_validation_start(self) -> None:
        if self._module.trainer.state.fn == TrainerFn.FITTING and self._rounds is not None:
            self._settle()
            self._share_buffers()

    @override
    def on_train_end(self) -> None:
        assert self._rounds is not None
        self._settle()
        self._share_buffers()
        self._rounds.close()

    def _share_buffers(self) -> None:
        """BatchNorm's statistics are of each process's chunks: rank 0's are for all."""
        broadcast_(self._module.buffers())

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Of a checkpoint, for which gradients under way are ended first; all processes save together."""
        if self._rounds is not None and not self._rounds.is_closed:
            self._settle()
        return super().lightning_module_state_dict()

    @override
    def teardown(self) -> None:
        if self._rounds is not None:
            self._rounds.fail("the fit has ended early")
        super().teardown()

    # ---- afterwards --------------------------------------------------------------------------------------------------

    def arrivals(self) -> Tensor:
        """On rank 0, in the process that trains: when results came in, and who was late when.

        Returns:
            ``(processes, rounds)``, seconds from the start of a round, nan where it ended without the result, of the
            last 8192 rounds at most; no rounds on other ranks and with ``record=False``.
        """
        times = self._rounds.times() if self._rounds is not None else []
        return torch.stack(times, 1) if times else torch.empty(self.world_size, 0, dtype=torch.float64)

    def profile(self, seconds_per_load: float | None = None) -> DelayProfile:
        """How long the workers took, to search a scheme for: record with ``s=0``, where every round waits for all.

        Args:
            seconds_per_load: seconds that one more unit of load would take; None takes all of the recorded time for
                computing. :func:`~fulgurite.plugins.comm.straggler_sim.fit_load_slope` measures it from two recordings.

        Returns:
            ``(processes, rounds)``, without the rounds in which somebody has not answered, the last 8192 at most.

        Raises:
            RuntimeError: nothing has been recorded in this process.
        """
        arrivals = self.arrivals()
        recorded = arrivals[:, ~arrivals.isnan().any(0)]
        if not recorded.numel():
            raise RuntimeError(
                "no round was recorded in which all workers have answered: record with `s=0`, and ask rank 0, in the"
                " process that has trained"
            )
        if seconds_per_load is None:
            seconds_per_load = float(recorded.median()) / self._coded.load
        return DelayProfile(recorded, self._coded.load, seconds_per_load, carry_over=True)


def refuse_small(chunks: Chunks, module: LightningModule) -> None:
    """Refuses chunks of one sample under BatchNorm, and warns of empty ones."""
    norms = nn.modules.batchnorm._BatchNorm
    if chunks.smallest < 2 and any(isinstance(layer, norms) and layer.training for layer in module.modules()):
        raise MisconfigurationException(
            f"a batch of {chunks.size} samples makes chunks of {chunks.smallest}, too few for BatchNorm: raise the"
            f" batch size to {2 * len(chunks.bounds)} or more (`drop_last=True` if it is the last one that is small),"
            " or use another normalization"
        )
    if chunks.smallest < 1:
        rank_zero_warn(
            f"a batch of {chunks.size} samples is cut into {len(chunks.bounds)} chunks, some of them empty: raise the"
            " batch size, which is the global one"
        )


def _warn_of_old_gradients(delay: int) -> None:
    bound = 2 * math.sin(math.pi / (2 * (2 * delay + 1)))
    rank_zero_warn(
        f"`pipeline='delayed'` steps on gradients that are {delay} steps old: where the loss has curvature h, plain SGD"
        f" diverges unless `lr` * h is below {bound:.3g} (2 without delay); the first {delay} steps have no gradient"
    )


def warn_of_traffic(in_bytes: int) -> None:
    """Warns where rank 0's link is what limits a round."""
    if in_bytes > _HEAVY:
        rank_zero_warn(
            f"rank 0 moves {in_bytes / 2**30:.1f} GiB in each round, through one link: fewer processes with more"
            " devices each, or a scheme that sends less ('gc' sends one vector a worker), may be faster"
        )


def _accumulates(trainer: Trainer) -> bool:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    scheduled = any(isinstance(callback, GradientAccumulationScheduler) for callback in callbacks)
    return scheduled or trainer.accumulate_grad_batches > 1


def _check_choices(**given: tuple[object, Any]) -> None:
    for name, (value, choices) in given.items():
        if value not in get_args(choices):
            raise ValueError(f"`{name}` must be one of {get_args(choices)}, got {value!r}")


def _check_kinds(kind: type | UnionType, **given: object) -> None:
    """Refuses what is neither of a kind nor None; True is no number."""
    for name, value in given.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, kind)):
            raise TypeError(f"`{name}` must be of type {getattr(kind, '__name__', kind)}, got {value!r}")


def _digest(batch: Any) -> bytes:
    digest = blake2b(digest_size=8)

    def add(value: Tensor | str) -> None:
        if isinstance(value, str):
            digest.update(value.encode())
        else:
            digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())

    apply_to_collection(batch, (Tensor, str), add)
    return digest.digest()
