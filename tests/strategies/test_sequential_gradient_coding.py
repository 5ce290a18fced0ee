"""Coded training is the synchronous one: exact whoever is late, and an error where it cannot be."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from torchmetrics import MeanMetric

from fulgurite.plugins.comm.straggler_sim import DelayProfile, search
from fulgurite.strategies import SequentialGradientCodingStrategy
from tests.suites.fits import assert_same, fit, make
from tests.suites.models import WIDTH, Normalised, Regressor, Scheduled, dataset, sgd

BATCH = 24
GC: dict[str, Any] = {"s": 1}
SR: dict[str, Any] = {"scheme": "sr_sgc", "B": 1, "W": 2, "lam": 1}
M: dict[str, Any] = {"scheme": "m_sgc", "B": 1, "W": 2, "lam": 1}
LONG_M: dict[str, Any] = {"scheme": "m_sgc", "B": 2, "W": 3, "lam": 2}
SCHEMES = [GC, SR, M, LONG_M]
IDS = ["gc", "sr_sgc", "m_sgc", "m_sgc of delay 3"]


def coded(**options: Any) -> SequentialGradientCodingStrategy:
    return SequentialGradientCodingStrategy(**{"start_method": "fork", **options})


def loader(batches: int = 4, batch_size: int = BATCH, **options: Any) -> DataLoader[Any]:
    return DataLoader(dataset(batches * BATCH, seed=0), batch_size=batch_size, **options)


class Ordered(Regressor):
    """Reads the same batches in the same order, however many processes train."""

    def train_dataloader(self) -> DataLoader[Any]:
        return loader()


def made(kind: type[LightningModule] = Ordered, **options: Any) -> Any:
    torch.manual_seed(3)
    return kind(**options)


def late(rank: int, rounds: int = 16, every: int = 3) -> DelayProfile:
    """One worker is late in each third round, by more than a round takes."""
    times = torch.full((3, rounds), 0.005, dtype=torch.float64)
    times[rank, ::every] = 0.3
    return DelayProfile(times, load=1 / 3, seconds_per_load=0.0)


def weights(folder: Path, module: LightningModule, strategy: Any, **options: Any) -> list[dict[str, Tensor]]:
    """The weights that each process ends with."""
    devices = options.setdefault("devices", 3)
    snapshot = fit(folder, module, strategy, **{"max_steps": -1, "max_epochs": 2, **options})
    return [snapshot.read(rank)["local"] for rank in range(devices)]


def assert_equal_to_one_process(
    folder: Path, module: Callable[[], LightningModule], strategy: Any, tolerance: float = 1e-6, **options: Any
) -> None:
    (expected,) = weights(folder / "one", module(), "auto", **{**options, "devices": 1})
    first, *others = weights(folder / "coded", module(), strategy, **options)
    assert_same(first, expected, tolerance)
    for other in others:
        assert_same(other, first)


# ---- exact -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES, ids=IDS)
@pytest.mark.parametrize("rank", [0, 2])
def test_equals_synchronous_training_whoever_is_late(scheme: dict[str, Any], rank: int, tmp_path: Path) -> None:
    accumulate = 1 if scheme is GC else 4
    strategy = coded(**scheme, delay_injection=late(rank), mu=0.3)
    assert_equal_to_one_process(tmp_path, made, strategy, accumulate_grad_batches=accumulate)


@pytest.mark.parametrize(
    ("module", "options"),
    [
        (Ordered, {"accumulate_grad_batches": 4}),
        (Ordered, {"accumulate_grad_batches": 3}),  # the last window of an epoch has one batch
        (Ordered, {"gradient_clip_val": 0.05}),
        (Scheduled, {"limit_train_batches": 3}),
    ],
    ids=str,
)
def test_equals_synchronous_training_whatever_the_trainer_does(
    module: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    class WithOrder(module):  # type: ignore[misc, valid-type]
        def train_dataloader(self) -> DataLoader[Any]:
            return loader()

    assert_equal_to_one_process(tmp_path, lambda: made(WithOrder, make_optimizer=sgd), coded(**GC), **options)


class Named(Ordered):
    """Batches have a list of texts, that the loss depends on."""

    def training_step(self, batch: list[Any], batch_idx: int) -> Tensor:
        names, x, y = batch
        assert len(names) == len(x)
        share = torch.tensor([int(name) % 3 + 1.0 for name in names], dtype=x.dtype)
        return (share * (self(x) - y).square().view(len(x), -1).mean(1)).mean()

    def train_dataloader(self) -> DataLoader[Any]:
        rows = [(str(index), *row) for index, row in enumerate(dataset(4 * BATCH, seed=0))]
        return DataLoader(rows, batch_size=BATCH)  # type: ignore[arg-type]


@pytest.mark.parametrize("data", ["slice", "held"])
def test_lists_of_texts_are_cut_as_tensors_are(data: Any, tmp_path: Path) -> None:
    assert_equal_to_one_process(tmp_path, lambda: made(Named), coded(**GC, data=data), max_epochs=1)


@pytest.mark.parametrize("code", ["balanced", "cyclic"])
def test_all_codes(code: Any, tmp_path: Path) -> None:
    assert_equal_to_one_process(tmp_path, made, coded(s=2, code=code), tolerance=1e-5)


def test_a_batch_smaller_than_the_number_of_chunks(tmp_path: Path) -> None:
    class Small(Ordered):
        def train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(dataset(8, seed=0), batch_size=6)  # then 2 samples for 3 chunks

    assert_equal_to_one_process(tmp_path, lambda: made(Small), coded(**GC))


def test_double_precision(tmp_path: Path) -> None:
    class Double(Regressor):
        def train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(dataset(2 * BATCH, seed=0, dtype=torch.float64), batch_size=BATCH)

    assert_equal_to_one_process(tmp_path, lambda: made(Double), coded(**GC), tolerance=1e-12, precision="64-true")


def test_a_parameter_that_the_loss_does_not_reach_stays(tmp_path: Path) -> None:
    class Idle(Ordered):
        def __init__(self) -> None:
            super().__init__()
            self.idle = nn.Linear(2, 2)

    assert_equal_to_one_process(tmp_path, lambda: made(Idle), coded(**GC))  # AdamW would decay it on a gradient of 0


def test_a_gradient_scaler_skips_everywhere_alike(tmp_path: Path) -> None:
    def scaled() -> MixedPrecision:
        return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=2))

    (expected,) = weights(tmp_path / "one", made(), "auto", devices=1, plugins=scaled())
    first, *others = weights(tmp_path / "coded", made(), coded(**GC), plugins=scaled())
    assert_same(first, expected, 2e-3)  # half precision
    for other in others:
        assert_same(other, first)


class Noisy(Ordered):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(self.drop(inputs))


def test_random_numbers_are_the_chunk_s_own(tmp_path: Path) -> None:
    alone = weights(tmp_path / "uncoded", made(Noisy), coded(s=0))
    thrice = weights(tmp_path / "coded", made(Noisy), coded(s=2, code="cyclic"))
    assert_same(thrice[0], alone[0], 1e-5)


def test_the_user_s_own_random_numbers_go_on(tmp_path: Path) -> None:
    class Draws(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            torch.save(torch.rand(3), tmp_path / f"draw{trainer.global_rank}.pt")

    torch.manual_seed(11)
    weights(tmp_path / "coded", Noisy(), coded(**GC), callbacks=[Draws()])
    first, second = (torch.load(tmp_path / f"draw{rank}.pt") for rank in (0, 1))
    assert torch.equal(first, second)


def test_the_loss_is_that_of_the_whole_batch(tmp_path: Path) -> None:
    module = made(make_optimizer=sgd)
    trainer = Trainer(
        accelerator="cpu",
        devices=3,
        strategy=coded(s=2, code="cyclic"),
        max_steps=1,
        logger=CSVLogger(tmp_path),
        log_every_n_steps=1,
        enable_progress_bar=False,
        use_distributed_sampler=False,
        enable_checkpointing=False,
    )
    x, y = next(iter(loader()))
    with torch.no_grad():
        expected = (module(x) - y).square().mean()
    trainer.fit(module)
    assert trainer.callback_metrics["gradient_coding/loss"] == pytest.approx(float(expected), rel=1e-5)
    assert trainer.callback_metrics["gradient_coding/decode_error"] < 1e-6  # 0 where one answer was enough
    assert trainer.callback_metrics["gradient_coding/load"] == 1
    (metrics,) = tmp_path.rglob("metrics.csv")
    assert "gradient_coding/round_s" in metrics.read_text()


class EpochLog(Ordered):
    """Logs for the epoch, by Lightning's means and by torchmetrics."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.mean = MeanMetric()
        self.steps = 0

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.steps += 1
        rank = float(self.global_rank)
        self.mean.update(rank)
        self.log("metric", self.mean, on_step=False, on_epoch=True)
        self.log("rank", rank, on_step=False, on_epoch=True, sync_dist=True, batch_size=1)
        return super().training_step(batch, batch_idx)

    def on_train_epoch_end(self) -> None:
        Path(f"{self.global_rank}-{self.current_epoch}.txt").write_text(str(self.steps))

    def on_train_end(self) -> None:
        logged = {name: self.trainer.callback_metrics[name] for name in ("rank", "metric")}
        torch.save(logged, f"logged-{self.global_rank}.pt")


