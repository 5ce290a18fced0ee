"""Log-normal weights with random signs: where a sign-preserving optimizer starts from."""

import math
import warnings
from typing import Literal, get_args

import torch
from torch import Generator, Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

Mode = Literal["fan_in", "fan_out"]
Sign = Literal["synapse", "neuron"]


@torch.no_grad()
def lognormal_(
    tensor: Tensor,
    gain: float = 1.0,
    mode: Mode = "fan_in",
    mean_std_ratio: float = 1.5,
    sign: Sign = "synapse",
    excitatory: float = 0.5,
    generator: Generator | None = None,
) -> Tensor:
    """Fills a weight with log-normal magnitudes and random signs, of mean square ``gain^2 / fan`` (arXiv 2510.02730).

    Magnitudes have standard deviation ``s = gain / sqrt(fan (1 + r^2))`` and mean ``r s``, where ``r`` is
    ``mean_std_ratio``.

    Args:
        tensor: ``(out, in, ...)``, as the weight of ``nn.Linear`` and ``nn.Conv2d``; filled in place.
        gain: above 0; ``sqrt(2)`` before a ReLU.
        mode: whether ``fan`` counts the inputs of a unit or its outputs.
        mean_std_ratio: of the magnitudes, above 0; the smaller, the heavier their tail.
        sign: ``"synapse"`` draws a sign for each weight, ``"neuron"`` one for each input, whose weights share it, which
            is Dale's law proper.
        excitatory: probability of a positive sign, in [0, 1].
        generator: of the draws; torch's own by default.

    Returns:
        The tensor.

    Raises:
        ValueError: for an argument out of its range, and for a tensor with fewer than two dimensions.

    Example:
        >>> weight = lognormal_(torch.empty(100, 50), sign="neuron")
        >>> bool((weight.sign() == weight.sign()[0]).all())
        True
    """
    rules = {
        "tensor": (tensor.ndim >= 2, "must have at least two dimensions", tuple(tensor.shape)),
        "gain": (0 < gain < math.inf, "must be positive", gain),
        "mode": (mode in get_args(Mode), f"must be one of {get_args(Mode)}", mode),
        "mean_std_ratio": (0 < mean_std_ratio < math.inf, "must be positive", mean_std_ratio),
        "sign": (sign in get_args(Sign), f"must be one of {get_args(Sign)}", sign),
        "excitatory": (0 <= excitatory <= 1, "is a probability and must be in [0, 1]", excitatory),
    }
    for name, (holds, meaning, value) in rules.items():
        if not holds:
            raise ValueError(f"`{name}` {meaning}, got {value!r}")
    fan = math.prod(tensor.shape[2:]) * tensor.shape[1 if mode == "fan_in" else 0]
    log_variance = math.log1p(mean_std_ratio**-2)  # of log|w|
    mean = gain / math.sqrt(fan) / math.sqrt(1 + mean_std_ratio**-2)
    tensor.log_normal_(math.log(mean) - log_variance / 2, math.sqrt(log_variance), generator=generator)
    shape = tensor.shape if sign == "synapse" else (1, tensor.shape[1]) + (1,) * (tensor.ndim - 2)
    positive = torch.rand(shape, generator=generator, device=tensor.device) < excitatory
    return tensor.mul_(positive.to(tensor.dtype).mul_(2).sub_(1))


def dale_init_(
    module: nn.Module,
    gain: float = 2**0.5,
    mean_std_ratio: float = 1.5,
    sign: Sign = "synapse",
    excitatory: float = 0.5,
    generator: Generator | None = None,
) -> nn.Module:
    """Fills the weights of all linear and convolutional layers by :func:`lognormal_`; biases stay.

    So do other weights, as those of ``nn.LSTM``, ``nn.Embedding`` and the ``in_proj_weight`` of
    ``nn.MultiheadAttention``, which one warning names: fill them by :func:`lognormal_`, or leave them as they are.

    Args:
        module: its layers, and itself.
        gain: as the others, of :func:`lognormal_`; the default is for ReLU.
        mean_std_ratio: mean of the magnitudes in units of their standard deviation.
        sign: ``"neuron"`` gives each input unit or channel one sign within a layer; in a grouped convolution too.
        excitatory: probability of a positive sign.
        generator: of the draws.

    Returns:
        The module.

    Raises:
        ValueError: for an argument out of its range.
    """
    others = []
    for prefix, layer in module.named_modules():
        if not isinstance(layer, nn.Linear | _ConvNd):
            weights = [name for name, p in layer.named_parameters(prefix, recurse=False) if p.ndim >= 2]
            others += [f"{name} ({type(layer).__name__})" for name in weights]
        else:
            weight = layer.weight.detach()
            parts = weight.chunk(layer.groups) if isinstance(layer, _ConvNd) else [weight]
            for part in parts:
                if isinstance(layer, _ConvTransposeNd):  # (in, out, ...)
                    part = part.transpose(0, 1)
                lognormal_(part, gain, "fan_in", mean_std_ratio, sign, excitatory, generator)
    if others:
        warnings.warn(
            f"`dale_init_` fills linear and convolutional layers, and left {', '.join(others)}: use `lognormal_`",
            stacklevel=2,
        )
    return module
