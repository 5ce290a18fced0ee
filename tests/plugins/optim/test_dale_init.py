"""Log-normal weights have the moments that their docstring says, and their signs the pattern."""

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fulgurite.plugins.optim import dale_init_, lognormal_


@pytest.mark.parametrize("ratio", [0.5, 1.5, 4.0])
@pytest.mark.parametrize(("mode", "fan"), [("fan_in", 500), ("fan_out", 400)])
def test_moments(ratio: float, mode: Any, fan: int) -> None:
    w = lognormal_(torch.empty(400, 500, dtype=torch.float64), gain=2.0, mode=mode, mean_std_ratio=ratio)
    s = 2.0 / math.sqrt(fan) / math.sqrt(1 + ratio**2)
    draws = w.numel()
    logs = w.abs().log()
    sigma = math.sqrt(math.log(1 + ratio**-2))
    mu = math.log((ratio * s) ** 2 / math.sqrt((ratio * s) ** 2 + s**2))
    assert logs.mean().item() == pytest.approx(mu, abs=5 * sigma / draws**0.5)
    assert logs.std().item() == pytest.approx(sigma, rel=5 / (2 * draws) ** 0.5)
    assert (((logs - mu) / sigma) ** 3).mean().item() == pytest.approx(0, abs=5 * (15 / draws) ** 0.5)
    square_sd = 4.0 / fan * math.sqrt(math.exp(4 * sigma**2) - 1)  # of w^2, again log-normal
    assert w.square().mean().item() == pytest.approx(4.0 / fan, abs=5 * square_sd / draws**0.5)
    assert (w > 0).double().mean().item() == pytest.approx(0.5, abs=2.5 / draws**0.5)


def test_fan_counts_the_receptive_field() -> None:
    w = lognormal_(torch.empty(64, 32, 5, 5), mean_std_ratio=10.0)
    assert w.square().mean().item() == pytest.approx(1 / (32 * 25), rel=0.01)


@pytest.mark.parametrize("excitatory", [0.0, 0.8, 1.0])
def test_one_sign_for_each_input(excitatory: float) -> None:
    w = lognormal_(torch.empty(3, 2000, 2), sign="neuron", excitatory=excitatory)
    assert torch.equal(w.sign(), w[:1, :, :1].sign().expand_as(w))
    assert (w[0, :, 0] > 0).double().mean().item() == pytest.approx(excitatory, abs=0.045)  # 5 sd of 2000 draws


def test_a_generator_decides() -> None:
    one, two = (lognormal_(torch.empty(4, 5), generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, two)
    state = torch.get_rng_state()
    lognormal_(torch.empty(4, 5), generator=torch.Generator())
    assert torch.equal(state, torch.get_rng_state())


def columns(layer: nn.Module) -> Tensor:
    """The weight as ``(inputs, all that one input reaches)``."""
    weight = layer.weight.detach()
    if isinstance(layer, nn.ConvTranspose2d):
        return weight.flatten(1)
    if isinstance(layer, nn.Conv2d):
        return torch.cat([part.transpose(0, 1).flatten(1) for part in weight.chunk(layer.groups)])
    return weight.T


@pytest.mark.parametrize(
    "layer",
    [nn.Linear(12, 9), nn.Conv2d(12, 8, 3), nn.Conv2d(12, 8, 3, groups=4), nn.ConvTranspose2d(12, 8, 3, groups=2)],
    ids=str,
)
def test_every_layer_obeys_dales_law(layer: nn.Module) -> None:
    bias = layer.bias.detach().clone()
    assert dale_init_(layer, sign="neuron") is layer
    signs = columns(layer).sign()
    assert signs.shape[0] == 12
    assert torch.equal(signs, signs[:, :1].expand_as(signs))
    assert {-1.0, 1.0} == set(signs.flatten().tolist())  # not all alike
    assert torch.equal(layer.bias, bias)


def test_variance_survives_a_relu_layer() -> None:
    module = nn.Sequential(nn.Linear(800, 800), nn.ReLU(), nn.Linear(800, 800))
    module[0].bias.detach().zero_()
    module[2].bias.detach().zero_()
    out = dale_init_(module)(torch.randn(200, 800))
    assert out.square().mean().item() == pytest.approx(2.0, rel=0.3)  # gain^2 once for an input without ReLU


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gain": 0.0}, "`gain` must be positive, got 0.0"),
        ({"mode": "fan"}, r"`mode` must be one of \('fan_in', 'fan_out'\), got 'fan'"),
        ({"mean_std_ratio": 0.0}, "`mean_std_ratio` must be positive, got 0.0"),
        ({"sign": "both"}, r"`sign` must be one of \('synapse', 'neuron'\), got 'both'"),
        ({"excitatory": 1.2}, r"`excitatory` is a probability and must be in \[0, 1\], got 1.2"),
    ],
    ids=str,
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lognormal_(torch.empty(2, 3), **options)
    if "mode" not in options:
        with pytest.raises(ValueError, match=message):
            dale_init_(nn.Linear(3, 2), **options)


def test_a_vector_has_no_fan() -> None:
    with pytest.raises(ValueError, match=r"`tensor` must have at least two dimensions, got \(3,\)"):
        lognormal_(torch.empty(3))


def test_one_warning_names_what_stays() -> None:
    module = nn.ModuleDict({"a": nn.LSTM(3, 4), "b": nn.MultiheadAttention(8, 2), "c": nn.Linear(2, 2)})
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    with pytest.warns(UserWarning, match="`dale_init_` .*: use `lognormal_`") as caught:
        dale_init_(module)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    stayed = {name for name, p in module.named_parameters() if p.ndim >= 2 and torch.equal(p, before[name])}
    assert stayed == {"a.weight_ih_l0", "a.weight_hh_l0", "b.in_proj_weight"}
    assert {name for name, p in module.named_parameters() if p.ndim >= 2 and name in str(caught[0].message)} == stayed


def test_no_warning_without_other_weights() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dale_init_(nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ConvTranspose2d(3, 2, 3), nn.Linear(4, 4)))
