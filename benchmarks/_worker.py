"""One process of a measured fit, and how to start its processes.

``run`` starts a process for each worker, as ``torchrun`` would; each trains the byte model by one method, and writes
what it measured. All of them enter the training loop at the same moment, also those that train alone.
"""

import json
import os
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from _netns import LOOPBACK, Place, sent_bytes
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState, post_localSGD_hook
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from typing_extensions import override

from fulgurite.plugins.comm import partition_parameters
from fulgurite.strategies import StreamingDiLoCoStrategy

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from byte_lm import ByteLM, PythonSource

TIMEOUT_S = 900.0  # of one fit


@dataclass(frozen=True)
class Job:
    """A fit.

    Attributes:
        method: ``"solo"`` (each process trains alone), ``"ddp"``, ``"ddp_bf16"``, ``"post_local_sgd"``,
            ``"diloco"`` or ``"streaming"``.
        steps: optimizer steps.
        sync_every: steps between two averages, where the method has them.
        batch_size: crops a step and worker.
        val_every: steps between validations; 0 for none.
        wire: whether to count what leaves this network namespace.
        options: for :class:`StreamingDiLoCoStrategy`.
    """

    method: str
    steps: int
    sync_every: int = 100
    seed: int = 0
    batch_size: int = 8
    lr: float = 4e-3
    val_every: int = 0
    val_crops: int = 4096
    wire: bool = False
    options: dict[str, Any] = field(default_factory=dict)


# ---- the methods -----------------------------------------------------------------------------------------------------


