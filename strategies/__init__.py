"""How processes train together; importing this package makes the strategies known to ``Trainer(strategy="name")``."""

from typing import Any

from lightning.pytorch.strategies import StrategyRegistry

from fulgurite.strategies.concurrent_modules import ConcurrentModules
from fulgurite.strategies.federated import FederatedStrategy
from fulgurite.strategies.federated_adversarial import FederatedAdversarialStrategy
from fulgurite.strategies.replicas import ReplicaStrategy
from fulgurite.strategies.sequential_gradient_coding import SequentialGradientCodingStrategy
from fulgurite.strategies.streaming_diloco import StreamingDiLoCoStrategy
from fulgurite.strategies.unwrapped import UnwrappedStrategy

__all__ = [
    "ConcurrentModules",
    "FederatedAdversarialStrategy",
    "FederatedStrategy",
    "ReplicaStrategy",
    "SequentialGradientCodingStrategy",
    "StreamingDiLoCoStrategy",
    "UnwrappedStrategy",
]

_DILOCO: dict[str, Any] = {
    "sync_every": 500,
    "num_fragments": 1,
    "overlap_steps": 0,
    "outer_lr": 0.7,
    "quantize": "fp32",
}

_NAMED: dict[str, tuple[type[UnwrappedStrategy], str, dict[str, Any]]] = {
    "streaming_diloco": (StreamingDiLoCoStrategy, "Streaming DiLoCo (arXiv 2501.18512)", {}),
    "diloco": (StreamingDiLoCoStrategy, "DiLoCo (arXiv 2311.08105)", _DILOCO),
    "federated": (FederatedStrategy, "federated averaging of ten IID clients (arXiv 1602.05629)", {"num_clients": 10}),
    "federated_adversarial": (
        FederatedAdversarialStrategy,
        "federated adversarial learning of ten IID clients (arXiv 2208.03635)",
        {"num_clients": 10},
    ),
    "gradient_coding": (SequentialGradientCodingStrategy, "a gradient code (arXiv 1612.03301)", {"s": 1}),
    "sr_sgc": (
        SequentialGradientCodingStrategy,
        "sequential gradient coding with selective repetition (arXiv 2211.13802)",
        {"scheme": "sr_sgc", "B": 1, "W": 2, "lam": 1},
    ),
    "m_sgc": (
        SequentialGradientCodingStrategy,
        "multiplexed sequential gradient coding (arXiv 2211.13802)",
        {"scheme": "m_sgc", "B": 1, "W": 2, "lam": 1},
    ),
}

for _name, (_strategy, _description, _settings) in _NAMED.items():
    for _suffix, _start_method in (("", "popen"), ("_spawn", "spawn"), ("_fork", "fork")):
        StrategyRegistry.register(
            f"{_name}{_suffix}",
            _strategy,
            description=f"{_description}, processes by {_start_method}",
            override=True,  # a notebook may reload this module
            start_method=_start_method,
            **_settings,
        )
