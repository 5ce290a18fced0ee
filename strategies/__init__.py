"""How processes train together; importing this package makes the strategies known to ``Trainer(strategy="name")``."""

from typing import Any

from lightning.pytorch.strategies import StrategyRegistry

from fulgurite.strategies.replicas import ReplicaStrategy
from fulgurite.strategies.streaming_diloco import StreamingDiLoCoStrategy

__all__ = ["ReplicaStrategy", "StreamingDiLoCoStrategy"]

_DILOCO: dict[str, Any] = {
    "sync_every": 500,
    "num_fragments": 1,
    "overlap_steps": 0,
    "outer_lr": 0.7,
    "quantize": "fp32",
}

for _suffix, _start_method in (("", "popen"), ("_spawn", "spawn"), ("_fork", "fork")):
    StrategyRegistry.register(
        f"streaming_diloco{_suffix}",
        StreamingDiLoCoStrategy,
        description=f"Streaming DiLoCo (arXiv 2501.18512), processes by {_start_method}",
        override=True,  # a notebook may reload this module
        start_method=_start_method,
    )
    StrategyRegistry.register(
        f"diloco{_suffix}",
        StreamingDiLoCoStrategy,
        description=f"DiLoCo (arXiv 2311.08105), processes by {_start_method}",
        override=True,
        start_method=_start_method,
        **_DILOCO,
    )
