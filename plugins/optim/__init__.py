"""Optimizers, what they say to take part in federated rounds, and the initial weights that one of them wants."""

from fulgurite.plugins.optim.dale_init import dale_init_, lognormal_
from fulgurite.plugins.optim.exponentiated_gradient import ExponentiatedGradient, dale_groups
from fulgurite.plugins.optim.federated_optimizer import FederatedOptimizer
from fulgurite.plugins.optim.fedspeed import FedSpeed, FedSpeedServer
from fulgurite.plugins.optim.gradient_regularized_newton import GradientRegularizedNewton

__all__ = [
    "ExponentiatedGradient",
    "FedSpeed",
    "FedSpeedServer",
    "FederatedOptimizer",
    "GradientRegularizedNewton",
    "dale_groups",
    "dale_init_",
    "lognormal_",
]
