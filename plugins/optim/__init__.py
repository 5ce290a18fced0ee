"""Optimizers, and what they say to take part in federated rounds."""

from fulgurite.plugins.optim.federated_optimizer import FederatedOptimizer
from fulgurite.plugins.optim.fedspeed import FedSpeed, FedSpeedServer

__all__ = ["FedSpeed", "FedSpeedServer", "FederatedOptimizer"]
