"""Federated rounds against plain loops in double precision, on any number of processes."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, WeightedRandomSampler
from torchmetrics import MeanMetric, SumMetric
from typing_extensions import override

from fulgurite.plugins.federated.rounds import ClientBatchSampler
from fulgurite.plugins.optim import FedSpeed, FedSpeedServer
from fulgurite.strategies import FederatedStrategy
from tests.suites.fits import assert_same, fit
from tests.suites.models import WIDTH, MakeOptimizer, Normalised, Regressor, adamw, dataset, sgd

PARTS = [list(range(start, stop)) for start, stop in ((0, 20), (20, 23), (23, 40), (40, 48), (48, 60))]
ROUNDS = 3


class Clients(Regressor):
    """Sixty rows, in double precision unless said."""

    def __init__(self, batch_size: int = 4, dtype: torch.dtype = torch.float64, **kwargs: Any) -> None:
        torch.manual_seed(3)
        super().__init__(blocks=1, **kwargs)
        self.batch_size = batch_size
        self.to(dtype)

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(dataset(60, seed=0, dtype=self.head.weight.dtype), batch_size=self.batch_size, shuffle=True)

    @override
    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(dataset(16, seed=1, dtype=self.head.weight.dtype), batch_size=8)


def federated(partition: Any = PARTS, **options: Any) -> FederatedStrategy:
    return FederatedStrategy(partition, start_method="fork", **options)


def train(folder: Path, module: LightningModule, strategy: Any, rounds: int = ROUNDS, **options: Any) -> dict[str, Any]:
    """Fits, and returns what rank 0 had at the end: its weights under ``local``."""
    snapshot = fit(folder, module, strategy, **{"devices": 1, "max_steps": -1, "max_epochs": rounds, **options})
    return snapshot.read(0)


def simulate(
    module: Regressor,
    parts: list[list[int]],
    *,
    clients_per_round: int,
    local_steps: int | None = None,
    local_epochs: int = 1,
    weighting: str = "samples",
    momentum: float = 0.0,
    rounds: int = ROUNDS,
) -> dict[str, Tensor]:
    """Federated averaging as a textbook writes it; only who trains on what, in which order, is asked of the package."""
    rows = module.train_dataloader().dataset.tensors
    arrays = [np.array(part) for part in parts]
    sampler = ClientBatchSampler(
        arrays, module.batch_size, clients_per_round, local_steps=local_steps, local_epochs=local_epochs
    )
    velocity = {name: torch.zeros_like(value) for name, value in module.named_parameters()}
    for number in range(rounds):
        sampler.set_round(number)
        start = {name: value.detach().clone() for name, value in module.named_parameters()}
        mean = {name: torch.zeros_like(value) for name, value in start.items()}
        weights = {client: len(parts[client]) if weighting == "samples" else 1 for client in sampler.clients}
        for turn, batch in zip(sampler.turns, sampler, strict=True):
            if turn.step == 0:
                module.load_state_dict(start)
                optimizer = module.make_optimizer(module.parameters())
            optimizer.zero_grad()
            mse_loss(module(rows[0][batch]), rows[1][batch]).backward()
            optimizer.step()
            if turn.last:
                for name, value in module.named_parameters():
                    share = weights[turn.client] / sum(weights.values())
                    mean[name] += share * (value.detach() - start[name])
        for name in start:
            velocity[name] = momentum * velocity[name] + mean[name]
            start[name] += velocity[name]
        module.load_state_dict(start)
    return {name: value.detach().clone() for name, value in module.named_parameters()}


# ---- the algorithm ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"clients_per_round": 5, "local_steps": 3},
        {"clients_per_round": 2, "local_epochs": 2},
        {"clients_per_round": 3, "weighting": "uniform"},
        {"clients_per_round": 4, "momentum": 0.9},
    ],
    ids=str,
)
@pytest.mark.parametrize("make_optimizer", [sgd, adamw])
def test_equals_the_textbook(options: dict[str, Any], make_optimizer: MakeOptimizer, tmp_path: Path) -> None:
    server = {"server_optimizer": partial(SGD, lr=1, momentum=options["momentum"])} if "momentum" in options else {}
    given = {name: value for name, value in options.items() if name != "momentum"}
    got = train(tmp_path, Clients(make_optimizer=make_optimizer), federated(**given, **server))
    # Adam divides by the root of small squares, which magnifies the rounding.
    assert_same(got["local"], simulate(Clients(make_optimizer=make_optimizer), PARTS, **options), tolerance=1e-10)


def test_one_step_of_everybody_on_everything_is_gradient_descent(tmp_path: Path) -> None:
    got = train(tmp_path, Clients(batch_size=60, make_optimizer=sgd), federated(local_steps=1))
    module = Clients(make_optimizer=sgd)
    inputs, targets = module.train_dataloader().dataset.tensors
    optimizer = sgd(module.parameters())
    for _ in range(ROUNDS):
        optimizer.zero_grad()
        mse_loss(module(inputs), targets).backward()
        optimizer.step()
    assert_same(got["local"], dict(module.named_parameters()), tolerance=1e-12)


def test_one_client_is_an_ordinary_fit(tmp_path: Path) -> None:
    everything = [list(range(60))]

    class InOrder(Clients):
        """Reads the batches of the only client, an epoch a round."""

        def train_dataloader(self) -> DataLoader[Any]:
            sampler = ClientBatchSampler([np.arange(60)], 4, 1)
            sampler.set_round(self.trainer.current_epoch)
            return DataLoader(super().train_dataloader().dataset, batch_sampler=list(sampler))

    got = train(tmp_path / "federated", Clients(make_optimizer=sgd), federated(everything))
    plain = InOrder(make_optimizer=sgd)
    want = train(tmp_path / "plain", plain, "ddp_fork", reload_dataloaders_every_n_epochs=1)
    assert_same(got["local"], want["local"], tolerance=1e-12)


# ---- processes -------------------------------------------------------------------------------------------------------


class Noisy(Dataset[Any]):
    """Draws random numbers as it loads, as augmentation does."""

    def __len__(self) -> int:
        return 60

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs = torch.full((WIDTH,), float(index)).sin() + torch.randn(WIDTH) * np.random.rand()
        return inputs, inputs.sum(0, keepdim=True)


class Stochastic(Normalised):
    """With batch norm, dropout, noisy data and a metric."""

    def __init__(self, **kwargs: Any) -> None:
        torch.manual_seed(3)
        super().__init__(blocks=2, **kwargs)
        self.dropout = nn.Dropout(0.2)
        self.seen, self.mean_loss = SumMetric(), MeanMetric()

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(self.dropout(inputs))

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Noisy(), batch_size=4, shuffle=True)

    @override
    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(dataset(48, seed=1), batch_size=8)  # as many for each of one, two or three processes

    @override
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.seen(float(len(batch[0])))
        self.mean_loss(loss.detach(), len(batch[0]))
        metrics: Any = {"seen": self.seen, "mean_loss": self.mean_loss}
        self.log_dict(metrics, on_step=False, on_epoch=True)
        self.log("synced", loss, sync_dist=True, on_step=False, on_epoch=True)
        return loss


def whole_batches(count: int) -> list[list[int]]:
    """Clients of which none has a last batch of one row, which batch norm refuses."""
    return [list(range(8 * client, 8 * client + (8 if client % 2 else 6))) for client in range(count)]


def slow_sgd(parameters: Any) -> Optimizer:
    return SGD(parameters, lr=0.002)


SETTINGS: dict[str, tuple[MakeOptimizer, dict[str, Any]]] = {
    "adamw": (adamw, {"clients_per_round": 4}),
    "fedspeed": (lambda parameters: FedSpeed(parameters, lr=0.02), {"server_optimizer": FedSpeedServer}),
    "uneven": (slow_sgd, {"clients_per_round": 3, "local_epochs": 2}),
    "keep": (slow_sgd, {"buffers": "keep"}),
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("devices", [2, 3])
def test_the_number_of_processes_changes_nothing(setting: str, devices: int, tmp_path: Path) -> None:
    make_optimizer, options = SETTINGS[setting]
    runs = []
    for world in (1, devices):
        module = Stochastic(make_optimizer=make_optimizer)
        strategy = federated(whole_batches(7), **options)
        trainer = quiet_trainer(tmp_path, strategy, devices=world, max_epochs=ROUNDS)
        trainer.fit(module)
        metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
        runs.append(({name: value.clone() for name, value in module.state_dict().items()}, metrics))
    assert_same(runs[0][0], runs[1][0])
    for metrics in (run[1] for run in runs):
        # Of the last process's own batches; a share of all of theirs; and Lightning's mean of batch sizes is truncated.
        for name in ("train_loss", "fed/filler_share", "synced"):
            metrics.pop(name)
    assert runs[0][1] == pytest.approx(runs[1][1], rel=1e-6)


def quiet_trainer(folder: Path, strategy: Any, **options: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "devices": 1}
    quiet |= {"enable_checkpointing": False, "default_root_dir": folder, "accelerator": "cpu", "max_epochs": 1}
    return Trainer(strategy=strategy, **quiet | options)


@pytest.mark.parametrize("devices", [1, 2, 3])
def test_a_metric_sees_each_sample_once_even_where_a_process_has_no_client(devices: int, tmp_path: Path) -> None:
    strategy = federated(whole_batches(7), clients_per_round=2, local_epochs=3)
    trainer = quiet_trainer(tmp_path, strategy, devices=devices)
    trainer.fit(Stochastic(make_optimizer=sgd))  # hangs where the idle process does not know what is logged
    assert trainer.callback_metrics["seen"] == 3 * trainer.callback_metrics["fed/samples"]
    assert trainer.callback_metrics["synced"] > 0


class WhoStepped(Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: list[Any] = []

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.rows.append([trainer.current_epoch, batch_idx, trainer.num_training_batches, len(batch[0])])

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        Path(self.folder, f"rank{trainer.global_rank}.json").write_text(json.dumps(self.rows))


def test_rounds_of_different_length_are_complete_on_all_processes(tmp_path: Path) -> None:
    strategy = federated(clients_per_round=2, local_epochs=2)
    trainer = quiet_trainer(tmp_path, strategy, devices=2, max_epochs=6, callbacks=[WhoStepped(tmp_path)])
    trainer.fit(Clients(make_optimizer=sgd))
    ranks = [json.loads(Path(tmp_path, f"rank{rank}.json").read_text()) for rank in range(2)]
    sampler = ClientBatchSampler([np.array(part) for part in PARTS], 4, 2, local_epochs=2, world_size=2)
    lengths = []
    for number in range(6):
        sampler.set_round(number)
        lengths.append(len(sampler))
    assert len(set(lengths)) > 1
    for rows in ranks:
        assert [row[:3] for row in rows] == [
            [number, index, length] for number, length in enumerate(lengths) for index in range(length)
        ]
    samples = [sum(row[3] for row in rows if row[0] == number) for rows in ranks for number in range(6)]
    assert min(samples) > 0


# ---- what the server does with buffers, metrics, schedules -----------------------------------------------------------


class Counting(Clients):
    """Its buffers hold what a client saw last."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("last_size", torch.tensor(100.0, dtype=torch.float64))

    @override
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.steps += 1
        self.last_size.fill_(len(batch[0]))
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("devices", [1, 2])
def test_buffers_are_averaged_or_kept(devices: int, tmp_path: Path) -> None:
    kept, averaged = ({}, {})
    for buffers, found in (("keep", kept), ("average", averaged)):
        module = Counting(batch_size=16)
        quiet_trainer(tmp_path, federated(buffers=buffers), devices=devices, max_epochs=2).fit(module)
        found |= {"steps": module.steps.item(), "last_size": module.last_size.item()}
    assert kept == {"steps": 0, "last_size": 100.0}
    last = {20: 4, 3: 3, 17: 1, 8: 8, 12: 12}  # size of the last batch of 16, by the number of samples
    mean = sum(samples * size for samples, size in last.items()) / 60
    assert averaged == {"steps": 4, "last_size": pytest.approx(mean)}  # two rounds, of two batches at most


