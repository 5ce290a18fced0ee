"""What watches or shapes a fit."""

from fulgurite.callbacks.coherent_gradients import CoherentGradients
from fulgurite.callbacks.curvature_batches import CurvatureBatches
from fulgurite.callbacks.dale_law import DaleLaw
from fulgurite.callbacks.figures import log_figure
from fulgurite.callbacks.gradient_coherence import GradientCoherence
from fulgurite.callbacks.hessian_spectrum import HessianSpectrum
from fulgurite.callbacks.jacobian_homeostasis import JacobianHomeostasis
from fulgurite.callbacks.robust_validation import RobustValidation

__all__ = [
    "CoherentGradients",
    "CurvatureBatches",
    "DaleLaw",
    "GradientCoherence",
    "HessianSpectrum",
    "JacobianHomeostasis",
    "RobustValidation",
    "log_figure",
]
