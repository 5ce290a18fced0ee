"""Gradients of single examples, out of the very backward pass that sums them up."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

Unsupported = Literal["vmap", "skip", "error"]

_CACHED_BYTES = 2**22  # chunks that a CPU need not read from memory again
_MOVED = 16  # a number that is written and read again costs as much as that many multiplications


class Use(ABC):
    """What one call of a module adds to the gradient of one of its parameters, example by example.

    Attributes:
        examples: B.
        shape: of the parameter.
        dtype: of what follows.
    """

    examples: int
    shape: torch.Size
    dtype: torch.dtype

    @abstractmethod
    def gradients(self, rows: slice) -> Tensor:
        """Of the examples in ``rows``, ``(b, *shape)``."""


class Sum(Use):
    """A gradient that is small, or that has no structure: ``gradients`` of some rows from a function."""

    def __init__(self, param: Tensor, examples: int, of: Callable[[slice], Tensor]) -> None:
        self.examples, self.shape, self.dtype, self._of = examples, param.shape, _wide(param.dtype), of

    def gradients(self, rows: slice) -> Tensor:  # noqa: D102
        return self._of(rows).to(self.dtype)


class Outer(Use):
    """A gradient that is a sum of ``length`` outer products: of linear maps, convolutions and embeddings.

    Args:
        param: a matrix once all axes but the first are flattened; in ``groups`` blocks of rows.
        examples: B.
        length: L, outer products an example.
        factors: from rows of the batch to left ``(b, groups, L, p)``, or with ``ids`` the numbers of the rows that are
            not zero, ``(b, 1, L)``, and right ``(b, groups, L, d)``.
        groups: blocks.
        ids: as of an embedding.
    """

    def __init__(
        self,
        param: Tensor,
        examples: int,
        length: int,
        factors: Callable[[slice], tuple[Tensor, Tensor]],
        groups: int = 1,
        ids: bool = False,
    ) -> None:
        self.examples, self.shape, self.dtype, self.length = examples, param.shape, _wide(param.dtype), length
        self.groups, self.ids, self._factors = groups, ids, factors
        self.widths = (param.shape[0] // groups, param[0].numel())

    def factors(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Left and right of the examples in ``rows``."""
        left, right = self._factors(rows)
        return left if self.ids else left.to(self.dtype), right.to(self.dtype)

    def product(self, rows: slice) -> Tensor:
        """The gradient in an order of its own, ``(b, n)``: positions in a kernel before its channels."""
        left, right = self.factors(rows)
        if self.ids:
            total = right.new_zeros(len(left), *self.widths)
            total.scatter_add_(1, left[:, 0, :, None].expand(-1, -1, self.widths[1]), right[:, 0])
        else:
            total = left.transpose(2, 3) @ right
        return total.flatten(1)

    def gradients(self, rows: slice) -> Tensor:  # noqa: D102
        channels_last = (self.shape[0], *self.shape[2:], *self.shape[1:2])
        total = self.product(rows)
        return total.view(len(total), *channels_last).movedim(-1, 2)