class Watch(Callback):
    """What is logged and shown at the end of each round."""

    def __init__(self) -> None:
        self.rounds: list[dict[str, Any]] = []

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            weights = torch.cat([value.detach().flatten().clone() for value in pl_module.parameters()])
            metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
            lr = trainer.optimizers[0].param_groups[0]["lr"]
            self.rounds.append({"weights": weights, "lr": lr, "state": len(trainer.optimizers[0].state), **metrics})


def alone(**options: Any) -> FederatedStrategy:
    """In this process, so that callbacks can be asked afterwards."""
    return FederatedStrategy(PARTS, **options)


def test_logged_numbers_are_those_of_the_round(tmp_path: Path) -> None:
    watch = Watch()
    module = Clients(make_optimizer=sgd)
    start = torch.cat([value.detach().flatten().clone() for value in module.parameters()])
    quiet_trainer(tmp_path, alone(clients_per_round=3), max_epochs=2, callbacks=[watch]).fit(module)
    first, second = watch.rounds
    assert [first["fed/round"], second["fed/round"]] == [0, 1]
    assert first["fed/clients"] == 3
    sampler = ClientBatchSampler([np.array(part) for part in PARTS], 4, 3)
    sizes = [len(PARTS[client]) for client in sampler.clients]
    assert first["fed/samples"] == sum(sizes)
    assert first["fed/bytes"] == 2 * 3 * 8 * len(start)
    assert first["fed/filler_share"] == 0
    assert first["fed/update_norm"] == pytest.approx((first["weights"] - start).norm().item())
    assert second["fed/update_norm"] == pytest.approx((second["weights"] - first["weights"]).norm().item())
    changes = []
    for client in sampler.clients:
        only = [PARTS[client] if i == client else [i] for i in range(5)]  # the others' samples do not matter
        changes.append(change_of(client, sampler, only))
    mean = sum(size * change for size, change in zip(sizes, changes, strict=True)) / sum(sizes)
    spread = sum(size * change.square().sum() for size, change in zip(sizes, changes, strict=True)) / sum(sizes)
    assert first["fed/drift"] == pytest.approx((spread - mean.square().sum()).sqrt().item())