def in_bfloat16(group: dist.ProcessGroup | None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """torch's hook by another name: under its own, DDP refuses it without CUDA, though gloo adds bfloat16."""
    future: torch.futures.Future[torch.Tensor] = bf16_compress_hook(group or dist.group.WORLD, bucket)
    return future


class Bfloat16DDP(DDPStrategy):
    """DDP with gradients in bfloat16 on the wire; Lightning itself registers communication hooks on CUDA alone."""

    @override
    def configure_ddp(self) -> None:
        super().configure_ddp()
        assert isinstance(self.model, DistributedDataParallel)
        self.model.register_comm_hook(None, in_bfloat16)


class PostLocalSGD(DDPStrategy):
    """torch's post-local SGD without a start under DDP: local gradients, weights averaged every few steps."""

    def __init__(self, sync_every: int) -> None:
        super().__init__()
        self.sync_every = sync_every

    @override
    def configure_ddp(self) -> None:
        super().configure_ddp()
        assert isinstance(self.model, DistributedDataParallel)
        alone = [dist.new_group([rank]) for rank in range(self.world_size)][self.global_rank]
        self.model.register_comm_hook(PostLocalSGDState(None, alone, start_localSGD_iter=0), post_localSGD_hook)
        self.averager = PeriodicModelAverager(self.sync_every, warmup_steps=self.sync_every - 1)

    @override
    def optimizer_step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        output = super().optimizer_step(optimizer, *args, **kwargs)
        assert self.lightning_module is not None
        self.averager.average_parameters(self.lightning_module.parameters())
        return output


def strategy_of(job: Job) -> Strategy:
    diloco = {"num_fragments": 1, "overlap_steps": 0, "outer_lr": 0.7, "quantize": "fp32"}
    makers: dict[str, Callable[[], Strategy]] = {
        "solo": lambda: SingleDeviceStrategy("cpu"),
        "ddp": DDPStrategy,
        "ddp_bf16": Bfloat16DDP,
        "post_local_sgd": lambda: PostLocalSGD(job.sync_every),
        "diloco": lambda: StreamingDiLoCoStrategy(job.sync_every, **diloco | job.options),
        "streaming": lambda: StreamingDiLoCoStrategy(job.sync_every, **job.options),
    }
    return makers[job.method]()


def traffic(job: Job, strategy: Strategy, module: LightningModule, steps: int) -> tuple[float, float]:
    """Payload sent by this process until a step, by count, and the largest message, in bytes."""
    if isinstance(strategy, StreamingDiLoCoStrategy):
        return strategy.stats["diloco/bytes_sent"], strategy.stats["diloco/peak_bytes"]
    weights = sum(parameter.numel() for parameter in module.parameters())
    rounds = {"ddp": steps, "ddp_bf16": steps, "post_local_sgd": steps // job.sync_every}.get(job.method, 0)
    size = weights * (2 if job.method == "ddp_bf16" else 4)
    others = strategy.world_size - 1 if isinstance(strategy, DDPStrategy) else 0
    peak = max_bucket(strategy.model) if isinstance(strategy.model, DistributedDataParallel) else 0
    if job.method == "ddp_bf16":
        peak //= 2
    on_ring = 2 * others * size / (others + 1)
    return rounds * on_ring, size if job.method == "post_local_sgd" else peak


def max_bucket(model: DistributedDataParallel) -> int:
    """Bytes of DDP's largest bucket of gradients, in the parameters' type."""
    data = model._get_ddp_logging_data()
    sizes = data.get("rebuilt_bucket_sizes") or data["bucket_sizes"]
    return max(int(size) for size in str(sizes).split(","))


# ---- a process -------------------------------------------------------------------------------------------------------


class Meter(Callback):
    """Times the training loop; the clock runs until the strategy's last exchange is over."""

    def __init__(self, job: Job, meeting: "Meeting") -> None:
        self.job, self.meeting = job, meeting
        self.losses: list[float] = []
        self.stamps: list[float] = []
        self.protocol_s: list[float] = []
        self.curve: list[dict[str, float]] = []
        self.result: dict[str, Any] = {}

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        strategy, finish = trainer.strategy, trainer.strategy.on_train_end

        def finish_and_stop_the_clock() -> None:
            finish()
            self._stop(trainer, pl_module)

        strategy.on_train_end = finish_and_stop_the_clock  # type: ignore[method-assign]  # called last
        if isinstance(strategy, StreamingDiLoCoStrategy):
            strategy.after_step = timed(strategy.after_step, self.protocol_s)  # type: ignore[method-assign]
        self.meeting.wait("start")
        self.sent_before = sent_bytes() if self.job.wire else 0
        self.started = time.perf_counter()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(float(outputs["loss"]))
        self.stamps.append(time.perf_counter())

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        sent, _ = traffic(self.job, trainer.strategy, pl_module, trainer.global_step)
        loss = trainer.callback_metrics["val/nats_per_byte"].item()
        self.curve.append({"step": trainer.global_step, "nats_per_byte": loss, "bytes_sent": sent})

    def _stop(self, trainer: Trainer, pl_module: LightningModule) -> None:
        wall = time.perf_counter() - self.started
        self.meeting.wait("end")
        time.sleep(0.3)  # until the last acknowledgements are out
        wire = sent_bytes() - self.sent_before if self.job.wire else None
        payload, peak = traffic(self.job, trainer.strategy, pl_module, trainer.global_step)
        stats = getattr(trainer.strategy, "stats", {})
        gap = median_gap([self.started, *self.stamps]) if self.job.val_every == 0 else None
        last = self.losses[-max(1, len(self.losses) // 10) :]
        self.result = {
            "wall_s": wall,
            "steps": trainer.global_step,
            "median_step_s": gap,
            "wire_bytes": wire,
            "payload_bytes": payload,
            "peak_bytes": peak,
            "wait_s": stats.get("diloco/wait_seconds", 0.0),
            "train_loss": sum(last) / len(last),
            "parameters": sum(parameter.numel() for parameter in pl_module.parameters()),
            "curve": self.curve,
            "protocol_us": protocol_microseconds(self.protocol_s, trainer.strategy, pl_module),
        }


class Meeting:
    """A barrier by files, which costs no traffic and also holds those that are alone."""

    def __init__(self, folder: Path, me: int, size: int) -> None:
        self.folder, self.me, self.size = folder, me, size

    def wait(self, name: str) -> None:
        (self.folder / f"{name}.{self.me}").touch()
        deadline = time.monotonic() + TIMEOUT_S
        while len(list(self.folder.glob(f"{name}.*"))) < self.size:
            if time.monotonic() > deadline:
                raise TimeoutError(f"not all {self.size} processes came to {name!r}")
            time.sleep(0.001)


def median_gap(stamps: Sequence[float]) -> float:
    """Between neighbours, in double precision: in float32 a clock that has run for hours ticks by a quarter of a ms."""
    return median(later - earlier for earlier, later in pairwise(stamps))


def timed(function: Callable[[], None], seconds: list[float]) -> Callable[[], None]:
    def wrapper() -> None:
        started = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - started)

    return wrapper


def protocol_microseconds(seconds: list[float], strategy: Strategy, module: LightningModule) -> dict[str, float] | None:
    """Median cost of the protocol in steps that send, that receive, and that do neither."""
    if not isinstance(strategy, StreamingDiLoCoStrategy) or not isinstance(strategy.overlap_steps, int):
        return None
    fragments = len(partition_parameters(module, strategy.num_fragments))
    every, by_kind = strategy.sync_every, {"idle": [], "send": [], "receive": []}
    for step, duration in enumerate(seconds, start=1):
        ages = {(step - index * every // fragments) % every for index in range(fragments)}
        kind = "send" if 0 in ages else "receive" if strategy.overlap_steps in ages else "idle"
        by_kind[kind].append(duration * 1e6)
    return {kind: torch.tensor(values).median().item() for kind, values in by_kind.items() if values}


def fit(job: Job, world: int, meeting: Meeting) -> dict[str, Any]:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    seed_everything(job.seed, verbose=False)
    workers = 1 if job.method == "solo" else world
    meter = Meter(job, meeting)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        num_nodes=workers,
        strategy=strategy_of(job),
        max_steps=job.steps,
        val_check_interval=job.val_every or None,
        limit_val_batches=None if job.val_every else 0,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        callbacks=[meter],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    crops = workers * job.batch_size * (job.steps + 1)  # none is seen twice
    data = PythonSource(job.batch_size, crops=crops, val_crops=job.val_crops, seed=job.seed)
    trainer.fit(ByteLM(lr=job.lr), data)
    return meter.result


# ---- its parent ------------------------------------------------------------------------------------------------------


def run(job: Job, places: Sequence[Place] = LOOPBACK, jobs: Sequence[Job] | None = None) -> list[dict[str, Any]]:
    """Trains with one process a place and returns what each measured.

    Args:
        job: what all of them do together.
        places: where the workers run.
        jobs: in place of ``job``, one a place, for workers that train alone.
    """
    port = free_port()
    with TemporaryDirectory() as folder:
        commands, variables = [], []
        for rank, place in enumerate(places):
            todo = json.dumps(asdict(jobs[rank] if jobs else job))
            commands.append([*place.prefix, sys.executable, __file__, todo, str(rank), str(len(places)), folder])
            variables.append(alone() if job.method == "solo" else environment(rank, places, port))
        run_side_by_side(commands, variables, Path(folder))
        return [json.loads((Path(folder) / f"result.{rank}").read_text()) for rank in range(len(places))]


def run_side_by_side(commands: list[list[str]], variables: list[dict[str, str]], folder: Path) -> None:
    """Returns when all have ended well; one that has not ends the others at once, for they would wait for it."""
    logs = [folder / f"log.{rank}" for rank in range(len(commands))]
    processes = []
    try:
        for command, environ, log in zip(commands, variables, logs, strict=True):
            with log.open("w") as file:
                processes.append(subprocess.Popen(command, env=environ, stdout=file, stderr=file))
        deadline = time.monotonic() + TIMEOUT_S
        codes: list[int | None] = [None]
        while None in codes and not any(codes):
            if time.monotonic() > deadline:
                raise TimeoutError(f"a fit took more than {TIMEOUT_S} s")
            time.sleep(0.05)
            codes = [process.poll() for process in processes]
        for rank, code in enumerate(codes):
            if code:
                raise RuntimeError(f"process {rank} failed:\n{logs[rank].read_text()[-4000:]}")
    finally:
        for process in processes:
            process.kill()
            process.wait()


def alone() -> dict[str, str]:
    distributed = (
        "RANK",
        "WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "LOCAL_RANK",
        "GROUP_RANK",
        "TORCHELASTIC_RUN_ID",
    )
    return {name: value for name, value in os.environ.items() if name not in distributed} | {"OMP_NUM_THREADS": "1"}


def environment(rank: int, places: Sequence[Place], port: int) -> dict[str, str]:
    """What ``torchrun`` would set on the node ``rank``."""
    return alone() | {
        "RANK": str(rank),
        "WORLD_SIZE": str(len(places)),
        "LOCAL_RANK": "0",
        "GROUP_RANK": str(rank),
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": places[0].address,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "benchmark",
        "GLOO_SOCKET_IFNAME": places[rank].interface,
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    todo, rank, world, folder = sys.argv[1:]
    result = fit(Job(**json.loads(todo)), int(world), Meeting(Path(folder), int(rank), int(world)))
    (Path(folder) / f"result.{rank}").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
