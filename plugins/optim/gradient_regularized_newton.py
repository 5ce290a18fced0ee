"""Newton steps of any loss, regularised by its gradient: no learning rate, and few steps."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Protocol, get_args

import torch
import torch.distributed as dist
from pytorch_optimizer.base.exception import NoClosureError, NoSparseGradientError
from pytorch_optimizer.base.optimizer import BaseOptimizer
from pytorch_optimizer.base.type import ParamGroup
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_forward_pre_hook
from typing_extensions import override

from fulgurite.plugins.linalg import (
    CurvatureOperator,
    FisherOperator,
    GGNOperator,
    HessianOperator,
    LossGraph,
    LossOperator,
    ModuleLoss,
    cg,
    hutchinson_diagonal,
    lanczos,
    record_loss,
)
from fulgurite.plugins.linalg.curvature import vjp
from fulgurite.plugins.linalg.distributed import Peers
from fulgurite.plugins.seeds import derived_seed

Curvature = Literal["ggn", "fisher", "hessian", "identity", "diagonal", "low_rank"]
Solver = Literal["lanczos", "cg"]

_REFRESH = 10  # steps for which a metric's diagonal and a low-rank basis are kept
_PROBES = 10  # of a metric's diagonal
_DECAY = 0.9  # of the running diagonal
_FLOOR = 0.1  # of a metric, as a fraction of its mean
_OPERATORS: dict[str, type[LossOperator]] = {"hessian": HessianOperator, "fisher": FisherOperator}


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
        subsample: the fraction of the micro-batches that the curvature is of, in (0, 1]; below 1 it needs
            :class:`~fulgurite.callbacks.CurvatureBatches`.
        tol_grad: where ``|g|*`` is at most that, nothing happens.
        process_group: the data-parallel ranks; None for all.

    Attributes:
        metrics: of the last step, ``grn/`` and: ``gamma``, as the next step will try it; ``lambda``, ``grad_norm``,
            ``step_norm``, ``krylov_dim``, ``trials``, ``products``, ``closures``, ``search_failed``.

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
        if any(isinstance(p, DTensor) or hasattr(p, "_is_flat_param") or hasattr(p, "ds_id") for p in group["params"]):
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

        Args:
            closure: clears the gradients, computes the loss and its gradients, returns the loss.

        Returns:
            The loss at x.

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
        objective: _ClosureLoss | _StoredLoss = (
            _ClosureLoss(closure, params, self.recorded)
            if self._loss is None
            else _StoredLoss(closure, params, self._loss, Peers(self.process_group))
        )
        self._loss = None
        try:
            result = objective.begin(group["subsample"])
            kind = _OPERATORS.get(self.curvature, GGNOperator if self.recorded is not None else HessianOperator)
            op = kind(objective.source, params, group=self.process_group)
            self._take(objective, op, float(op.peers.mean_(objective.loss)))
        finally:
            objective.end()
        group["n_steps"] += 1
        return result

    def _take(self, objective: "_ClosureLoss | _StoredLoss", op: LossOperator, value: float) -> None:
        """Looks for a step from x, where the objective is ``value`` and ``op`` its curvature, and writes it."""
        group, metrics = self.param_groups[0], dict.fromkeys(_METRICS, 0.0)
        gradient = objective.gradient.to(op.dtype)
        self._refuse_non_finite(value, gradient)
        self._warn_of_missing(objective.missing)
        root = None if self._metric_is("identity") else self._metric(op).sqrt()
        scaled = op if root is None else _Preconditioned(op, root.reciprocal())
        slope = gradient if root is None else gradient / root
        norm = float(op.peers.agree_(slope.norm().double()))
        metrics |= {"grad_norm": norm, "closures": 1.0, "lambda": norm / group["gamma"]}
        if norm > group["tol_grad"]:
            system = self._system(scaled, slope)
            step = self._search(objective, op, system, root, value, norm, metrics)
            metrics["step_norm"] = float(step.norm()) if step is not None else 0.0
            metrics["search_failed"] = float(step is None)
            metrics["krylov_dim"] = float(system.dimension)
        metrics |= {"gamma": group["gamma"], "products": float(op.n_products)}
        self.metrics = {f"grn/{name}": value for name, value in metrics.items()}

    def _search(
        self,
        objective: "_ClosureLoss | _StoredLoss",
        op: LossOperator,
        system: "_System",
        root: Tensor | None,
        value: float,
        norm: float,
        metrics: dict[str, float],
    ) -> Tensor | None:
        """The step that was accepted and written, in coordinates in which the metric is the identity."""
        group = self.param_groups[0]
        start = [param.detach().clone() for param in op.params]
        share = 1 / (2 * (2 + group["theta"]) ** 2)
        accepted, step = False, None
        while not accepted and metrics["trials"] < self.max_search:
            metrics["lambda"] = lam = norm / group["gamma"]
            metrics["trials"] += 1
            step = system.solve(lam)
            if step is not None:
                metrics["closures"] += 1
                _write(op.params, start, op.unflatten(step if root is None else step / root))
                if isinstance(system, _Krylov):  # a larger lambda needs no more products
                    objective.release()
                try:
                    loss, after = objective.again()
                except BaseException:
                    _write(op.params, start)
                    raise
                after = after.to(op.dtype) if root is None else after.to(op.dtype) / root
                gain, least = value - float(op.peers.mean_(loss)), share * float(after @ after) / lam
                if abs(gain) <= objective.rounding * abs(value):
                    gain = -float(after @ step)  # a convex function decreases at least so much
                accepted = op.peers.decide(gain >= least and math.isfinite(gain), op.device)
                if not accepted:
                    _write(op.params, start)
            group["gamma"] *= 2 if accepted else 0.5
        group["gamma"] = min(max(group["gamma"], group["gamma_min"]), group["gamma_max"])
        return step if accepted else None

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

    def _system(self, op: CurvatureOperator, slope: Tensor) -> "_System":
        """What solves ``(H + lambda) h = -slope`` for any lambda."""
        tolerance = (self.param_groups[0]["theta"], 4 * torch.finfo(op.dtype).eps)
        match self.curvature:
            case "identity":
                return _Diagonal(torch.zeros_like(slope), slope)
            case "diagonal":
                return _Diagonal(self._running_diagonal(op), slope)
            case "low_rank":
                return _LowRank(*self._ritz(op, slope), slope)
        if self.solver == "cg":
            return _Conjugate(op, slope, tolerance, self.max_krylov)
        return _Krylov(op, slope, tolerance, self.max_krylov)

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


_METRICS = [
    "gamma",
    "lambda",
    "grad_norm",
    "step_norm",
    "krylov_dim",
    "trials",
    "products",
    "closures",
    "search_failed",
]


class _Group(dict[str, Any]):
    """Says to a scheduler what is wrong."""

    def __missing__(self, key: str) -> Any:
        if key == "lr":
            raise KeyError("GradientRegularizedNewton has no `lr`, its steps adapt themselves: remove the scheduler")
        raise KeyError(key)


def _write(params: list[Tensor], values: list[Tensor], steps: list[Tensor] | None = None) -> None:
    """Through ``data``, which counts no version: the kept graph stays valid."""
    for i, (param, value) in enumerate(zip(params, values, strict=True)):
        param.data.copy_(value if steps is None else value + steps[i])


# ---- solving (H + lambda) h = -g ---------------------------------------------------------------------------------


class _System(Protocol):
    """A linear system for any shift."""

    @property
    def dimension(self) -> int:
        """Of the space that the last solution is from."""

    def solve(self, lam: float) -> Tensor | None:
        """The step for a shift, ``(P,)``; None where the matrix is not positive."""


class _Krylov:
    """By one Lanczos basis, which serves all shifts; it grows for the first one alone."""

    def __init__(self, op: CurvatureOperator, slope: Tensor, tolerance: tuple[float, float], limit: int) -> None:
        self.run, self.norm, self.device = lanczos(op, 1, v0=slope), float(slope.norm()), op.device
        (self.theta, self.eps), self.limit, self.closed = tolerance, min(limit, op.shape[0]), False
        self.peers = op.peers

    @property
    def dimension(self) -> int:
        return len(self.run)

    def solve(self, lam: float) -> Tensor | None:
        while True:
            y = _thomas(self.run.alpha.tolist(), self.run.beta.tolist(), lam, self.norm)
            # Ends with a positive matrix and a small residual, or where nothing can be added.
            over = self.closed or y is None or self.run.breakdown or len(self.run) == self.limit
            if y is not None and not over:
                least = max(self.theta * lam * math.hypot(*y), self.eps * self.norm)
                over = self.run.beta_last * abs(y[-1]) <= least
            if self.peers.decide(over, self.device):
                break
            self.run.extend(1)
        if y is None:
            return None
        self.closed = True
        return -self.run.lift(torch.tensor(y, dtype=torch.float64))


def _thomas(diagonal: list[float], beside: list[float], shift: float, first: float) -> list[float] | None:
    """Solves a tridiagonal system with the right side ``first e1``; None where the matrix is not positive."""
    pivots, right = [diagonal[0] + shift], [first]
    for a, b in zip(diagonal[1:], beside, strict=True):
        if not pivots[-1] > 0:
            return None
        factor = b / pivots[-1]
        pivots.append(a + shift - factor * b)
        right.append(-factor * right[-1])
    if not pivots[-1] > 0:
        return None
    solution = [right[-1] / pivots[-1]]
    for pivot, value, b in zip(reversed(pivots[:-1]), reversed(right[:-1]), reversed(beside), strict=True):
        solution.append((value - b * solution[-1]) / pivot)
    return solution[::-1]


class _Conjugate:
    """By conjugate gradients, anew for each shift."""

    def __init__(self, op: CurvatureOperator, slope: Tensor, tolerance: tuple[float, float], limit: int) -> None:
        self.op, self.slope, self.limit = op, slope, limit
        self.theta, self.eps = tolerance
        self.dimension = 0

    def solve(self, lam: float) -> Tensor | None:
        least = self.eps * float(self.slope.norm())

        def close(x: Tensor, residual: Tensor) -> bool:
            return float(residual.norm()) <= max(self.theta * lam * float(x.norm()), least)

        found = cg(self.op, -self.slope, shift=lam, max_iter=self.limit, stop=close)
        self.dimension = found.n_iter
        return None if found.status == "negative_curvature" else found.x


class _Diagonal:
    """By division."""

    dimension = 0

    def __init__(self, diagonal: Tensor, slope: Tensor) -> None:
        self.diagonal, self.slope = diagonal, slope

    def solve(self, lam: float) -> Tensor | None:
        return -self.slope / (self.diagonal + lam)


class _LowRank:
    """By the formula of Sherman, Morrison and Woodbury, for a matrix with orthonormal ``u``."""

    def __init__(self, u: Tensor, s: Tensor, slope: Tensor) -> None:
        self.u, self.s, self.slope, self.dimension = u, s, slope, len(s)

    def solve(self, lam: float) -> Tensor | None:
        return (self.u @ (self.s / (self.s + lam) * (self.u.T @ self.slope)) - self.slope) / lam


class _Preconditioned(CurvatureOperator):
    """``S H S`` for a diagonal S: the curvature in coordinates in which the metric is the identity."""

    def __init__(self, op: CurvatureOperator, s: Tensor) -> None:
        super().__init__(op.shape[0], op.dtype, op.device, op.peers)
        self.op, self.s = op, s

    def _products(self, vectors: Tensor) -> Tensor:
        return self.op.local(vectors * self.s) * self.s


# ---- the loss, at x and at trial points --------------------------------------------------------------------------


class _ClosureLoss:
    """The loss of a closure, whose graph at x is kept.

    Attributes:
        source: of curvature at x.
        loss: at x, ``()``, double precision, this rank's.
        gradient: at x, ``(P,)``, the mean over the ranks, as DDP leaves it.
        missing: parameters without a gradient.
        rounding: relative difference of losses that may be rounding.
    """

    source: LossGraph
    loss: Tensor
    gradient: Tensor
    rounding: float

    def __init__(self, closure: Callable[[], Any], params: list[Tensor], outputs: Any) -> None:
        self.closure, self.params, self.outputs = closure, params, outputs
        self.missing = 0
        self._random = _random_states(params[0].device)
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        self._after: list[tuple[Tensor, Tensor]] = []

    def begin(self, subsample: float) -> Any:
        if subsample < 1:
            raise ValueError(
                f"`subsample` is {subsample}, but a closure shows no batches: attach "
                "`fulgurite.callbacks.CurvatureBatches()`"
            )
        with _watch_buffers(self._before), _Recording(self.params, self.outputs) as recording, torch.enable_grad():
            result = self.closure()
        self._after = [(buffer, buffer.clone()) for buffer, _ in self._before.values()]
        self.source, self.gradient = recording.graph, recording.gradient
        self.loss, self.missing = self._value(result), sum(p.grad is None for p in self.params)
        change = (self._gradient() - self.gradient).norm()
        if not change <= 1e-3 * self.gradient.norm() and bool(self.gradient.isfinite().all()):
            raise RuntimeError(
                "the gradients after the closure are not those of `backward`: remove `gradient_clip_val`, since lambda"
                " already bounds the step, and what else changes gradients"
            )
        tensors = [self.source.root, *self.params]
        self.rounding = max(32 * torch.finfo(tensor.dtype).eps for tensor in tensors)
        # Under autocast the loss is the mean of numbers that are rounded more coarsely than it is.
        self.rounding = max([self.rounding, *(torch.finfo(z.dtype).eps for z in self.source.outputs)])
        return result

    def again(self) -> tuple[Tensor, Tensor]:
        """Loss and gradient at the present parameters."""
        for param in self.params:
            param.grad = None
        _put_back(self._before.values())
        _set_random_states(self._random, self.params[0].device)
        with torch.enable_grad():
            result = self.closure()
        return self._value(result), self._gradient()

    def release(self) -> None:
        self.source.release()

    def end(self) -> None:
        if hasattr(self, "source"):
            self.release()
        _put_back(self._after)

    def _gradient(self) -> Tensor:
        return _flat([p.grad for p in self.params], self.params)

    def _value(self, result: Any) -> Tensor:
        if not isinstance(result, Tensor) or result.numel() != 1:
            got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise RuntimeError(f"the closure must return the loss, a scalar tensor, got {got}")
        return result.detach().double().reshape(())


class _StoredLoss:
    """The loss of stored micro-batches; the closure, of the last one, runs once for the Trainer."""

    missing = 0
    source: ModuleLoss
    loss: Tensor
    gradient: Tensor

    def __init__(self, closure: Callable[[], Any], params: list[Tensor], stored: ModuleLoss, peers: Peers) -> None:
        self.closure, self.params, self.stored, self.peers = closure, params, stored, peers
        self.rounding = 32 * torch.finfo(params[0].dtype).eps

    def begin(self, subsample: float) -> Any:
        with torch.enable_grad():
            result = self.closure()
        n_batches = len(self.stored.batches)
        count = math.ceil(subsample * n_batches)
        if subsample < 1 and count == n_batches:
            raise ValueError(
                f"`subsample` ({subsample}) takes whole micro-batches, and of {n_batches} that is all: raise "
                "`accumulate_grad_batches`"
            )
        self.source = self.stored.fresh(count)
        self.loss, self.gradient = self._evaluate(self.source if count == n_batches else self._passing())
        return result

    def again(self) -> tuple[Tensor, Tensor]:
        return self._evaluate(self._passing())

    def release(self) -> None:
        self.source.release()

    def end(self) -> None:
        if hasattr(self, "source"):
            self.release()

    def _passing(self) -> ModuleLoss:
        """The same loss, whose graphs nobody keeps."""
        return self.stored.fresh(keep_graphs=False)

    def _evaluate(self, stored: ModuleLoss) -> tuple[Tensor, Tensor]:
        losses: list[Tensor] = []
        gradients: list[Tensor] = []
        for weight, graph in stored.graphs():
            losses.append(weight * graph.root.detach().double())
            part = _flat(vjp([graph.root], self.params), self.params).mul_(weight)
            gradients = [part if not gradients else gradients[0].add_(part)]
        return torch.stack(losses).sum(), self.peers.mean_(gradients[0])


class _Recording(record_loss):
    """Takes the gradients as ``backward`` leaves them."""

    gradient: Tensor

    def __init__(self, params: list[Tensor], outputs: Any) -> None:
        super().__init__(outputs)
        self._of = params

    @override
    def _backward(self, *args: Any, **kwargs: Any) -> None:
        if self._root is None and any(p.grad is not None and bool(p.grad.any()) for p in self._of):
            raise RuntimeError(
                "there are gradients already where `backward` begins. Without `accumulate_grad_batches`: call "
                "`zero_grad` in the closure. With it: the loss of the last batch would be tested against the gradient "
                "of all; raise the batch size, or attach `fulgurite.callbacks.CurvatureBatches()`"
            )
        super()._backward(*args, **kwargs)
        if any(p.grad is not None and p.grad.layout != torch.strided for p in self._of):
            raise NoSparseGradientError("GradientRegularizedNewton", " Use `sparse=False`")
        self.gradient = _flat([p.grad for p in self._of], self._of)


def _flat(gradients: Sequence[Tensor | None], params: list[Tensor]) -> Tensor:
    """``(P,)``, in single precision at least."""
    dtype = torch.promote_types(params[0].dtype, torch.float32)
    pairs = zip(gradients, params, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g.detach()).reshape(-1).to(dtype) for g, p in pairs])


@contextmanager
def _watch_buffers(found: dict[int, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Notes the buffers of every module that runs within the block, as they are before it does."""

    def note(module: nn.Module, args: Any) -> None:
        for buffer in module._buffers.values():
            if buffer is not None and id(buffer) not in found:
                found[id(buffer)] = (buffer, buffer.detach().clone())

    handle = register_module_forward_pre_hook(note)
    try:
        yield
    finally:
        handle.remove()


def _put_back(buffers: Iterable[tuple[Tensor, Tensor]]) -> None:
    for buffer, value in buffers:
        buffer.data.copy_(value)


def _random_states(device: torch.device) -> list[Tensor]:
    """Of torch's generators on the host and on the device."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _set_random_states(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)
