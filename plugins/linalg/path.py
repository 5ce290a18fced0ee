"""The loss along the straight line between two solutions."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from fulgurite.plugins.linalg.distributed import Peers
from fulgurite.plugins.linalg.module_loss import ModuleLoss
from fulgurite.plugins.quiet import quiet


class PathResult(NamedTuple):
    """The loss between two points; see :func:`connecting_path`.

    Attributes:
        t: ``(n_points,)``, from 0 to 1.
        loss: ``(n_points,)``.
        barrier: how far the loss rises above the straight line between its ends; at least 0.
    """

    t: Tensor
    loss: Tensor
    barrier: float


def connecting_path(
    loss: ModuleLoss,
    a: Tensor | Mapping[str, Tensor],
    b: Tensor | Mapping[str, Tensor],
    n_points: int = 21,
    *,
    group: dist.ProcessGroup | None = None,
) -> PathResult:
    """The loss at ``(1 - t) a + t b``: without a barrier, both lie in one basin (arXiv 1706.04454).

    In eval mode, the running statistics of batch normalisation are estimated anew at each point, from the batches. The
    module's weights and statistics are put back.

    Args:
        loss: its kept graphs stay valid.
        a: the parameters that require gradients, as one vector ``(P,)`` or by name as in ``state_dict()``.
        b: likewise.
        n_points: from a to b, at least 2.
        group: the data-parallel ranks; None for all.

    Raises:
        ValueError: for ``n_points`` below 2, and for points with another number of parameters.
    """
    if n_points < 2:
        raise ValueError(f"`n_points` counts both ends and must be at least 2, got {n_points}")
    ends = [_weights(loss, point) for point in (a, b)]
    own = [param.detach().clone() for param in loss.params]
    t, values = torch.linspace(0, 1, n_points, dtype=torch.float64), []
    try:
        for weight in t.tolist():
            for param, first, last in zip(loss.params, *ends, strict=True):
                param.data.copy_(torch.lerp(first, last, weight))  # between equal points it is that point to the bit
            with _statistics(loss):
                values.append(loss.value())
    finally:
        for param, before in zip(loss.params, own, strict=True):
            param.data.copy_(before)
    found = Peers(group).mean_(torch.stack(values)).cpu()
    return PathResult(t, found, float((found - torch.lerp(found[0], found[-1], t)).max()))


def _weights(loss: ModuleLoss, point: Tensor | Mapping[str, Tensor]) -> list[Tensor]:
    params = loss.params
    if not isinstance(point, Tensor):
        names = [name for name, param in loss.module.named_parameters() if param.requires_grad]
        return [point[name].detach().to(param) for name, param in zip(names, params, strict=True)]
    sizes = [param.numel() for param in params]
    if point.shape != (sum(sizes),):
        raise ValueError(f"`a` and `b` have {sum(sizes)} numbers each, got {tuple(point.shape)}")
    pieces = torch.split(point.detach(), sizes)
    return [piece.view_as(param).to(param) for piece, param in zip(pieces, params, strict=True)]


@contextmanager
def _statistics(loss: ModuleLoss) -> Iterator[None]:
    """Within it, running statistics are averages over the batches."""
    norms = [part for part in loss.module.modules() if isinstance(part, _BatchNorm)]
    norms = [norm for norm in norms if norm.track_running_stats and not norm.training]
    if not norms:
        yield
        return
    with quiet(loss.module):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        ModuleLoss(loss.module, loss.batches, step=loss.step, frozen=False, context=loss.context).value()
        for norm in norms:
            norm.eval()
        yield