@dataclass(eq=False)
class Uses:
    """All uses of one parameter in a backward pass."""

    calls: Sequence[Use]
    max_bytes: int
    device: torch.device

    def gradients(self, rows: slice = slice(None)) -> Tensor:
        """What each example adds to the parameter's gradient, ``(b, *shape)``."""
        return _total([call.gradients(rows) for call in self.calls])

    def sq_norms(self) -> Tensor:
        """The squared norms of :meth:`gradients`, ``(B,)``, in chunks of at most ``max_bytes``."""
        first = self.calls[0]
        outer = [call for call in self.calls if isinstance(call, Outer)]
        if len(outer) == len(self.calls) and len({call.groups for call in outer}) == 1:
            numbers, of = _plan(outer)
        else:
            numbers, of = first.shape.numel(), lambda rows: _square(self.gradients(rows))
        limit = min(self.max_bytes, _CACHED_BYTES) if self.device.type == "cpu" else self.max_bytes
        size = max(1, limit // (numbers * first.dtype.itemsize))
        if size >= first.examples:
            return of(slice(None))
        return torch.cat([of(slice(i, i + size)) for i in range(0, first.examples, size)])


def _plan(calls: list[Outer]) -> tuple[int, Callable[[slice], Tensor]]:
    """Numbers an example and the cheaper function: gradients, or inner products of their factors."""
    (p, d), groups = calls[0].widths, calls[0].groups
    length, dense = (sum(call.length for call in calls if not (call.ids and skip)) for skip in (False, True))
    factors = length * (p + d if dense else 1 + d)
    gram, direct = length * (factors + _MOVED * length), p * d * (dense + _MOVED)
    if gram <= direct or length == 1:
        return groups * (factors + length**2), partial(_gram, calls)
    return groups * (factors + p * d), lambda rows: _square(_total([call.product(rows) for call in calls]))


def _gram(calls: list[Outer], rows: slice) -> Tensor:
    """``sum_st <l_s, l_t> <r_s, r_t>`` over the outer products of all calls."""
    terms = [call.factors(rows) for call in calls]
    if len(terms) == 1 and calls[0].length == 1 and not calls[0].ids:
        left, right = terms[0]
        return (_square(left) if left.shape[1] == 1 else left.square().sum(3)) * _square(right)
    kinds = [[term for call, term in zip(calls, terms, strict=True) if call.ids == ids] for ids in (False, True)]
    merged = [tuple(_joined(side) for side in zip(*kind, strict=True)) for kind in kinds if kind]
    left, right = merged[0]
    parts = [_inner(left, left) * (right @ right.transpose(2, 3))]
    for ids, seeds in merged[1:]:
        parts += [_inner(ids, ids) * (seeds @ seeds.transpose(2, 3))]
        parts += [2 * _inner(left, ids) * (right @ seeds.transpose(2, 3))]
    return _total([part.flatten(1).sum(1) for part in parts])


def _inner(left: Tensor, other: Tensor) -> Tensor:
    """Inner products of dense rows ``(b, g, L, p)``, or one-hot ones, given by their ids ``(b, 1, L)``."""
    if left.dim() == 3:
        return (left[:, :, :, None] == other[:, :, None, :]).to(torch.float32)
    if other.dim() == 3:
        return left.gather(3, other[:, :, None, :].expand(-1, -1, left.shape[2], -1))
    return left @ other.transpose(2, 3)


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(tensors), 2) if len(tensors) > 1 else tensors[0]


def _square(rows: Tensor) -> Tensor:
    rows = rows.flatten(1)
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)  # in one pass
    return norms.square()


