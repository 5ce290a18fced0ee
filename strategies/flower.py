"""Flower: the clients of a federation on machines of their own, joined by a real network (arXiv 2007.14390).

Not imported with :mod:`fulgurite.strategies`; needs ``pip install 'fulgurite[flower]'``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from fulgurite.plugins.federated.attack import PGD
from fulgurite.plugins.federated.loader import batch_size_of
from fulgurite.plugins.optim.fedspeed import FedSpeed
from fulgurite.plugins.seeds import derived_seed
from fulgurite.strategies.federated import FederatedStrategy
from fulgurite.strategies.federated_adversarial import FederatedAdversarialStrategy

if TYPE_CHECKING:  # the two functions import it when they are called, and the package is whole without it
    from flwr.app import Context, Message
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import Strategy

Loaders = DataLoader[Any] | tuple[DataLoader[Any], DataLoader[Any]]

_STATE = "fulgurite"  # record of a node's state: the tensors of its optimizer, and the round that they are of
_QUIET: dict[str, Any] = dict.fromkeys(
    ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
)
_OF_THE_ROUND = ("devices", "max_epochs", "max_steps", "num_nodes", "strategy")
_OF_THE_NODE = ("buffers", "input_key", "local_epochs", "local_steps", "process_group_backend", "seed", "timeout")


def client_app(
    module_fn: Callable[[], LightningModule],
    dataloader_fn: Callable[[Context], Loaders],
    trainer_kwargs: Mapping[str, Any] | None = None,
    attack: PGD | None = None,
    strategy_kwargs: Mapping[str, Any] | None = None,
) -> ClientApp:
    """What a node does: a local round of an unchanged module, and its validation.

    A message brings the server's model and the number of the round. To train, the node takes the local steps that
    :class:`FederatedStrategy` takes for a client, and sends its whole model back, with ``num-examples`` and what the
    module has logged. To evaluate, it validates the server's model on its own data.

    What an optimizer such as :class:`~fulgurite.plugins.optim.FedSpeed` keeps from round to round stays on the node,
    in ``context.state``. Order and random numbers depend on ``seed``, the round and the node's ``partition-id``, or,
    without one, its id, which is another in each run.

    Args:
        module_fn: makes the module, of the same architecture on all nodes and the server.
        dataloader_fn: from the context, the node's training loader, or a pair of it and one to validate with.
        trainer_kwargs: for the Trainer of each message, such as ``accelerator``, ``precision`` or ``callbacks``;
            without any it logs, saves and prints nothing.
        attack: lets the node train on perturbed inputs; None trains clean.
        strategy_kwargs: those of :class:`FederatedStrategy` that are a client's own: ``local_steps``,
            ``local_epochs``, ``buffers``, ``seed``; with an ``attack`` also ``input_key``.

    Raises:
        ValueError: for a setting that is out of its range, or not the node's to choose.
    """
    from flwr.app import ArrayRecord, MetricRecord, RecordDict
    from flwr.app import Message as Reply
    from flwr.clientapp import ClientApp

    trainer_options, strategy_options = _QUIET | dict(trainer_kwargs or {}), dict(strategy_kwargs or {})
    _check_options(trainer_options, strategy_options)
    _local_strategy(1, 0, attack, strategy_options)  # refuses here, not on the nodes

    def train(message: Message, context: Context) -> Message:
        name, arrays = _only_record(message.content.array_records)
        module = _loaded(module_fn(), arrays.to_torch_state_dict())
        loader = _pair(dataloader_fn(context))[0]
        size = _size(loader)
        number = context.node_config.get("partition-id", context.node_id)
        strategy = _local_strategy(size, number, attack, strategy_options)
        round = _round(message)
        last, kept = _recall(context)
        strategy.continue_from(round, {0: kept} if kept else {})
        trainer = Trainer(devices=1, max_epochs=1, strategy=strategy, **trainer_options | {"limit_val_batches": 0})
        trainer.fit(module, loader)
        if not strategy.stats:
            raise RuntimeError("the fit ended before the round did: let no callback or limit of the Trainer stop it")
        for tensors in strategy.client_states().values():
            _warn_if_absent(trainer, tensors, last, round)
            _remember(context, round, tensors)
        own = {key: value for key, value in _metrics(trainer).items() if not key.startswith("fed/")}
        content = RecordDict({name: ArrayRecord(module.state_dict())})
        content["metrics"] = MetricRecord({"num-examples": size, **own})
        return Reply(content, reply_to=message)

    def evaluate(message: Message, context: Context) -> Message:
        _, arrays = _only_record(message.content.array_records)
        module = _loaded(module_fn(), arrays.to_torch_state_dict())
        loader = _pair(dataloader_fn(context))[1]
        if loader is None:
            raise MisconfigurationException(
                "the server asks for an evaluation, and `dataloader_fn` gives a training loader alone: return a pair"
                " with one to validate with, or give the server `FedAvg(fraction_evaluate=0.0)`"
            )
        trainer = Trainer(devices=1, **trainer_options)
        trainer.validate(module, loader, verbose=False)
        metrics = MetricRecord({"num-examples": _size(loader), **_metrics(trainer)})
        return Reply(RecordDict({"metrics": metrics}), reply_to=message)

    app = ClientApp()
    app.train()(train)
    app.evaluate()(evaluate)
    return app


def server_app(
    module_fn: Callable[[], LightningModule],
    num_rounds: int,
    strategy: Strategy | None = None,
    checkpoint: str | Path | None = None,
) -> ServerApp:
    """What the server does: rounds of a strategy of Flower's, from the weights of a new module.

    Args:
        module_fn: as for :func:`client_app`.
        num_rounds: at least 1.
        strategy: draws nodes and averages their models; None is ``flwr.serverapp.strategy.FedAvg()``, all nodes in
            each round, weighed by their samples, and evaluated if the module has a ``validation_step``.
        checkpoint: file for the final model, which ``load_from_checkpoint`` reads; None keeps it nowhere.

    Raises:
        ValueError: for a ``num_rounds`` out of its range.
        RuntimeError: at the end of a run in which no node trained.
    """
    from flwr.app import ArrayRecord
    from flwr.serverapp import ServerApp
    from flwr.serverapp.strategy import FedAvg

    if num_rounds < 1:
        raise ValueError(f"`num_rounds` must be at least 1, got {num_rounds}")

    def main(grid: Grid, context: Context) -> None:
        module = module_fn()
        chosen = strategy or FedAvg(fraction_evaluate=float(is_overridden("validation_step", module)))
        result = chosen.start(grid, ArrayRecord(module.state_dict()), num_rounds)
        if not result.arrays:
            raise RuntimeError("no node sent a trained model back in any round: the nodes' logs say why")
        if checkpoint is not None:
            _loaded(module, result.arrays.to_torch_state_dict())
            trainer = Trainer(accelerator="cpu", devices=1, **_QUIET)
            trainer.strategy.connect(module)
            trainer.save_checkpoint(checkpoint, weights_only=True)

    app = ServerApp()
    app.main()(main)
    return app


def _check_options(trainer: Mapping[str, Any], strategy: Mapping[str, Any]) -> None:
    """Refuses what is not the node's to choose."""
    for name in trainer.keys() & set(_OF_THE_ROUND):
        raise ValueError(f"`trainer_kwargs` has `{name}`, but a local round is one epoch on one device: leave it out")
    for name in strategy.keys() - set(_OF_THE_NODE):
        raise ValueError(
            f"`strategy_kwargs` has `{name}`, of which the server decides, or `client_app` has an argument for it;"
            f" a node can choose {', '.join(_OF_THE_NODE)}"
        )


