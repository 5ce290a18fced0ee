"""Optimizers, and what they say to take part in federated rounds."""

from fulgurite.plugins.optim.federated_optimizer import FederatedOptimizer
from fulgurite.plugins.optim.fedspeed import FedSpeed, FedSpeedServer
from fulgurite.plugins.optim.gradient_regularized_newton import GradientRegularizedNewton

__all__ = ["FedSpeed", "FedSpeedServer", "FederatedOptimizer", "GradientRegularizedNewton"]
