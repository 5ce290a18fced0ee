import pytest
import torch
from torch import nn

from fulgurite.plugins.equilibrium import DSiLU, ScaledSigmoid
from fulgurite.plugins.equilibrium.activations import is_holomorphic, slope

Z = torch.linspace(-3, 3, 25, dtype=torch.float64)


def test_scaled_sigmoid_is_the_formula() -> None:
    torch.testing.assert_close(ScaledSigmoid()(Z), 1 / (1 + torch.exp(-(4 * Z - 2))))
    assert slope(ScaledSigmoid(), torch.tensor(0.5)) == 1


def test_dsilu_is_the_formula() -> None:
    one, two = 1 / (1 + torch.exp(-Z)), 1 / (1 + torch.exp(-(Z - 2)))
    torch.testing.assert_close(DSiLU()(Z), 0.5 * Z * one + (1 - 0.5 * Z) * two)


@pytest.mark.parametrize("activation", [ScaledSigmoid(), DSiLU()], ids=lambda phi: type(phi).__name__)
def test_slopes_are_those_of_a_difference(activation: nn.Module) -> None:
    step = 1e-5
    expected = (activation(Z + step) - activation(Z - step)) / (2 * step)
    torch.testing.assert_close(slope(activation, Z), expected, rtol=1e-8, atol=1e-9)


class Modulus(nn.Module):
    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return z * z.abs()


class OfRealPart(nn.Module):
    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(z.real).to(z.dtype)


@pytest.mark.parametrize("activation", [ScaledSigmoid(), DSiLU(), nn.Tanh(), nn.Identity()])
def test_holomorphic_ones_are_known(activation: nn.Module) -> None:
    assert is_holomorphic(activation)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Hardtanh(), nn.GELU(), Modulus(), OfRealPart()])
def test_the_others_are_known_too(activation: nn.Module) -> None:
    assert not is_holomorphic(activation)
