"""What a model is measured by, trained and in training."""

from fulgurite.plugins.linalg.example_gradients import per_example_sq_norms
from fulgurite.plugins.metrics.coherence import MCoherence, m_coherence
from fulgurite.plugins.metrics.robust_accuracy import RobustAccuracy

__all__ = ["MCoherence", "RobustAccuracy", "m_coherence", "per_example_sq_norms"]
