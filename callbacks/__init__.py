"""What watches or shapes a fit."""

from fulgurite.callbacks.curvature_batches import CurvatureBatches
from fulgurite.callbacks.figures import log_figure
from fulgurite.callbacks.robust_validation import RobustValidation

__all__ = ["CurvatureBatches", "RobustValidation", "log_figure"]
