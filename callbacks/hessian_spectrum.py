"""The spectrum of the Hessian while a model trains."""

import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning_utilities.core.apply_func import apply_to_collection
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, Optimizer
from typing_extensions import override

from fulgurite.callbacks.figures import log_figure
from fulgurite.callbacks.logs import log_now
from fulgurite.callbacks.requirements import (
    averaging_group,
    matching_parameters,
    patterns_of,
    require_matplotlib,
    require_whole_parameters,
)
from fulgurite.callbacks.training_batches import batch_at, to_device, training_batches
from fulgurite.plugins.linalg import HessianOperator, ModuleLoss, SpectralMeasure, SpectrumRecord, spectrum
from fulgurite.plugins.linalg.module_loss import SkippedBatch
from fulgurite.plugins.quiet import quiet
from fulgurite.plugins.seeds import isolate_generators, seed_all

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SHARDED_ABOVE_BYTES = 2**30
Batch = tuple[Any, int]  # and its index


class HessianSpectrum(Callback):
    """Logs the spectrum of the Hessian of the loss that ``training_step`` returns (arXiv 1706.04454, 1901.10159).

    At chosen optimizer steps, with the weights after the step: ``hessian/lambda_max``, ``lambda_min``, ``trace``,
    ``negative_mass``, ``outliers`` and the other scalars of :func:`~fulgurite.plugins.linalg.spectrum`; with SGD
    ``hessian/stability``, ``lr lambda_max / (2 + 2 momentum)``, beyond 1 of which a step overshoots; and the figure
    ``hessian/density``. Where the loss is not finite, ``hessian/lambda_max`` is nan, and training goes on. With none of
    ``every_n_steps``, ``at_steps`` and ``at_epoch_end`` it happens once, at the end of the fit.

    The fit stays as it was, bit for bit. An event costs about ``lanczos_steps * n_probes`` products of ``n_batches``
    batches, each dearer than a gradient; ``hessian/seconds`` says how long. Over several processes the loss is the
    mean over their batches, with one all-reduce a product.

    Args:
        every_n_steps: optimizer steps between events, at least 1.
        at_steps: optimizer steps, the first being 1.
        at_epoch_end: at the end of each training epoch.
        k: top eigenpairs; ``"classes"`` for ``3 C + 5`` where the loss is cross entropy of C classes, else 10.
        lanczos_steps: products a probe (m in the paper), at least 2.
        n_probes: random vectors; they are the same at each event.
        sigma: width of the kernel in the figure; None for the range of the eigenvalues over ``lanczos_steps``.
        near_zero: an eigenvalue counts as zero below this fraction of the largest.
        batches: ``"fixed"``, batches of the training data that are kept on the host for the whole fit, so that a curve
            moves because the weights do; ``"current"``, the last ones trained on.
        n_batches: over whose losses the Hessian is a mean, on each rank; with one, its graph is kept.
        step: the module's method that gets a batch, and its index if it takes one, and returns the loss.
        params: patterns of names of parameters or modules, as ``"encoder"``: the principal block of those alone.
        ggn: the scalars of the Gauss-Newton part; dropped with a warning where it is not defined.
        gradient_overlap: how much of the gradient lies in the space of the top eigenvectors; costs a gradient.
        eval_mode: run the step in eval mode.
        basis: ``"sharded"`` divides the memory of the Lanczos vectors among the ranks; ``"auto"`` does above 1 GiB.
        tol: residuals of the top pairs, relative to the largest eigenvalue.
        seed: of the probes, the fixed batches and what the step draws.
        figure: draw it; needs matplotlib.
        keep_vectors: keep the top eigenvectors in ``history`` and in checkpoints: ``k`` times the parameters an event.

    Attributes:
        history: one :class:`~fulgurite.plugins.linalg.SpectrumRecord` an event.

    Raises:
        ValueError: for settings out of range; when the fit starts, for patterns without a parameter.
        MisconfigurationException: when the fit starts, for what it cannot measure.
        RuntimeError: before the first step, for a loss that cannot be differentiated twice.
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        at_steps: Sequence[int] = (),
        at_epoch_end: bool = False,
        k: int | Literal["classes"] = "classes",
        lanczos_steps: int = 80,
        n_probes: int = 4,
        sigma: float | None = None,
        near_zero: float = 0.01,
        batches: Literal["fixed", "current"] = "fixed",
        n_batches: int = 1,
        step: str = "training_step",
        params: str | Sequence[str] | None = None,
        ggn: bool = True,
        gradient_overlap: bool = True,
        eval_mode: bool = False,
        basis: Literal["full", "sharded", "auto"] = "auto",
        tol: float = 1e-3,
        seed: int = 0,
        figure: bool = True,
        keep_vectors: bool = False,
    ) -> None:
        self.every_n_steps, self.at_steps, self.at_epoch_end = every_n_steps, tuple(at_steps), at_epoch_end
        self.k, self.lanczos_steps, self.n_probes, self.tol = k, lanczos_steps, n_probes, tol
        self.sigma, self.near_zero, self.figure = sigma, near_zero, figure
        self.batches, self.n_batches, self.step, self.eval_mode = batches, n_batches, step, eval_mode
        self.params = patterns_of(params)
        self.ggn, self.gradient_overlap, self.seed = ggn, gradient_overlap, seed
        self.basis, self.keep_vectors = basis, keep_vectors
        self._check()
        self.history: list[SpectrumRecord] = []
        self._indices: list[list[tuple[Any, int]]] | None = None  # of the fixed batches, and numbers, by rank
        self._kept: deque[Batch] = deque(maxlen=n_batches)
        self._coming: Batch | None = None
        self._previous: Tensor | None = None
        self._seen, self._measured = 0, -1
        self._ready, self._has_ggn, self._clipped = False, ggn, False

    def _check(self) -> None:
        counts = {
            "every_n_steps": (self.every_n_steps, 1),
            "k": (None if self.k == "classes" else self.k, 1),
            "lanczos_steps": (self.lanczos_steps, 2),
            "n_probes": (self.n_probes, 1),
            "n_batches": (self.n_batches, 1),
        } | {f"at_steps[{i}]": (step, 1) for i, step in enumerate(self.at_steps)}
        for name, (value, least) in counts.items():
            if value is not None and (isinstance(value, str) or value < least):
                raise ValueError(f"`{name}` is a count and must be at least {least}, got {value!r}")
        for name, number in (("sigma", self.sigma), ("near_zero", self.near_zero), ("tol", self.tol)):
            if number is not None and not number > 0:
                raise ValueError(f"`{name}` must be positive, got {number}")
        if self.batches not in ("fixed", "current"):
            raise ValueError(f"`batches` must be 'fixed' or 'current', got {self.batches!r}")
        if self.basis not in ("full", "sharded", "auto"):
            raise ValueError(f"`basis` must be 'full', 'sharded' or 'auto', got {self.basis!r}")
        if self.keep_vectors and self.basis == "sharded":
            raise ValueError('`keep_vectors` writes whole vectors, and `basis="sharded"` has none: set one of the two')

    # ---- when -------------------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._indices = self._previous = None  # of an earlier fit; a checkpoint brings its own, later
        self._has_ggn = self.ggn
        self._measured = -1
        require_whole_parameters(self, trainer)
        if torch.is_inference_mode_enabled():
            raise MisconfigurationException("`HessianSpectrum` differentiates: fit outside of `torch.inference_mode`")
        if not callable(getattr(pl_module, self.step, None)):
            raise MisconfigurationException(f"`step`: {type(pl_module).__name__} has no method `{self.step}`")
        by_hand = not pl_module.automatic_optimization
        reads_data = is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True)
        if self.step == "training_step" and (by_hand or reads_data):
            raise MisconfigurationException(
                "the `training_step` of this module steps its optimizers or reads its data itself: give it a method "
                'that takes a batch and returns the loss, and name it, as in `HessianSpectrum(step="hessian_loss")`'
            )
        require_matplotlib(self.figure)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        group = averaging_group(trainer)
        if trainer.world_size > 1 and (group is None or group.size() < trainer.world_size):
            raise MisconfigurationException(
                "`HessianSpectrum` takes the mean over all ranks, at equal weights and of batches that differ, and"
                f' {type(trainer.strategy).__name__} promises one of the two at most: use `strategy="ddp"` or one'
                " process, or measure a checkpoint by `fulgurite.plugins.linalg.spectrum`"
            )
        self._chosen(pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seen, self._ready = trainer.global_step, False
        self._kept.clear()

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.batches == "current":
            self._coming = _copy(batch), batch_idx  # now, for the step may write into it
        if not self._ready:  # not before: what the module's own hooks prepare is there from here on
            self._prepare(trainer, pl_module)
            self._ready = True

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._coming is not None and (outputs or not pl_module.automatic_optimization):  # else it was skipped
            self._kept.append(self._coming)
        last, self._seen = self._seen, trainer.global_step
        every = self.every_n_steps
        crossed = every is not None and self._seen // every > last // every
        if crossed or any(last < step <= self._seen for step in self.at_steps):
            self._event(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.at_epoch_end:
            self._event(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not (self.every_n_steps or self.at_steps or self.at_epoch_end):
            self._event(trainer, pl_module)
        self._kept.clear()
        if self.history and not getattr(trainer, "fast_dev_run", False):
            for logger in trainer.loggers:
                if isinstance(logger, WandbLogger):
                    logger.log_table("hessian/eigenvalues", *_table(self.history), step=trainer.global_step)

    # ---- what -------------------------------------------------------------------------------------------------------

    @contextmanager
    def _apart(self, trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
        """Within it the step may run: eagerly, and without a trace in the fit."""
        with isolate_generators(), quiet(pl_module, self.eval_mode), torch.compiler.set_stance("force_eager"):
            pl_module._compiled_call_impl = None
            seed_all("hessian", self.seed, trainer.global_rank)
            yield

    def _loss(self, trainer: Trainer, pl_module: LightningModule, batches: Sequence[Batch]) -> ModuleLoss:
        moved = _Moved(trainer, pl_module, self.step, batches, on_device=self.batches == "current")
        # Autocast is the step's alone: in it, the products of the Krylov basis would lose half their digits.
        return ModuleLoss(pl_module, moved, step=self.step, context=trainer.precision_plugin.forward_context)

    def _prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws the fixed batches, and tries a product, so that what cannot be measured fails before training."""
        with self._apart(trainer, pl_module):
            if self.batches == "fixed":
                self._draw(trainer, pl_module)
            batches = list(self._kept)[:1] or ([self._coming] if self._coming is not None else [])
            loss = self._loss(trainer, pl_module, batches)
            try:
                op = HessianOperator(loss, self._chosen(pl_module), sync=False)
                op.matvec(torch.ones(op.shape[0], dtype=op.dtype, device=op.device))
            except SkippedBatch:  # of the current batches the first has no loss to try: the event will find others
                pass
            finally:
                loss.release()

    def _draw(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loader: Any = trainer.train_dataloader
        counts = [len(pairs) for pairs in self._indices or ()]
        if self._indices is not None and counts == [self.n_batches] * trainer.world_size:
            for index, number in self._indices[trainer.global_rank]:
                self._kept.append((batch_at(loader, index, self.seed), number))
            return
        indices: list[tuple[Any, int]] = []
        for number, (index, batch) in enumerate(training_batches(loader, self.seed, 'batches="current"')):
            found = (batch, number)
            if self._value(trainer, pl_module, found) is None:
                continue
            self._kept.append(found)
            indices.append((list(index) if isinstance(index, tuple) else index, number))
            if len(self._kept) == self.n_batches:
                break
        if not self._kept:
            raise ValueError(f"`{self.step}` returned no loss for any batch of the training data")
        if all(index is not None for index, _ in indices):
            self._indices = [indices] * trainer.world_size
            if trainer.world_size > 1:
                dist.all_gather_object(self._indices, indices)

    def _value(self, trainer: Trainer, pl_module: LightningModule, batch: Batch) -> float | None:
        """The loss of a batch; None where the step skips it."""
        try:
            return float(self._loss(trainer, pl_module, [batch]).value())
        except SkippedBatch:
            return None

    def _event(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._ready or self._measured == trainer.global_step:
            return
        self._measured, start = trainer.global_step, time.perf_counter()
        with self._apart(trainer, pl_module):
            record = self._measure(trainer, pl_module)
        if record is None:
            rank_zero_warn(f"the loss is not finite after step {trainer.global_step}: no spectrum of its Hessian")
            log_now(trainer, {"hessian/lambda_max": math.nan})
            return
        stability = _stability(trainer.optimizers, record.scalars["lambda_max"])
        record.scalars |= {**stability, "seconds": time.perf_counter() - start}
        record.scalars = trainer.strategy.broadcast(record.scalars)  # the clocks differ
        self._previous = record.vectors
        record.vectors = record.vectors.cpu() if self.keep_vectors and record.vectors is not None else None
        self.history.append(record)
        log_now(trainer, {f"hessian/{name}": value for name, value in record.scalars.items()})
        if self.figure and trainer.is_global_zero:
            block = "" if self.params is None else f", block of {', '.join(self.params)}"
            title = f"Hessian after step {record.step}, {record.measure.size:,} parameters{block}"
            log_figure(trainer, "hessian/density", density_figure(record, self.sigma, title))

    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> SpectrumRecord | None:
        """The record; None where the loss is not finite on some rank."""
        values = {i: self._value(trainer, pl_module, batch) for i, batch in enumerate(self._kept)}
        there = {i: value for i, value in values.items() if value is not None}
        mean = torch.tensor(sum(there.values()) / len(there) if there else math.nan, device=pl_module.device)
        if not math.isfinite(float(trainer.strategy.reduce(mean, reduce_op="mean"))):
            return None
        params = self._chosen(pl_module)
        size = sum(param.numel() for param in params)
        same = self.history and self.history[-1].measure.size == size  # no layer was frozen since
        previous = self._previous.to(pl_module.device) if same and self._previous is not None else None
        loss = self._loss(trainer, pl_module, [self._kept[i] for i in there])
        try:
            record = spectrum(
                loss,
                **self._clip(size),
                n_probes=self.n_probes,
                ggn=self._has_ggn,
                gradient_overlap=self.gradient_overlap,
                near_zero=self.near_zero,
                tol=self.tol,
                basis=self._basis_of(size, trainer.world_size),
                params=params,
                previous=previous,
                step=trainer.global_step,
                generator=torch.Generator().manual_seed(self.seed),
            )
        finally:
            loss.release()
        self._has_ggn = self.ggn and "ggn_trace" in record.scalars  # `spectrum` warned: once is enough
        return record

    def _chosen(self, pl_module: LightningModule) -> list[Parameter]:
        return list(matching_parameters(pl_module, self.params, "params").values())

    def _clip(self, size: int) -> dict[str, Any]:
        """``k`` and ``lanczos_steps``, at most the number of parameters."""
        wanted = {"lanczos_steps": self.lanczos_steps} | ({} if self.k == "classes" else {"k": self.k})
        above = [f"`{name}` ({value})" for name, value in wanted.items() if value > size]
        if above and not self._clipped:
            rank_zero_warn(f"{' and '.join(above)} is clipped to the {size} parameters")
            self._clipped = True
        return {"k": self.k} | {name: min(value, size) for name, value in wanted.items()}

    def _basis_of(self, size: int, world_size: int) -> Literal["full", "sharded"]:
        if self.basis != "auto":
            return self.basis
        large = 4 * size * self.lanczos_steps > _SHARDED_ABOVE_BYTES
        return "sharded" if large and world_size > 1 and not self.keep_vectors else "full"

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"history": [_plain(record) for record in self.history], "indices": self._indices}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = [_record(state) for state in state_dict["history"]]
        self._indices = state_dict["indices"]
        self._previous = self.history[-1].vectors if self.history else None


class _Moved(Sequence[tuple[Any, ...]]):
    """The step's arguments for each batch, copied each time, and moved as the Trainer moves a batch."""

    def __init__(
        self, trainer: Trainer, pl_module: LightningModule, step: str, batches: Sequence[Batch], on_device: bool
    ) -> None:
        self.trainer, self.pl_module, self.batches, self.on_device = trainer, pl_module, batches, on_device
        self.takes_index = is_param_in_hook_signature(getattr(pl_module, step), "batch_idx", min_args=2)

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: Any) -> tuple[Any, ...]:
        kept, batch_idx = self.batches[index]
        batch = _copy(kept)
        if not self.on_device:
            batch = to_device(self.trainer, self.pl_module, batch)
        return (batch, batch_idx) if self.takes_index else (batch,)