def change_of(client: int, sampler: ClientBatchSampler, parts: list[list[int]]) -> Tensor:
    """What one client does to the initial weights in round 0."""
    module = Clients(make_optimizer=sgd)
    start = torch.cat([value.detach().flatten().clone() for value in module.parameters()])
    rows = module.train_dataloader().dataset.tensors
    optimizer = sgd(module.parameters())
    for turn, batch in zip(sampler.turns, sampler, strict=True):
        if turn.client == client:
            assert set(batch) <= set(parts[client])
            optimizer.zero_grad()
            mse_loss(module(rows[0][batch]), rows[1][batch]).backward()
            optimizer.step()
    return torch.cat([value.detach().flatten() for value in module.parameters()]) - start


def test_validation_and_schedulers_see_the_rounds(tmp_path: Path) -> None:
    class Decaying(Clients):
        def configure_optimizers(self) -> Any:
            optimizer = adamw(self.parameters())
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]

    watch = Watch()
    module = Decaying()
    quiet_trainer(tmp_path, alone(), max_epochs=3, callbacks=[watch]).fit(module)
    assert [entry["lr"] for entry in watch.rounds] == pytest.approx([0.005, 0.0025, 0.00125])
    assert [entry["state"] for entry in watch.rounds] == [0, 0, 0]  # a client's moments end with its round
    inputs, targets = module.val_dataloader().dataset.tensors
    assert watch.rounds[-1]["val_loss"] == pytest.approx(mse_loss(module(inputs), targets).item())


