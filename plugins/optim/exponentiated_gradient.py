"""Exponentiated gradient: weights are multiplied instead of added to, so that none changes its sign."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from pytorch_optimizer.base.optimizer import BaseOptimizer
from pytorch_optimizer.base.type import Defaults, ParamGroup, ParamsT
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.distributed.tensor import DTensor, Placement
from torch.optim import Optimizer
from typing_extensions import override

from fulgurite.plugins.optim.other_state import refuse_other_state

Zeros = Literal["error", "keep"]
Row = tuple[Tensor, ...]  # a parameter, its gradient and its buffers

_CPU_CHUNKS = 2**16, 2**18  # elements that are joined, and elements of a block: temporaries stay in the cache
_DEVICE_CHUNKS = 2**24, 2**24  # elsewhere launches cost more than memory traffic


class ExponentiatedGradient(BaseOptimizer):
    """Signed exponentiated gradient, which obeys Dale's law (arXiv 2510.02730), and its hypentropy form (1902.01903).

    With ``d`` the gradient, or what momentum or Adam's moments (``betas``) make of it, elementwise::

        hypentropy = 0    w <- w exp(-lr sign(w) d)                        log|w| moves by -lr sign(w) d
        hypentropy = b    w <- w cosh(lr d) - sqrt(w^2 + b^2) sinh(lr d)   asinh(w / b) moves by -lr d

    Without hypentropy no weight changes its sign or reaches 0, and an exact 0 stays: a pruning mask survives.
    Log-normal weights stay so. With hypentropy signs may change: take it for biases and norms, as :func:`dale_groups`
    does. It equals EG+- on ``u - v``, whose product ``u v = b^2 / 4`` is invariant, without a second copy; ``b`` to
    infinity with steps ``lr / b`` is gradient descent. ``lr`` is relative: take three to ten times that of SGD. Every
    setting may differ between groups.

    Args:
        params: parameters or groups of them, float32 or float64, with dense gradients; sharded ones (DTensor) as well.
        lr: step size, above 0, in units of 1 / gradient: 0.1 changes a weight with gradient 1 by about 10 %.
        momentum: of the gradient, in [0, 1).
        dampening: share of the gradient that momentum leaves out, in [0, 1], from the second step on.
        nesterov: look ahead; needs momentum without dampening.
        betas: decay of the two moments of Adam, each in [0, 1), instead of momentum; None for plain gradients.
        eps: added to the root of the second moment, at least 0.
        weight_decay: decoupled, at least 0: ``|w|`` shrinks by ``exp(-lr weight_decay)`` a step.
        hypentropy: ``b``, at least 0, in units of a weight.
        normalize: ``"row"`` rescales each row (first dimension) of ``|w|`` to sum ``norm`` after the step, a vector as
            one row; None does not.
        norm: of a row, above 0.
        max_log_step: bound of ``|lr d|``, above 0; None for none.
        zeros: what a tensor that is all zeros does at its first step without hypentropy, which it cannot leave: raise
            an ``"error"``, or ``"keep"`` them.
        maximize: ascend the objective instead.
        foreach: update all tensors of a group together, at the cost of copies of all; False goes one by one. None
            takes small tensors together and large ones in blocks, which is fastest and bounds the copies.

    Raises:
        ValueError: for an argument out of its range; in ``step``, for a tensor of zeros; in ``load_state_dict``, for
            the state of another optimizer.
        TypeError: for parameters of another type.
        RuntimeError: in ``step``, for sparse gradients.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([0.5, -0.25, 0.0]))
        >>> weight.grad = torch.ones(3)
        >>> ExponentiatedGradient([weight], lr=0.1).step()
        >>> weight.data
        tensor([ 0.4524, -0.2763,  0.0000])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.1,
        *,
        momentum: float = 0.0,
        dampening: float = 0.0,
        nesterov: bool = False,
        betas: tuple[float, float] | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        hypentropy: float = 0.0,
        normalize: Literal["row"] | None = None,
        norm: float = 1.0,
        max_log_step: float | None = None,
        zeros: Zeros = "error",
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        defaults: Defaults = {"lr": lr, "momentum": momentum, "dampening": dampening, "nesterov": nesterov, "eps": eps}
        defaults |= {"weight_decay": weight_decay, "hypentropy": hypentropy, "normalize": normalize, "norm": norm}
        defaults |= {"max_log_step": max_log_step, "zeros": zeros, "maximize": maximize, "foreach": foreach}
        if betas is not None:  # torch's cyclic schedulers take the mere name for Adam
            defaults["betas"] = betas
        super().__init__(params, defaults)

    @override
    def __str__(self) -> str:
        return "ExponentiatedGradient"

    @override
    def add_param_group(self, param_group: ParamGroup) -> None:
        super().add_param_group(param_group)
        _validate(self.param_groups[-1])

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        refuse_other_state(self, state_dict, optional=["betas"])
        super().load_state_dict(state_dict)

    @override
    def init_group(self, group: ParamGroup, **kwargs: Any) -> None:
        """Opens the state of those parameters that have a gradient for the first time, and refuses tensors of zeros."""
        for i, p in enumerate(group["params"]):
            if p.grad is None:
                continue
            if p.grad.layout != torch.strided:
                raise RuntimeError(
                    f"{self} needs dense gradients, got {p.grad.layout}: build the embedding with `sparse=False`"
                )
            if p not in self.state:
                if group["zeros"] == "error" and group["hypentropy"] == 0 and _is_zero(p):
                    name = f"'{group['param_names'][i]}'" if "param_names" in group else str(i)
                    raise ValueError(
                        f"parameter {name} is all zeros and cannot leave 0 under exponentiated gradient; give its group"
                        " `hypentropy` above 0 (as `dale_groups` does) or `zeros='keep'`"
                    )
                self.state[p] = {}  # empty without buffers, and yet says that the first step was taken
            if group.get("betas") and "exp_avg" not in self.state[p]:
                moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
                self.state[p] |= {"step": torch.tensor(0.0), **moments}

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step, and returns the closure's loss if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self.init_group(group)
        for group in self.param_groups:
            for (age, device, _), rows in self._rows(group).items():
                for chunk in _chunks(rows, group["foreach"], *_CPU_CHUNKS if device.type == "cpu" else _DEVICE_CHUNKS):
                    _update(group, age, chunk)
            if group["normalize"]:
                for p in group["params"]:
                    if p.grad is not None:
                        _normalize_rows(_local(p), group["norm"])
        return loss

    def _rows(self, group: ParamGroup) -> dict[tuple[int, torch.device, torch.dtype], list[Row]]:
        """Parameters with gradients and buffers, by the steps of their buffers, this one included, device and type."""
        rows: dict[tuple[int, torch.device, torch.dtype], list[Row]] = {}
        for p in group["params"]:
            grad = p.grad
            if grad is None:
                continue
            state, age = self.state[p], 0
            buffers: Row = ()
            if group.get("betas"):
                state["step"] += 1
                age, buffers = int(state["step"]), (state["exp_avg"], state["exp_avg_sq"])
            elif group["momentum"]:
                age = 2 if "momentum_buffer" in state else 1
                if age == 1:
                    state["momentum_buffer"] = torch.zeros_like(p)
                buffers = (state["momentum_buffer"],)
            row: Row = (p, grad, *buffers)
            if isinstance(p, DTensor):
                row = tuple(_local(tensor, p.placements) for tensor in row)
            rows.setdefault((age, p.device, p.dtype), []).append(row)
        return rows


