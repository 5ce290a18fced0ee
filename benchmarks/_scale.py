"""What a strategy sends, holds and saves: forked processes that fit a small module and ask the kernel and Python."""

import gc
import json
import logging
import os
import socket
import struct
import warnings
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from fulgurite.plugins.federated import PGD
from fulgurite.plugins.optim import FedSpeed, FedSpeedServer
from fulgurite.strategies import FederatedAdversarialStrategy, FederatedStrategy, StreamingDiLoCoStrategy
from fulgurite.strategies import SequentialGradientCodingStrategy as Coded

BLOCKS = 6  # of equal size: two fragments of three and one of the rest
ROWS, FEATURES = 8, 4  # of a batch of a process; the module is all that matters here
SENT, RECEIVED = 200, 128  # where Linux has tcpi_bytes_sent (since 4.19) and tcpi_bytes_received in a tcp_info
CLIENTS_PER_PROCESS = 2  # of the federation; half of them train in a round, one a process


@dataclass(frozen=True)
class Fit:
    """A method on ``processes``, whose exchanges are ``every`` steps apart where it says when; ``width`` of a block."""

    method: str
    processes: int
    width: int
    every: int

    @property
    def window(self) -> tuple[int, int]:
        """Steps between which bytes are counted: two exchanges of everything, all of which have landed."""
        return self.every + 1, 3 * self.every + 1

    def run(self) -> list[dict[str, Any]]:
        """What each process has found, by rank."""
        seed_everything(0, verbose=False)
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        steps = self.window[1]
        federated = self.method.startswith("fed")
        coded = self.method in CODED
        rows = ROWS * self.processes * (CLIENTS_PER_PROCESS if federated else steps)
        batch_size = ROWS * self.processes if coded else ROWS
        data = TensorDataset(torch.rand(rows, FEATURES), torch.randint(2, (rows,)))
        with TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            meter = Meter(self, Path(folder))
            trainer = Trainer(
                accelerator="cpu",
                devices=self.processes,
                strategy=make_strategy(self),
                max_epochs=4 if federated else 1,
                max_steps=-1 if federated else steps,
                callbacks=meter,
                logger=Listener(meter),
                enable_checkpointing=False,
                enable_model_summary=False,
                enable_progress_bar=False,
                default_root_dir=folder,
            )
            gc.collect()
            gc.freeze()  # so that `look` goes through what a process makes in the fit, and nothing else
            trainer.fit(Blocks(self.width, self.method), DataLoader(data, batch_size))
            gc.unfreeze()
            return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(self.processes)]


CODED: dict[str, dict[str, Any]] = {
    "gc": {"scheme": "gc", "s": 1},
    "sr_sgc": {"scheme": "sr_sgc", "B": 1, "W": 2, "lam": 1, "pipeline": "delayed"},
    "m_sgc": {"scheme": "m_sgc", "B": 1, "W": 2, "lam": 1, "pipeline": "delayed"},
}


def make_strategy(fit: Fit) -> Strategy:
    """The settings are those of the names, but for how often they exchange; codes step on each batch.

    ``"streaming_scatter"`` is what suits many workers: it also leaves their own state out of checkpoints.
    """
    federation = {"num_clients": CLIENTS_PER_PROCESS * fit.processes, "clients_per_round": fit.processes}
    federation |= {"local_steps": fit.every}
    match fit.method:
        case "ddp":
            return DDPStrategy(start_method="fork")
        case "diloco":
            settings = {"num_fragments": 1, "overlap_steps": 0, "outer_lr": 0.7, "quantize": "fp32"}
            return StreamingDiLoCoStrategy(fit.every, start_method="fork", **settings)
        case "streaming":
            return StreamingDiLoCoStrategy(fit.every, start_method="fork")
        case "streaming_scatter":
            options = {"reduction": "scatter", "worker_state": "none"}
            return StreamingDiLoCoStrategy(fit.every, start_method="fork", **options)
        case "federated":
            return FederatedStrategy(start_method="fork", **federation)
        case "fedspeed":
            return FederatedStrategy(server_optimizer=FedSpeedServer, start_method="fork", **federation)
        case "federated_adversarial":
            attack = PGD(eps=0.1, steps=1)
            return FederatedAdversarialStrategy(attack=attack, start_method="fork", **federation)
    return Coded(mu=1e6, start_method="fork", record=False, **CODED[fit.method])  # waits for all: bytes are the same