def test_a_scheduler_reaches_the_clients(tmp_path: Path) -> None:
    class Stopping(Clients):
        def configure_optimizers(self) -> Any:
            optimizer = sgd(self.parameters())
            return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda round: float(round < 2))]

    watch = Watch()
    quiet_trainer(tmp_path, alone(), max_epochs=4, callbacks=[watch]).fit(Stopping())
    assert [entry["fed/update_norm"] > 0 for entry in watch.rounds] == [True, True, False, False]


@pytest.mark.parametrize(
    ("options", "batches"),
    [({"fast_dev_run": 2}, 2), ({"limit_train_batches": 5}, 5)],
)
def test_a_round_cut_short_still_closes(options: dict[str, Any], batches: int, tmp_path: Path) -> None:
    strategy = alone()
    trainer = quiet_trainer(tmp_path, strategy, **options)
    trainer.fit(Clients())
    assert strategy.stats["fed/round"] == 0
    assert trainer.global_step == batches


def test_ending_within_a_round_drops_it(tmp_path: Path) -> None:
    strategy = alone()
    module = Clients(make_optimizer=sgd)
    with pytest.warns(UserWarning, match="ended within a round"):
        quiet_trainer(tmp_path, strategy, max_epochs=-1, max_steps=25).fit(module)
    assert_same(
        dict(module.named_parameters()),
        simulate(Clients(make_optimizer=sgd), PARTS, clients_per_round=5, rounds=1),
        1e-10,
    )


