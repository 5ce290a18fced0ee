"""How many examples profit from a step on one of them, during any fit."""

import copy
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, closing
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from typing_extensions import override

from fulgurite.callbacks.figures import log_figure
from fulgurite.callbacks.logs import log_now
from fulgurite.callbacks.requirements import (
    averaging_group,
    loss_scale,
    matching_parameters,
    patterns_of,
    require_matplotlib,
    require_whole_backward,
    require_whole_parameters,
)
from fulgurite.callbacks.training_batches import to_device, training_batches
from fulgurite.callbacks.untouched import untouched
from fulgurite.plugins.linalg import per_example_sq_norms
from fulgurite.plugins.seeds import seed_all

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class GradientCoherence(Callback):
    """Logs the m-coherence of a step's gradients, out of its own backward pass (arXiv 2203.10036, 2008.01217).

    ``alpha_m`` is ``|sum g_i|^2 / sum |g_i|^2`` over the m examples of an optimizer step, of all ranks and batches of
    the step: 1 where each example is learnt alone, m where all agree. The fit stays as it was, bit for bit.

    Logged under ``coherence/``: ``alpha_m``; ``alpha``, which is ``alpha_m / m``; ``alpha_unbiased``, the mean inner
    product of two different examples over the mean square, to compare batches of different size; ``m``;
    ``grad_norm``; ``mean_example_norm``, in units in which the mean of the examples' gradients is the gradient;
    ``layer/<parameter>``, its ``alpha_m``; ``covered``, the share of trainable numbers that entered; ``coupled``, 1
    where batch normalisation makes an example's gradient depend on the others. The figure ``coherence/layers`` shows
    ``alpha_m`` of each parameter over the steps, at the end of the fit.

    Args:
        every_n_steps: optimizer steps between events, the first before any step; an event costs a fraction of a step.
        per_layer: log ``coherence/layer/...``.
        source: ``"train_batch"`` measures the gradients that training takes; ``"fixed"`` those of the same examples at
            each event, in a pass of their own.
        n_batches: of ``"fixed"``, on each rank.
        batch_dim: the examples' axis in every module.
        modules: patterns of names of modules or parameters, as ``"encoder.*"``; None for all.
        unsupported: modules without a rule: ``"vmap"`` differentiates them once an example, ``"skip"`` leaves them out,
            ``"error"`` raises.
        max_bytes: of what is computed at once.
        seed: of the fixed batches and what their step draws.
        figure: draw it; needs matplotlib.

    Attributes:
        history: a dict an event: ``step``, ``alpha_m``, ``alpha``, ``alpha_unbiased``, ``m``, ``grad_norm``,
            ``mean_example_norm``, and ``layers``, ``alpha_m`` by parameter.

    Raises:
        ValueError: an argument out of its range; a pattern without a match; one example only.
        MisconfigurationException: sharded parameters, or several optimizers; for ``"train_batch"`` a compiled module,
            or a strategy whose backward passes are of parts of a batch; for ``"fixed"`` manual optimization.
        RuntimeError: modules whose gradients are not those of examples.
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        per_layer: bool = True,
        source: Literal["train_batch", "fixed"] = "train_batch",
        n_batches: int = 1,
        batch_dim: int = 0,
        modules: str | Sequence[str] | None = None,
        unsupported: Literal["vmap", "skip", "error"] = "vmap",
        max_bytes: int = 2**28,
        seed: int = 0,
        figure: bool = True,
    ) -> None:
        for name, count in (("every_n_steps", every_n_steps), ("n_batches", n_batches), ("max_bytes", max_bytes)):
            if count < 1:
                raise ValueError(f"`{name}` is a count and must be at least 1, got {count}")
        if batch_dim < 0:
            raise ValueError(f"`batch_dim` is an axis and must be at least 0, got {batch_dim}")
        if source not in ("train_batch", "fixed"):
            raise ValueError(f"`source` must be 'train_batch' or 'fixed', got {source!r}")
        if unsupported not in ("vmap", "skip", "error"):
            raise ValueError(f"`unsupported` must be 'vmap', 'skip' or 'error', got {unsupported!r}")
        self.every_n_steps, self.per_layer, self.source, self.n_batches = every_n_steps, per_layer, source, n_batches
        self.modules = patterns_of(modules)
        self.batch_dim, self.unsupported, self.max_bytes = batch_dim, unsupported, max_bytes
        self.seed, self.figure = seed, figure
        self.history: list[dict[str, Any]] = []
        self._only: list[str] = []
        self._kept: list[Any] | None = None
        self._event: _Event | None = None
        self._norms: dict[str, Tensor] | None = None  # while a backward is awaited
        self._open = ExitStack()
        self._measured = -1
        self._warned: set[str] = set()

    # ---- when -------------------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        require_whole_parameters(self, trainer)
        require_matplotlib(self.figure)
        if self.source == "fixed" and not pl_module.automatic_optimization:
            raise MisconfigurationException(
                '`source="fixed"` runs `training_step` once more, and one that steps its optimizers itself would '
                'train: use `source="train_batch"`'
            )
        if self.source == "train_batch":
            what = '`GradientCoherence(source="train_batch")`'
            require_whole_backward(what, trainer, 'use `source="fixed"`, which makes a pass of its own')
        if self.source == "train_batch" and _compiled(pl_module):
            raise MisconfigurationException(
                "`GradientCoherence` watches modules at work, and compiled ones cannot be watched: set "
                '`source="fixed"`, which runs them uncompiled'
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if len(trainer.optimizers) > 1:
            raise MisconfigurationException(
                f"`GradientCoherence` is of one loss, and {len(trainer.optimizers)} optimizers have several: measure "
                "one of them in a fit of its own"
            )
        self._only = list(matching_parameters(pl_module, self.modules, "modules"))
        self._measured, self._event, self._kept = -1, None, None

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if step % self.every_n_steps or step == self._measured:
            return
        if self.source == "fixed":
            self._measured = step
            self._replay(trainer, pl_module)
        else:
            self._event = self._event or _Event(step)
            self._norms = self._open.enter_context(self._watched(pl_module))

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if self._event is not None and not self._event.passes:
            named = pl_module.named_parameters()
            if any(name in self._only and param.grad is not None and bool(param.grad.any()) for name, param in named):
                raise RuntimeError(
                    "`GradientCoherence` found gradients of an earlier step where a backward begins: call `zero_grad` "
                    "before it"
                )

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._event is None:
            return
        if self._norms is None:
            raise RuntimeError(
                "`GradientCoherence` saw two backward passes in one step, each of another loss: leave it out of manual "
                "optimization with several losses"
            )
        self._open.close()
        if self._norms:
            self._event.add(self._norms, pl_module)
        elif not self._event.passes:  # no module had a part in it: a process of a federation that waits for others
            self._event = None
        self._norms = None

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._event is None or not self._event.squares:
            return
        event, self._event = self._event, None
        self._measured = event.step
        event.divide(loss_scale(trainer))  # by which the gradients have just been divided
        ranks = _ranks(trainer)  # whose mean the gradients are
        event.gradients = {name: ranks * gradient for name, gradient in event.gradients.items()}
        self._finish(trainer, pl_module, event, ranks)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._norms is not None:  # a batch that the step skipped
            self._forget()
            if self._event is not None and not self._event.passes:
                self._event = None

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._forget()
        self._event = None

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.figure and len(self.history) > 1 and trainer.is_global_zero:
            log_figure(trainer, "coherence/layers", layers_figure(self.history))

    # ---- what -------------------------------------------------------------------------------------------------------

    def _watched(self, pl_module: LightningModule) -> AbstractContextManager[dict[str, Tensor]]:
        return per_example_sq_norms(
            pl_module, self.batch_dim, self.max_bytes, unsupported=self.unsupported, only=self._only
        )

    def _forget(self) -> None:
        self._norms = None
        self._open.close()

    def _replay(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The gradients of the fixed batches, in a pass of their own."""
        if self._kept is None:
            drawn = training_batches(trainer.train_dataloader, self.seed, 'source="train_batch"')
            with closing(drawn):  # which puts the generators back
                self._kept = [batch for _, batch in islice(drawn, self.n_batches)]
        event = _Event(trainer.global_step)
        with untouched(trainer, pl_module), torch.compiler.set_stance("force_eager"), torch.enable_grad():
            seed_all("coherence", self.seed, trainer.global_rank)
            for index, batch in enumerate(self._kept):
                moved = to_device(trainer, pl_module, copy.deepcopy(batch))
                with self._watched(pl_module) as norms:
                    output: Any = pl_module.training_step(moved, index)
                    loss = output["loss"] if isinstance(output, dict) else output
                    if loss is not None:
                        loss.backward()
                if norms:
                    event.add(norms, pl_module)
            if _ranks(trainer) > 1:
                group = averaging_group(trainer)
                for name, gradient in event.gradients.items():
                    event.gradients[name] = trainer.strategy.reduce(gradient, group, reduce_op="sum")
        if event.passes:
            self._finish(trainer, pl_module, event, _ranks(trainer) * event.passes)
        else:
            self._warn("`training_step` returned no loss for any of the fixed batches: no coherence")

    def _finish(self, trainer: Trainer, pl_module: LightningModule, event: "_Event", parts: int) -> None:
        """``event.gradients`` are sums over all ranks, of ``parts`` gradients whose mean is meant."""
        m, norms, coupled, squares = self._joined(trainer, pl_module, event)
        if m < 2:
            if not self.history:
                raise ValueError(f"coherence needs at least 2 examples in a step, got {m}: raise the batch size")
            self._warn("a step of one example, such as an epoch's last, has no coherence: set `drop_last`")
            return
        tops = {name: float(event.gradients[name].double().square().sum()) for name in squares}
        layers = {name: tops[name] / square if square else math.nan for name, square in squares.items()}
        below = sum(squares.values())
        alpha_m = sum(tops.values()) / below if below else math.nan
        scalars = {
            "alpha_m": alpha_m,
            "alpha": alpha_m / m,
            "alpha_unbiased": (alpha_m - 1) / (m - 1),
            "m": float(m),
            "grad_norm": sum(tops.values()) ** 0.5 / parts,
            "mean_example_norm": norms / parts,
        }
        self.history.append({"step": event.step, **scalars, "layers": layers})
        sizes = {name: param.numel() for name, param in pl_module.named_parameters() if param.requires_grad}
        scalars["covered"] = sum(sizes[name] for name in squares) / sum(sizes.values())
        scalars |= {"coupled": 1.0} if coupled else {}
        scalars |= {f"layer/{name}": value for name, value in layers.items()} if self.per_layer else {}
        log_now(trainer, {f"coherence/{name}": value for name, value in scalars.items()})
        self._doubt(alpha_m, m, coupled)

    def _joined(
        self, trainer: Trainer, pl_module: LightningModule, event: "_Event"
    ) -> tuple[int, float, bool, dict[str, float]]:
        """Over all ranks: examples, the sum of their norms, whether they are coupled, squares by parameter."""
        counts = torch.tensor([event.examples, event.norms, event.coupled], dtype=torch.float64)
        seen = torch.tensor([name in event.squares for name in self._only], dtype=torch.float64)
        zero = torch.zeros((), dtype=torch.float64)
        squares = torch.stack([event.squares.get(name, zero).cpu() for name in self._only])
        if _ranks(trainer) > 1:
            numbers = torch.cat([counts, seen, squares]).to(pl_module.device)
            numbers = trainer.strategy.reduce(numbers, averaging_group(trainer), reduce_op="sum").cpu()
            counts, seen, squares = numbers.split([3, len(seen), len(squares)])
        m, norms, coupled = counts.tolist()
        found = zip(self._only, seen.tolist(), squares.tolist(), strict=True)
        return int(m), norms, bool(coupled), {name: square for name, is_seen, square in found if is_seen}

    def _doubt(self, alpha_m: float, m: int, coupled: bool) -> None:
        """Says once what makes the numbers other than they seem."""
        if coupled:
            self._warn("batch normalisation couples the examples of a batch: coherence is of what each row adds")
        if math.isnan(alpha_m):
            self._warn("all gradients are zero: `coherence/alpha_m` is nan")
        if alpha_m > m * (1 + 1e-3):
            self._warn(
                f"`coherence/alpha_m` is {alpha_m:.3g} of {m} examples: a part of the gradient is of none of them, "
                "such as a penalty on weights"
            )

    def _warn(self, what: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            rank_zero_warn(what)

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(source=self.source, modules=self.modules, every_n_steps=self.every_n_steps)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"history": copy.deepcopy(self.history)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = state_dict["history"]


class _Event:
    """What this rank has seen of one optimizer step.

    Attributes:
        step: optimizer steps before it.
        gradients: the sums over the examples, by parameter; replaced by each backward that adds to them.
        squares: the sums of the examples' squared norms, by parameter.
        norms: the sum of the examples' norms, over all parameters.
        examples: their number.
        passes: backward passes.
        coupled: whether batch normalisation was training.
    """

    def __init__(self, step: int) -> None:
        self.step, self.examples, self.passes, self.norms, self.coupled = step, 0, 0, 0.0, False
        self.gradients: dict[str, Tensor] = {}
        self.squares: dict[str, Tensor] = {}

    def divide(self, scale: float) -> None:
        """Takes the scale of the loss out of the examples' norms."""
        self.norms /= scale
        self.squares = {name: square / scale**2 for name, square in self.squares.items()}

    def add(self, norms: dict[str, Tensor], pl_module: LightningModule) -> None:
        """Takes a backward pass, whose gradients have joined those before."""
        self.examples += len(next(iter(norms.values())))
        self.passes += 1
        self.norms += float(torch.stack(list(norms.values())).double().sum(0).sqrt().sum())
        self.coupled |= any(isinstance(part, _BatchNorm) and part.training for part in pl_module.modules())
        for name, squares in norms.items():
            self.squares[name] = self.squares.get(name, 0.0) + squares.double().sum()
        self.gradients = {name: p.grad.detach() for name, p in pl_module.named_parameters() if p.grad is not None}


def layers_figure(history: list[dict[str, Any]]) -> "Figure":
    """``alpha_m`` of each parameter over the steps, on a logarithmic scale."""
    from matplotlib.colors import LogNorm  # an extra
    from matplotlib.figure import Figure

    names = list({name: None for record in history for name in record["layers"]})
    values = [[max(record["layers"].get(name, math.nan), 1e-3) for record in history] for name in names]
    figure = Figure(figsize=(6.4, 1.2 + 0.22 * len(names)), dpi=120, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, aspect="auto", norm=LogNorm(), cmap="viridis", interpolation="nearest")
    places = sorted({round(i * (len(history) - 1) / 5) for i in range(6)})
    axes.set_xticks(places, [str(history[place]["step"]) for place in places])
    axes.set_yticks(range(len(names)), names, fontsize="small")
    axes.set_xlabel("optimizer step")
    axes.set_title("examples that profit from a step on one of them", fontsize="medium", loc="left")
    figure.colorbar(image, label="m-coherence")
    return figure


def _ranks(trainer: Trainer) -> int:
    """How many processes the gradients are a mean over; 1 where each keeps its own."""
    group = averaging_group(trainer)
    return 1 if group is None else group.size()


def _compiled(module: LightningModule) -> bool:
    if hasattr(module.training_step, "_torchdynamo_orig_callable"):
        return True
    return any(part._compiled_call_impl is not None or hasattr(part, "_orig_mod") for part in module.modules())
