"""FedSpeed: clients take many steps near the server's model, and a dual variable removes the bias of staying near."""

import math
import warnings
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from pytorch_optimizer.base.exception import NoClosureError, NoComplexParameterError, NoSparseGradientError
from pytorch_optimizer.base.optimizer import BaseOptimizer
from pytorch_optimizer.base.type import Defaults, ParamGroup, ParamsT
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from typing_extensions import override

from fulgurite.plugins.linalg.distributed import in_pieces
from fulgurite.plugins.optim.other_state import refuse_other_state
from fulgurite.plugins.quiet import quiet

Server = Literal["all", "active"]


@dataclass
class _Batch:
    """Parameters of one group that are updated together, and the gradients at the iterate.

    Attributes:
        terms: the direction's gradient, as a weighted sum of gradients.
    """

    group: ParamGroup
    params: list[Tensor]
    grads: list[Tensor]
    terms: list[tuple[float, list[Tensor]]] = field(default_factory=list)

    @property
    def sign(self) -> float:
        return -1.0 if self.group["maximize"] else 1.0


class FedSpeed(BaseOptimizer):
    """The client of FedSpeed: a proximal term corrected by a dual variable, and an ascent step (arXiv 2302.10429).

    From the iterate ``x``, which is ``x0`` when the round begins, with both gradients of one minibatch::

        g1 = grad F(x);  g2 = grad F(x + rho g1 / |g1|);  g = (1 - alpha) g1 + alpha g2
        x <- x - lr (g - dual + (x - x0) / lam + weight_decay x)

    and once, at the round's end, ``dual <- dual - (x - x0) / lam``, which tends to the client's gradient at the common
    minimiser. Of ``x0`` and ``dual`` a round needs ``anchor = x0 + lam dual`` alone: the step is
    ``x - lr (g + (x - anchor) / lam + weight_decay x)``, the new dual ``(anchor - x) / lam``. So a parameter's state is
    its ``anchor`` within a round, and between two its ``prox_grad``, the dual.

    ``rho=0`` is FedDyn, with ``correction=False`` FedProx; ``lam=inf`` is FedSAM, with ``rho=0`` FedAvg. State has the
    type of its parameter: bfloat16 ones round the dual too, so prefer float32 ones under bf16-mixed.

    ``FederatedStrategy`` opens and closes rounds. Under a plain Trainer or loop ``local_steps`` does, and there is one
    client. Gradients that are not finite in the first pass make no step and count in the group's ``skipped_steps``.
    Batches cannot be accumulated, as the second pass would see the last one alone.

    Args:
        params: parameters or groups of them, real and unsharded; with dense gradients.
        lr: local step size, above 0; below ``lam`` for the dual to be an average of gradients.
        lam: length of the proximal term (lambda), above 0, in units of a parameter by a gradient; inf is without.
        rho: radius of the ascent step, at least 0; 0 saves the second pass.
        alpha: weight of the gradient at the ascended point, in [0, 1]; 0 saves the second pass.
        weight_decay: L2 coefficient, from 0 to below ``1 / lr``; no part of the ascent.
        correction: whether there is a dual variable.
        normalize: whether the ascent step has length ``rho``; if not it is ``rho g1``.
        max_grad_norm: norm to clip the whole direction to, above 0; None does not clip.
        local_steps: steps of a round (K) without a federated strategy, at least 1.
        server: ``"all"`` for :class:`FedSpeedServer`, which corrects by the duals of all clients; ``"active"``, as
            printed in the paper, corrects a client's model by its own dual: no fixed point unless all take part.
        module: the module that the closure trains, whose logs, metrics and buffers then see each batch once; held
            weakly.
        eps: added to the gradient's norm, at least 0.
        maximize: ascend the objective instead.
        foreach: update all parameters of a group in one call of each operation, as None does too; False goes through
            them one by one.

    Attributes:
        round_metrics: ``fedspeed/dual_norm``, the norm of the dual variable after the last round.

    Raises:
        ValueError: for an argument out of its range; in ``load_state_dict``, for the state of another optimizer.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.1,
        lam: float = 10.0,
        rho: float = 0.1,
        alpha: float = 1.0,
        weight_decay: float = 0.0,
        *,
        correction: bool = True,
        normalize: bool = True,
        max_grad_norm: float | None = None,
        local_steps: int | None = None,
        server: Server = "all",
        module: nn.Module | None = None,
        eps: float = 1e-12,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        self.normalize, self.eps, self.max_grad_norm = normalize, eps, max_grad_norm
        self.local_steps, self.server = local_steps, server
        self.round_metrics = {"fedspeed/dual_norm": 0.0}
        self._module: Callable[[], nn.Module | None] = (lambda: None) if module is None else weakref.ref(module)
        self._warned = False
        defaults: Defaults = {"lr": lr, "lam": lam, "rho": rho, "alpha": alpha, "weight_decay": weight_decay}
        defaults |= {"correction": correction, "maximize": maximize, "foreach": foreach}
        super().__init__(params, defaults | {"local_step": 0, "skipped_steps": 0})

    @override
    def __str__(self) -> str:
        return "FedSpeed"

    @override
    def add_param_group(self, param_group: ParamGroup) -> None:
        super().add_param_group(param_group)
        self._validate(self.param_groups[-1])

    def _validate(self, group: ParamGroup) -> None:
        values = {**group, "eps": self.eps, "max_grad_norm": self.max_grad_norm}
        values |= {"local_steps": self.local_steps, "server": self.server}
        lr, steps, norm = values["lr"], self.local_steps, self.max_grad_norm
        rules = {
            "lr": (0 < lr < math.inf, "must be positive and finite"),
            "lam": (values["lam"] > 0, "is the length of the proximal term and must be positive (inf for none)"),
            "rho": (0 <= values["rho"] < math.inf, "is the radius of the ascent step and must be at least 0"),
            "alpha": (0 <= values["alpha"] <= 1, "is the weight of the ascended gradient and must be in [0, 1]"),
            "weight_decay": (0 <= values["weight_decay"] * lr < 1, f"must be from 0 to below 1 / `lr` (`lr` is {lr})"),
            "eps": (0 <= self.eps < math.inf, "must be at least 0"),
            "max_grad_norm": (norm is None or norm > 0, "must be positive, or None not to clip"),
            "local_steps": (steps is None or steps >= 1, "counts the steps of a round and must be at least 1"),
            "server": (self.server in get_args(Server), f"must be one of {get_args(Server)}"),
        }
        for name, (holds, meaning) in rules.items():
            if not holds:
                raise ValueError(f"`{name}` {meaning}, got {values[name]!r}")
        if any(p.is_complex() for p in group["params"]):
            raise NoComplexParameterError(str(self))
        if any(in_pieces(p) for p in group["params"]):
            raise ValueError("`params` must not be sharded: FedSpeed needs the norm of the whole gradient; use DDP")
        if lr >= group["lam"]:
            warnings.warn(
                f"`lr` ({lr}) is not below `lam` ({group['lam']}): the local steps overshoot the proximal term, and the"
                " dual variable is no average of gradients; lower `lr` or raise `lam`",
                stacklevel=2,
            )

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        refuse_other_state(self, state_dict)
        super().load_state_dict(state_dict)

    @override
    def init_group(self, group: ParamGroup, **kwargs: Any) -> None:
        """Takes those parameters into the round that are not in it, at their present values."""
        for p in group["params"]:
            state = self.state[p]
            if "anchor" not in state:
                state["anchor"] = p.detach().clone()
                dual = state.pop("prox_grad", None)
                if _corrects(group) and dual is not None:
                    state["anchor"].add_(dual, alpha=group["lam"])

    # ---- rounds ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def begin_round(self, state: list[Tensor] | None) -> None:
        """Opens a round around the present parameters.

        Args:
            state: the client's dual variable as ``end_round`` returned it; None goes on with the present one, which is
                zero at first.

        Raises:
            RuntimeError: if a round is open.
            ValueError: ``state`` does not fit the parameters.
        """
        if self._in_round():
            raise RuntimeError("`begin_round` was called in an open round: call `end_round` first")
        if state is not None:
            params = [p for group in self.param_groups for p in group["params"]]
            _refuse_misfits(state, params)
            for p, dual in zip(params, state, strict=True):
                self.state[p]["prox_grad"] = dual.detach().to(p.device)
        for group in self.param_groups:
            group["local_step"] = 0
            self.init_group(group)

    def end_round(self) -> list[Tensor]:
        """Closes the round and updates the dual variable; with ``server="active"`` corrects the parameters by it.

        Returns:
            The dual variable, one tensor for each parameter in the order of the groups.

        Raises:
            RuntimeError: if no round is open.
        """
        if not self._in_round():
            raise RuntimeError("`end_round` was called without an open round: call `begin_round` first")
        return self._close_round(corrected=self.server == "active")

    @torch.no_grad()
    def _close_round(self, corrected: bool) -> list[Tensor]:
        duals = []
        for group in self.param_groups:
            self.init_group(group)  # for parameters that joined after the last step
            for p in group["params"]:
                dual = self.state[p].pop("anchor").sub_(p)
                if _corrects(group):
                    self.state[p]["prox_grad"] = dual.div_(group["lam"])
                    if corrected:
                        p.sub_(dual, alpha=group["lam"])
                else:
                    dual.zero_()
                duals.append(dual)
        self.round_metrics = {"fedspeed/dual_norm": float(get_total_norm(duals))}
        return duals

    def _in_round(self) -> bool:
        return any("anchor" in state for state in self.state.values())

    def _enter_round(self) -> None:
        if self._in_round():
            for group in self.param_groups:
                self.init_group(group)
            return
        if self.local_steps is None and not self._warned:
            self._warned = True
            warnings.warn(
                "FedSpeed takes a step outside of a round, and opens one that nothing will end: the parameters stay"
                " near their present values. Train with FederatedStrategy, or give `local_steps`",
                stacklevel=2,
            )
        self.begin_round(None)

    # ---- a step ------------------------------------------------------------------------------------------------------

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one local step.

        Args:
            closure: clears the gradients, computes the loss and its gradients, returns the loss; runs once or twice.

        Returns:
            The loss at the iterate.

        Raises:
            NoClosureError: without a closure.
        """
        if closure is None:
            raise NoClosureError(
                str(self), " Call `step(closure)`; Lightning's 16-mixed gives none: use bf16-mixed or 32-true"
            )
        self._refuse_accumulation()
        self._enter_round()
        with torch.enable_grad():
            loss = closure()
        batches = self._batches()
        norm = float(get_total_norm([grad for batch in batches for grad in batch.grads]))
        if math.isfinite(norm):
            self._collect_gradients(batches, norm, closure)
            share = self._clipped_share(batches)
            for batch in batches:
                self._descend(batch, share)
        self._count(skipped=not math.isfinite(norm))
        return loss

    def _batches(self) -> list[_Batch]:
        batches = []
        for group in self.param_groups:
            pairs = [(p, p.grad) for p in group["params"] if p.grad is not None]
            if any(grad.layout != torch.strided for _, grad in pairs):
                raise NoSparseGradientError(str(self))
            parts = [[pair] for pair in pairs] if group["foreach"] is False else [pairs]
            batches += [_Batch(group, [p for p, _ in part], [grad for _, grad in part]) for part in parts if part]
        return batches

    def _collect_gradients(self, batches: list[_Batch], norm: float, closure: Callable[[], Any]) -> None:
        """Fills in the terms, by a second pass where there is an ascent; the parameters come back as they were."""
        if not all(any(group[key] for group in self.param_groups) for key in ("rho", "alpha")):
            for batch in batches:
                batch.terms = [(batch.sign, batch.grads)]
            return
        for batch in batches:
            if (weight := 1 - batch.group["alpha"]) > 0:  # clones: the closure clears or overwrites the gradients
                batch.terms = [(batch.sign * weight, [grad.clone() for grad in batch.grads])]
        saved = [[p.clone() for p in batch.params] for batch in batches]  # undoing the ascent would leave rounding
        try:
            for batch in batches:
                length = batch.group["rho"]
                if self.normalize:
                    length = length / (norm + self.eps) if norm > 0 else 0.0
                torch._foreach_add_(batch.params, batch.grads, alpha=batch.sign * length)
                batch.grads = []  # lets the closure free them
            module = self._module()
            with nullcontext() if module is None else quiet(module), torch.enable_grad():
                closure()
        finally:
            for batch, values in zip(batches, saved, strict=True):
                torch._foreach_copy_(batch.params, values)
        for batch in batches:
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in batch.params]
            batch.terms.append((batch.sign * batch.group["alpha"], grads))

    def _clipped_share(self, batches: list[_Batch]) -> float:
        """The share of the direction that ``max_grad_norm`` leaves, as ``torch.nn.utils.clip_grad_norm_`` has it."""
        if self.max_grad_norm is None:
            return 1.0
        norms = [self._direction(batch, i).norm() for batch in batches for i in range(len(batch.params))]
        return min(1.0, self.max_grad_norm / (float(get_total_norm(norms)) + 1e-6))

    def _direction(self, batch: _Batch, i: int) -> Tensor:
        p, group = batch.params[i], batch.group
        direction: Tensor = (p - self.state[p]["anchor"]) / group["lam"] + group["weight_decay"] * p
        for weight, grads in batch.terms:
            direction.add_(grads[i], alpha=weight)
        return direction

    def _descend(self, batch: _Batch, share: float) -> None:
        """Subtracts ``share * lr`` times the direction without forming it: each term is one pass over the memory."""
        group, params = batch.group, batch.params
        lr = float(group["lr"]) * share
        kept = 1 - lr * group["weight_decay"]
        if group["lam"] < math.inf:
            torch._foreach_lerp_(params, [self.state[p]["anchor"] for p in params], lr / group["lam"] / kept)
        if kept < 1:
            torch._foreach_mul_(params, kept)
        for weight, grads in batch.terms:
            torch._foreach_add_(params, grads, alpha=-lr * weight)

    def _count(self, skipped: bool) -> None:
        for group in self.param_groups:
            group["local_step"] += 1
            group["skipped_steps"] += skipped
        if self.local_steps is not None and self.param_groups[0]["local_step"] >= self.local_steps:
            self._close_round(corrected=True)  # the server's update when there is one client, for both servers
            self.begin_round(None)

    def _refuse_accumulation(self) -> None:
        module: Any = self._module()
        try:
            batches = module.trainer.accumulate_grad_batches
        except (AttributeError, RuntimeError):  # no module, one of torch's, or no Trainer
            return
        if batches > 1:
            raise ValueError(
                f"`accumulate_grad_batches` must be 1 with FedSpeed, got {batches}: the second pass would see the last"
                " batch alone; raise the batch size instead"
            )


