"""Newton steps of any loss, regularised by its gradient: no learning rate, and few steps."""

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from pytorch_optimizer.base.exception import NoClosureError
from pytorch_optimizer.base.optimizer import BaseOptimizer
from pytorch_optimizer.base.type import ParamGroup
from torch import Tensor, nn
from typing_extensions import override

from fulgurite.plugins.linalg import (
    CurvatureOperator,
    FisherOperator,
    GGNOperator,
    HessianOperator,
    LossOperator,
    ModuleLoss,
    hutchinson_diagonal,
    lanczos,
)
from fulgurite.plugins.linalg.curvature import NoOutputs
from fulgurite.plugins.linalg.distributed import Peers, in_pieces
from fulgurite.plugins.linalg.module_loss import SkippedBatch
from fulgurite.plugins.optim.objectives import ClosureLoss, Objective, StoredLoss
from fulgurite.plugins.optim.other_state import refuse_other_state
from fulgurite.plugins.optim.shifted_systems import (
    Conjugate,
    Diagonal,
    Krylov,
    LowRank,
    Preconditioned,
    ShiftedSystem,
)
from fulgurite.plugins.seeds import derived_seed

Curvature = Literal["ggn", "fisher", "hessian", "identity", "diagonal", "low_rank"]
Solver = Literal["lanczos", "cg"]

_REFRESH = 10  # steps for which a metric's diagonal and a low-rank basis are kept
_PROBES = 10  # of a metric's diagonal
_DECAY = 0.9  # of the running diagonal
_FLOOR = 0.1  # of a metric, as a fraction of its mean
_OPERATORS: dict[str, type[LossOperator]] = {"hessian": HessianOperator, "fisher": FisherOperator}
_NO_RATE = (
    "GradientRegularizedNewton has no `lr`, its steps adapt themselves: remove what asks for it, a scheduler, "
    "LearningRateFinder, LearningRateMonitor or StochasticWeightAveraging"
)
_METRICS = ["gamma", "lambda", "grad_norm", "step_norm", "krylov_dim", "trials", "products", "closures"]
_METRICS += ["search_failed"]