@pytest.mark.parametrize("kind", ["dirichlet", "pathological", "iid", "json", "npz"])
def test_partitions_by_name_and_from_files(kind: str, tmp_path: Path) -> None:
    class Labelled(Clients):
        def train_dataloader(self) -> DataLoader[Any]:
            inputs, targets = super().train_dataloader().dataset.tensors
            return DataLoader(TensorDataset(inputs, targets, (targets > 0).long().flatten()), batch_size=4)

    options: dict[str, Any] = {"partition": kind, "num_clients": 4, "label_key": 2, "classes_per_client": 1}
    if kind in ("json", "npz"):
        options = {"partition": str(tmp_path / f"parts.{kind}")}
        if kind == "json":
            Path(options["partition"]).write_text(json.dumps(PARTS))
        else:
            np.savez(options["partition"], *map(np.array, PARTS))
    strategy = FederatedStrategy(**options)
    trainer = quiet_trainer(tmp_path, strategy)
    trainer.fit(Labelled())
    assert strategy.stats["fed/samples"] == 60
    assert strategy.stats["fed/clients"] == strategy.num_clients == (5 if kind in ("json", "npz") else 4)


# ---- what an optimizer that knows of rounds is told ------------------------------------------------------------------


class Remembering(SGD):
    """Counts its client's rounds and steps."""

    def __init__(self, parameters: Any, lr: float = 0.01) -> None:
        super().__init__(parameters, lr=lr)
        self.open, self.log, self.round_metrics = False, [], {"remembering/steps": 0.0}

    def begin_round(self, state: list[Tensor] | None) -> None:
        assert not self.open
        assert not self.state
        self.open = True
        self.counts = torch.zeros(2) if state is None else state[0].clone()
        self.log.append(self.counts.tolist())

    def step(self, closure: Any = None) -> Any:
        assert self.open
        self.counts[1] += 1
        return super().step(closure)

    def end_round(self) -> list[Tensor]:
        self.open = False
        self.counts[0] += 1
        self.round_metrics = {"remembering/steps": self.counts[1].item()}
        return [self.counts]


def test_each_client_gets_its_own_state_back(tmp_path: Path) -> None:
    module = Clients(make_optimizer=Remembering)
    strategy = alone(local_steps=2)
    trainer = quiet_trainer(tmp_path, strategy, max_epochs=3)
    trainer.fit(module)
    log = trainer.optimizers[0].log
    assert sorted(log) == sorted([[done, 2.0 * done] for done in range(3) for _ in range(5)])
    assert strategy.stats["remembering/steps"] == 6


def test_the_participation_reaches_the_server(tmp_path: Path) -> None:
    class Server(SGD):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, lr=1)
            self.param_groups[0]["participation"] = None

    for weighting, share in (("samples", 0.2), ("uniform", 2 / 5)):
        strategy = alone(server_optimizer=Server, clients_per_round=2, weighting=weighting, seed=4)
        quiet_trainer(tmp_path, strategy).fit(Clients())
        samples = strategy.stats["fed/samples"]
        expected = samples / 60 if weighting == "samples" else share
        assert strategy._server.param_groups[0]["participation"] == pytest.approx(expected)


