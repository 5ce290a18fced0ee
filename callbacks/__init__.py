"""What watches or shapes a fit."""

from fulgurite.callbacks.figures import log_figure
from fulgurite.callbacks.jacobian_homeostasis import JacobianHomeostasis
from fulgurite.callbacks.robust_validation import RobustValidation

__all__ = ["JacobianHomeostasis", "RobustValidation", "log_figure"]
