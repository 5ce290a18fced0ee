"""What a call of a module adds to the gradients of its parameters, example by example."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from fulgurite.plugins.linalg.example_uses import Outer, Sum, Use, wide


def _linear(module: nn.Linear, x: Tensor, grad: Tensor) -> dict[str, Use]:
    x, grad = x.reshape(len(x), 1, -1, x.shape[-1]), grad.reshape(len(grad), 1, -1, grad.shape[-1])
    weight = Outer(module.weight, len(x), x.shape[2], lambda rows: (grad[rows], x[rows]))
    return {"weight": weight} | _bias(module, grad[:, 0].movedim(-1, 1))


def _bias(module: Any, grad: Tensor) -> dict[str, Use]:
    """``grad``: ``(B, channels, ...)``."""
    if module.bias is None:
        return {}
    total = grad if grad.dim() == 2 else grad.flatten(2).sum(2, dtype=wide(grad.dtype))
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
    normed = _normalised(module, x.to(wide(x.dtype)))
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


def by_vmap(module: nn.Module, args: Any, kwargs: Any, grad: Tensor, batch_dim: int) -> dict[str, Use]:
    """A vector-Jacobian product an example, of the module alone: ``grad`` is batch first, the arguments are not."""
    if isinstance(module, nn.RNNBase):
        raise NotImplementedError("fused: use `nn.LSTMCell`, `nn.GRUCell` or `nn.RNNCell`")
    if isinstance(module, nn.MultiheadAttention) and module.batch_first == bool(batch_dim):
        raise NotImplementedError("with the batch on another axis than `batch_dim`: pass `batch_first=True`")
    leaves, tree = tree_flatten((args, kwargs))
    mask = kwargs.get("attn_mask", args[5] if len(args) > 5 else None)  # of attention: (L, L), of no example
    split = [leaf is not mask and _has_rows(leaf, len(grad), batch_dim) for leaf in leaves]
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
        try:
            with sdpa_kernel([SDPBackend.MATH]):  # the fused ones know no vmap
                found: dict[str, Tensor] = vmap(pulled)([leaf[rows] for leaf in rows_first], grad[rows])
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise NotImplementedError(f"cannot run once an example (dropout inside? batch norm? {reason})") from error
        return found[name]

    return {name: Sum(param, len(grad), partial(gradients, name)) for name, param in own.items()}


def _has_rows(leaf: Any, examples: int, batch_dim: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > batch_dim and leaf.shape[batch_dim] == examples


RULES: dict[Any, Callable[[Any, Tensor, Tensor], dict[str, Use]]] = {
    nn.Linear.forward: _linear,
    nn.Embedding.forward: _embedding,
    nn.Conv1d.forward: _conv,
    nn.Conv2d.forward: _conv,
    nn.Conv3d.forward: _conv,
    nn.ConvTranspose1d.forward: _conv,
    nn.ConvTranspose2d.forward: _conv,
    nn.ConvTranspose3d.forward: _conv,
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