class GradientRegularizedNewton(BaseOptimizer):
    """Newton's method with steps regularised by the gradient, and no learning rate (arXiv 2506.13710).

    From the loss f, its gradient g and an approximation H of its Hessian at x, on one batch::

        lambda = |g|* / gamma;  h = -(H + lambda B)^-1 g;  the norms are |h|^2 = h' B h and |g|*^2 = g' B^-1 g
        x <- x + h,  gamma <- 2 gamma    if f(x) - f(x + h) >= c |grad f(x + h)|*^2 / lambda
        gamma <- gamma / 2, and again    otherwise; x comes back bit for bit

    so that ``gamma`` bounds the step and adapts itself. The solve is inexact: its residual is at most
    ``theta lambda |h|``, and ``c = 1 / (2 (2 + theta)^2)``. The method is for large or full batches.

    The closure runs once, and once more for each trial; it clears the gradients, computes the loss, calls ``backward``
    and returns the loss. Torch's random numbers are the same each time, so that dropout repeats, and buffers of the
    modules that run keep what the first time left. Under DDP all ranks take the decisions of the first one.

    Args:
        params: parameters, or one group of them; real, unsharded, of one type and on one device, with dense gradients.
        curvature: ``"ggn"`` the Gauss-Newton matrix, ``"fisher"`` the empirical Fisher matrix, ``"hessian"`` itself,
            ``"identity"`` none: gradient descent whose rate adapts; ``"diagonal"`` of the Gauss-Newton matrix, a
            running mean of estimates by one product; ``"low_rank"``, ``max_krylov`` products with the Gauss-Newton
            matrix every ten steps.
        gamma: first bound on the length of a step, above 0.
        gamma_min: from which ``gamma`` goes on after a failed search, above 0.
        gamma_max: at most so large.
        theta: how inexact the solve is, in [0, 1].
        max_krylov: products of a solve, at least 1.
        max_search: trials of a step, at least 1.
        solver: ``"lanczos"`` serves all trials by the products of the first and keeps ``max_krylov`` vectors; ``"cg"``
            begins anew each time and keeps four.
        metric: B: ``"identity"``; ``"diagonal"``, an estimate of the curvature's diagonal, ten products every ten
            steps; or positive numbers, ``(P,)``.
        outputs: where the loss is split for ``"ggn"`` and ``"fisher"``, see
            :func:`~fulgurite.plugins.linalg.record_loss`.
        subsample: the fraction of the micro-batches that the curvature is of, rounded up, in (0, 1]; below 1 it needs
            :class:`~fulgurite.callbacks.CurvatureBatches`.
        tol_grad: where ``|g|*`` is at most that, nothing happens.
        process_group: the data-parallel ranks; None for all.

    Attributes:
        metrics: of the last step, ``grn/`` and: ``gamma``, as the next step will try it; ``lambda``, ``grad_norm``,
            ``step_norm``, ``krylov_dim``, ``trials``, ``products``, ``closures``, ``search_failed``. After a batch that
            was skipped, ``lambda`` and ``grad_norm`` are not there.

    Raises:
        ValueError: for an argument out of its range.

    Example:
        >>> x = nn.Parameter(torch.tensor([-2.0, 2.0], dtype=torch.float64))
        >>> optimizer = GradientRegularizedNewton([x], "hessian")
        >>> def closure() -> Tensor:
        ...     optimizer.zero_grad()
        ...     loss = (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2
        ...     loss.backward()
        ...     return loss
        >>> for _ in range(60):
        ...     loss = optimizer.step(closure)
        >>> bool(loss < 1e-12)
        True
    """

    def __init__(
        self,
        params: Iterable[Any],
        curvature: Curvature = "ggn",
        *,
        gamma: float = 1.0,
        gamma_min: float = 1e-9,
        gamma_max: float = 1e12,
        theta: float = 0.5,
        max_krylov: int = 20,
        max_search: int = 20,
        solver: Solver = "lanczos",
        metric: Literal["identity", "diagonal"] | Tensor = "identity",
        outputs: Literal["loss_input"] | nn.Module = "loss_input",
        subsample: float = 1.0,
        tol_grad: float = 0.0,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.curvature, self.solver, self.metric, self.outputs = curvature, solver, metric, outputs
        self.max_krylov, self.max_search, self.process_group = max_krylov, max_search, process_group
        self.metrics: dict[str, float] = {}
        self._loss: ModuleLoss | None = None
        self._warned = False
        defaults = {"gamma": gamma, "gamma_min": gamma_min, "gamma_max": gamma_max, "theta": theta}
        defaults |= {"subsample": subsample, "tol_grad": tol_grad, "n_steps": 0}
        super().__init__(params, defaults)

    @override
    def __str__(self) -> str:
        return "GradientRegularizedNewton"

    @override
    def add_param_group(self, param_group: ParamGroup) -> None:
        if self.param_groups:
            raise ValueError("`params` must be one group: a Newton step couples all parameters; freeze some instead")
        super().add_param_group(_Group(param_group))
        self._validate(self.param_groups[0])

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes ``gamma``, its bounds, ``theta``, ``subsample`` and ``tol_grad`` too; the rest is the constructor's.

        Raises:
            ValueError: for the state of another optimizer.
        """
        refuse_other_state(self, state_dict)
        super().load_state_dict(state_dict)
        self.param_groups = [_Group(group) for group in self.param_groups]

    @override
    def init_group(self, group: ParamGroup, **kwargs: Any) -> None:
        """Does nothing: state comes with the first step."""

    def _validate(self, group: ParamGroup) -> None:
        values = {**group, **vars(self)}
        positive = "must be positive and finite"
        rules = {name: (0 < values[name] < math.inf, positive) for name in ("gamma", "gamma_min", "gamma_max")} | {
            "curvature": (self.curvature in get_args(Curvature), f"must be one of {get_args(Curvature)}"),
            "solver": (self.solver in get_args(Solver), f"must be one of {get_args(Solver)}"),
            "theta": (0 <= values["theta"] <= 1, "bounds the residual of the solve and must be in [0, 1]"),
            "max_krylov": (self.max_krylov >= 1, "counts the products of a solve and must be at least 1"),
            "max_search": (self.max_search >= 1, "counts the trials of a step and must be at least 1"),
            "subsample": (0 < values["subsample"] <= 1, "is a fraction of the batch and must be in (0, 1]"),
            "tol_grad": (values["tol_grad"] >= 0, "is a norm of the gradient and must be at least 0"),
        }
        for name, (holds, meaning) in rules.items():
            if not holds:
                raise ValueError(f"`{name}` {meaning}, got {values[name]!r}")
        if any(in_pieces(p) for p in group["params"]):
            raise ValueError("`params` are held in pieces by FSDP, tensor parallelism or DeepSpeed: train with DDP")
        kinds = {(p.dtype, p.device) for p in group["params"]}
        if len(kinds) > 1 or any(p.is_complex() for p in group["params"]):
            raise ValueError(
                f"`params` must be real, of one type and on one device, got {sorted(map(str, kinds))}: model "
                "parallelism is not supported"
            )
        numel = sum(p.numel() for p in group["params"] if p.requires_grad)
        if isinstance(self.metric, Tensor):
            if self.metric.shape != (numel,) or not bool((self.metric > 0).all()):
                got = f"{tuple(self.metric.shape)} from {float(self.metric.min())}"
                raise ValueError(f"`metric` must be ({numel},), one positive number a parameter, got {got}")
        elif self.metric not in ("identity", "diagonal"):
            raise ValueError(f"`metric` must be 'identity', 'diagonal' or a tensor, got {self.metric!r}")

    @property
    def recorded(self) -> Literal["loss_input"] | nn.Module | None:
        """The outputs that the curvature needs, for the ``outputs`` of a :class:`ModuleLoss`."""
        bare = self.curvature == "hessian" or (self.curvature == "identity" and not self._metric_is("diagonal"))
        return None if bare else self.outputs

    def use(self, loss: ModuleLoss | None) -> None:
        """Lets the next step be one of ``loss``, which the closure's is then a part of; None for the closure's own."""
        self._loss = loss

    # ---- a step ------------------------------------------------------------------------------------------------------

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step, or none where the search fails: the parameters are then as they were.

        A batch that is skipped, for which the closure clears the gradients, calls no ``backward`` and returns None,
        changes nothing at x; at a trial it is a rejection.

        Args:
            closure: clears the gradients, computes the loss and its gradients, returns the loss.

        Returns:
            The loss at x; None where it was skipped.

        Raises:
            NoClosureError: without a closure.
            RuntimeError: for a loss or gradient at x that is not finite, and where something else than ``backward``
                changes gradients: accumulation of batches, or clipping.
            ValueError: where the curvature is not defined, see :class:`~fulgurite.plugins.linalg.GGNOperator`.
        """
        if closure is None:
            raise NoClosureError(
                str(self), " Call `step(closure)`; Lightning's 16-mixed gives none: use bf16-mixed or 32-true"
            )
        group = self.param_groups[0]
        params = [p for p in group["params"] if p.requires_grad]
        if not params:
            raise ValueError("no parameter requires a gradient: unfreeze one")
        stored, self._loss = self._loss, None
        objective: Objective
        if stored is None:
            objective = ClosureLoss(closure, params, self.recorded)
        else:
            objective = StoredLoss(closure, params, stored, Peers(self.process_group))
        try:
            result = objective.begin(group["subsample"])
            kind = _OPERATORS.get(self.curvature, GGNOperator if self.recorded is not None else HessianOperator)
            op = kind(objective.source, params, group=self.process_group)
            self._take(objective, op)
        except SkippedBatch:
            self.metrics = {f"grn/{name}": 0.0 for name in _METRICS if name not in ("lambda", "grad_norm")}
            self.metrics |= {"grn/gamma": group["gamma"], "grn/closures": 1.0}
            return None
        except NoOutputs as error:
            raise ValueError(
                "no known loss function of `torch.nn.functional` was called with a prediction: name the submodule that "
                'returns the prediction, `GradientRegularizedNewton(outputs=self.net)`, or take `curvature="hessian"`'
            ) from error
        finally:
            objective.end()
        group["n_steps"] += 1
        return result

    def _take(self, objective: Objective, op: LossOperator) -> None:
        """Looks for a step from x, where ``op`` is the curvature, and writes it to the parameters."""
        group, metrics = self.param_groups[0], dict.fromkeys(_METRICS, 0.0)
        value, gradient = float(op.peers.mean_(objective.loss)), objective.gradient.to(op.dtype)
        self._refuse_non_finite(value, gradient)
        self._warn_of_missing(objective.missing)
        root = None if self._metric_is("identity") else self._metric(op).sqrt()
        slope = gradient if root is None else gradient / root
        norm = float(op.peers.agree_(slope.norm().double()))
        metrics |= {"grad_norm": norm, "closures": 1.0, "lambda": norm / group["gamma"]}
        if norm > group["tol_grad"]:
            system = self._system(op if root is None else Preconditioned(op, root.reciprocal()), slope)
            step = self._search(objective, _Point(op, value, norm, root), system, metrics)
            metrics["step_norm"] = float(step.norm()) if step is not None else 0.0
            metrics["search_failed"] = float(step is None)
            metrics["krylov_dim"] = float(system.dimension)
        metrics |= {"gamma": group["gamma"], "products": float(op.n_products)}
        self.metrics = {f"grn/{name}": value for name, value in metrics.items()}

    def _search(
        self, objective: Objective, at: "_Point", system: ShiftedSystem, metrics: dict[str, float]
    ) -> Tensor | None:
        """The step that was accepted, in coordinates in which the metric is the identity."""
        group, params = self.param_groups[0], at.op.params
        start = [param.detach().clone() for param in params]
        accepted, step = False, None
        while not accepted and metrics["trials"] < self.max_search:
            metrics["lambda"] = lam = at.norm / group["gamma"]
            metrics["trials"] += 1
            step = system.solve(lam)
            if step is not None:
                metrics["closures"] += 1
                if isinstance(system, Krylov):  # a larger lambda needs no more products
                    objective.release()
                try:
                    steps = at.op.unflatten(at.scaled(step))
                    _write(params, (x + h for x, h in zip(start, steps, strict=True)))
                    accepted = at.op.peers.decide(self._accepts(objective, at, step, lam), at.op.device)
                finally:
                    if not accepted:
                        _write(params, start)
            group["gamma"] *= 2 if accepted else 0.5
        group["gamma"] = min(max(group["gamma"], group["gamma_min"]), group["gamma_max"])
        return step if accepted else None

    def _accepts(self, objective: Objective, at: "_Point", step: Tensor, lam: float) -> bool:
        """Whether the objective, where the parameters are now, has decreased enough."""
        loss, after = objective.again()
        after = at.scaled(after.to(step.dtype))
        gain = at.value - float(at.op.peers.mean_(loss))
        if abs(gain) <= objective.rounding * abs(at.value):
            gain = -float(after @ step)  # a convex function decreases at least so much
        least = float(after @ after) / lam / (2 * (2 + self.param_groups[0]["theta"]) ** 2)
        return gain >= least and math.isfinite(gain)

    def _refuse_non_finite(self, value: float, gradient: Tensor) -> None:
        if not (math.isfinite(value) and bool(gradient.isfinite().all())):
            raise RuntimeError(
                f"the loss is {value}, and it or its gradient is not finite where the step begins; the parameters are "
                "untouched: check the data and the initial weights"
            )

    def _warn_of_missing(self, count: int) -> None:
        if count and not self._warned:
            self._warned = True
            warnings.warn(f"{count} parameters got no gradient, and do not move", stacklevel=5)

    def _system(self, op: CurvatureOperator, slope: Tensor) -> ShiftedSystem:
        """What solves ``(H + lambda) h = -slope`` for any lambda."""
        match self.curvature:
            case "identity":
                return Diagonal(torch.zeros_like(slope), slope)
            case "diagonal":
                return Diagonal(self._running_diagonal(op), slope)
            case "low_rank":
                return LowRank(*self._ritz(op, slope), slope)
        solver = Conjugate if self.solver == "cg" else Krylov
        return solver(op, slope, self.param_groups[0]["theta"], self.max_krylov)

    # ---- what lasts longer than a step -------------------------------------------------------------------------------

    def _probe(self, op: CurvatureOperator, n_probes: int) -> Tensor:
        """An estimate of the diagonal; seeded by the step, so that a resumed run draws the same."""
        seed = derived_seed("GradientRegularizedNewton", self.param_groups[0]["n_steps"])
        return hutchinson_diagonal(op, n_probes, generator=torch.Generator().manual_seed(seed))[0]

    def _kept(self, op: CurvatureOperator, *names: str) -> list[Tensor] | None:
        """State of these names, unless it is of other parameters or its time is over."""
        state = self.state[self.param_groups[0]["params"][0]]
        kept = [state[name].to(op.dtype) for name in names if name in state]
        return kept if len(kept) == len(names) and len(kept[0]) == op.shape[0] else None

    def _keep(self, **tensors: Tensor) -> list[Tensor]:
        """Rounds to the parameters' type, as loading from a checkpoint would."""
        first = self.param_groups[0]["params"][0]
        for name, tensor in tensors.items():
            self.state[first][name] = tensor.to(first.device, first.dtype)
        return [self.state[first][name].to(tensor.dtype) for name, tensor in tensors.items()]

    @property
    def _due(self) -> bool:
        return bool(self.param_groups[0]["n_steps"] % _REFRESH == 0)

    def _metric_is(self, name: str) -> bool:
        return isinstance(self.metric, str) and self.metric == name

    def _metric(self, op: CurvatureOperator) -> Tensor:
        if isinstance(self.metric, Tensor):
            return self.metric.to(op.device, op.dtype)
        kept = self._kept(op, "metric")
        if kept is None or self._due:
            diagonal = self._probe(op, _PROBES).abs()
            mean = diagonal.mean()
            # Its mean is 1, so that multiples of the loss take the same steps.
            relative = diagonal / mean if bool(mean > 0) else torch.ones_like(diagonal)
            kept = self._keep(metric=relative.clamp(min=_FLOOR))
        return kept[0]

    def _running_diagonal(self, op: CurvatureOperator) -> Tensor:
        fresh = self._probe(op, 1)
        kept = self._kept(op, "diagonal")
        (diagonal,) = self._keep(diagonal=fresh if kept is None else kept[0].lerp(fresh, 1 - _DECAY))
        return diagonal.clamp(min=0)

    def _ritz(self, op: CurvatureOperator, slope: Tensor) -> tuple[Tensor, Tensor]:
        """Orthonormal vectors, ``(P, r)``, and the curvature along them, ``(r,)``."""
        kept = self._kept(op, "basis", "values")
        if kept is None or self._due:
            run = lanczos(op, self.max_krylov, v0=slope)
            ritz = run.ritz()
            kept = self._keep(basis=run.lift(ritz.coefficients), values=ritz.values.clamp(min=0).to(slope))
        return kept[0], kept[1]


@dataclass
class _Point:
    """Where a step begins.

    Attributes:
        op: the curvature.
        value: of the objective.
        norm: of the gradient.
        root: of the metric's diagonal; None for the identity.
    """

    op: LossOperator
    value: float
    norm: float
    root: Tensor | None

    def scaled(self, vector: Tensor) -> Tensor:
        """A step, or a gradient, from one system of coordinates to the other."""
        return vector if self.root is None else vector / self.root


class _Group(dict[str, Any]):
    """Says to what asks for a learning rate that there is none."""

    def __missing__(self, key: str) -> Any:
        raise KeyError(_NO_RATE if key == "lr" else key)

    def __setitem__(self, key: str, value: Any) -> None:
        if key == "lr":
            raise KeyError(_NO_RATE)
        super().__setitem__(key, value)


def _write(params: list[Tensor], values: Iterable[Tensor]) -> None:
    """Through ``data``, which counts no version: the kept graph stays valid."""
    for param, value in zip(params, values, strict=True):
        param.data.copy_(value)