def _only_record(records: Mapping[str, Any]) -> tuple[str, Any]:
    if len(records) != 1:
        raise ValueError(
            f"a message must have one ArrayRecord, the server's model, got {len(records)}: use a strategy that, like"
            " FedAvg, sends the model alone"
        )
    return next(iter(records.items()))


def _loaded(module: LightningModule, state: Mapping[str, Tensor]) -> LightningModule:
    """The module with these values; a server that averages counts makes fractions of them."""
    whole = {name for name, value in module.state_dict().items() if not value.is_floating_point()}
    module.load_state_dict({name: value.round() if name in whole else value for name, value in state.items()})
    return module


def _pair(loaders: Loaders) -> tuple[DataLoader[Any], DataLoader[Any] | None]:
    return loaders if isinstance(loaders, tuple) else (loaders, None)


def _size(loader: DataLoader[Any]) -> int:
    batch_size_of(loader)  # refuses samples that cannot be counted
    return len(loader.dataset)  # type: ignore[arg-type]


def _local_strategy(size: int, number: object, attack: PGD | None, options: dict[str, Any]) -> FederatedStrategy:
    seed = derived_seed(options.get("seed", 0), "node", number)
    given = {"partition": [range(size)], **options, "seed": seed}
    return FederatedStrategy(**given) if attack is None else FederatedAdversarialStrategy(attack=attack, **given)


def _round(message: Message) -> int:
    for record in message.content.config_records.values():
        number: Any = record.get("server-round")
        if number is not None:
            return int(number) - 1
    raise ValueError(
        "the message has no `server-round`, on which the order of the samples depends: use a strategy that, like"
        " FedAvg, puts it into the `ConfigRecord` of each message"
    )


def _recall(context: Context) -> tuple[int, list[Tensor]]:
    """The round in which the node trained last, -1 before the first, and what its optimizer keeps."""
    if _STATE not in context.state:
        return -1, []
    kept = context.state.array_records[_STATE].to_torch_state_dict()
    last = int(kept.pop("round"))
    return last, [kept[str(i)] for i in range(len(kept))]


def _remember(context: Context, round: int, tensors: list[Tensor]) -> None:
    from flwr.app import ArrayRecord

    numbered = {str(i): tensor for i, tensor in enumerate(tensors)}
    context.state[_STATE] = ArrayRecord({"round": torch.tensor(round), **numbered})


def _metrics(trainer: Trainer) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def _warn_if_absent(trainer: Trainer, state: list[Tensor], last: int, round: int) -> None:
    """As ``check_pair`` does where one process knows how many clients take part."""
    if last + 1 != round and isinstance(trainer.optimizers[0], FedSpeed) and any(map(torch.any, state)):
        rank_zero_warn(
            f'this node sat out rounds {last + 1} to {round - 1} (from 0), and FedSpeed(server="active") has no fixed'
            " point then: let all nodes train in each round, or give it `correction=False`"
        )
