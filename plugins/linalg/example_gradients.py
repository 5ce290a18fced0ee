"""Gradients of single examples, out of the very backward pass that sums them up."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial, wraps
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fulgurite.plugins.linalg.example_rules import RULES, by_vmap, first_tensor, owned
from fulgurite.plugins.linalg.example_uses import Use, Uses

Unsupported = Literal["vmap", "skip", "error"]


@contextmanager
def example_gradients(
    module: nn.Module,
    visit: Callable[[str, nn.Parameter, Uses], None],
    *,
    batch_dim: int = 0,
    max_bytes: int = 2**28,
    unsupported: Unsupported = "vmap",
    only: Collection[str] | None = None,
    otherwise: str = "pass `unsupported='skip'` to keep the others alone",
) -> Iterator[None]:
    """Shows what each example adds to the gradients, while one forward and one ``backward`` run in the block.

    An example is a row of the batch, and its gradient what the loss makes of it, in whatever reduction; what is not a
    function of examples, as a penalty on weights, belongs to none. Where batch normalisation couples examples, it is
    what the row adds to the gradient.

    Args:
        module: whose submodules are called with the batch on axis ``batch_dim`` of their first argument and result.
        visit: gets a parameter's name, the parameter, and its :class:`Uses` as soon as its ``.grad`` is complete.
        batch_dim: the examples' axis in every module.
        max_bytes: of what is computed at once.
        unsupported: for modules without a rule of their own: ``"vmap"`` differentiates them once an example, ``"skip"``
            leaves their parameters out, ``"error"`` raises.
        only: names of parameters; None for all.
        otherwise: the remedy that the error names.

    Raises:
        RuntimeError: a gradient is not one of examples: a module without a rule or with another number of rows, a
            parameter that is used outside of its module's ``forward``; with ``"skip"``, where nothing else is left.
        ValueError: an argument out of its range.
    """
    if unsupported not in ("vmap", "skip", "error"):
        raise ValueError(f"`unsupported` must be 'vmap', 'skip' or 'error', got {unsupported!r}")
    if batch_dim < 0 or max_bytes < 1:
        raise ValueError(f"`batch_dim` and `max_bytes` must be at least 0 and 1, got {batch_dim} and {max_bytes}")
    watch = _Watch(module, visit, batch_dim, max_bytes, unsupported, only)
    try:
        yield
    finally:
        watch.remove()
    watch.check(otherwise)


def _plainly(hook: Callable[..., None]) -> Callable[..., None]:
    """Without a graph and in the precision that a number has."""

    @wraps(hook)
    @torch.no_grad()
    def called(*args: Any) -> None:
        device = args[-1].device.type
        with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
            hook(*args)

    return called


class _Watch:
    """Collects the uses of each parameter between its first gradient and the last."""

    def __init__(
        self,
        module: nn.Module,
        visit: Callable[[str, nn.Parameter, Uses], None],
        batch_dim: int,
        max_bytes: int,
        unsupported: Unsupported,
        only: Collection[str] | None,
    ) -> None:
        self.visit, self.batch_dim, self.max_bytes, self.unsupported = visit, batch_dim, max_bytes, unsupported
        named = [(name, param) for name, param in module.named_parameters() if param.requires_grad]
        self.names = {id(param): name for name, param in named if only is None or name in only}
        if not self.names:
            raise ValueError(f"`only` names none of the trainable parameters {[name for name, _ in named]}")
        self.uses: dict[int, list[Use]] = {}
        self.labels: dict[int, str] = {}
        self.missed: dict[str, str] = {}
        self.seen = False
        self.examples: int | None = None
        self.replaying = False
        self.own = {name: vars(part) for name, part in module.named_modules()}
        self.handles = [
            part.register_forward_hook(partial(self._called, name), with_kwargs=True)
            for name, part in module.named_modules()
            if any(id(param) in self.names for _, param in owned(part))
        ]
        self.handles += [
            param.register_post_accumulate_grad_hook(self._complete)  # type: ignore[no-untyped-call]
            for _, param in named
            if id(param) in self.names
        ]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def check(self, otherwise: str) -> None:
        if self.missed and (self.unsupported != "skip" or not self.seen):
            names: dict[str, list[str]] = {}
            for name, reason in self.missed.items():
                names.setdefault(reason, []).append(f"`{name}`")
            reasons = "; ".join(f"{', '.join(those)}: {reason}" for reason, those in names.items())
            raise RuntimeError(f"no gradients of single examples for {reasons}. Remedy: {otherwise}")

    def _called(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if vars(module) is not self.own[name]:
            return  # in a block of `quiet` that has begun since, as an attack on the inputs: no part of the step
        # A hook on the result and not on the module: a forward that checkpointing repeats never gets a gradient.
        if not self.replaying and torch.is_grad_enabled() and (result := first_tensor(output)).requires_grad:
            arrived = partial(self._arrived, name, module, args, kwargs)
            result.register_hook(arrived)  # type: ignore[no-untyped-call]

    @_plainly
    def _arrived(self, name: str, module: nn.Module, args: Any, kwargs: Any, grad: Tensor) -> None:
        params = {key: param for key, param in owned(module) if id(param) in self.names}
        label = f"`{name}`, {type(module).__name__}"
        try:
            uses = self._uses(module, args, kwargs, grad.detach())
        except NotImplementedError as reason:
            self.missed |= {self.names[id(param)]: f"{label}, {reason}" for param in params.values()}
            return
        for key, param in params.items():
            if key in uses:
                self.uses.setdefault(id(param), []).append(uses[key])
                self.labels[id(param)] = label

    def _uses(self, module: nn.Module, args: Any, kwargs: Any, grad: Tensor) -> dict[str, Use]:
        rows = grad.shape[self.batch_dim] if grad.dim() > self.batch_dim else 0
        self.examples = rows if self.examples is None else self.examples
        if rows != self.examples:
            raise NotImplementedError(
                f"returns {rows} rows, and what is nearest to the loss {self.examples}: one of them is not the batch"
            )
        rule = RULES.get(type(module).forward)
        grad = grad.movedim(self.batch_dim, 0)
        if rule is not None:
            x = args[0] if args else next(iter(kwargs.values()))
            return rule(module, x.detach().movedim(self.batch_dim, 0), grad)
        if self.unsupported != "vmap":
            raise NotImplementedError("has no rule")
        return by_vmap(module, args, kwargs, grad, self.batch_dim)

    @_plainly
    def _complete(self, param: nn.Parameter) -> None:
        name, calls = self.names[id(param)], self.uses.pop(id(param), [])
        if not calls:
            self.missed.setdefault(name, "used outside of a call of its module")
        if name not in self.missed:
            self.replaying = True
            try:
                self.visit(name, param, Uses(calls, self.max_bytes, param.device))
                self.seen = True
            except NotImplementedError as reason:
                self.missed[name] = f"{self.labels[id(param)]}, {reason}"
            finally:
                self.replaying = False


@contextmanager
def per_example_sq_norms(
    module: nn.Module,
    batch_dim: int = 0,
    max_bytes: int = 2**28,
    *,
    unsupported: Unsupported = "vmap",
    only: Collection[str] | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Squared norms of each example's gradient, by parameter, without the gradients (arXiv 1510.01799).

    Arguments and errors are those of :func:`example_gradients`.

    Yields:
        name of a parameter -> ``(B,)``; complete when the ``backward`` in the block has run.

    Example:
        >>> net = nn.Linear(2, 1, bias=False)
        >>> with per_example_sq_norms(net) as norms:
        ...     net(torch.tensor([[3.0, 4.0], [0.0, 1.0]])).sum().backward()
        >>> norms["weight"].tolist()
        [25.0, 1.0]
    """
    norms: dict[str, Tensor] = {}

    def visit(name: str, param: nn.Parameter, uses: Uses) -> None:
        norms[name] = uses.sq_norms()

    with example_gradients(module, visit, batch_dim=batch_dim, max_bytes=max_bytes, unsupported=unsupported, only=only):
        yield norms
