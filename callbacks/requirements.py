"""What several callbacks ask of a fit, and refuse in the same words."""

import importlib.util
from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from torch.nn import Module, Parameter
from torch.nn.parallel import DistributedDataParallel


def require_whole_parameters(callback: Callback, trainer: Trainer) -> None:
    """Refuses strategies under which a rank holds pieces of the parameters."""
    if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy):
        raise MisconfigurationException(
            f"`{type(callback).__name__}` needs whole parameters on each rank, and {type(trainer.strategy).__name__} "
            'holds pieces: train by `strategy="ddp"`'
        )


def require_whole_backward(what: str, trainer: Trainer, remedy: str) -> None:
    """Refuses strategies that put a step's gradient together from backward passes of their own, as a gradient code."""
    strategy = type(trainer.strategy)
    if strategy.backward is not Strategy.backward:
        raise MisconfigurationException(
            f"{what} belongs to the backward pass of a whole batch, and {strategy.__name__} makes several, of parts"
            f" that it weighs and adds up over processes: {remedy}"
        )


def averaging_group(trainer: Trainer) -> dist.ProcessGroup | None:
    """The processes over which DDP makes gradients a mean; None where each process keeps its own."""
    model = trainer.strategy.model
    return model.process_group if isinstance(model, DistributedDataParallel) else None


def loss_scale(trainer: Trainer) -> float:
    """What ``16-mixed`` multiplies the loss by, and so what backward leaves in gradients; 1 in other precisions."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())


def require_matplotlib(figure: bool) -> None:
    """Refuses ``figure=True`` where it cannot be drawn."""
    if figure and importlib.util.find_spec("matplotlib") is None:
        raise MisconfigurationException(
            "`figure` needs matplotlib: pip install 'fulgurite[figures]', or set `figure=False`"
        )


def matching_parameters(module: Module, patterns: Sequence[str] | None, argument: str) -> dict[str, Parameter]:
    """The trainable parameters that a pattern names, by name.

    Args:
        module: has them; one that goes by two names matches by either.
        patterns: of :mod:`fnmatch`, for the names of parameters, or of modules, which stand for all within; None for
            all parameters.
        argument: that the patterns come from, for messages.

    Raises:
        ValueError: a pattern without a match.
    """
    named = {name: param for name, param in module.named_parameters() if param.requires_grad}
    if patterns is None:
        return named
    aliases = [(name, id(param)) for name, param in module.named_parameters(remove_duplicate=False)]
    chosen: set[int] = set()
    for pattern in patterns:
        found = {key for name, key in aliases if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")}
        if not found & {id(param) for param in named.values()}:
            raise ValueError(f"`{argument}`: no trainable parameter matches {pattern!r}; there are {', '.join(named)}")
        chosen |= found
    return {name: param for name, param in named.items() if id(param) in chosen}


def patterns_of(patterns: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """One pattern or several, as a tuple."""
    return (patterns,) if isinstance(patterns, str) else None if patterns is None else tuple(patterns)