def _total(parts: Sequence[Tensor]) -> Tensor:
    total, *others = parts
    for other in others:
        total = total + other
    return total


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Half precision overflows when it is squared."""
    return torch.promote_types(dtype, torch.float32)


# ---- what a call adds, by kind of module -----------------------------------------------------------------------------


def _linear(module: nn.Linear, x: Tensor, grad: Tensor) -> dict[str, Use]:
    x, grad = x.reshape(len(x), 1, -1, x.shape[-1]), grad.reshape(len(grad), 1, -1, grad.shape[-1])
    weight = Outer(module.weight, len(x), x.shape[2], lambda rows: (grad[rows], x[rows]))
    return {"weight": weight} | _bias(module, grad[:, 0].movedim(-1, 1))


def _bias(module: Any, grad: Tensor) -> dict[str, Use]:
    """``grad``: ``(B, channels, ...)``."""
    if module.bias is None:
        return {}
    total = grad if grad.dim() == 2 else grad.flatten(2).sum(2, dtype=_wide(grad.dtype))
    return {"bias": Sum(module.bias, len(grad), total.__getitem__)}


def _embedding(module: nn.Embedding, x: Tensor, grad: Tensor) -> dict[str, Use]:
    if module.scale_grad_by_freq or module.sparse or module.max_norm is not None:
        raise NotImplementedError("with `scale_grad_by_freq`, `sparse` or `max_norm`")
    ids, grad = x.reshape(len(x), 1, -1), grad.reshape(len(grad), 1, -1, grad.shape[-1])
    if module.padding_idx is not None:
        grad = grad * (ids != module.padding_idx)[..., None]
    return {"weight": Outer(module.weight, len(x), ids.shape[2], lambda rows: (ids[rows], grad[rows]), ids=True)}


def _conv(module: _ConvNd, x: Tensor, grad: Tensor) -> dict[str, Use]:
    turned = isinstance(module, _ConvTransposeNd)  # what it returns is what its patches are cut from
    images, seeds = (grad, x) if turned else (x, grad)
    groups, count = module.groups, seeds.shape[2:]

    def factors(rows: slice) -> tuple[Tensor, Tensor]:
        left = seeds[rows]
        left = left.reshape(len(left), groups, -1, math.prod(count)).transpose(2, 3)
        return left, _patches(_padded(images[rows], module, turned), module, count)

    weight = Outer(module.weight, len(x), math.prod(count), factors, groups)
    return {"weight": weight} | _bias(module, grad)


def _padded(images: Tensor, module: _ConvNd, turned: bool) -> Tensor:
    """Channels last, ``(b, *padded, channels)``, so that patches are cut in long runs."""
    sides = module._reversed_padding_repeated_twice
    if turned:
        assert not isinstance(module.padding, str)
        sides = [side for width in reversed(module.padding) for side in (width, width)]
    if module.padding_mode != "zeros":
        return F.pad(images, sides, mode=module.padding_mode).movedim(1, -1).contiguous()
    lows, highs = sides[-2::-2], sides[-1::-2]
    sizes = [low + size + high for low, size, high in zip(lows, images.shape[2:], highs, strict=True)]
    padded = images.new_zeros(len(images), *sizes, images.shape[1])
    inner = padded
    for axis, (low, size) in enumerate(zip(lows, images.shape[2:], strict=True), start=1):
        inner = inner.narrow(axis, low, size)
    inner.copy_(images.movedim(1, -1))
    return padded


def _patches(last: Tensor, module: _ConvNd, count: torch.Size) -> Tensor:
    """What each output sees, ``(b, groups, L, positions * channels)``."""
    batch, *steps, channel = last.stride()
    strides = [step * stride for step, stride in zip(steps, module.stride, strict=True)]
    within = [step * dilation for step, dilation in zip(steps, module.dilation, strict=True)]
    windows = last.as_strided(
        (len(last), *count, *module.kernel_size, last.shape[-1]), (batch, *strides, *within, channel)
    )
    windows = windows.view(*windows.shape[:-1], module.groups, -1).movedim(-2, 1)
    patches: Tensor = windows.reshape(len(last), module.groups, math.prod(count), -1)
    return patches


def _norm(module: Any, x: Tensor, grad: Tensor) -> dict[str, Use]:
    normed = _normalised(module, x.to(_wide(x.dtype)))
    uses: dict[str, Use] = {}
    for name, of in (("weight", normed), ("bias", None)):
        param = getattr(module, name, None)
        if param is not None:
            terms = grad.to(normed.dtype) if of is None else grad * of
            last = isinstance(module, nn.LayerNorm | nn.RMSNorm)
            shape = (len(x), -1, *param.shape) if last else (len(x), *param.shape, -1)
            total = terms.reshape(shape).sum(1 if last else -1)
            uses[name] = Sum(param, len(x), total.__getitem__)
    return uses


def _normalised(module: Any, x: Tensor) -> Tensor:
    match module:
        case nn.LayerNorm():
            return F.layer_norm(x, module.normalized_shape, eps=module.eps)
        case nn.RMSNorm():
            return F.rms_norm(x, module.normalized_shape, eps=module.eps)
        case nn.GroupNorm():
            return F.group_norm(x, module.num_groups, eps=module.eps)
    batch = module.training or module.running_mean is None
    mean, var = (None, None) if batch else (module.running_mean.to(x), module.running_var.to(x))
    return F.batch_norm(x, mean, var, training=batch, eps=module.eps)


def _any(module: nn.Module, args: Any, kwargs: Any, grad: Tensor, batch_dim: int) -> dict[str, Use]:
    """A vector-Jacobian product an example, of the module alone: ``grad`` is batch first, the arguments are not."""
    if isinstance(module, nn.RNNBase):
        raise NotImplementedError("fused: use `nn.LSTMCell`, `nn.GRUCell` or `nn.RNNCell`")
    if isinstance(module, nn.MultiheadAttention) and module.batch_first == bool(batch_dim):
        raise NotImplementedError("with the batch on another axis than `batch_dim`: pass `batch_first=True`")
    leaves, tree = tree_flatten((args, kwargs))
    split = [_has_rows(leaf, len(grad), batch_dim) for leaf in leaves]
    rows_first = [leaf.detach().movedim(batch_dim, 0) for leaf, is_split in zip(leaves, split, strict=True) if is_split]
    own = {name: param.detach() for name, param in owned(module)}

    def pulled(row: list[Tensor], grad: Tensor) -> dict[str, Tensor]:
        given = iter(row)
        one = [
            next(given).unsqueeze(batch_dim) if is_split else leaf for leaf, is_split in zip(leaves, split, strict=True)
        ]

        def call(params: dict[str, Tensor]) -> Tensor:
            some, named = tree_unflatten(one, tree)
            return first_tensor(functional_call(module, params, some, named)).squeeze(batch_dim)

        output, pull = vjp(call, own)[:2]
        gradients: dict[str, Tensor] = pull(grad.to(output.dtype))[0]
        return gradients

    def gradients(name: str, rows: slice) -> Tensor:
        with sdpa_kernel([SDPBackend.MATH]):  # the fused ones know no vmap
            found: dict[str, Tensor] = vmap(pulled)([leaf[rows] for leaf in rows_first], grad[rows])
        return found[name]

    return {name: Sum(param, len(grad), partial(gradients, name)) for name, param in own.items()}


def _has_rows(leaf: Any, examples: int, batch_dim: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > batch_dim and leaf.shape[batch_dim] == examples


_RULES: dict[Any, Callable[[Any, Tensor, Tensor], dict[str, Use]]] = {
    nn.Linear.forward: _linear,
    nn.Embedding.forward: _embedding,
    nn.Conv1d.forward: _conv,
    nn.Conv2d.forward: _conv,
    nn.ConvTranspose1d.forward: _conv,
    nn.ConvTranspose2d.forward: _conv,
    nn.LayerNorm.forward: _norm,
    nn.RMSNorm.forward: _norm,
    nn.GroupNorm.forward: _norm,
    _BatchNorm.forward: _norm,
}  # by what runs: a subclass with a forward of its own computes something else


def owned(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The trainable parameters that a call of the module uses itself."""
    inside = isinstance(module, nn.MultiheadAttention)  # whose `out_proj` is never called
    return [(name, param) for name, param in module.named_parameters(recurse=inside) if param.requires_grad]