def test_fedspeed_duals_average_to_the_server_state(tmp_path: Path) -> None:
    strategy = alone(server_optimizer=FedSpeedServer, clients_per_round=2)
    module = Clients(make_optimizer=lambda parameters: FedSpeed(parameters, lr=0.05, lam=2.0))
    quiet_trainer(tmp_path, strategy, max_epochs=6).fit(module)
    duals = dict(strategy._states.owned())
    for index, parameter in enumerate(module.parameters()):
        mean = sum(len(PARTS[client]) * tensors[index] for client, tensors in duals.items()) / 60
        torch.testing.assert_close(strategy._server.state[parameter]["h"], -2.0 * mean, rtol=1e-9, atol=1e-12)


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"partition": "iid"}, "`num_clients` must be at least 1"),
        ({"partition": "iid", "num_clients": 0}, "`num_clients` must be at least 1 .* got 0"),
        ({"num_clients": 4}, "`num_clients` is 4, but `partition` has 5 index lists"),
        ({"partition": "shards.txt"}, "`partition` is read from an .npz or .json file"),
        ({"partition": "dirichlet", "num_clients": 3, "alpha": 0.0}, "`alpha` is a concentration .* got 0.0"),
        ({"partition": "pathological", "num_clients": 3, "classes_per_client": 0}, "`classes_per_client` .* got 0"),
        ({"clients_per_round": 6}, r"`clients_per_round` .* number of clients \(5\).* got 6"),
        ({"clients_per_round": 0}, "`clients_per_round` .* got 0"),
        ({"clients_per_round": 0.0}, "`clients_per_round` .* got 0.0"),
        ({"clients_per_round": 1.5}, "`clients_per_round` .* got 1.5"),
        ({"local_steps": 0}, "`local_steps` must be at least 1, got 0"),
        ({"local_epochs": 0}, "`local_epochs` must be at least 1, got 0"),
        ({"weighting": "equal"}, "`weighting` must be one of .* got 'equal'"),
        ({"buffers": "sum"}, "`buffers` must be one of .* got 'sum'"),
    ],
    ids=str,
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FederatedStrategy(**{"partition": PARTS, **options})