class FedSpeedServer(BaseOptimizer):
    """The server of FedSpeed: adds up the clients' mean updates ``D``, and corrects by the sum (arXiv 2302.10429).

    With the pseudo-gradient ``p.grad = -D`` and the share ``P`` of the clients (or of their samples) that took part::

        h <- h + P D;  x <- x + lr (D + h)

    Then ``h`` is ``-lam`` times the mean dual variable of all clients, though the server never sees one.

    Args:
        params: the server's parameters or groups of them; ``participation`` (P) of a group is 1 at first, and the
            strategy sets it each round.
        lr: server step size, above 0.

    Attributes:
        round_metrics: ``fedspeed/dual_residual``, the norm of the clients' mean dual variable, which tends to 0 at a
            stationary point; known once ``check_pair`` told the server one ``lam`` of all client groups.

    Raises:
        ValueError: for an ``lr`` out of its range.
    """

    def __init__(self, params: ParamsT, lr: float = 1.0) -> None:
        if not 0 < lr < math.inf:
            raise ValueError(f"`lr` must be positive and finite, got {lr!r}")
        self.round_metrics: dict[str, float] = {}
        super().__init__(params, {"lr": lr, "participation": 1.0, "lam": None})

    @override
    def __str__(self) -> str:
        return "FedSpeedServer"

    @override
    def init_group(self, group: ParamGroup, **kwargs: Any) -> None:
        for p in group["params"]:
            if p.grad is not None and "h" not in self.state[p]:
                self.state[p]["h"] = torch.zeros_like(p)

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step of the server, and returns the closure's loss if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self.init_group(group)
            for p in group["params"]:
                if p.grad is not None:
                    h = self.state[p]["h"].sub_(p.grad, alpha=group["participation"])
                    p.sub_(p.grad - h, alpha=float(group["lr"]))
        lam = self.param_groups[0]["lam"]
        if lam is not None:
            residual = get_total_norm([state["h"] for state in self.state.values()])
            self.round_metrics = {"fedspeed/dual_residual": float(residual) / lam}
        return loss