def test_logs_of_an_epoch_are_of_all_workers_though_one_be_late_in_all_steps(tmp_path: Path) -> None:
    times = torch.tensor([[0.005], [0.005], [1e4]], dtype=torch.float64)
    delays = DelayProfile(times, load=1 / 3, seconds_per_load=0.0)
    weights(tmp_path, EpochLog(make_optimizer=sgd), coded(**GC, delay_injection=delays))
    steps = [[int(Path(f"{rank}-{epoch}.txt").read_text()) for epoch in (0, 1)] for rank in range(3)]
    assert steps[2] == [1, 2]
    of_last = [after - before for before, after in steps]
    expected = sum(rank * count for rank, count in enumerate(of_last)) / sum(of_last)
    for rank in range(3):
        logged = torch.load(f"logged-{rank}.pt", weights_only=True)
        assert logged["rank"] == pytest.approx(expected)
        assert logged["metric"] == pytest.approx(expected)


# ---- data ------------------------------------------------------------------------------------------------------------


class Counting(Dataset[Any]):
    """Notes in a file of its process which samples were read."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.data = folder, dataset(4 * BATCH, seed=0)

    def __getitem__(self, index: int) -> Any:
        with (self.folder / f"{os.getpid()}.txt").open("a") as file:
            file.write(f"{index}\n")
        return self.data[index]

    def __len__(self) -> int:
        return len(self.data)


@pytest.mark.parametrize("scheme", [{"s": 0}, GC, M], ids=["uncoded", "gc", "m_sgc"])
def test_held_data_is_all_that_a_worker_reads(scheme: dict[str, Any], tmp_path: Path) -> None:
    class Held(Ordered):
        def train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(Counting(tmp_path), batch_size=20, shuffle=True)  # the last batch has 16

    accumulate = 4 if scheme is M else 1
    options = {"use_distributed_sampler": True, "max_epochs": 1, "accumulate_grad_batches": accumulate}
    held = weights(tmp_path / "held", made(Held), coded(**scheme, data="held"), **options)
    read = [len(file.read_text().split()) for file in tmp_path.glob("*.txt")]
    sliced = weights(tmp_path / "sliced", made(Held), coded(**scheme), **options)
    assert_same(held[0], sliced[0], 1e-6)
    assert len(read) == 3
    assert sum(read) < (1.1 if scheme == {"s": 0} else 2.2) * 4 * BATCH


def test_other_batches_on_a_process_are_refused(tmp_path: Path) -> None:
    class Own(Regressor):
        def train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(dataset(BATCH, seed=self.trainer.global_rank), batch_size=BATCH)

    with pytest.raises(ProcessRaisedException, match="2 of 3 processes have read another first batch"):
        weights(tmp_path, made(Own), coded(**GC))


def test_another_order_on_a_process_is_refused_where_each_reads_its_own_chunks(tmp_path: Path) -> None:
    class Own(Regressor):
        def train_dataloader(self) -> DataLoader[Any]:
            generator = torch.Generator().manual_seed(self.trainer.global_rank)
            return loader(shuffle=True, generator=generator)

    with pytest.raises(ProcessRaisedException, match="2 of 3 processes have read another first batch"):
        weights(tmp_path, made(Own), coded(**GC, data="held"))


def test_validation_is_dealt_out_and_training_is_not(tmp_path: Path) -> None:
    class Counts(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
            torch.save([trainer.num_training_batches, *trainer.num_val_batches], tmp_path / "counts.pt")

    class Shuffled(Regressor):
        def train_dataloader(self) -> DataLoader[Any]:
            return loader(shuffle=True)

    options = {"use_distributed_sampler": True, "limit_val_batches": 1.0}
    weights(tmp_path, made(Shuffled), coded(**GC), callbacks=[Counts()], max_epochs=1, **options)
    assert torch.load(tmp_path / "counts.pt") == [4, 2]  # 32 samples of validation, in batches of 8, on three


# ---- delayed ---------------------------------------------------------------------------------------------------------


class Quadratic(LightningModule):
    """``h x^2 / 2``, whatever the data."""

    def __init__(self, h: float, lr: float) -> None:
        super().__init__()
        self.x, self.h, self.lr = nn.Parameter(torch.ones((), dtype=torch.float64)), h, lr

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return (self.h * self.x**2 / 2).expand(len(batch[0])).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.zeros(240, 1)), batch_size=6)


@pytest.mark.parametrize(("scheme", "delay"), [(SR, 1), (LONG_M, 3)], ids=["sr_sgc", "m_sgc"])
@pytest.mark.parametrize("stable", [True, False], ids=["stable", "unstable"])
def test_delayed_steps_are_on_old_gradients(scheme: dict[str, Any], delay: int, stable: bool, tmp_path: Path) -> None:
    bound = 2 * torch.sin(torch.tensor(torch.pi / (2 * (2 * delay + 1)))).item()
    lr = (0.6 if stable else 1.6) * bound / 4.0
    steps = 40
    (end, *_) = weights(
        tmp_path, Quadratic(4.0, lr), coded(**scheme, pipeline="delayed"), max_steps=steps, max_epochs=1
    )
    x = [1.0]
    for step in range(steps):
        gradient = 4.0 * x[step - delay] if step >= delay else 0.0
        x.append(x[-1] - lr * gradient)
    assert float(end["x"]) == pytest.approx(x[-1], rel=1e-9)
    assert (abs(x[-1]) < 1) == stable


def test_delay_is_warned_of_with_its_bound() -> None:
    with pytest.warns(UserWarning, match=r"`lr` \* h is below 0\.445"):
        coded(**LONG_M, pipeline="delayed")


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "gc"}, "`s` is missing"),
        ({"s": -1}, "`s` is how many .* at least 0, got -1"),
        ({"s": 1, "B": 1}, "do not belong to 'gc'"),
        ({"scheme": "m_sgc", "s": 1}, "`s` does not belong to 'm_sgc'"),
        ({"scheme": "sr_sgc", "B": 1}, "needs `B`, `W` and `lam`"),
        ({"scheme": "sr_sgc", "B": 2, "W": 4, "lam": 1}, "`B` must divide `W` - 1 .* nearest W: 5"),
        ({"scheme": "m_sgc", "B": 2, "W": 2, "lam": 1}, "`B` is the length of a burst"),
        ({"scheme": "other"}, "`scheme` must be one of"),
        ({"s": 1, "mu": 0.0}, "`mu` .* must be positive and finite, got 0.0"),
        ({"s": 1, "mu": float("nan")}, "`mu`"),
        ({"s": 1, "mu": float("inf")}, "`mu` .* finite, got inf"),
        ({"s": 1, "wait": "all"}, "`wait` must be one of"),
        ({"s": 1, "code": "random"}, "`code` must be one of"),
        ({"s": 1, "pipeline": "stale"}, "`pipeline` must be one of"),
        ({"s": 1, "data": "none"}, "`data` must be one of"),
    ],
    ids=str,
)
def test_arguments_that_no_trainer_makes_right(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        coded(**options)


@pytest.mark.parametrize(
    ("name", "value"),
    [("s", "1"), ("s", 1.0), ("s", True), ("mu", "1"), ("seed", "a"), ("delay_injection", 1.0)],
)
def test_arguments_of_another_type(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"`{name}` must be of type .*, got {value!r}"):
        coded(**{**GC, name: value})
    with pytest.raises(TypeError, match=r"`lam` must be of type int, got 1\.5"):
        coded(**{**M, "lam": 1.5})


def test_an_unknown_argument() -> None:
    with pytest.raises(TypeError, match="no argument `straglers`"):
        coded(s=1, straglers=2)


class SyncedLog(Ordered):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("synced", loss, sync_dist=True)
        return loss


class SyncedNorm(Ordered):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.SyncBatchNorm(WIDTH)


class NoLoss(Ordered):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        return None


class TwoOptimizers(Ordered):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return [sgd(self.head.parameters()), sgd(self.embed.parameters())]


class Unfreezing(Ordered):
    def __init__(self) -> None:
        super().__init__()
        self.head.requires_grad_(False)

    def on_train_epoch_start(self) -> None:
        self.head.requires_grad_(self.current_epoch > 0)


class Small(Normalised):
    def train_dataloader(self) -> DataLoader[Any]:
        return loader(batch_size=4)


class Streamed(Ordered):
    def train_dataloader(self) -> DataLoader[Any]:
        class Stream(IterableDataset[Any]):
            def __iter__(self) -> Any:
                return iter(dataset(BATCH, seed=0))

        return DataLoader(Stream(), batch_size=6)


class LBFGS(Ordered):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), max_iter=3)


@pytest.mark.parametrize(
    ("module", "strategy", "options", "message"),
    [
        (Ordered, GC, {"devices": 1}, "needs several processes"),
        (Ordered, {"s": 3}, {}, "`s` is how many of the 3 workers"),
        (Ordered, {**M, "lam": 4}, {"accumulate_grad_batches": 4}, "at most the 3 that there are"),
        (Ordered, {"s": 1, "code": "fractional_repetition"}, {}, "use code='balanced'"),
        (Ordered, SR, {}, r"takes 1 more rounds .* 2 times as long with `accumulate_grad_batches=1`"),
        (Ordered, {**SR, "pipeline": "delayed"}, {"accumulate_grad_batches": 2}, "set `accumulate_grad_batches=1`"),
        (Ordered, {**SR, "pipeline": "interleaved"}, {}, "2 modules or more.* got Ordered"),
        (Ordered, {**GC, "ddp_comm_hook": lambda state, bucket: None}, {}, "`ddp_comm_hook`"),
        (Ordered, GC, {"sync_batchnorm": True}, "SyncBatchNorm has a collective"),
        (SyncedNorm, GC, {}, "SyncBatchNorm has a collective"),
        (SyncedLog, GC, {}, "`gradient_coding/loss`"),
        (NoLoss, GC, {}, "must return a loss for each batch, and for each chunk"),
        (TwoOptimizers, GC, {}, "manual optimization"),
        (Unfreezing, GC, {}, "was unfrozen or replaced during the fit"),
        (Small, GC, {}, "a batch of 4 samples makes chunks of 1, too few for BatchNorm: .* to 6 or more"),
        (Streamed, {**GC, "data": "held"}, {}, "use `data='slice'`"),
        (LBFGS, SR, {"accumulate_grad_batches": 4}, "calls its closure more than once a step, as LBFGS does"),
        (Ordered, {**GC, "delay_injection": DelayProfile(torch.ones(2, 4), 0.5, 0)}, {}, "delays of 2 workers"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else None,
)
def test_refusals(module: Any, strategy: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path) -> None:
    start = {} if options.get("devices") == 1 else {"start_method": "fork"}
    raised = (MisconfigurationException, ValueError, ProcessRaisedException)
    with pytest.raises(raised, match=message):
        weights(tmp_path, made(module), SequentialGradientCodingStrategy(**strategy, **start), **options)


def test_lbfgs_takes_a_round_for_each_closure(tmp_path: Path) -> None:
    assert_equal_to_one_process(tmp_path, lambda: made(LBFGS), coded(**GC), tolerance=1e-4, max_epochs=1)


def test_few_batches_for_a_long_delay_draw_a_warning(tmp_path: Path) -> None:
    strategy, module = coded(**LONG_M), Ordered()
    trainer = Trainer(accelerator="cpu", devices=3, strategy=strategy, logger=False, accumulate_grad_batches=4)
    strategy.connect(module)
    with pytest.warns(UserWarning, match=r"takes 4 \+ 3 rounds"):
        strategy.check(trainer)  # by itself, since a fit warns in its children


# ---- what goes wrong -------------------------------------------------------------------------------------------------


class Faulty(Ordered):
    """Rank 1 does something in its third batch; every process notes its own end."""

    def __init__(self, folder: Path, fault: Callable[[], None]) -> None:
        super().__init__()
        self.folder, self.fault = folder, fault

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if batch_idx == 2 and self.trainer.global_rank == 1:
            self.fault()
        return super().training_step(batch, batch_idx)


class NotingStrategy(SequentialGradientCodingStrategy):
    """Leaves what a process ended with in a file, which the launcher would show of one process alone."""

    folder: Path

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().training_step(*args, **kwargs)
        except Exception as error:
            (self.folder / f"error{self.global_rank}.txt").write_text(f"{error}")
            raise


def errors_of(folder: Path, fault: Callable[[], None], **options: Any) -> dict[int, str]:
    strategy = NotingStrategy(start_method="fork", **options)
    strategy.folder = folder
    with pytest.raises((ProcessRaisedException, ProcessExitedException)):
        weights(folder, Faulty(folder, fault), strategy)
    return {int(file.stem[-1]): file.read_text() for file in folder.glob("error*.txt")}


def raises() -> None:
    raise ZeroDivisionError("in the user's code")


def test_an_error_in_one_process_reaches_all(tmp_path: Path) -> None:
    errors = errors_of(tmp_path, raises, s=1, mu=1e6)  # whoever is slow is waited for, and comes to that batch
    assert errors[1] == "in the user's code"
    assert {errors.get(0), errors.get(2)} & {"rank 1 has failed: ZeroDivisionError: in the user's code"}


def test_a_worker_that_never_answers_is_named_within_the_timeout(tmp_path: Path) -> None:
    errors = errors_of(tmp_path, lambda: time.sleep(6), s=0, timeout=timedelta(seconds=2))
    assert "rank(s) 1 have not answered in round 2 for 2 s after they were due" in errors[0]
    assert errors[2] == errors[0]


def test_a_killed_worker_ends_the_fit(tmp_path: Path) -> None:
    errors = errors_of(tmp_path, lambda: os.kill(os.getpid(), signal.SIGKILL), s=0, timeout=timedelta(seconds=2))
    assert "rank(s) 1 have not answered" in errors[0] or "connection" in errors[0]


def test_a_worker_that_is_late_within_the_code_s_bounds_holds_nobody_up(tmp_path: Path) -> None:
    class Stalls(Ordered):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            if self.trainer.global_rank == 1 and batch_idx == 0:
                release = tmp_path / "others-are-done"
                while not release.exists():  # the others take the other rounds meanwhile
                    time.sleep(0.01)
            if self.trainer.global_rank == 2 and batch_idx == 3:
                (tmp_path / "others-are-done").touch()
            return super().training_step(batch, batch_idx)

    assert_equal_to_one_process(tmp_path, lambda: made(Stalls), coded(**GC, mu=0.1), max_epochs=1)


TERMINATED = """
import os, signal, sys
from pathlib import Path
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from fulgurite.strategies import SequentialGradientCodingStrategy
from tests.suites.fits import fit, make

