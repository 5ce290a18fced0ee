"""Several models trained in turns, so that the gradient of one may take its time (arXiv 2211.13802)."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from typing_extensions import override

_FORWARDED = (
    "on_train_start",
    "on_train_end",
    "on_train_epoch_start",
    "on_train_epoch_end",
    "on_validation_epoch_start",
    "on_validation_epoch_end",
    "on_test_epoch_start",
    "on_test_epoch_end",
)


class ConcurrentModules(LightningModule):
    """Trains ordinary LightningModules side by side: batch after batch goes to one after another.

    Each keeps its own ``training_step``, optimizer and scheduler, and what it logs as ``"loss"`` appears as
    ``"0/loss"``, ``"1/loss"`` and so on. Under :class:`SequentialGradientCodingStrategy` with
    ``pipeline="interleaved"`` it makes room for the delay ``T`` of a code, without stale gradients, where it has
    ``T + 1`` modules or more. Under any other strategy it trains them in the same turns.

    Validation and test run all modules on each batch. Epoch hooks of the modules are called (``on_train_epoch_end`` and
    the like), hooks of batches are not.

    Args:
        modules: at least one, each with one optimizer.

    Raises:
        ValueError: there is none.
    """

    def __init__(self, modules: Sequence[LightningModule]) -> None:
        super().__init__()
        if not modules:
            raise ValueError("`modules` must hold at least one LightningModule, got none")
        self.automatic_optimization = False
        self.members = nn.ModuleList(modules)
        self._turn = 0
        self._is_silent = False

    @override
    def setup(self, stage: str) -> None:
        for index, member in enumerate(self._each()):
            member.trainer = self.trainer
            member.log = partial(self._log_of, index)  # type: ignore[method-assign]
            member.setup(stage)

    def _each(self) -> list[LightningModule]:
        return list(self.members)  # type: ignore[arg-type]

    def _log_of(self, index: int, name: str, value: Any, **options: Any) -> None:
        if not self._is_silent:
            self.log(f"{index}/{name}", value, **options)

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Lets the modules log nothing, where their training steps run outside of Lightning's."""
        self._is_silent = True
        try:
            yield
        finally:
            self._is_silent = False

    # ---- turns -------------------------------------------------------------------------------------------------------

    def take_turn(self) -> int:
        """The module that the next batch is for."""
        turn = self._turn
        self._turn = (turn + 1) % len(self.members)
        return turn

    @override
    def training_step(self, batch: Any, batch_idx: int) -> None:
        index = self.take_turn()
        output = self._each()[index].training_step(batch, batch_idx)
        loss = output["loss"] if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor):
            raise MisconfigurationException(
                f"`training_step` of module {index} must return a loss, got {type(loss).__name__}"
            )
        self.manual_backward(loss)
        self.step_of(index)

    def step_of(self, index: int) -> None:
        """Steps the optimizer of a module on the gradients that its parameters have, and its scheduler."""
        optimizers = self.optimizers()
        optimizer = optimizers[index] if isinstance(optimizers, list) else optimizers
        optimizer.step()
        optimizer.zero_grad()
        self._step_schedulers("step", optimizer.optimizer)

    def _step_schedulers(self, interval: str, optimizer: Optimizer | None = None) -> None:
        for config in self.trainer.lr_scheduler_configs:
            if config.interval == interval and optimizer in (None, config.scheduler.optimizer):
                config.scheduler.step()  # type: ignore[call-arg]

    @override
    def configure_optimizers(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return [_one_optimizer(member.configure_optimizers(), index) for index, member in enumerate(self._each())]

    # ---- everything else ---------------------------------------------------------------------------------------------

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        for member in self._each():
            member.validation_step(batch, batch_idx)

    @override
    def test_step(self, batch: Any, batch_idx: int) -> None:
        for member in self._each():
            member.test_step(batch, batch_idx)

    def _forward_hook(self, name: str) -> None:
        for member in self._each():
            getattr(member, name)()

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["concurrent_modules"] = {"turn": self._turn}
        for member in self._each():
            member.on_save_checkpoint(checkpoint)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._turn = checkpoint["concurrent_modules"]["turn"]
        for member in self._each():
            member.on_load_checkpoint(checkpoint)


def _hook(name: str) -> Any:
    def forward(self: ConcurrentModules) -> None:
        self._forward_hook(name)
        if name == "on_train_epoch_end":
            self._step_schedulers("epoch")

    forward.__name__, forward.__doc__ = name, "Calls the modules' own."
    return forward


for _name in _FORWARDED:
    setattr(ConcurrentModules, _name, _hook(_name))


def _one_optimizer(configured: Any, index: int) -> dict[str, Any]:
    """What ``configure_optimizers`` gave, in the one form of Lightning's that holds for several modules together."""
    if isinstance(configured, tuple) and len(configured) == 2 and isinstance(configured[0], list):
        optimizers, schedulers = configured
        configured = {"optimizer": optimizers[0]} if len(optimizers) == 1 else None
        if configured is not None and schedulers:
            configured["lr_scheduler"] = schedulers[0]
    elif isinstance(configured, list) and len(configured) == 1:
        configured = configured[0]
    if isinstance(configured, Optimizer):
        configured = {"optimizer": configured}
    if not isinstance(configured, dict):
        raise MisconfigurationException(
            f"`configure_optimizers` of module {index} must give one optimizer, alone or with one scheduler, got"
            f" {type(configured).__name__}"
        )
    scheduler = configured.get("lr_scheduler")
    scheduler = scheduler.get("scheduler") if isinstance(scheduler, dict) else scheduler
    if isinstance(scheduler, ReduceLROnPlateau):
        raise MisconfigurationException(
            f"module {index} has a ReduceLROnPlateau scheduler, which needs a metric that ConcurrentModules does not"
            " watch: use one that counts steps or epochs"
        )
    return configured
