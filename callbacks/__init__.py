"""What watches or shapes a fit."""

from fulgurite.callbacks.dale_law import DaleLaw
from fulgurite.callbacks.figures import log_figure
from fulgurite.callbacks.robust_validation import RobustValidation

__all__ = ["DaleLaw", "RobustValidation", "log_figure"]
