"""What a trained model is measured by."""

from fulgurite.plugins.metrics.robust_accuracy import RobustAccuracy

__all__ = ["RobustAccuracy"]
