"""Networks that settle to a fixed point and learn by relaxing once more: equilibrium propagation, holomorphic too."""

from fulgurite.plugins.equilibrium.activations import DSiLU, ScaledSigmoid
from fulgurite.plugins.equilibrium.conv_field import ConvField
from fulgurite.plugins.equilibrium.dense_field import DenseField
from fulgurite.plugins.equilibrium.field import EquilibriumField
from fulgurite.plugins.equilibrium.homeostasis import attach_loss, homeostatic_loss, jacobian_symmetry
from fulgurite.plugins.equilibrium.layer import Backward, EquilibriumLayer
from fulgurite.plugins.equilibrium.pooling import SoftmaxPool2d
from fulgurite.plugins.equilibrium.relaxation import adjoint_response, free_phase, nudged_response

__all__ = [
    "Backward",
    "ConvField",
    "DSiLU",
    "DenseField",
    "EquilibriumField",
    "EquilibriumLayer",
    "ScaledSigmoid",
    "SoftmaxPool2d",
    "adjoint_response",
    "attach_loss",
    "free_phase",
    "homeostatic_loss",
    "jacobian_symmetry",
    "nudged_response",
]