def keeps_signs(optimizer: Optimizer) -> bool:
    """Whether it promises of some weights that they keep their signs."""
    return isinstance(optimizer, ExponentiatedGradient) and any(
        group["hypentropy"] == 0 for group in optimizer.param_groups
    )


def dale_groups(module: nn.Module, *, bias_hypentropy: float = 1.0) -> list[dict[str, Any]]:
    """Parameter groups for :class:`ExponentiatedGradient`: weights keep their signs, biases and norms need not.

    Args:
        module: its parameters, with their names.
        bias_hypentropy: of parameters with fewer than two dimensions, above 0.

    Returns:
        The group of parameters with two or more dimensions and the group of the others; none that would be empty.

    Raises:
        ValueError: for a ``bias_hypentropy`` out of its range.
    """
    if not 0 < bias_hypentropy < math.inf:
        raise ValueError(f"`bias_hypentropy` must be positive, or biases of 0 never move, got {bias_hypentropy!r}")
    weights = [(name, p) for name, p in module.named_parameters() if p.ndim >= 2]
    others = [(name, p) for name, p in module.named_parameters() if p.ndim < 2]
    groups = [{"params": weights, "hypentropy": 0.0}, {"params": others, "hypentropy": bias_hypentropy}]
    return [group for group in groups if group["params"]]


