"""Federated training: many clients, each with samples of its own, share one model round by round."""

import copy
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal, get_args

import torch
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler
from typing_extensions import override

from fulgurite.plugins.federated.average import ClientAverage
from fulgurite.plugins.federated.deal import Deal, Partition
from fulgurite.plugins.federated.loader import ClientLoader, batch_size_of
from fulgurite.plugins.federated.rounds import ClientBatchSampler, Turn
from fulgurite.plugins.federated.states import ClientStates, client_folder
from fulgurite.plugins.optim.exponentiated_gradient import keeps_signs
from fulgurite.plugins.optim.federated_optimizer import FederatedOptimizer
from fulgurite.plugins.optim.fedspeed import check_pair
from fulgurite.plugins.quiet import quiet
from fulgurite.plugins.seeds import seed_all
from fulgurite.strategies._lightning import saves_within_epochs, set_epoch_length, wants_sync_batchnorm
from fulgurite.strategies.replicas import ReplicaStrategy

Weighting = Literal["samples", "uniform"]
Buffers = Literal["average", "keep"]
_ROUND_ENDS = "only the end of a round is a state of the model, so"


class FederatedStrategy(ReplicaStrategy):
    """Trains a federation of clients, an epoch of the Trainer being one round (FedAvg, arXiv 1602.05629).

    In a round some clients are drawn. Each starts from the global weights with a fresh optimizer and takes its local
    steps on its own samples; the server then moves the global weights by the mean of the clients' changes. The
    processes share the clients of a round: the result depends on their number no more than sums in float64 depend on
    their order.

    Validation, checkpoints and schedulers of ``interval="epoch"`` see the round ends. An optimizer that is a
    :class:`~fulgurite.plugins.optim.FederatedOptimizer`, such as FedSpeed, is told where rounds begin and end, and its
    client's state is kept from round to round.

    Args:
        partition: index lists, one a client, which may not overlap; a file of them (``.npz`` or ``.json``); or
            ``"iid"``, ``"dirichlet"`` (label skew, arXiv 1909.06335) or ``"pathological"`` (few classes a client).
        num_clients: clients in all (N); needed for the three named partitions.
        alpha: concentration of ``"dirichlet"``, above 0; the smaller, the more the clients differ.
        classes_per_client: of ``"pathological"``.
        label_key: where named partitions find the labels if the dataset has no ``targets`` or ``labels``: index into
            ``dataset.tensors``, or name of an attribute.
        clients_per_round: a count, or as a float the share in (0, 1], of at least one client.
        local_steps: optimizer steps of a client in a round; None takes ``local_epochs``.
        local_epochs: passes of a client over its samples in a round, at least 1.
        weighting: the server's mean weighs clients by ``"samples"``, or is ``"uniform"``.
        server_optimizer: from the parameters, the optimizer that steps on the negative mean change; None is SGD with
            ``lr=1``, which takes the mean itself, and ``partial(SGD, lr=1, momentum=0.9)`` is FedAvgM.
        buffers: floating buffers, such as BatchNorm's, are averaged like weights (``"average"``) or stay as the
            server has them (``"keep"``).
        client_state_dir: folder, not shared between nodes, for memory-mapped states of clients; None keeps them in
            memory.
        seed: of partition, draws, order and each client's random numbers.
        **kwargs: for :class:`~lightning.pytorch.strategies.DDPStrategy`.

    Attributes:
        stats: the ``fed/*`` metrics of the last round.

    Raises:
        ValueError: for an argument out of its range.
        MisconfigurationException: before the first batch, for a module, Trainer or data that cannot train this way.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> strategy = FederatedStrategy(partition="dirichlet", num_clients=50, alpha=0.3, clients_per_round=5)
        >>> trainer = Trainer(strategy=strategy, accelerator="cpu", devices=1, max_epochs=100, logger=False)
    """

    checkpoint_key: ClassVar[str] = "fulgurite_federated"
    _sum_names: ClassVar[tuple[str, ...]] = ("squared_norms",)  # summed over clients and processes in a round

    def __init__(
        self,
        partition: Partition = "iid",
        num_clients: int | None = None,
        alpha: float = 0.6,
        classes_per_client: int = 2,
        label_key: int | str = 1,
        clients_per_round: int | float = 1.0,
        local_steps: int | None = None,
        local_epochs: int = 1,
        weighting: Weighting = "samples",
        server_optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
        buffers: Buffers = "average",
        client_state_dir: str | None = None,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(devices_per_worker=1, worker_state="none", **kwargs)
        self._deal = Deal(partition, num_clients, alpha, classes_per_client, label_key, seed)
        self.num_clients = self._deal.clients
        self.clients_per_round = clients_per_round
        self.local_steps = local_steps
        self.local_epochs = local_epochs
        self.weighting = weighting
        self.server_optimizer = server_optimizer
        self.buffers = buffers
        self.client_state_dir = client_state_dir
        self.seed = seed
        self._validate()
        self.stats: dict[str, float] = {}
        self._round = 0  # rounds closed so far, and the number of the next one
        self._loaded_for: int | None = None  # round for which the data were loaded
        self._round_open = False
        self._turn: Turn | None = None  # None: a filler
        self._is_last_batch = False
        self._told_to_stop = False
        self._sampler: ClientBatchSampler | None = None
        self._given: tuple[int, dict[int, list[Tensor]]] | None = None  # by an engine that keeps round and states

    def _validate(self) -> None:
        """Ranges of the arguments; what depends on the data is checked when they are loaded."""
        share, clients = self.clients_per_round, self.num_clients
        positive = {"local_epochs": self.local_epochs, "local_steps": self.local_steps}
        for name, value in positive.items():
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}")
        if not (0 < share <= 1 if isinstance(share, float) else 1 <= share <= clients):
            raise ValueError(
                f"`clients_per_round` must be a count from 1 to the number of clients ({clients}), or a share as a"
                f" float in (0, 1], got {share!r}"
            )
        for name, choice in {"weighting": Weighting, "buffers": Buffers}.items():
            if getattr(self, name) not in get_args(choice):
                raise ValueError(f"`{name}` must be one of {get_args(choice)}, got {getattr(self, name)!r}")

    @property
    def sampled_clients(self) -> int:
        """Clients in a round (S)."""
        share = self.clients_per_round
        return max(1, round(share * self.num_clients)) if isinstance(share, float) else share

    # ---- under another engine ----------------------------------------------------------------------------------------

    def continue_from(self, round: int, states: Mapping[int, list[Tensor]]) -> None:
        """Lets fits begin at a round, for an engine that starts one for each round, such as a Flower node.

        Args:
            round: its number, from 0, on which order and random numbers depend.
            states: by client, what ``client_states`` gave after an earlier round; the same on all processes. A client
                that is not in it has no state yet.
        """
        self._given = round, dict(states)

    def client_states(self) -> dict[int, list[Tensor]]:
        """After a fit, what the clients of this process remember; nothing without a ``FederatedOptimizer``."""
        return dict(self._states.owned())

    # ---- setup -------------------------------------------------------------------------------------------------------

    @override
    def check(self, trainer: Trainer) -> None:
        refused = {
            f"`accumulate_grad_batches` is {trainer.accumulate_grad_batches}, and a window of batches would straddle"
            " two clients: leave it at 1, and raise the batch size": trainer.accumulate_grad_batches != 1,
            "the module has `automatic_optimization=False`, and FederatedStrategy must know which step is a client's"
            " last: let Lightning step the optimizer": not self._module.automatic_optimization,
            f"`val_check_interval` is {trainer.val_check_interval!r}: {_ROUND_ENDS} leave it at 1.0, and use"
            " `check_val_every_n_epoch`": trainer.val_check_interval != 1.0 or trainer.check_val_every_n_epoch is None,
            f"`limit_train_batches` is {trainer.limit_train_batches}, a share, and rounds differ in length:"
            " give a count": (isinstance(trainer.limit_train_batches, float) and trainer.limit_train_batches != 1.0),
            f"a ModelCheckpoint saves after some steps or some time: {_ROUND_ENDS} use `every_n_epochs`": any(
                saves_within_epochs(callback) for callback in trainer.checkpoint_callbacks
            ),
            "`sync_batchnorm=True` would mix the statistics of two clients: remove it; with `buffers='average'` the"
            " server averages them after each round": wants_sync_batchnorm(self),
        }
        for reason, holds in refused.items():
            if holds:
                raise MisconfigurationException(reason)
        super().check(trainer)
        if self.sampled_clients < self.world_size:
            rank_zero_warn(
                f"`clients_per_round` is {self.sampled_clients} and there are {self.world_size} processes:"
                f" {self.world_size - self.sampled_clients} of them idle in each round; lower `devices`"
            )

    @override
    def start(self, trainer: Trainer) -> None:
        self._check_schedulers()
        named = dict(self._tensors())
        parameters = {name: tensor for name, tensor in named.items() if isinstance(tensor, nn.Parameter)}
        buffers = {name: tensor for name, tensor in named.items() if name not in parameters}
        server_optimizer = self.server_optimizer or partial(SGD, lr=1.0)
        self._server = server_optimizer(parameters.values())
        self._refuse_sign_changes()
        check_pair(self._client, self._server, full_participation=self.sampled_clients == self.num_clients)
        self._names = [*parameters, *buffers]
        kept = buffers if self.buffers == "keep" else {}
        averaged = {name: buffer for name, buffer in buffers.items() if name not in kept}
        self._average = ClientAverage(*map(list, (parameters.values(), averaged.values(), kept.values())))
        self._states = ClientStates(
            self.num_clients, self.global_rank, self.world_size, self._object_group, self.client_state_dir
        )
        self._round, self._loaded_for = 0, None
        self._sampler, self._round_open, self._turn, self.stats = None, False, None, {}
        if self._given is not None:
            self._round, states = self._given
            self._take_over(states)

    def _refuse_sign_changes(self) -> None:
        """The mean of the clients' weights keeps a sign that they share, and a server that goes beyond it need not."""
        server = self._server
        is_mean = isinstance(server, SGD) and all(
            group["lr"] <= 1 and group["momentum"] == 0 for group in server.param_groups
        )
        if keeps_signs(self._client) and not is_mean:
            raise MisconfigurationException(
                f"ExponentiatedGradient keeps the signs of weights, and `server_optimizer` {type(server).__name__} may"
                " go beyond the clients' mean and change them: leave it out, take SGD without momentum and with `lr` at"
                " most 1, or give the groups of ExponentiatedGradient `hypentropy` above 0"
            )

    def _take_over(self, states: dict[int, list[Tensor]]) -> None:
        for client, tensors in states.items():
            self._states[client] = tensors
        ranks = range(self.world_size)
        self._states.give_back([[client for client in states if self._states.owner(client) == rank] for rank in ranks])

    @property
    def _client(self) -> Optimizer:
        return self.optimizers[0]

    def _check_schedulers(self) -> None:
        if self._given is not None and self.lr_scheduler_configs:
            raise MisconfigurationException(
                "`configure_optimizers` has a learning rate scheduler, and each round is a fit of its own here, in"
                " which the scheduler would begin anew: return the optimizer alone"
            )
        for config in self.lr_scheduler_configs:
            if config.interval == "step":
                raise MisconfigurationException(
                    "a scheduler, or the learning rate finder, changes the rate with `interval='step'`, and the"
                    " clients of a round, which run one after another, would have different ones: use"
                    " `interval='epoch'`, an epoch being a round, and try rates in short fits"
                )

    # ---- data --------------------------------------------------------------------------------------------------------

    @override
    def process_dataloader(self, dataloader: object) -> object:
        """Deals the training samples out to the clients; validation's loader stays as it is."""
        trainer = self._module.trainer
        if not trainer.training:
            return dataloader
        self._check_schedulers()  # again: the learning rate finder has put its own in place
        batch_size = batch_size_of(dataloader)
        assert isinstance(dataloader, DataLoader)
        self._check_loader(dataloader)
        limit = trainer.limit_train_batches  # a count, also by `fast_dev_run`, or 1.0
        self._sampler = ClientBatchSampler(
            self._deal(dataloader.dataset),
            batch_size,
            self.sampled_clients,
            local_steps=self.local_steps,
            local_epochs=self.local_epochs,
            rank=self.global_rank,
            world_size=self.world_size,
            seed=self.seed,
            limit=int(limit) if limit != 1.0 else None,
        )
        # Lightning calls this when an epoch begins. Its number of the epoch runs ahead in some resumed fits.
        self._sampler.sampler = SimpleNamespace(set_epoch=lambda epoch: self._plan_round())
        self._plan_round()
        return ClientLoader(dataloader, self._sampler)

    def _plan_round(self) -> None:
        assert self._sampler is not None
        self._sampler.set_round(self._round)
        set_epoch_length(self._module.trainer, len(self._sampler))

    def _check_loader(self, loader: DataLoader[Any]) -> None:
        if self._loaded_for == self._round:
            raise MisconfigurationException(
                "there is more than one training DataLoader, and clients own samples of one dataset: join the"
                " datasets in a `torch.utils.data.ConcatDataset`"
            )
        self._loaded_for = self._round
        if type(loader.sampler) not in (SequentialSampler, RandomSampler, DistributedSampler):
            rank_zero_warn(
                "the sampler of the training DataLoader is dropped: each client reads its own samples, shuffled in each"
                " of its epochs"
            )

    # ---- a round -----------------------------------------------------------------------------------------------------

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        sampler = self._sampler
        assert sampler is not None
        if batch_idx == 0:
            self._open_round(sampler)
        self._turn, self._is_last_batch = sampler.turn(batch_idx), batch_idx + 1 == len(sampler)
        if self._turn is None:
            return
        if self._turn.step == 0:
            self._open_client(self._turn.client)
        self._seed("step")

    def _seed(self, purpose: str) -> None:
        """Random numbers from here on are this client's and step's own, whatever rank it is on and what came before."""
        assert self._sampler is not None
        assert self._turn is not None
        seed_all(self.seed, purpose, self._sampler.round, self._turn.client, self._turn.step)

    def _open_round(self, sampler: ClientBatchSampler) -> None:
        self._average.open()
        self._round_open, self._idles = True, False
        self._groups = copy.deepcopy(self._client.state_dict()["param_groups"])
        self._sums = dict.fromkeys((*self._sum_names, *getattr(self._client, "round_metrics", {})), 0.0)
        if isinstance(self._client, FederatedOptimizer):
            self._states.borrow(sampler.plan)

    def _open_client(self, client: int) -> None:
        self._reset_client_optimizer()
        if isinstance(self._client, FederatedOptimizer):
            self._client.begin_round(self._states[client])

    def _reset_client_optimizer(self) -> None:
        self._client.load_state_dict({"state": {}, "param_groups": self._groups})

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        assert self._sampler is not None
        if self._turn is not None:
            return super().training_step(*args, **kwargs)
        if not self._sampler.turns and not self._idles:
            # What the module logs must be known on each rank, or those that reduce it at the epoch's end wait for ever.
            self._idles = True
            with torch.no_grad(), quiet(self._module, evaluate=True, mute=False):
                super().training_step(*args, **kwargs)
        return torch.zeros((), device=self.root_device, requires_grad=True)

    @override
    def reduce(self, tensor: Tensor, group: Any | None = None, reduce_op: Any = "mean") -> Tensor:
        if self._in_training_step and group is None:
            rank_zero_warn(
                "`self.log(..., sync_dist=True)` in `training_step` is not reduced in the step, where each process"
                " trains a client of its own; its mean over the epoch is"
            )
            return tensor
        return super().reduce(tensor, group, reduce_op)

    @override
    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: LightningModule | nn.Module | None = None,
        **kwargs: Any,
    ) -> Any:
        if self._turn is not None:
            return super().optimizer_step(optimizer, self._aloud_once(closure), model, **kwargs)
        output = closure()  # of a filler; Lightning wants its result
        with torch.no_grad():
            self.after_step()
        return output

    def _aloud_once(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Lets an optimizer that calls its closure again not log, count and normalise the batch again."""
        called = False

        def again() -> Any:
            nonlocal called
            if called:
                with quiet(self._module):
                    return closure()
            called = True
            return closure()

        return again

    @override
    def after_step(self) -> None:
        if self._turn is not None and self._turn.last:
            self._close_client(self._turn.client)
        if self._is_last_batch:
            self._close_round()

    def _close_client(self, client: int) -> None:
        if isinstance(self._client, FederatedOptimizer):
            self._states[client] = self._client.end_round()
        weight = self._weight(client)
        self._sums["squared_norms"] += weight * self._average.add(weight)
        for name, value in getattr(self._client, "round_metrics", {}).items():
            self._sums[name] += value

    def _weight(self, client: int) -> int:
        assert self._sampler is not None
        return len(self._sampler.parts[client]) if self.weighting == "samples" else 1

    def _close_round(self) -> None:
        sampler = self._sampler
        assert sampler is not None
        self.refuse_unfrozen()
        weight = sum(map(self._weight, sampler.clients))
        changes, sums = self._average.close(weight, list(self._sums.values()))
        self._step_server(changes, weight / sum(map(self._weight, range(self.num_clients))))
        if isinstance(self._client, FederatedOptimizer):
            self._states.give_back(sampler.plan)
        self._reset_client_optimizer()  # nothing of the last client is left for the checkpoint
        self._round_open = False
        self._round += 1
        seed_all(self.seed, "server", sampler.round)
        self.stats = self._round_metrics(changes, weight, dict(zip(self._sums, sums, strict=True)))
        self.log_scalars(self.stats)
        self._stop_if_told()

    def _step_server(self, changes: list[Tensor], participation: float) -> None:
        parameters = self._average.parameters
        for parameter, change in zip(parameters, changes, strict=True):
            parameter.grad = change.neg().to(parameter.dtype)
        for group in self._server.param_groups:
            if "participation" in group:
                group["participation"] = participation
        self._server.step()
        for parameter in parameters:
            parameter.grad = None

    def _round_metrics(self, changes: list[Tensor], weight: float, sums: dict[str, float]) -> dict[str, float]:
        """What is logged of a round; ``sums`` are over its clients."""
        sampler = self._sampler
        assert sampler is not None
        clients = sampler.clients
        squared_norm = sum(norm.item() ** 2 for norm in torch._foreach_norm(changes))
        return {
            "fed/round": sampler.round,
            "fed/clients": len(clients),
            "fed/samples": sum(len(sampler.parts[client]) for client in clients),
            "fed/update_norm": squared_norm**0.5,
            "fed/drift": max(0.0, sums.pop("squared_norms") / weight - squared_norm) ** 0.5,
            "fed/bytes": 2 * len(clients) * self._average.nbytes,
            "fed/filler_share": sampler.filler_share,
            **{name: value / len(clients) for name, value in sums.items()},
            **getattr(self._server, "round_metrics", {}),
        }

    def _stop_if_told(self) -> None:
        self._told_to_stop = self.ask_to_stop()()
        trainer = self._module.trainer
        every = trainer.check_val_every_n_epoch or 1
        if not (trainer.enable_validation and (trainer.current_epoch + 1) % every == 0):
            self._end_if_told()

    def _end_if_told(self) -> None:
        if self._told_to_stop:
            self.stop()

    @override
    def on_validation_end(self) -> None:
        super().on_validation_end()
        self._end_if_told()  # not before: the validation would be cut short, and with it the round that it belongs to

    # ---- what the shared room asks ----------------------------------------------------------------------------------

    @property
    @override
    def apart(self) -> bool:
        return self._round_open

    @override
    def shared_values(self) -> dict[str, Tensor]:
        return dict(zip(self._names, self._average.anchor, strict=True))

    @override
    def finish(self) -> None:
        if self._round_open:
            rank_zero_warn(
                "training ended within a round, whose clients' work is dropped, and the model is that of the round's"
                " start: give the Trainer `max_epochs` instead of `max_steps`; an epoch is a round"
            )

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    @override
    def rule_state(self) -> dict[str, Any]:
        return {
            "num_clients": self.num_clients,
            "seed": self.seed,
            "round": self._round,
            "server": self._server.state_dict(),
            "clients": sorted(self._states.touched),
        }

    @override
    def load_rule_state(self, state: Mapping[str, Any], same_workers: bool) -> None:
        if state["apart"]:
            raise MisconfigurationException(
                f"the checkpoint {self._restored_from} was saved within a round: {_ROUND_ENDS} resume from one that"
                " ModelCheckpoint saved at the end of an epoch"
            )
        for name in ("num_clients", "seed"):
            if state[name] != getattr(self, name):
                raise MisconfigurationException(
                    f"`{name}` is {getattr(self, name)} and was {state[name]} in the checkpoint: the clients would have"
                    " other samples than those that they have learnt from; give the same"
                )
        self._round = state["round"]
        self._server.load_state_dict(state["server"])
        self._states.load(client_folder(self._restored_from), self._round, state["clients"])

    @override
    def load_checkpoint(self, checkpoint_path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        self._restored_from = checkpoint_path
        return super().load_checkpoint(checkpoint_path, *args, **kwargs)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Writes the clients' states beside the checkpoint, each from its owner, and then the checkpoint.

        Whenever a process dies, a checkpoint that exists is whole, also one that was to be overwritten. A fit that ends
        by an exception within a round saves none: it would not resume, and stand before the last one that does.
        """
        if "optimizer_states" in checkpoint and self._round_open and self._module.trainer.interrupted:
            rank_zero_warn(
                f"the fit ended by an exception within a round, and {filepath} is not written: {_ROUND_ENDS} resume"
                " from one that ModelCheckpoint saved at the end of an epoch"
            )
            return
        folder = client_folder(filepath)
        has_states = "optimizer_states" in checkpoint and self._object_group is not None and self._states.touched
        if has_states:
            self._states.save(folder, self._round)
            self.barrier()
        super().save_checkpoint(checkpoint, filepath, storage_options)
        if has_states and self.is_global_zero:
            self._states.forget_others(folder, self._round)

    @override
    def remove_checkpoint(self, filepath: str | Path) -> None:
        super().remove_checkpoint(filepath)
        folder = client_folder(filepath)
        filesystem = get_filesystem(folder)
        if self.is_global_zero and filesystem.exists(folder):
            filesystem.rm(folder, recursive=True)