class Rows(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(dataset(8, seed=0))


def with_loader(make_loader: Callable[[], Any]) -> Clients:
    class Loaded(Clients):
        def train_dataloader(self) -> Any:
            return make_loader()

    return Loaded()


def with_optimizers(make: Callable[[Any], Any]) -> Clients:
    class Optimised(Clients):
        def configure_optimizers(self) -> Any:
            return make(self.parameters())

    return Optimised()


def step_scheduler(parameters: Any) -> Any:
    optimizer = sgd(parameters)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def rows(batch_size: int | None = 4, **options: Any) -> DataLoader[Any]:
    return DataLoader(dataset(60, seed=0, dtype=torch.float64), batch_size=batch_size, **options)


@pytest.mark.parametrize(
    ("make_module", "strategy", "trainer", "message"),
    [
        (Clients, {}, {"accumulate_grad_batches": 2}, "would straddle two clients"),
        (Clients, {}, {"val_check_interval": 0.5}, "`val_check_interval` is 0.5"),
        (Clients, {}, {"val_check_interval": 3, "check_val_every_n_epoch": None}, "`val_check_interval` is 3"),
        (Clients, {}, {"limit_train_batches": 0.5}, "`limit_train_batches` is 0.5, a share"),
        (Clients, {}, {"sync_batchnorm": True}, "`sync_batchnorm=True` would mix"),
        (
            Clients,
            {},
            {"callbacks": [ModelCheckpoint(every_n_train_steps=3)], "enable_checkpointing": True},
            "saves after some steps",
        ),
        (partial(with_optimizers, step_scheduler), {}, {}, "use `interval='epoch'`"),
        (partial(with_loader, lambda: DataLoader(Rows())), {}, {}, "the training data come as Rows"),
        (partial(with_loader, lambda: [rows(), rows()]), {}, {}, "more than one training DataLoader"),
        (partial(with_loader, lambda: rows(batch_size=None)), {}, {}, "has no `batch_size`"),
        (Clients, {"partition": [[0, 1], [1, 2]]}, {}, "gives index 1 to client 1 and to client 0"),
        (Clients, {"partition": [[0], [60]]}, {}, "gives index 60 to client 1, and the dataset has 60"),
        (Clients, {"partition": [[0], []]}, {}, "leaves client 1 without samples"),
        (
            partial(Clients, make_optimizer=FedSpeed),
            {},
            {},
            r"FedSpeed\(server=\"all\"\) leaves the correction .* pass FedSpeedServer",
        ),
        (partial(Clients, make_optimizer=sgd), {"server_optimizer": FedSpeedServer}, {}, "needs FedSpeed"),
        (
            partial(Clients, make_optimizer=partial(FedSpeed, local_steps=3)),
            {"server_optimizer": FedSpeedServer},
            {},
            "`local_steps` of FedSpeed is 3",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused_before_the_first_batch(
    make_module: Callable[[], LightningModule],
    strategy: dict[str, Any],
    trainer: dict[str, Any],
    message: str,
    tmp_path: Path,
) -> None:
    module = make_module()
    module.training_step = lambda batch, batch_idx: pytest.fail("a batch was trained on")  # type: ignore[assignment]
    with pytest.raises((MisconfigurationException, ValueError), match=message):
        quiet_trainer(tmp_path, FederatedStrategy(**{"partition": PARTS, **strategy}), **trainer).fit(module)


def test_unfreezing_within_a_fit_is_refused(tmp_path: Path) -> None:
    class Thaws(Clients):
        def __init__(self) -> None:
            super().__init__()
            self.head.requires_grad_(False)

        def on_train_epoch_start(self) -> None:
            self.head.requires_grad_(self.current_epoch > 0)

    with pytest.raises(MisconfigurationException, match=r"`head.weight` was unfrozen or replaced during the fit"):
        quiet_trainer(tmp_path, alone(), max_epochs=2).fit(Thaws())


def test_the_learning_rate_finder_is_refused(tmp_path: Path) -> None:
    module = with_optimizers(lambda parameters: SGD(parameters, lr=module.lr))
    module.lr = 0.01
    with pytest.raises(MisconfigurationException, match="the learning rate finder, changes the rate"):
        Tuner(quiet_trainer(tmp_path, alone())).lr_find(module, num_training=12)


def test_worker_processes_load_the_same(tmp_path: Path) -> None:
    def loaded(num_workers: int) -> Any:
        module = with_loader(lambda: rows(num_workers=num_workers, persistent_workers=num_workers > 0))
        quiet_trainer(tmp_path, alone(clients_per_round=2), max_epochs=3).fit(module)
        return dict(module.named_parameters())

    assert_same(loaded(1), loaded(0))


@pytest.mark.parametrize("kind", ["dirichlet", "pathological"])
def test_labels_that_are_not_found(kind: str, tmp_path: Path) -> None:
    strategy = FederatedStrategy(kind, num_clients=3, label_key=5)
    with pytest.raises(ValueError, match="has no labels under `label_key` 5"):
        quiet_trainer(tmp_path, strategy).fit(Clients())


def test_a_sampler_of_the_users_is_dropped_with_a_warning(tmp_path: Path) -> None:
    sampler = WeightedRandomSampler([1.0] * 60, 60)
    with pytest.warns(UserWarning, match="the sampler of the training DataLoader is dropped"):
        quiet_trainer(tmp_path, alone()).fit(with_loader(lambda: rows(sampler=sampler)))


def test_idle_processes_draw_a_warning(tmp_path: Path, recwarn: Any) -> None:
    class Heard(Callback):
        @override
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if trainer.is_global_zero:
                Path(tmp_path, "heard").write_text(" ".join(str(warning.message) for warning in recwarn))

    strategy = federated(clients_per_round=1)
    quiet_trainer(tmp_path, strategy, devices=2, callbacks=[Heard()]).fit(Clients())
    assert "1 of them idle in each round" in Path(tmp_path, "heard").read_text()


def test_logging_in_lockstep_is_not_waited_for(tmp_path: Path) -> None:
    class Synced(Clients):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.log("each_step", loss, sync_dist=True, on_step=True, on_epoch=True)
            return loss

    module = Synced(make_optimizer=sgd)
    quiet_trainer(tmp_path, federated(clients_per_round=3), devices=2, max_epochs=2).fit(module)  # does not hang
    want = simulate(Clients(make_optimizer=sgd), PARTS, clients_per_round=3, rounds=2)
    assert_same(dict(module.named_parameters()), want, 1e-10)
