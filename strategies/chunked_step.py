"""The user's training step on chunks of a batch, as a gradient code asks for them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins import Precision
from torch import Tensor, nn

from fulgurite.plugins.comm.chunks import Chunks, cut
from fulgurite.plugins.comm.gradient_codes import Task
from fulgurite.plugins.comm.gradient_vector import GradientVector
from fulgurite.plugins.seeds import isolate_generators, seed_all
from fulgurite.strategies.concurrent_modules import ConcurrentModules, call_step, loss_of


@dataclass
class Job:
    """A batch whose gradient is under way.

    Args:
        batch: all of it, or what this worker holds.
        args: what else ``training_step`` gets.
        chunks: of the batch.
        places: where the chunks lie in ``batch``: first sample, and the first after it.
        seed: of its random numbers, besides the chunk; the same on all workers.
        member: of :class:`ConcurrentModules`.
        weights: that the gradient is of, if they may not be those that the module has.
        begun: tasks that this worker has tried, by kind and index.
    """

    batch: Any
    args: tuple[Any, ...]
    chunks: Chunks
    places: Mapping[int, tuple[int, int]]
    seed: tuple[object, ...]
    member: int = 0
    weights: list[Tensor] | None = None
    begun: set[tuple[str, int]] = field(default_factory=set)


class ChunkedStep:
    """Computes coded gradients: the user's ``training_step`` and a backward for each chunk of a task.

    Args:
        module: of the fit.
        precision: of the fit; what a GradScaler scales is sent unscaled.
        may_go_on: called before each chunk with the number of chunks of its task; False to give the task up.
    """

    def __init__(self, module: LightningModule, precision: Precision, may_go_on: Callable[[int], bool]) -> None:
        self._module, self._precision, self._may_go_on = module, precision, may_go_on
        self._members: list[Any] = list(module.members) if isinstance(module, ConcurrentModules) else [module]
        self.vectors = [
            GradientVector(parameter for parameter in member.parameters() if parameter.requires_grad)
            for member in self._members
        ]
        self.jobs: list[Job | None] = []  # by number; None where the gradient is not under way any more
        self.loss = torch.zeros(())  # mean over the chunks of the last task
        self.ran: set[int] = set()  # members whose training step has run in this epoch

    def begin(self, job: Job, delay: float) -> None:
        """The next job begins, and the one of ``delay + 1`` jobs before needs no more work."""
        self.jobs.append(job)
        if len(self.jobs) > delay + 1:
            self.jobs[len(self.jobs) - 2 - int(delay)] = None

    def compute(self, task: Task, row: Tensor) -> bool:
        """Writes a task's coded gradient into a row to send; False where the task was given up."""
        job = self.jobs[task.job]
        assert job is not None
        vector = self.vectors[job.member]
        vector.clear()
        loss = weight = 0.0
        with self._as_of(job, task), isolate_generators():
            for chunk, coefficient in zip(task.chunks, task.coeffs.tolist(), strict=True):
                # Once an epoch late workers compute a chunk all the same: where `training_step` logs for the epoch, the
                # others wait for them at its end.
                if not self._may_go_on(len(task.chunks)) and job.member in self.ran:
                    return False
                share = coefficient * job.chunks.share(chunk)
                if share:  # else an empty chunk
                    seed_all(*job.seed, chunk)
                    loss += self._backward(job, chunk, share)
                    weight += share
        vector.write(row, loss, weight, 1 / self.scale)
        vector.clear()
        if weight:
            self.loss = torch.tensor(loss / weight)
        return True

    def give_gradient(self, member: int, vector: Tensor, share: float = 1.0) -> None:
        """Gives the parameters ``share`` times a decoded gradient, as a backward would have."""
        self.vectors[member].read(vector, share * self.scale)

    @property
    def scale(self) -> float:
        """Of a GradScaler, 1 without."""
        scaler = getattr(self._precision, "scaler", None)
        return float(scaler.get_scale()) if scaler is not None else 1.0

    def _backward(self, job: Job, chunk: int, share: float) -> float:
        """Adds the gradient of ``share`` times a chunk's mean loss; returns ``share`` times the loss."""
        self.ran.add(job.member)
        with self._precision.train_step_context():
            step = self._members[job.member].training_step
            weighted = loss_of(call_step(step, cut(job.batch, *job.places[chunk]), *job.args)) * share
        scaler = getattr(self._precision, "scaler", None)
        scaled = scaler.scale(weighted) if scaler is not None else weighted
        self._precision.backward(scaled, self._module, None)
        return float(weighted.detach())

    @contextmanager
    def _as_of(self, job: Job, task: Task) -> Iterator[None]:
        """Shows the weights that the gradient is of; a second try leaves no trace in buffers."""
        name = task.kind, task.index
        with ExitStack() as stack:
            if name in job.begun:
                stack.enter_context(_kept(self._module.buffers()))
            if job.weights is not None:
                stack.enter_context(showing(self.vectors[job.member].parameters, "data", job.weights))
            job.begun.add(name)
            yield


@contextmanager
def showing(objects: Iterable[nn.Module | nn.Parameter], name: str, values: Sequence[Any]) -> Iterator[None]:
    """Gives objects other values of an attribute, one each: modules their modes, parameters their data."""
    shown = list(objects)
    before = [getattr(each, name) for each in shown]
    try:
        for each, value in zip(shown, values, strict=True):
            setattr(each, name, value)
        yield
    finally:
        for each, value in zip(shown, before, strict=True):
            setattr(each, name, value)


@contextmanager
def _kept(buffers: Iterable[Tensor]) -> Iterator[None]:
    before = [(buffer, buffer.clone()) for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)
