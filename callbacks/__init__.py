"""What watches or shapes a fit."""

from fulgurite.callbacks.figures import log_figure

__all__ = ["log_figure"]
