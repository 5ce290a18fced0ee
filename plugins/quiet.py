"""Runs a step of a module that is to leave nothing behind."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric


@contextmanager
def quiet(module: nn.Module, evaluate: bool = False, mute: bool = True) -> Iterator[None]:
    """Lets a training step run once more without a trace: what it logs, counts and normalises is forgotten.

    Within the block each submodule lives on a copy of its attributes, and on leaving it gets its own back. So these do
    not last: metric states and counts, buffers (running statistics, spectral norm), a rebound attribute, what was put
    into a list or dict, the ``training`` flags. ``log`` and ``log_dict`` do nothing. Weights, gradients and generators
    are shared with the outside; so is a tensor, written in place, that is neither a buffer nor a metric's state.

    Args:
        module: the module whose step runs; any :class:`~torch.nn.Module`, and uses may nest.
        evaluate: run it in eval mode.
        mute: keep ``log`` and ``log_dict`` from logging.
    """
    parts = list(module.modules())
    own = [vars(part) for part in parts]
    with torch.inference_mode(False), torch.no_grad():  # else a backward within the block could not save the clones
        lent = _lent(parts)
    for part, attributes in zip(parts, lent, strict=True):
        if evaluate:
            attributes["training"] = False
        if mute and hasattr(type(part), "log_dict"):
            attributes["log"] = attributes["log_dict"] = _mute
    try:
        # The dicts are swapped, and not the buffers' content written back: the kernels of batch norm write without
        # counting a version, and where the own tensors never change, graphs that saved them stay valid.
        _swap(parts, lent)
        yield
    finally:
        _swap(parts, own)


def _swap(parts: list[nn.Module], attributes: list[dict[str, Any]]) -> None:
    for part, values in zip(parts, attributes, strict=True):
        object.__setattr__(part, "__dict__", values)


def _lent(parts: list[nn.Module]) -> list[dict[str, Any]]:
    """Copies of the parts' attributes."""
    copies: dict[int, Any] = {}  # by the id of the original: metrics of a collection share their states
    lent = []
    for part in parts:
        _copied(part._buffers, True, copies)  # first: what is copied once stays so
        lent.append(_copied(vars(part), isinstance(part, Metric), copies))
    return lent


def _mute(*args: Any, **kwargs: Any) -> None:
    """Stands in for ``log``."""


def _copied(value: Any, tensors: bool, copies: dict[int, Any]) -> Any:
    """Copies lists and dicts within each other and, with ``tensors``, the tensors that are not in a list."""
    if id(value) in copies:
        return copies[id(value)]
    if isinstance(value, Tensor):
        copies[id(value)] = value.clone()
        return copies[id(value)]
    copies[id(value)] = copy = value.copy()
    tensors = tensors and type(value) is dict  # batches in a metric's list are never written to
    for key, item in value.items() if type(value) is dict else enumerate(value):
        is_state = tensors and isinstance(item, Tensor) and not isinstance(item, nn.Parameter)
        if is_state or type(item) in (dict, list):
            copy[key] = _copied(item, tensors, copies)
    return copy