class Terminated(Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 7 and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_exception(self, trainer, pl_module, exception):
        note = f"{type(exception).__name__} {trainer.global_step}"
        Path(sys.argv[1], f"rank{trainer.global_rank}").write_text(note)

callbacks = [Terminated(), OnExceptionCheckpoint(sys.argv[1], "last")]
fit(Path(sys.argv[1], "run"), make(twins=True), SequentialGradientCodingStrategy(s=1), 3, 40, callbacks=callbacks)
"""


def test_sigterm_to_one_process_ends_all_in_the_same_step_with_a_checkpoint(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(TERMINATED)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, str(script), str(tmp_path)]
    subprocess.run(command, env=environment, timeout=100, check=False, capture_output=True)
    (ended,) = {Path(tmp_path, f"rank{rank}").read_text() for rank in range(3)}
    assert ended in ("SIGTERMException 8", "SIGTERMException 9")  # the round that the signal meets may be ending
    path = tmp_path / "last.ckpt"
    resumed = fit(tmp_path / "on", make(twins=True), coded(**GC), 3, 40, ckpt_path=path)
    whole = fit(tmp_path / "whole", make(twins=True), coded(**GC), 3, 40)
    assert_same(resumed.read(0)["local"], whole.read(0)["local"], 1e-5)


# ---- afterwards ------------------------------------------------------------------------------------------------------


def test_record_search_train(tmp_path: Path) -> None:
    class Keeps(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if trainer.is_global_zero:
                trainer.strategy.profile().to_csv(tmp_path / "profile.csv")  # type: ignore[attr-defined]

    weights(tmp_path, made(), coded(s=0, delay_injection=late(1)), callbacks=[Keeps()])
    profile = DelayProfile.from_csv(tmp_path / "profile.csv")
    assert profile.times.shape == (3, 8)
    assert profile.times[1, ::3].min() > 0.25
    assert profile.times[1, 1::3].max() < 0.25
    best = search(profile, jobs=5, max_delay=1)[0]
    assert best.params != {"s": 0}


def test_nothing_recorded() -> None:
    with pytest.raises(RuntimeError, match="record with `s=0`"):
        coded(s=1).profile()


def test_no_thread_is_left(tmp_path: Path) -> None:
    class Threads(Callback):
        def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
            names = [thread.name for thread in threading.enumerate()]
            torch.save(names, tmp_path / f"threads{trainer.global_rank}.pt")

    weights(tmp_path, made(), coded(**GC), callbacks=[Threads()])
    for rank in range(3):
        assert not any("coded" in name for name in torch.load(tmp_path / f"threads{rank}.pt"))


def test_the_learning_rate_finder_tries_in_rounds_of_its_own(tmp_path: Path) -> None:
    module = made()
    module.lr = 0.01
    first, *others = weights(
        tmp_path, module, coded(**GC), callbacks=[LearningRateFinder(num_training_steps=8)], max_epochs=1
    )
    for other in others:
        assert_same(other, first)


def test_wandb(tmp_path: Path) -> None:
    trainer = Trainer(
        accelerator="cpu",
        devices=3,
        strategy=coded(**GC),
        max_epochs=1,
        log_every_n_steps=1,
        logger=WandbLogger(save_dir=tmp_path, offline=True),
        enable_progress_bar=False,
        enable_checkpointing=False,
        limit_val_batches=0,
    )
    trainer.fit(made())
    assert list(tmp_path.glob("wandb/offline-run*"))


def test_resume_is_bit_for_bit_where_sums_are_exact(tmp_path: Path) -> None:
    class Whole(Quadratic):
        """Weights and gradients are multiples of 1/64."""

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return self.x * batch[0].mean()

        def train_dataloader(self) -> DataLoader[Any]:
            rows = torch.arange(48, dtype=torch.float64)[:, None]
            return DataLoader(TensorDataset(rows), batch_size=12)

    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    whole = weights(tmp_path / "whole", Whole(1.0, 0.25), coded(**GC), callbacks=[checkpoint])
    path = tmp_path / "step=4.ckpt"
    resumed = weights(tmp_path / "resumed", Whole(1.0, 0.25), coded(**GC), ckpt_path=path)
    for before, after in zip(whole, resumed, strict=True):
        assert_same(after, before)
