"""What the federated benchmark measures: models, data, and fits, each in a process of its own."""

import logging
import signal
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import SingleDeviceStrategy, Strategy
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader, Dataset, TensorDataset, random_split
from typing_extensions import override

from fulgurite.callbacks import RobustValidation
from fulgurite.plugins.federated import PGD, dirichlet_partition
from fulgurite.plugins.federated.partition import iid_partition
from fulgurite.plugins.federated.rounds import ClientBatchSampler
from fulgurite.plugins.optim import FedSpeed, FedSpeedServer
from fulgurite.strategies import FederatedAdversarialStrategy, FederatedStrategy

TIMEOUT_S = 900  # of one fit
SMALL, MILLION = (64, 32, 10), (64, 960, 960, 10)  # layer widths: 2410 and 994 570 weights
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}

Optimizers = Callable[[Any], Optimizer]


def apart(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls the function in a forked process: a fit leaves a process group and memory behind."""
    with ProcessPoolExecutor(1, mp_context=get_context("fork"), initializer=_begin) as process:
        return process.submit(function, *args, **kwargs).result()


def _begin() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.alarm(TIMEOUT_S)  # ends this process, and the parent hears of it
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


# ---- models and data -------------------------------------------------------------------------------------------------


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with rectifiers between them, He normal."""
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    for layer in layers[::2]:
        nn.init.kaiming_normal_(layer.weight)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers[:-1])


def convolutions() -> nn.Sequential:
    """For images of 3 x 32 x 32; 28 442 weights."""
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, 10)),
    )


def paper_cnn() -> nn.Sequential:
    """FedAvg's (arXiv 1602.05629) for images of 1 x 28 x 28; 1 663 370 weights."""
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(3136, 512), nn.ReLU(), nn.Linear(512, 10)),
    )


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {  # and the shape of an input
    "million": (partial(mlp, *MILLION), (64,)),
    "small": (partial(mlp, *SMALL), (64,)),
    "cnn": (paper_cnn, (1, 28, 28)),
}


def weights_of(net: str) -> int:
    return sum(parameter.numel() for parameter in NETS[net][0]().parameters())


class Classifier(LightningModule):
    def __init__(self, net: nn.Module, optimizer: Optimizers) -> None:
        super().__init__()
        self.net, self.optimizer = net, optimizer

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return cross_entropy(self.net(x), y)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """RobustValidation does what there is to do."""

    def configure_optimizers(self) -> Optimizer:
        return self.optimizer(self.parameters())


class Table(Dataset[tuple[Tensor, Tensor]]):
    """Samples in two tensors, of which a batch is read at once, as a hand-written loop would; see ``loader``."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return self.x[indices], self.y[indices]


def as_it_is(batch: Any) -> Any:
    return batch


def loader(data: Table, batch_size: int) -> DataLoader[Any]:
    return DataLoader(data, batch_size, collate_fn=as_it_is)


def noise(samples: int, *shape: int) -> Table:
    """Samples to measure time and memory with."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(samples, *shape, generator=generator)
    return Table(x, torch.randint(10, (samples,), generator=generator))


def digits(seed: int) -> tuple[TensorDataset, TensorDataset]:
    """Handwritten digits of 8 x 8 in [0, 1], 1437 to train on and 360 held out, by a permutation."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x, y = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    parts = random_split(range(len(x)), [1437, 360], torch.Generator().manual_seed(seed))
    train, test = (TensorDataset(x[part.indices], y[part.indices]) for part in parts)
    return train, test


# ---- time ------------------------------------------------------------------------------------------------------------


class Rounds(Callback):
    """Seconds of each round, from one epoch's end to the next; what runs in between does not count.

    Args:
        between: runs after each round, with its number.
    """

    def __init__(self, between: Callable[[int], None] | None = None) -> None:
        self.between = between
        self.seconds: list[float] = []

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._resumed = time.perf_counter()

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seconds.append(time.perf_counter() - self._resumed)
        if self.between is not None:
            self.between(trainer.current_epoch)
        self._resumed = time.perf_counter()


class HandLoop:
    """The passes of FedAvg and nothing else, on the strategy's own batches: what a round cannot do without."""

    def __init__(self, net: nn.Module, data: Table, batch_size: int, clients: int, sampled: int, lr: float) -> None:
        self.net, self.data, self.lr = net, data, lr
        self.sampler = ClientBatchSampler(iid_partition(len(data), clients), batch_size, sampled)
        self.seconds: list[float] = []

    def __call__(self, number: int) -> None:
        """Takes the round of this number."""
        clients = self._clients(number)
        started = time.perf_counter()
        self._train(clients)
        self.seconds.append(time.perf_counter() - started)

    def _clients(self, number: int) -> list[tuple[int, list[list[int]]]]:
        """The clients of a round: how many samples each has, and its batches of indices."""
        self.sampler.set_round(number)
        batches: dict[int, list[list[int]]] = {}
        for turn, indices in zip(self.sampler.turns, self.sampler, strict=True):
            batches.setdefault(turn.client, []).append(indices)
        return [(len(self.sampler.parts[client]), parts) for client, parts in batches.items()]

    def _train(self, clients: list[tuple[int, list[list[int]]]]) -> None:
        x, y, weights = self.data.x, self.data.y, list(self.net.parameters())
        before = [weight.detach().clone() for weight in weights]
        total = [torch.zeros_like(weight) for weight in before]
        for samples, batches in clients:
            restore(weights, before)
            optimizer = SGD(weights, self.lr)
            for indices in batches:
                optimizer.zero_grad()
                cross_entropy(self.net(x[indices]), y[indices]).backward()
                optimizer.step()
            for mean, weight in zip(total, weights, strict=True):
                mean.add_(weight.detach(), alpha=samples / sum(samples for samples, _ in clients))
        restore(weights, total)


