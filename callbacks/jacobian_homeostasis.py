"""Keeps the learning signal of equilibrium propagation faithful where weights forward and back differ."""

from statistics import fmean
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from fulgurite.callbacks.requirements import loss_scale, require_whole_backward, require_whole_parameters
from fulgurite.plugins.equilibrium import Backward, EquilibriumLayer, attach_loss, homeostatic_loss, jacobian_symmetry
from fulgurite.plugins.equilibrium.homeostasis import MAX_JACOBIAN, Estimator, check_estimator
from fulgurite.plugins.seeds import derived_seed

SYMMETRY_SAMPLES = 10


class _Call(NamedTuple):
    layer: EquilibriumLayer
    state: Tensor
    input: Tensor
    residual: Tensor
    loss: Tensor


class JacobianHomeostasis(Callback):
    """Trains the Jacobian of each :class:`~fulgurite.plugins.equilibrium.EquilibriumLayer` to be symmetric.

    That is the homeostasis of arXiv 2309.02214. To the gradients of the user's loss come those of ``coef`` times
    :func:`~fulgurite.plugins.equilibrium.homeostatic_loss`, at the state of each forward pass of training, in the same
    backward pass: clipping, accumulation, loss scaling and DDP see one gradient. The logged loss is the user's alone.

    Logs on the first rank, of its own batch: ``homeostasis/loss``, the penalty without ``coef``, a sum over layers, and
    ``homeostasis/residual``, the largest residual of the free phase, each time; ``homeostasis/symmetry``, the index of
    at most 10 samples, at first and every ``log_every_n_steps`` of the Trainer, for layers of at most 2048 units; and
    ``homeostasis/alignment``, the cosine of the layer's response and the exact error over all units but the read-out's,
    a mean over samples, where that is asked for, of each layer's last backward pass in the batch. A layer that takes no
    part in a batch is left out of it.

    Probes depend on the seed of the fit, the rank and a count, which checkpoints hold: resuming is exact.

    Args:
        coef: factor of the penalty, at least 0; 0 only logs. The penalty is divided by the number of units.
        probes: random directions a sample, at least 1.
        estimator: ``"vjp"``, ``"jvp"``, or ``"exact"``, which needs no probe but a field linear in its activities.
        every_n_steps: optimizer steps from one penalised step to the next, at least 1.
        log_alignment_every_n_steps: optimizer steps between alignments, each of which costs an adjoint relaxation; 0
            for none.
        modules: names of layers in the module, or one name; None for all.

    Raises:
        ValueError: an argument is out of its range.
        MisconfigurationException: at setup, where there is no such layer, weights are sharded, or ``"exact"`` or the
            alignment cannot be had.
    """

    def __init__(
        self,
        coef: float = 1.0,
        probes: int = 5,
        estimator: Estimator = "vjp",
        every_n_steps: int = 1,
        log_alignment_every_n_steps: int = 0,
        modules: str | list[str] | None = None,
    ) -> None:
        if not coef >= 0:
            raise ValueError(f"`coef` is the factor of a penalty and must be at least 0, got {coef}")
        check_estimator(probes, estimator)
        if every_n_steps < 1:
            raise ValueError(f"`every_n_steps` counts optimizer steps and must be at least 1, got {every_n_steps}")
        if log_alignment_every_n_steps < 0:
            raise ValueError(
                "`log_alignment_every_n_steps` counts optimizer steps and must be at least 1, or 0 for none, got "
                f"{log_alignment_every_n_steps}"
            )
        self.coef, self.probes, self.estimator = coef, probes, estimator
        self.every_n_steps, self.log_alignment_every_n_steps = every_n_steps, log_alignment_every_n_steps
        self.modules = [modules] if isinstance(modules, str) else modules
        self._layers: dict[str, EquilibriumLayer] = {}
        self._hooks: list[RemovableHandle] = []
        self._own: dict[int, dict[str, Any]] = {}  # attributes of the layers, by id
        self._seed: int | None = None
        self._rank = self._draws = 0
        self._weight: float | None = None  # of the penalty in this batch; None: no penalty
        self._calls: list[_Call] = []  # of this batch, penalised
        self._alignment: float | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            require_whole_parameters(self, trainer)
            remedy = '`strategy="ddp"`, or add `homeostatic_loss`, a mean over samples, to the loss of your step'
            require_whole_backward("the penalty of `JacobianHomeostasis`", trainer, remedy)
            self._layers = self._find(pl_module)
            for name, layer in self._layers.items():
                self._check(name, layer)

    def _find(self, pl_module: LightningModule) -> dict[str, EquilibriumLayer]:
        found = {name: part for name, part in pl_module.named_modules() if isinstance(part, EquilibriumLayer)}
        if not found:
            raise MisconfigurationException(
                f"{type(pl_module).__name__} has no EquilibriumLayer for `JacobianHomeostasis` to act on: add one, or "
                "leave the callback out"
            )
        missing = set(self.modules or ()) - set(found)
        if missing:
            raise MisconfigurationException(
                f"`modules` names {', '.join(sorted(missing))}, and the module's EquilibriumLayers are "
                f"{', '.join(found)}"
            )
        return {name: layer for name, layer in found.items() if self.modules is None or name in self.modules}

    def _check(self, name: str, layer: EquilibriumLayer) -> None:
        if self.estimator == "exact" and layer.field.recurrent_matrix() is None:
            raise MisconfigurationException(
                f"`estimator='exact'` needs a field that is linear in its activities, and that of {name} "
                f"({type(layer.field).__name__}) has no `recurrent_matrix()`: use 'vjp'"
            )
        if self.log_alignment_every_n_steps and layer.gradient == "unroll":
            raise MisconfigurationException(
                f"`log_alignment_every_n_steps` needs a response, and {name} has gradient='unroll': use 'ep' or 0"
            )

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._rank = trainer.global_rank
        if self._seed is None:  # else a checkpoint brought it
            self._seed = trainer.strategy.broadcast(torch.initial_seed())
        self._own = {id(layer): vars(layer) for layer in self._layers.values()}
        self._hooks = [layer.register_forward_hook(self._penalise) for layer in self._layers.values()]

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._calls = []
        for layer in self._layers.values():
            layer.last_backward = None
        if trainer.global_step % self.every_n_steps:
            return
        # As the Trainer's own loss is scaled and divided.
        self._weight = self.coef * loss_scale(trainer) / trainer.accumulate_grad_batches

    def _penalise(self, layer: EquilibriumLayer, args: Any, out: Tensor) -> Tensor | None:
        """The forward hook."""
        if self._weight is None or not torch.is_grad_enabled():
            return None
        u, x = layer.last_state, layer.last_input
        seed = derived_seed(self._seed, "homeostasis", self._rank, self._draws)
        self._draws += 1
        with torch.autocast(u.device.type, enabled=False), torch.set_grad_enabled(self.coef > 0):
            loss = homeostatic_loss(
                layer.field,
                layer.activation(u),
                x,
                probes=self.probes,
                estimator=self.estimator,
                generator=torch.Generator(u.device).manual_seed(seed),
            )
        # Attributes are others in a block of `quiet`, such as an attack on the inputs: not to be logged.
        if vars(layer) is self._own[id(layer)]:
            parts = u[:SYMMETRY_SAMPLES], x[:SYMMETRY_SAMPLES]
            self._calls.append(_Call(layer, *parts, layer.last_residual, loss.detach()))
        return attach_loss(out, loss, self._weight) if self.coef > 0 else None

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Here, as the weights are still those of the response.
        every = self.log_alignment_every_n_steps
        if every and trainer.global_step % every == 0:
            ran = [(layer, layer.last_backward) for layer in self._layers.values() if layer.last_backward is not None]
            if ran:
                self._alignment = fmean(_alignment(layer, record) for layer, record in ran)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._weight = None
        if self._calls:
            pl_module.log("homeostasis/loss", torch.stack([call.loss for call in self._calls]).sum())
            pl_module.log("homeostasis/residual", torch.stack([call.residual for call in self._calls]).amax())
            if batch_idx == 0 or trainer.global_step % getattr(trainer, "log_every_n_steps", 50) == 0:
                indices = [_symmetry(call) for call in self._calls if call.layer.field.n <= MAX_JACOBIAN]
                if indices:
                    pl_module.log("homeostasis/symmetry", torch.cat(indices).mean())
        if self._alignment is not None:
            pl_module.log("homeostasis/alignment", self._alignment)
            self._alignment = None

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release()

    def _release(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._layers, self._calls, self._weight = [], {}, [], None

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"seed": self._seed, "draws": self._draws}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._seed, self._draws = state_dict["seed"], state_dict["draws"]


def _symmetry(call: _Call) -> Tensor:
    return jacobian_symmetry(call.layer.field, call.layer.activation(call.state), call.input)


def _alignment(layer: EquilibriumLayer, record: Backward) -> float:
    """Mean cosine of the response with the exact one, over the units that are not read out, where there are such."""
    exact = layer.exact_response(record.state, record.input, record.signal)
    hidden = torch.ones(layer.field.n, dtype=torch.bool, device=exact.device)
    hidden[layer.readout] = False
    units = hidden if hidden.any() else ~hidden
    return torch.cosine_similarity(record.response[:, units], exact[:, units]).mean().item()
