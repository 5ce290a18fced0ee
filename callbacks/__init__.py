"""What watches or shapes a fit."""

from fulgurite.callbacks.figures import log_figure
from fulgurite.callbacks.hessian_spectrum import HessianSpectrum
from fulgurite.callbacks.robust_validation import RobustValidation

__all__ = ["HessianSpectrum", "RobustValidation", "log_figure"]