@torch.no_grad()
def restore(weights: list[Tensor], values: list[Tensor]) -> None:
    for weight, value in zip(weights, values, strict=True):
        weight.copy_(value)


def beside_hand_loop(net: str, rounds: int, batch_size: int, federated: bool) -> dict[str, Any]:
    """Rounds of a fit in turn with rounds of the hand loop; by FederatedStrategy, or as many steps of Lightning alone.

    Returns:
        Seconds of each round but the first, and how far the two models end from each other.
    """
    clients, sampled, steps, lr = 100, 10, 10, 0.1
    make, shape = NETS[net]
    data = noise(clients * steps * batch_size, *shape)
    nets = []
    for _ in range(2):
        seed_everything(0, verbose=False)
        nets.append(make())
    hand = HandLoop(nets[1], data, batch_size, clients, sampled, lr)
    meter = Rounds(between=hand)
    strategy: Strategy = SingleDeviceStrategy("cpu")
    if federated:
        strategy = FederatedStrategy(num_clients=clients, clients_per_round=sampled)
    trainer = Trainer(
        **QUIET,
        devices=1,
        strategy=strategy,
        max_epochs=rounds + 1,
        limit_train_batches=1.0 if federated else sampled * steps,
        callbacks=[meter],
    )
    trainer.fit(Classifier(nets[0], partial(SGD, lr=lr)), loader(data, batch_size))
    differences = [(a - b).abs().max().item() for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True)]
    return {
        "steps": sampled * steps,
        "fit_s": meter.seconds[1:],
        "hand_s": hand.seconds[1:],
        "max_difference": max(differences),
    }


def with_ranks(devices: int, rounds: int, batch_size: int, folder: str) -> list[float]:
    """Seconds of each round but the first, with one or two processes."""
    clients, sampled, steps = 100, 10, 10
    data = noise(clients * steps * batch_size, MILLION[0])
    seed_everything(0, verbose=False)
    meter = Rounds()
    trainer = Trainer(
        **QUIET,
        devices=devices,
        strategy=FederatedStrategy(num_clients=clients, clients_per_round=sampled, start_method="fork"),
        max_epochs=rounds + 1,
        callbacks=[meter, OnRankZero(lambda: torch.save(meter.seconds[1:], f"{folder}/seconds.pt"))],
    )
    trainer.fit(Classifier(mlp(*MILLION), partial(SGD, lr=0.1)), loader(data, batch_size))
    return list(torch.load(f"{folder}/seconds.pt"))


class OnRankZero(Callback):
    """Saves what a forked process knows, which it does not tell its parent."""

    def __init__(self, save: Callable[[], None]) -> None:
        self.save = save

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self.save()


# ---- the attack ------------------------------------------------------------------------------------------------------


