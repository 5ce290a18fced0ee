"""Federated training: clients' data, adversarial examples, and steps without a trace."""

from fulgurite.plugins.federated.attack import PGD, pgd
from fulgurite.plugins.federated.partition import dirichlet_partition, iid_partition, pathological_partition
from fulgurite.plugins.federated.rounds import plan_round
from fulgurite.plugins.quiet import quiet

__all__ = ["PGD", "dirichlet_partition", "iid_partition", "pathological_partition", "pgd", "plan_round", "quiet"]