# ---- a step ----------------------------------------------------------------------------------------------------------


def _chunks(rows: list[Row], foreach: bool | None, joined: int, block: int) -> Iterator[list[Row]]:
    """Rows to update together: small ones up to ``joined`` elements, and larger ones alone, in blocks."""
    together: list[Row] = []
    count = 0
    for row in rows:
        numel = row[0].numel()
        if foreach or (foreach is None and numel <= joined):
            if together and not foreach and count + numel > joined:
                yield together
                together, count = [], 0
            together.append(row)
            count += numel
        else:
            yield from ([part] for part in _blocks(row, block))
    if together:
        yield together


def _blocks(row: Row, size: int) -> Iterator[Row]:
    if row[0].numel() <= size:
        return iter([row])
    if all(tensor.is_contiguous() for tensor in row):
        parts = [torch.split(tensor.view(-1), size) for tensor in row]
    else:  # along the first dimension any strides will do
        parts = [torch.split(tensor, max(1, size * len(tensor) // tensor.numel())) for tensor in row]
    return zip(*parts, strict=True)


def _update(group: ParamGroup, age: int, chunk: list[Row]) -> None:
    """Steps a chunk, as one tensor: a few operations on many small ones would take longer than their arithmetic."""
    columns = list(zip(*chunk, strict=True))
    w, grad, *buffers = chunk[0] if len(chunk) == 1 else map(_flatten_dense_tensors, columns)
    direction = _direction(group, age, grad, *buffers)
    rate = float(group["lr"]) * (1 if group["maximize"] else -1)  # every direction is odd in the gradient
    _mirror_step_(group, w, direction * rate)
    if len(chunk) > 1:
        params, _, *old = columns
        for column, joined in zip((params, *old), (w, *buffers), strict=True):
            torch._foreach_copy_(column, _unflatten_dense_tensors(joined, column))  # type: ignore[no-untyped-call]


def _direction(group: ParamGroup, age: int, grad: Tensor, *buffers: Tensor) -> Tensor:
    """What takes the gradient's place; updates the buffers."""
    if group.get("betas"):
        mean, square = buffers
        beta1, beta2 = group["betas"]
        mean.lerp_(grad, 1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        scale = (square / (1 - beta2**age)).sqrt_().add_(group["eps"])
        return torch.div(mean, 1 - beta1**age).div_(scale)
    if not group["momentum"]:
        return grad
    (total,) = buffers
    if age == 1:
        total.copy_(grad)
    else:
        total.mul_(group["momentum"]).add_(grad, alpha=1 - group["dampening"])
    return grad.add(total, alpha=group["momentum"]) if group["nesterov"] else total


def _mirror_step_(group: ParamGroup, w: Tensor, e: Tensor) -> None:
    """Moves ``w`` by ``e`` in the mirror's coordinates, and decays it; overwrites both."""
    if group["max_log_step"] is not None:
        e.clamp_(-group["max_log_step"], group["max_log_step"])
    decay = math.exp(-float(group["lr"]) * group["weight_decay"])
    if group["hypentropy"] > 0:
        w.copy_(_hypentropy_step(w, e, group["hypentropy"]))
        if decay < 1:
            w.mul_(decay)
        return
    sign = w.sign()
    w.mul_(e.mul_(sign).exp_())
    if decay < 1:
        w.mul_(decay)
    _keep_signs_(w, sign)


def _hypentropy_step(w: Tensor, e: Tensor, b: float) -> Tensor:
    """``b sinh(asinh(w / b) + e)``, by the form that loses less: addition theorem for short steps, itself for long."""
    short = w * e.cosh() + torch.hypot(w, torch.tensor(b, dtype=w.dtype, device=w.device)) * e.sinh()
    return torch.where(e.abs() > 1, (w / b).asinh_().add_(e).sinh_().mul_(b), short)


def _keep_signs_(w: Tensor, sign: Tensor) -> None:
    """An underflow to 0 would lose the sign for ever; what is added rounds away in weights of any use."""
    w.add_(sign, alpha=torch.finfo(w.dtype).tiny)


def _normalize_rows(w: Tensor, norm: float) -> None:
    sign = w.sign()
    dims = tuple(range(1 if w.ndim > 1 else 0, w.ndim))
    tiny = torch.finfo(w.dtype).tiny  # for rows of zeros
    w.mul_(norm / w.abs().sum(dims, keepdim=True).clamp_min_(tiny))
    _keep_signs_(w, sign)


def _local(tensor: Tensor, placements: Sequence[Placement] | None = None) -> Tensor:
    """This process's shard, after sharding it by ``placements``."""
    return tensor.redistribute(placements=placements).to_local() if isinstance(tensor, DTensor) else tensor


def _is_zero(p: Tensor) -> bool:
    total = p.detach().abs().sum()  # of all shards, where one may well be zeros
    return bool((total.full_tensor() if isinstance(total, DTensor) else total) == 0) and p.numel() > 0


# ---- what is refused -------------------------------------------------------------------------------------------------


def _validate(group: ParamGroup) -> None:
    betas, bound, momentum = group.get("betas"), group["max_log_step"], group["momentum"]
    rules = {
        "lr": (0 < group["lr"] < math.inf, "must be positive and finite"),
        "momentum": (0 <= momentum < 1, "must be in [0, 1)"),
        "dampening": (0 <= group["dampening"] <= 1, "must be in [0, 1]"),
        "nesterov": (
            not group["nesterov"] or (momentum > 0 and group["dampening"] == 0),
            "needs `momentum` above 0 and `dampening` 0",
        ),
        "betas": (
            betas is None or (len(betas) == 2 and all(0 <= beta < 1 for beta in betas) and momentum == 0),
            f"must be two numbers in [0, 1), with `momentum` 0 (it is {momentum})",
        ),
        "eps": (0 <= group["eps"] < math.inf, "must be at least 0"),
        "weight_decay": (0 <= group["weight_decay"] < math.inf, "must be at least 0"),
        "hypentropy": (0 <= group["hypentropy"] < math.inf, "must be at least 0 and finite"),
        "normalize": (group["normalize"] in (None, "row"), 'must be None or "row"'),
        "norm": (0 < group["norm"] < math.inf, "is the sum of a row and must be positive"),
        "max_log_step": (bound is None or bound > 0, "must be positive, or None for no bound"),
        "zeros": (group["zeros"] in get_args(Zeros), f"must be one of {get_args(Zeros)}"),
    }
    for name, (holds, meaning) in rules.items():
        if not holds:
            raise ValueError(f"`{name}` {meaning}, got {group.get(name)!r}")
    for p in group["params"]:
        if p.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"parameters are {p.dtype}, in which small relative steps vanish; train float32 ones, and use"
                " `precision='bf16-mixed'` instead of 'bf16-true'"
            )
    if group["normalize"]:
        _validate_rows(group)


def _validate_rows(group: ParamGroup) -> None:
    if group["hypentropy"] > 0:
        raise ValueError(
            f'`normalize="row"` needs signs that stay, and a group has `hypentropy` {group["hypentropy"]}, as '
            "`dale_groups` gives to biases: set `normalize` in the group of the weights alone"
        )
    for p in group["params"]:
        if isinstance(p, DTensor) and any(
            at.is_shard() and (getattr(at, "dim", 0) > 0 or p.ndim < 2) for at in p.placements
        ):
            raise ValueError(f'`normalize="row"` needs whole rows, got {p.placements}: shard along dimension 0')
