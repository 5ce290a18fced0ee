"""CurvatureBatches: micro-batches are one batch, nothing of a trial is seen, and the numbers are logged."""

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler
from torchmetrics import SumMetric
from typing_extensions import override

from fulgurite.callbacks import CurvatureBatches
from fulgurite.plugins.optim import GradientRegularizedNewton
from tests.suites.fits import assert_same, fit, make
from tests.suites.models import Regressor, dataset, sgd

SAMPLES = 32


class Rows(Regressor):
    """Double precision, in order; ``parts`` micro-batches an epoch and process."""

    def __init__(self, parts: int = 1, **options: Any) -> None:
        torch.manual_seed(3)
        super().__init__(blocks=1, make_optimizer=lambda p: GradientRegularizedNewton(p, **options))
        self.double()
        self.parts = parts

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        data = dataset(SAMPLES, seed=0, dtype=torch.float64)
        world = self.trainer.world_size
        sampler = DistributedSampler(data, world, self.trainer.global_rank, shuffle=False)
        return DataLoader(data, SAMPLES // self.parts // world, sampler=sampler)


def train(folder: Path, module: LightningModule, parts: int = 1, devices: int = 1, **options: Any) -> Any:
    strategy = "ddp_fork" if devices > 1 else "auto"
    options = {"callbacks": [CurvatureBatches()], "max_steps": 5} | options
    return fit(folder, module, strategy, devices, accumulate_grad_batches=parts, **options).read(0)["local"]


@pytest.mark.parametrize("options", [{}, {"curvature": "hessian", "solver": "cg"}, {"metric": "diagonal"}], ids=str)
def test_micro_batches_are_one_batch(options: dict[str, Any], tmp_path: Path) -> None:
    whole = train(tmp_path, Rows(**options), callbacks=[])  # by the closure alone
    for parts in (1, 4):
        assert_same(train(tmp_path, Rows(parts, **options), parts), whole, tolerance=1e-8)


def test_two_processes_with_two_micro_batches_are_one_batch(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", Rows(), callbacks=[])
    assert_same(train(tmp_path / "parts", Rows(2), 2, devices=2), whole, tolerance=1e-6)


def test_the_last_micro_batches_of_an_epoch_make_a_step(tmp_path: Path) -> None:
    """Of four micro-batches three make a step, and then one."""
    module = Rows(4)
    seen: list[int] = []

    class Count(Callback):
        @override
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            (optimizer,) = trainer.optimizers
            seen.append(len(optimizer._loss.batches))

    train(tmp_path, module, 3, max_steps=4, callbacks=[CurvatureBatches(), Count()])
    assert seen == [1, 2, 3, 1, 1, 2, 3, 1]


class Observed(Rows):
    """Counts what it logs, has dropout and batch norm, and a metric."""

    def __init__(self, **options: Any) -> None:
        super().__init__(2, **options)
        self.norm, self.dropout, self.samples = nn.BatchNorm1d(6).double(), nn.Dropout(0.3), SumMetric()

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(self.dropout(self.norm(inputs)))

    @override
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.samples.update(len(batch[0]))
        loss = (self(batch[0]) - batch[1]).square().mean()
        self.log("epoch_samples", float(len(batch[0])), on_step=False, on_epoch=True, reduce_fx="sum")
        return loss


def test_nothing_of_a_trial_is_seen(tmp_path: Path) -> None:
    module = Observed(curvature="hessian", gamma=64.0)
    train(tmp_path, module, 2, max_steps=1)
    (optimizer,) = module.trainer.optimizers
    assert optimizer.metrics["grn/closures"] > 2
    assert optimizer.metrics["grn/search_failed"] == 0
    assert module.samples.compute() == SAMPLES
    assert module.trainer.callback_metrics["epoch_samples"] == SAMPLES
    assert module.norm.num_batches_tracked == 2


def test_logs_the_optimizers_metrics(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    train(tmp_path, Rows(), logger=logger, log_every_n_steps=1)
    rows = Path(logger.log_dir, "metrics.csv").read_text().splitlines()
    assert {"grn/gamma", "grn/lambda", "grn/grad_norm", "grn/step_norm", "grn/krylov_dim"} <= set(rows[0].split(","))
    assert {"grn/trials", "grn/products", "grn/closures", "grn/search_failed"} <= set(rows[0].split(","))
    assert len(rows) == 1 + 5


def test_a_fraction_of_the_micro_batches_serves_the_curvature(tmp_path: Path) -> None:
    """The gradient and the tests are of all of them: the loss goes down, by other steps."""
    runs, losses = {}, {}
    for fraction in (1.0, 0.25):
        module = Rows(4, subsample=fraction)
        runs[fraction] = train(tmp_path, module, 4, max_steps=8)
        batch = dataset(SAMPLES, seed=0, dtype=torch.float64).tensors
        losses[fraction] = float((module(batch[0]) - batch[1]).square().mean().detach())
    assert not torch.equal(runs[1.0]["head.weight"], runs[0.25]["head.weight"])
    assert max(losses.values()) < 1.0


@pytest.mark.parametrize(("fraction", "parts"), [(0.5, 1), (0.9, 4)])
def test_refuses_a_fraction_that_is_all(fraction: float, parts: int, tmp_path: Path) -> None:
    message = rf"`subsample` \({fraction}\) takes whole micro-batches, and of {parts} .*`accumulate_grad_batches`"
    with pytest.raises(MisconfigurationException, match=message):
        train(tmp_path, Rows(parts, subsample=fraction), parts)


def test_a_short_last_window_serves_the_curvature_as_a_whole(tmp_path: Path) -> None:
    """Of four micro-batches three make a step, and then one."""
    module = Rows(4, subsample=0.3)
    train(tmp_path, module, 3, max_steps=4)
    assert module.trainer.global_step == 4
    assert module.trainer.optimizers[0].metrics["grn/search_failed"] == 0


def test_a_schedule_of_accumulation_may_take_a_fraction_later(tmp_path: Path) -> None:
    module = Rows(4, subsample=0.5)
    train(tmp_path, module, callbacks=[CurvatureBatches(), GradientAccumulationScheduler({0: 1, 1: 4})], max_steps=6)
    assert module.trainer.global_step == 6


class Clipped(Rows):
    @override
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        nn.utils.clip_grad_norm_(self.parameters(), 1e9)


def test_refuses_a_hook_that_clips(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="not as `backward` left them"):
        train(tmp_path, Clipped(2), 2, max_steps=1)


class Skipping(Rows):
    @override
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        return None if batch_idx in (1, 4, 7) else super().training_step(batch, batch_idx)


def test_a_batch_that_is_skipped_skips_the_step(tmp_path: Path) -> None:
    """Of the steps of batches 0 and 1, 2 and 3, 4 and 5, 6 and 7 only the second one has all it needs."""
    module = Skipping(8)
    logger = CSVLogger(tmp_path)
    train(tmp_path, module, 2, max_steps=4, logger=logger, log_every_n_steps=1)
    assert module.trainer.optimizers[0].param_groups[0]["n_steps"] == 1
    with Path(logger.log_dir, "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["grn/trials"] for row in rows if row["grn/trials"]] == ["0.0", rows[1]["grn/trials"], "0.0", "0.0"]
    assert float(rows[1]["grn/trials"]) > 0


def test_refuses_manual_optimization(tmp_path: Path) -> None:
    module = Rows()
    module.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match="needs automatic optimization"):
        train(tmp_path, module)


def test_refuses_a_loss_by_hand_in_words_of_the_optimizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`GradientRegularizedNewton\(outputs=self.net\)`"):
        train(tmp_path, ByHand(2), 2)


class ByHand(Rows):
    @override
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return (self(batch[0]) - batch[1]).square().mean()


def test_dropout_repeats_within_a_step_and_not_from_step_to_step(tmp_path: Path) -> None:
    module = Observed(curvature="hessian", gamma=64.0)
    masks: list[Tensor] = []
    module.dropout.register_forward_hook(lambda part, args, output: masks.append(output == 0))
    steps = []

    class Split(Callback):
        @override
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            if trainer.global_step > len(steps):
                steps.append(masks[-2:])

    train(tmp_path, module, 2, max_steps=2, callbacks=[CurvatureBatches(), Split()])
    (first, second) = steps
    counts = [sum(torch.equal(mask, last) for mask in masks) for last in (*first, *second)]
    assert min(counts) >= 2  # at x, and at each trial
    assert not torch.equal(first[0], second[0])


def test_resumes_bit_for_bit(tmp_path: Path) -> None:
    def run(folder: str, max_steps: int, **options: Any) -> dict[str, Tensor]:
        module = make(make_optimizer=lambda p: GradientRegularizedNewton(p, metric="diagonal"), worker=0)
        options["callbacks"] = [CurvatureBatches(), *options.pop("callbacks", [])]
        return train(tmp_path / folder, module, 3, max_steps=max_steps, **options)

    whole = run("whole", 12)
    run("first", 6, callbacks=[ModelCheckpoint(tmp_path / "kept", filename="at6", every_n_train_steps=6)])
    torch.load(tmp_path / "kept" / "at6.ckpt", weights_only=True)
    assert_same(run("second", 12, ckpt_path=tmp_path / "kept" / "at6.ckpt"), whole)


def test_bf16_mixed(tmp_path: Path) -> None:
    module = make(make_optimizer=GradientRegularizedNewton, worker=0)
    state = train(tmp_path, module, 4, precision="bf16-mixed", max_steps=6)
    assert all(value.isfinite().all() and value.dtype == torch.float32 for value in state.values())
    assert math.isfinite(module.trainer.optimizers[0].metrics["grn/grad_norm"])


@pytest.mark.parametrize(
    ("make_optimizer", "options", "message"),
    [
        (sgd, {}, r"for one GradientRegularizedNewton, got \['SGD'\]"),
        (GradientRegularizedNewton, {"gradient_clip_val": 0.5}, "`gradient_clip_val` is 0.5: remove it"),
    ],
    ids=["optimizer", "clipping"],
)
def test_refuses_before_training(make_optimizer: Any, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        train(tmp_path, make(make_optimizer=make_optimizer, worker=0), **options)
