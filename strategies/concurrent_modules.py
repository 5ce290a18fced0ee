"""Several models trained in turns, so that the gradient of one may take its time (arXiv 2211.13802)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from inspect import Parameter, signature
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from typing_extensions import override


class ConcurrentModules(LightningModule):
    """Trains ordinary LightningModules side by side: batch after batch goes to one after another.

    Each keeps its own ``training_step``, optimizer and scheduler, and what it logs as ``"loss"`` appears as
    ``"0/loss"``, ``"1/loss"`` and so on. Under :class:`SequentialGradientCodingStrategy` with
    ``pipeline="interleaved"`` it makes room for the delay ``T`` of a code, without stale gradients, where it has
    ``T + 1`` modules or more. Under any other strategy it trains them in the same turns.

    Validation, test and prediction run all modules on each batch; a prediction is a list of theirs. The hooks of
    training's and evaluation's start and end and of epochs are called, and ``on_before_optimizer_step``; hooks of
    batches are not. Lightning refuses its own clipping and accumulation, as with all manual optimization: clip in
    ``on_before_optimizer_step``.

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
        self._steps = [0] * len(modules)
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
        self.manual_backward(loss_of(call_step(self._each()[index].training_step, batch, batch_idx)))
        self.step_of(index)

    def step_of(self, index: int) -> None:
        """Steps the optimizer of a module on the gradients that its parameters have, and its scheduler."""
        optimizers = self.optimizers()
        optimizer = optimizers[index] if isinstance(optimizers, list) else optimizers
        optimizer.step()
        optimizer.zero_grad()
        self._steps[index] += 1
        self._step_schedulers("step", self._steps[index], optimizer.optimizer)

    def _step_schedulers(self, interval: str, count: int, optimizer: Optimizer | None = None) -> None:
        """Steps those that are due at the ``count``-th step or epoch, of one optimizer or all."""
        for config in self.trainer.lr_scheduler_configs:
            of_it = optimizer in (None, config.scheduler.optimizer)
            if config.interval == interval and of_it and not count % config.frequency:
                config.scheduler.step()  # type: ignore[call-arg]

    @override
    def configure_optimizers(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return [_one_optimizer(member.configure_optimizers(), index) for index, member in enumerate(self._each())]

    # ---- everything else ---------------------------------------------------------------------------------------------

    @override
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._call_all("validation_step", batch, batch_idx, dataloader_idx)

    @override
    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._call_all("test_step", batch, batch_idx, dataloader_idx)

    @override
    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> list[Any]:
        return self._call_all("predict_step", batch, batch_idx, dataloader_idx)

    def _call_all(self, name: str, *args: Any) -> list[Any]:
        return [call_step(getattr(member, name), *args) for member in self._each()]

    @override
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        index = [each is optimizer for each in self.trainer.optimizers].index(True)
        self._each()[index].on_before_optimizer_step(optimizer)

    @override
    def on_train_epoch_end(self) -> None:
        self._call_all("on_train_epoch_end")
        self._step_schedulers("epoch", self.current_epoch + 1)

    @override
    def on_train_start(self) -> None:
        self._call_all("on_train_start")

    @override
    def on_train_end(self) -> None:
        self._call_all("on_train_end")

    @override
    def on_train_epoch_start(self) -> None:
        self._call_all("on_train_epoch_start")

    @override
    def on_validation_start(self) -> None:
        self._call_all("on_validation_start")

    @override
    def on_validation_end(self) -> None:
        self._call_all("on_validation_end")

    @override
    def on_validation_epoch_start(self) -> None:
        self._call_all("on_validation_epoch_start")

    @override
    def on_validation_epoch_end(self) -> None:
        self._call_all("on_validation_epoch_end")

    @override
    def on_test_start(self) -> None:
        self._call_all("on_test_start")

    @override
    def on_test_end(self) -> None:
        self._call_all("on_test_end")

    @override
    def on_test_epoch_start(self) -> None:
        self._call_all("on_test_epoch_start")

    @override
    def on_test_epoch_end(self) -> None:
        self._call_all("on_test_epoch_end")

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["concurrent_modules"] = {"turn": self._turn, "steps": self._steps}
        for member in self._each():
            member.on_save_checkpoint(checkpoint)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._turn, self._steps = (checkpoint["concurrent_modules"][name] for name in ("turn", "steps"))
        for member in self._each():
            member.on_load_checkpoint(checkpoint)


def call_step(step: Callable[..., Any], *args: Any) -> Any:
    """Calls a step of a module with as many of the arguments as it takes, as Lightning does."""
    kinds = [parameter.kind for parameter in signature(step).parameters.values()]
    if Parameter.VAR_POSITIONAL in kinds:
        return step(*args)
    return step(*args[: sum(kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD) for kind in kinds)])


def loss_of(output: Any) -> Tensor:
    """The loss in what a ``training_step`` has returned."""
    loss = output["loss"] if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor):
        raise MisconfigurationException(
            f"`training_step` must return a loss for each batch, and for each chunk of one, got {type(loss).__name__}:"
            " its gradient would be missing"
        )
    return loss


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