def first_tensor(output: Any) -> Tensor:
    """What a module returned, or the first of it."""
    return (
        output if isinstance(output, Tensor) else next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
    )


# ---- during a backward -----------------------------------------------------------------------------------------------


@contextmanager
def example_gradients(
    module: nn.Module,
    visit: Callable[[str, nn.Parameter, Uses], None],
    *,
    batch_dim: int = 0,
    max_bytes: int = 2**28,
    unsupported: Unsupported = "vmap",
    only: Collection[str] | None = None,
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

    Raises:
        RuntimeError: a gradient is not one of examples: a module without a rule or with another number of rows, a
            parameter that is used outside of its module's ``forward``; with ``"skip"``, where nothing else is left.
        ValueError: an argument out of its range.
    """
    if unsupported not in ("vmap", "skip", "error"):
        raise ValueError(f"`unsupported` is 'vmap', 'skip' or 'error', got {unsupported!r}")
    if batch_dim < 0 or max_bytes < 1:
        raise ValueError(f"`batch_dim` and `max_bytes` must be at least 0 and 1, got {batch_dim} and {max_bytes}")
    watch = _Watch(module, visit, batch_dim, max_bytes, unsupported, only)
    try:
        yield
    finally:
        watch.remove()
    watch.check()


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
        self.missed: dict[str, str] = {}
        self.seen = False
        self.examples: int | None = None
        self.replaying = False
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

    def check(self) -> None:
        if self.missed and (self.unsupported != "skip" or not self.seen):
            reasons = "; ".join(f"`{name}`: {reason}" for name, reason in self.missed.items())
            raise RuntimeError(
                f"no gradients of single examples for {reasons}. Pass `unsupported='skip'` to keep the others alone"
            )

    def _called(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        # A hook on the result and not on the module: a forward that checkpointing repeats never gets a gradient.
        if not self.replaying and torch.is_grad_enabled() and (result := first_tensor(output)).requires_grad:
            arrived = partial(self._arrived, name, module, args, kwargs)
            result.register_hook(arrived)  # type: ignore[no-untyped-call]

    @_plainly
    def _arrived(self, name: str, module: nn.Module, args: Any, kwargs: Any, grad: Tensor) -> None:
        try:
            uses = self._uses(module, args, kwargs, grad.detach())
        except NotImplementedError as reason:
            self.missed |= {
                self.names[id(param)]: f"`{name}`, {type(module).__name__}, {reason}"
                for _, param in owned(module)
                if id(param) in self.names
            }
            return
        params = dict(owned(module))
        for key, use in uses.items():
            if key in params and id(params[key]) in self.names:
                self.uses.setdefault(id(params[key]), []).append(use)

    def _uses(self, module: nn.Module, args: Any, kwargs: Any, grad: Tensor) -> dict[str, Use]:
        rows = grad.shape[self.batch_dim] if grad.dim() > self.batch_dim else 0
        self.examples = rows if self.examples is None else self.examples
        if rows != self.examples:
            raise NotImplementedError(f"returns {rows} rows where the batch has {self.examples} examples")
        rule = _RULES.get(type(module).forward)
        grad = grad.movedim(self.batch_dim, 0)
        if rule is not None:
            x = args[0] if args else next(iter(kwargs.values()))
            return rule(module, x.detach().movedim(self.batch_dim, 0), grad)
        if self.unsupported != "vmap":
            raise NotImplementedError("has no rule")
        return _any(module, args, kwargs, grad, self.batch_dim)

    @_plainly
    def _complete(self, param: nn.Parameter) -> None:
        name, calls = self.names[id(param)], self.uses.pop(id(param), [])
        if not calls:
            self.missed.setdefault(name, "used outside of a call of its module")
        if name not in self.missed:
            self.seen = self.replaying = True
            try:
                self.visit(name, param, Uses(calls, self.max_bytes, param.device))
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