def check_pair(client: Optimizer, server: Optimizer, full_participation: bool) -> None:
    """Refuses a client and a server optimizer that would train without error and to the wrong place.

    Args:
        client: the clients' optimizer; one without dual variables goes with any server but :class:`FedSpeedServer`.
        server: the server's; a :class:`FedSpeedServer` learns the client's ``lam`` here, for its metric.
        full_participation: whether all clients take part in each round.

    Raises:
        ValueError: naming cause and remedy.
    """
    corrected = [_corrects(group) for group in client.param_groups] if isinstance(client, FedSpeed) else [False]
    server_mode = client.server if isinstance(client, FedSpeed) else "active"
    if isinstance(client, FedSpeed) and client.local_steps is not None:
        raise ValueError(
            f"`local_steps` of FedSpeed is {client.local_steps}, but a federated strategy ends the rounds: leave it"
            " out, and give `local_steps` to the strategy"
        )
    if isinstance(server, FedSpeedServer):
        if server_mode != "all" or not all(corrected):
            raise ValueError(
                "`server_optimizer=FedSpeedServer` adds up what the clients' dual variables take away, so it needs"
                ' FedSpeed(server="all", correction=True) with a finite `lam` in all groups as their optimizer, got'
                f" {client}; use it, or leave `server_optimizer` out"
            )
        lams = {group["lam"] for group in client.param_groups}
        for group in server.param_groups:
            group["lam"] = lams.copy().pop() if len(lams) == 1 else None
    elif server_mode == "all" and any(corrected):
        raise ValueError(
            'FedSpeed(server="all") leaves the correction by the dual variables to the server, and `server_optimizer`'
            f' is {type(server).__name__}: pass FedSpeedServer, or FedSpeed(server="active"), or correction=False'
        )
    elif any(corrected) and not full_participation:
        warnings.warn(
            'FedSpeed(server="active") has no fixed point when clients sit out a round, since the dual variables of'
            ' the others do not sum to zero: use server="all" with `server_optimizer=FedSpeedServer`',
            stacklevel=2,
        )


def _corrects(group: ParamGroup) -> bool:
    return bool(group["correction"]) and group["lam"] < math.inf


def _refuse_misfits(state: list[Tensor], params: list[Tensor]) -> None:
    if len(state) != len(params):
        raise ValueError(f"`state` must have a tensor for each of the {len(params)} parameters, got {len(state)}")
    for i, (dual, p) in enumerate(zip(state, params, strict=True)):
        if dual.shape != p.shape or dual.dtype != p.dtype:
            raise ValueError(
                f"`state[{i}]` must fit parameter {i}, {tuple(p.shape)} of {p.dtype}, got {tuple(dual.shape)} of"
                f" {dual.dtype}: it belongs to another model"
            )