class AttacksInTurn:
    """Ours and, in the next step, the one that peers write: ``backward`` through the whole model, weights included."""

    mode = "eval"

    def __init__(self, attack: PGD, net: nn.Module) -> None:
        self.attack, self.net = attack, net
        self.backward = False
        self.last = "plain"  # kind of the step at hand

    def __call__(self, loss_fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        self.last = "backward" if self.backward else "fal"
        attack = self._by_backward if self.backward else self.attack
        self.backward = not self.backward
        return attack(loss_fn, x)

    def _by_backward(self, loss_fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        eps, step_size = self.attack.eps, 2.5 * self.attack.eps / self.attack.steps
        adversarial = (x + torch.empty_like(x).uniform_(-eps, eps)).clamp(0, 1)
        for _ in range(self.attack.steps):
            adversarial.requires_grad_()
            loss_fn(adversarial).backward()
            self.net.zero_grad()
            assert adversarial.grad is not None
            moved = adversarial.detach() + step_size * adversarial.grad.sign()
            adversarial = moved.clamp(x - eps, x + eps).clamp(0, 1)
        return adversarial


class Steps(Callback):
    """Seconds of each step, round by round, by its kind."""

    def __init__(self, attacks: AttacksInTurn) -> None:
        self.attacks = attacks
        self.rounds: list[dict[str, list[float]]] = []

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.rounds.append({"plain": [], "fal": [], "backward": []})
        self._ended = time.perf_counter()

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        now = time.perf_counter()
        self.rounds[-1][self.attacks.last].append(now - self._ended)
        self.attacks.last = "plain"
        self._ended = time.perf_counter()


def attacked_steps(rounds: int, batch_size: int, attack: PGD) -> list[dict[str, float]]:
    """Median seconds of a plain step, of one of FAL, and of one with the peers' attack, in each round but the first.

    Half of the clients train clean, so that one fit has steps of all kinds.
    """
    seed_everything(0, verbose=False)
    net = convolutions()
    attacks = AttacksInTurn(attack, net)
    meter = Steps(attacks)
    strategy = FederatedAdversarialStrategy(
        attack=attacks,  # type: ignore[arg-type]
        adversarial_clients=0.5,
        num_clients=4,
        local_steps=12,
    )
    trainer = Trainer(**QUIET, devices=1, strategy=strategy, max_epochs=rounds + 1, callbacks=[meter])
    trainer.fit(Classifier(net, partial(SGD, lr=0.01)), loader(noise(48 * batch_size, 3, 32, 32), batch_size))
    return [{kind: median(seconds) for kind, seconds in kinds.items()} for kinds in meter.rounds[1:]]


# ---- accuracy --------------------------------------------------------------------------------------------------------

TRAINED_ON, TESTED_ON = PGD(eps=0.1, step_size=0.025, steps=7), PGD(eps=0.1, step_size=0.01, steps=20)
FEDSPEED = partial(FedSpeed, lr=0.3, lam=10.0, rho=0.1)


class Curve(Callback):
    """Accuracies after each round."""

    def __init__(self) -> None:
        self.points: list[dict[str, float]] = []

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.points.append(
                {name: float(trainer.callback_metrics[f"fal/{name}_acc"]) for name in ("clean", "robust")}
            )


def robust_fit(method: str, seed: int, rounds: int) -> list[dict[str, float]]:
    """Clean and robust accuracy on the digits held out, after each round; ``seed`` has split, clients and weights."""
    train, test = digits(seed)
    federation: dict[str, Any] = {
        "partition": dirichlet_partition(train.tensors[1], 20, 0.3, seed=seed, balanced=True),
        "clients_per_round": 5,
        "local_steps": 1 if method == "fal_one_step" else 10,
        "seed": seed,
    }
    optimizer: Optimizers = partial(SGD, lr=0.3)
    if method == "fal_fedspeed":
        optimizer = FEDSPEED
        federation["server_optimizer"] = FedSpeedServer
    if method == "fedavg":
        strategy = FederatedStrategy(**federation)
    else:
        strategy = FederatedAdversarialStrategy(attack=TRAINED_ON, **federation)
    seed_everything(seed, verbose=False)
    curve = Curve()
    trainer = Trainer(
        **QUIET,
        devices=1,
        strategy=strategy,
        max_epochs=rounds,
        num_sanity_val_steps=0,
        callbacks=[RobustValidation(TESTED_ON), curve],
    )
    trainer.fit(Classifier(mlp(*SMALL), optimizer), DataLoader(train, 16), DataLoader(test, 360))
    return curve.points


# ---- memory ----------------------------------------------------------------------------------------------------------


def memory_of_fit(clients: int, rounds: int, duals: bool, folder: str | None) -> dict[str, float]:
    """Bytes of a fit of the large model, by the kernel's count.

    Args:
        clients: N; ten of them take two steps in a round.
        rounds: to train.
        duals: train by FedSpeed, whose clients remember a tensor for each parameter.
        folder: for the clients' duals; None keeps them in memory.
    """
    beside_hand_loop("small", rounds=1, batch_size=1, federated=True)  # loads what a first fit loads
    data = noise(20_000, MILLION[0])
    seed_everything(0, verbose=False)
    federation: dict[str, Any] = {"num_clients": clients, "clients_per_round": 10, "local_steps": 2}
    if duals:
        federation |= {"server_optimizer": FedSpeedServer, "client_state_dir": folder}
    meter = Memory()
    strategy = FederatedStrategy(**federation)
    trainer = Trainer(**QUIET, devices=1, strategy=strategy, max_epochs=rounds, callbacks=[meter])
    module = Classifier(mlp(*MILLION), FEDSPEED if duals else partial(SGD, lr=0.1))
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = resident("VmRSS")
    trainer.fit(module, loader(data, 10))
    files = [path.stat() for path in Path(folder).iterdir()] if folder else []
    return {
        "model_bytes": sum(parameter.nbytes for parameter in module.parameters()),
        "peak_bytes": resident("VmHWM"),
        "peak_of_fit_bytes": resident("VmHWM") - before,
        "anonymous_at_end_bytes": meter.anonymous_bytes,
        "clients_with_duals": meter.touched,
        "file_bytes_on_disk": sum(file.st_blocks * 512 for file in files),
        "file_bytes_apparent": sum(file.st_size for file in files),
    }


class Memory(Callback):
    """What is in memory when training ends: anonymous pages, which no file backs, and clients that have a state."""

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.anonymous_bytes = resident("RssAnon")
        self.touched = len(trainer.strategy.rule_state()["clients"])  # type: ignore[attr-defined]


def resident(field: str) -> int:
    """``VmRSS``, ``VmHWM`` (its peak) or ``RssAnon`` of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