class Blocks(LightningModule):
    """Equal blocks between two small layers."""

    def __init__(self, width: int, method: str) -> None:
        super().__init__()
        self.method = method
        self.embed = nn.Linear(FEATURES, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(BLOCKS))
        self.head = nn.Linear(width, 2)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        hidden = self.embed(batch[0])
        for block in self.blocks:
            hidden = hidden + block(hidden).tanh() / BLOCKS
        return nn.functional.cross_entropy(self.head(hidden), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.method == "fedspeed":
            return FedSpeed(self.parameters(), lr=1e-2)
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class Listener(Logger):
    """Looks at the memory when a strategy logs, which is in the middle of its exchange."""

    def __init__(self, meter: "Meter") -> None:
        super().__init__()
        self.meter = meter

    @property
    @override
    def name(self) -> str:
        return "listener"

    @property
    @override
    def version(self) -> str:
        return ""

    @override
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

    @override
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.meter.look()


class Meter(Callback):
    """Counts bytes from one step to another, and the most that is held in between; then saves a checkpoint."""

    def __init__(self, fit: Fit, folder: Path) -> None:
        self.fit, self.folder = fit, folder
        self.trainer: Trainer | None = None
        self.held = self.steps = 0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.trainer = trainer

    @override
    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.steps += 1
        self.look()
        if self.steps in self.fit.window:
            trainer.strategy.barrier()  # what this step sends has come, what the next one sends has not begun
            numbers = self._numbers(trainer)
            if self.steps == self.fit.window[0]:
                self.before = numbers
            else:
                self.found = {name: numbers[name] - self.before[name] for name in numbers}
                self.found["logged_last"] = logged(trainer, total=False)
            trainer.strategy.barrier()

    def _numbers(self, trainer: Trainer) -> dict[str, float]:
        sent, received = on_the_wire()
        return {"sent": sent, "received": received, "logged": logged(trainer, total=True)}

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        file = self.folder / "state.ckpt"
        trainer.strategy.barrier()
        before, sockets = sum(on_the_wire()), len(connections())
        trainer.save_checkpoint(file)
        trainer.strategy.barrier()
        through = sum(on_the_wire()) - before
        files = [file, *self.folder.glob("state.ckpt.clients/*")]
        self.found |= {
            "parameters": sum(parameter.numel() for parameter in pl_module.parameters()),
            "tensors": len(list(pl_module.parameters())),
            "held": self.held,
            "checkpoint": sum(each.stat().st_size for each in files),
            "sockets": sockets,
            "gathered": through,
            "clients_saved": len(files) - 1,
        }
        (self.folder / f"{trainer.global_rank}.json").write_text(json.dumps(self.found))

    def look(self) -> None:
        """At the storages of all tensors that Python knows, but for the module's, the optimizer's and the data."""
        trainer = self.trainer
        if trainer is None:
            return
        module = trainer.lightning_module
        own: list[Tensor] = [*module.parameters(), *module.buffers()]
        own += [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
        own += [value for optimizer in trainer.optimizers for value in tensors_in(optimizer.state.values())]
        own += trainer.train_dataloader.dataset.tensors
        left_out = {tensor.untyped_storage().data_ptr() for tensor in own}
        storages = {
            thing.untyped_storage().data_ptr(): thing.untyped_storage().nbytes()
            for thing in gc.get_objects()
            if type(thing) in (Tensor, nn.Parameter)
        }
        held = sum(size for place, size in storages.items() if place not in left_out)
        if isinstance(trainer.strategy.model, DistributedDataParallel):
            held += bucket_bytes(trainer.strategy.model)
        self.held = max(self.held, held)


def tensors_in(states: Iterable[Any]) -> list[Tensor]:
    return [value for state in states for value in state.values() if isinstance(value, Tensor)]


def bucket_bytes(model: DistributedDataParallel) -> int:
    """Of all of DDP's buckets, which are beyond Python's sight."""
    data = model._get_ddp_logging_data()
    return sum(int(size) for size in str(data.get("rebuilt_bucket_sizes") or data["bucket_sizes"]).split(","))


def logged(trainer: Trainer, total: bool) -> float:
    """Bytes by the strategy's own count: since the start, or of the last exchange where it counts those singly."""
    names = ["diloco/bytes_sent"] if total else ["fed/bytes", "gradient_coding/bytes_sent"]
    return sum(float(trainer.callback_metrics.get(name, 0.0)) for name in names)


def on_the_wire() -> tuple[int, int]:
    """Bytes that this process has sent and received by TCP, as the kernel counts them on its open connections."""
    sent, received = zip(*connections(), strict=True)
    return sum(sent), sum(received)


def connections() -> list[tuple[int, int]]:
    """Bytes sent and received of each of this process's open sockets of TCP."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the folder's own, or not a socket of TCP
            if not os.readlink(f"/proc/self/fd/{number}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(number))) as connection:
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, SENT + 8)
            found.append((struct.unpack_from("=Q", info, SENT)[0], struct.unpack_from("=Q", info, RECEIVED)[0]))
    return found
