"""Short fits that tell what goes with what: a strategy in two processes, and one thing more."""

import re
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from os import close, devnull, dup, dup2
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import Strategy, StrategyRegistry
from torch import Tensor, nn
from torch.multiprocessing.spawn import ProcessRaisedException
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import fulgurite.strategies  # registers the names
from fulgurite import callbacks, plugins
from fulgurite.plugins.equilibrium import DenseField, EquilibriumLayer
from fulgurite.plugins.federated import PGD
from fulgurite.plugins.optim import (
    ExponentiatedGradient,
    FedSpeed,
    FedSpeedServer,
    GradientRegularizedNewton,
    dale_groups,
)

_QUIET: dict[str, Any] = dict.fromkeys(
    ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
)
_QUIET |= {"max_epochs": 2, "num_sanity_val_steps": 0}
_OURS = tuple(f"{Path(str(package.__file__)).parent}/" for package in (fulgurite.strategies, callbacks, plugins))


@dataclass(frozen=True)
class Column:
    """A strategy, with what a fit of a few steps needs."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    trainer: Mapping[str, Any] = field(default_factory=dict)

    def make(self, more: Mapping[str, Any]) -> Strategy:
        """It, in forked processes."""
        entry = StrategyRegistry[f"{self.name}_fork"]
        options = entry["init_params"] | self.options | more
        strategy: Strategy = entry["strategy"](timeout=timedelta(seconds=60), **options)
        return strategy


@dataclass(frozen=True)
class Row:
    """What is put together with a strategy: arguments of :class:`Net`, of the Trainer and of federated strategies."""

    name: str
    net: Mapping[str, Any] = field(default_factory=dict)
    trainer: Mapping[str, Any] = field(default_factory=dict)
    callback: Callable[[], Callback] | None = None
    compiled: bool = False
    federated: Mapping[str, Any] = field(default_factory=dict)


class _Stream(IterableDataset[Any]):
    def __init__(self, rows: TensorDataset) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Any]:
        return (self.rows[i] for i in range(len(self.rows)))


class Net(LightningModule):
    """An ordinary classifier; with ``by_hand`` it steps as many optimizers itself."""

    def __init__(
        self,
        optimizer: Callable[[LightningModule], Optimizer] | None = None,
        by_hand: int = 0,
        streams: bool = False,
        settles: bool = False,
    ) -> None:
        super().__init__()
        self.automatic_optimization = not by_hand
        self.optimizer, self.by_hand, self.streams = optimizer, by_hand, streams
        field = DenseField(4, {"out": 8})
        self.net = nn.Sequential(EquilibriumLayer(field, step_size=0.5) if settles else nn.Linear(4, 8), nn.Tanh())
        self.head = nn.Linear(8, 3)

    def forward(self, inputs: Tensor) -> Any:  # noqa: D102
        return self.head(self.net(inputs))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:  # noqa: D102
        loss = cross_entropy(self(batch[0]), batch[1])
        if self.by_hand:
            optimizers: Any = self.optimizers()
            optimizers = optimizers if self.by_hand > 1 else [optimizers]
            for optimizer in optimizers:
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in optimizers:
                optimizer.step()
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:  # noqa: D102
        self.log("val_loss", cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self) -> Any:  # noqa: D102
        if self.optimizer is not None:
            return self.optimizer(self)
        parts = [self.net, self.head] if self.by_hand > 1 else [self]
        return [SGD(part.parameters(), lr=0.1) for part in parts]

    def train_dataloader(self) -> Any:  # noqa: D102
        inputs = torch.rand(64, 4, generator=torch.Generator().manual_seed(0))
        rows = TensorDataset(inputs, inputs.argmax(1) % 3)
        return DataLoader(_Stream(rows) if self.streams else rows, batch_size=8)

    def val_dataloader(self) -> Any:  # noqa: D102
        inputs = torch.rand(16, 4, generator=torch.Generator().manual_seed(1))
        return DataLoader(TensorDataset(inputs, inputs.argmax(1) % 3), batch_size=8)


def _fedspeed(module: LightningModule) -> Optimizer:
    federated = isinstance(module.trainer.strategy, fulgurite.strategies.FederatedStrategy)
    return FedSpeed(module.parameters(), server="all", local_steps=None if federated else 2)


_NEWTON = {"optimizer": lambda module: GradientRegularizedNewton(module.parameters())}
COLUMNS = (
    Column("ddp"),
    Column("streaming_diloco", {"sync_every": 2}),
    Column("diloco", {"sync_every": 2}),
    Column("federated"),
    Column("federated_adversarial"),
    Column("gradient_coding"),
    Column("sr_sgc", trainer={"accumulate_grad_batches": 4}),
    Column("m_sgc", trainer={"accumulate_grad_batches": 4}),
)
ROWS = (
    *(Row(f"`{name}`", trainer={"precision": name}) for name in ("32-true", "64-true", "bf16-true", "bf16-mixed")),
    Row("`16-mixed`", trainer={"precision": "16-mixed"}),
    Row("`accumulate_grad_batches`", trainer={"accumulate_grad_batches": 4}),
    Row("`gradient_clip_val`", trainer={"gradient_clip_val": 0.1}),
    Row("`torch.compile`", compiled=True),
    Row("manual optimization", {"by_hand": 1}, {"accumulate_grad_batches": 1}),
    Row("several optimizers", {"by_hand": 2}, {"accumulate_grad_batches": 1}),
    Row("iterable dataset", {"streams": True}),
    Row("`GradientCoherence`", callback=lambda: callbacks.GradientCoherence(1, figure=False)),
    Row(
        '`GradientCoherence(source="fixed")`',
        callback=lambda: callbacks.GradientCoherence(1, source="fixed", figure=False),
    ),
    Row('`CoherentGradients("winsorize")`', callback=lambda: callbacks.CoherentGradients("winsorize")),
    Row('`CoherentGradients("rm3")`', callback=lambda: callbacks.CoherentGradients("rm3")),
    Row(
        '`CoherentGradients("m3")`',
        trainer={"accumulate_grad_batches": 3},
        callback=lambda: callbacks.CoherentGradients("m3"),
    ),
    Row("`HessianSpectrum`", callback=lambda: callbacks.HessianSpectrum(2, lanczos_steps=4, n_probes=1, figure=False)),
    Row("`DaleLaw`", callback=lambda: callbacks.DaleLaw(1)),
    Row("`RobustValidation`", callback=lambda: callbacks.RobustValidation(PGD(steps=1))),
    Row("`GradientRegularizedNewton`", _NEWTON),
    Row("the same with `CurvatureBatches`", _NEWTON, callback=callbacks.CurvatureBatches),
    Row("`ExponentiatedGradient`", {"optimizer": lambda module: ExponentiatedGradient(dale_groups(module))}),
    Row("`FedSpeed`", {"optimizer": _fedspeed}, federated={"server_optimizer": FedSpeedServer}),
    Row("`EquilibriumLayer`", {"settles": True}),
    Row("the same with `JacobianHomeostasis`", {"settles": True}, callback=callbacks.JacobianHomeostasis),
)


def probe(row: Row, column: Column) -> tuple[str, str]:
    """What comes of a fit: ``"works"``, ``"refused"`` by our code or Lightning's, ``"fails"`` or ``"untried"``; why."""
    net = Net(**row.net)
    before = [param.detach().clone() for param in net.parameters()]
    given = row.federated if column.name.startswith("federated") else {}
    options: dict[str, Any] = {"precision": "32-true", **_QUIET, **column.trainer, **row.trainer}
    try:
        with _silence():
            watching = [row.callback()] if row.callback else []
            trainer = Trainer(accelerator="cpu", devices=2, strategy=column.make(given), callbacks=watching, **options)
            if trainer.precision != options["precision"]:
                return "untried", f"on a CPU the Trainer takes {trainer.precision} instead"
            module: Any = torch.compile(net, backend="eager") if row.compiled else net
            trainer.fit(module)
    except Exception as error:
        return _told(error)
    after = [param.to(old) for param, old in zip(net.parameters(), before, strict=True)]
    if not all(bool(param.isfinite().all()) for param in after):
        return "fails", "the fit ended, and not all weights are finite"
    moved = any(not torch.equal(param, old) for param, old in zip(after, before, strict=True))
    return ("works", "") if moved else ("fails", "the fit ended, and no weight had moved")


def _told(error: Exception) -> tuple[str, str]:
    """Whether an error is a ``raise`` of our code or a verdict of Lightning's, and the first sentence of it."""
    of_process = isinstance(error, ProcessRaisedException)
    text = str(error) if of_process else "".join(traceback.format_exception(error))
    *_, (file, line, kind, message) = re.findall(
        r'^  File "(.+?)", line.*\n    (.*)\n(?:    .*\n)*([\w.]+)(?:: (.*))?$', text, re.MULTILINE
    )
    ours = file.startswith(_OURS) and line.startswith("raise ")
    outcome = "refused" if ours or kind.endswith("MisconfigurationException") else "fails"
    return outcome, f"{message or kind}".partition(". ")[0]


@contextmanager
def _silence() -> Iterator[None]:
    """Of this process and those that it forks."""
    kept = [dup(1), dup(2)]
    with open(devnull, "w") as nothing:
        dup2(nothing.fileno(), 1)
        dup2(nothing.fileno(), 2)
        try:
            yield
        finally:
            for number, old in zip((1, 2), kept, strict=True):
                dup2(old, number)
                close(old)