def density_figure(record: SpectrumRecord, sigma: float | None = None, title: str = "") -> "Figure":
    """The density of the eigenvalues on logarithmic axes, and a tick at each of the top ones.

    Args:
        record: what to draw.
        sigma: width of the kernel; None for the range over the number of Lanczos steps.
        title: above it.
    """
    from matplotlib.figure import Figure  # an extra

    nodes, top = record.measure.nodes, record.eigenvalues
    low, high = float(nodes.min()), max(float(nodes.max()), float(top.max()))
    width = sigma or (high - low) / nodes.shape[1] or 1.0
    pad = 0.05 * (high - low) + 3 * width
    grid = torch.linspace(low - pad, high + pad, 2000, dtype=torch.float64)
    density = record.measure.density(grid, width)
    figure = Figure(figsize=(6, 3.4), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.plot(grid, density, color="#0072b2", label="density")
    axes.fill_between(grid, density, 0, color="#0072b2", alpha=0.15, linewidth=0)
    axes.plot(
        top,
        [0.02] * len(top),
        "|",
        transform=axes.get_xaxis_transform(),
        color="#d55e00",
        markersize=12,
        label=f"top {len(top)} eigenvalues",
    )
    peak = float(density.max())
    axes.set(xlabel="eigenvalue", ylabel="density", yscale="log", ylim=(1e-7 * peak, 30 * peak))
    axes.set_xscale("symlog", linthresh=10.0 ** math.ceil(math.log10(width)))
    axes.set_title(title, fontsize="medium", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper right")
    return figure


def _copy(batch: Any) -> Any:
    return apply_to_collection(batch, Tensor, torch.clone)


def _stability(optimizers: list[Optimizer], lambda_max: float) -> dict[str, float]:
    """``lr lambda_max / (2 + 2 momentum)``: gradient descent on a quadratic diverges above 1."""
    if len(optimizers) != 1 or not isinstance(optimizers[0], SGD):
        return {}
    group = optimizers[0].param_groups[0]
    if group["nesterov"] or group["dampening"] or group["maximize"]:  # another bound holds
        return {}
    return {"stability": float(group["lr"]) * lambda_max / (2 + 2 * group["momentum"])}


def _table(history: list[SpectrumRecord]) -> tuple[list[str], list[list[float]]]:
    rows = [
        [record.step, place, value, residual]
        for record in history
        for place, (value, residual) in enumerate(
            zip(record.eigenvalues.tolist(), record.residuals.tolist(), strict=True), start=1
        )
    ]
    return ["step", "place", "eigenvalue", "residual"], rows


def _plain(record: SpectrumRecord) -> dict[str, Any]:
    measure = record.measure
    names = ("step", "eigenvalues", "residuals", "scalars", "vectors")
    state = {name: getattr(record, name) for name in names}
    return state | {"nodes": measure.nodes, "weights": measure.weights, "size": measure.size}


def _record(state: dict[str, Any]) -> SpectrumRecord:
    fields = dict(state)
    measure = SpectralMeasure(*(fields.pop(name) for name in ("nodes", "weights", "size")))
    return SpectrumRecord(measure=measure, **fields)
