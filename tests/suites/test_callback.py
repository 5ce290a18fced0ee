"""The common suite for callbacks that watch: a new one adds a row to ``CASES`` and passes."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

from fulgurite.callbacks import GradientCoherence, HessianSpectrum, RobustValidation
from fulgurite.plugins.federated import PGD
from tests.suites.fits import assert_same, loaded_without_fulgurite

CLASSES = 3


@dataclass(frozen=True)
class Case:
    """A callback under test.

    Args:
        kind: its class.
        init_args: as in YAML, for a fit of two epochs with four optimizer steps and a validation each.
        prefix: its metrics begin with it.
        metric: one that it logs.
        clocks: metrics that differ from run to run.
        validates: it works in ``trainer.validate``, too.
        nested: arguments that are objects.
    """

    kind: type[Callback]
    init_args: Mapping[str, Any]
    prefix: str
    metric: str
    clocks: frozenset[str] = frozenset()
    validates: bool = False
    nested: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.kind.__name__

    def make(self) -> Callback:
        return self.kind(**self.init_args | self.nested)


HESSIAN = {"every_n_steps": 4, "lanczos_steps": 6, "n_probes": 1, "n_batches": 2, "k": 2, "keep_vectors": True}
CASES = [
    Case(GradientCoherence, {"every_n_steps": 3}, "coherence/", "coherence/alpha_m"),
    Case(GradientCoherence, {"every_n_steps": 3, "source": "fixed", "n_batches": 2}, "coherence/", "coherence/alpha_m"),
    Case(HessianSpectrum, HESSIAN, "hessian/", "hessian/lambda_max", frozenset({"hessian/seconds"})),
    Case(
        RobustValidation,
        {"limit_batches": 4},
        "fal/",
        "fal/robust_acc",
        validates=True,
        nested={"attack": PGD(eps=0.2, steps=2)},
    ),
]
every_callback = pytest.mark.parametrize("case", CASES, ids=str)


def dataset(size: int, seed: int) -> TensorDataset:
    x = torch.rand(size, 6, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, (x[:, :2].sum(1) * 1.5).long().clamp(max=CLASSES - 1))


class Classifier(LightningModule):
    """Dropout, batch norm, noise, momentum, a metric that counts in training, and a shuffled loader."""

    def __init__(self, batch_size: int = 8, stateful: bool = False) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.2))
        self.head = nn.Linear(12, CLASSES)
        self.accuracy = MulticlassAccuracy(CLASSES, average="micro")
        self.batch_size, self.stateful = batch_size, stateful
        self.losses: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x + 1e-3 * torch.randn_like(x)))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        logits = self(batch[0])
        loss = cross_entropy(logits, batch[1])
        self.accuracy(logits, batch[1])
        self.losses.append(loss.detach().clone())
        self.log("train/loss", loss)
        self.log("train/accuracy", self.accuracy, on_epoch=True)
        batch[0].zero_()  # its own by now
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/loss", cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    def train_dataloader(self) -> DataLoader[Any]:
        loader = StatefulDataLoader if self.stateful else DataLoader
        return loader(dataset(64, seed=0), batch_size=self.batch_size, shuffle=not self.stateful)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(dataset(16, seed=1), batch_size=8)


class Ends(Callback):
    """Writes what each process has at the end: weights, buffers, gradients, optimizer, generators, metrics."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        kept = {f"state {name}": value for name, value in pl_module.state_dict().items()}
        kept |= {f"grad {name}": p.grad for name, p in pl_module.named_parameters() if p.grad is not None}
        for index, state in trainer.optimizers[0].state_dict()["state"].items():
            kept |= {f"optimizer {index} {name}": v for name, v in state.items() if isinstance(v, Tensor)}
        kept |= {"generator": torch.get_rng_state(), "losses": torch.stack(pl_module.losses)}
        metrics = {name: value.clone() for name, value in trainer.callback_metrics.items()}
        modes = [part.training for part in pl_module.modules()]
        torch.save({"kept": kept, "metrics": metrics, "modes": modes}, self.folder / f"{trainer.global_rank}.pt")

    def read(self, rank: int = 0) -> dict[str, Any]:
        return torch.load(self.folder / f"{rank}.pt", weights_only=True)


def fit(
    folder: Path, callbacks: list[Callback], module: Any = None, ckpt_path: Path | None = None, **options: Any
) -> Ends:
    torch.manual_seed(7)
    ends = Ends(folder)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "max_epochs": 2}
    quiet |= {"enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks)}
    quiet |= {"accelerator": "cpu", "devices": 1, "default_root_dir": folder, "log_every_n_steps": 1}
    Trainer(callbacks=[*callbacks, ends], **quiet | options).fit(module or Classifier(), ckpt_path=ckpt_path)
    return ends


@every_callback
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"devices": 2, "strategy": "ddp_fork"},
        {"accumulate_grad_batches": 3},
        {"precision": "bf16-mixed"},
        {"precision": "64-true"},
        {"val_check_interval": 3},
        {"gradient_clip_val": 0.1},
    ],
    ids=str,
)
def test_the_fit_is_the_fit_without_it(case: Case, options: dict[str, Any], tmp_path: Path) -> None:
    bare = fit(tmp_path / "bare", [], **options)
    watched = fit(tmp_path / "watched", [case.make()], **options)
    found = [watched.read(rank)["metrics"] for rank in range(options.get("devices", 1))]
    for rank, metrics in enumerate(found):
        one, two = bare.read(rank), watched.read(rank)
        assert_same(two["kept"], one["kept"])
        assert one["modes"] == two["modes"]
        own = {name: value for name, value in metrics.items() if name.startswith(case.prefix)}
        assert case.metric in own
        assert one["metrics"].keys() == metrics.keys() - own.keys()
        assert all(torch.equal(one["metrics"][name], metrics[name]) for name in one["metrics"])
        assert own == {name: value for name, value in found[0].items() if name in own}  # on all ranks


@every_callback
def test_resuming_goes_on_as_if_nothing_had_been(case: Case, tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=4)
    module = Classifier(stateful=True)
    whole = fit(tmp_path / "whole", [case.make(), checkpoint], module, max_epochs=1).read()
    module = Classifier(stateful=True)
    path = tmp_path / "step=4.ckpt"
    resumed = fit(tmp_path / "resumed", [case.make(), Regenerate()], module, path, max_epochs=1).read()
    bare = fit(tmp_path / "without", [Regenerate()], Classifier(stateful=True), path, max_epochs=1).read()
    for name, value in bare["kept"].items():
        torch.testing.assert_close(resumed["kept"][name], value, rtol=0, atol=0)
    own = {name for name in whole["metrics"] if name.startswith(case.prefix)} - case.clocks
    assert own <= resumed["metrics"].keys()


class Regenerate(Callback):
    """A generator's state is in no checkpoint of Lightning's."""

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        torch.manual_seed(11)


def assert_plain(value: Any) -> None:
    if isinstance(value, dict):
        assert all(type(key) in (str, int) for key in value)
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            assert_plain(item)
    else:
        assert value is None or type(value) in (bool, int, float, str, Tensor), type(value)


@every_callback
def test_a_checkpoint_loads_without_fulgurite_and_without_the_callback(case: Case, tmp_path: Path) -> None:
    callback = case.make()
    checkpoint = ModelCheckpoint(tmp_path, "last", every_n_train_steps=4)
    fit(tmp_path, [callback, checkpoint], max_epochs=1)
    assert_plain(callback.state_dict())
    loaded_without_fulgurite(tmp_path / "last.ckpt")
    fit(tmp_path / "more", [], ckpt_path=tmp_path / "last.ckpt")


@every_callback
@pytest.mark.parametrize("logger", ["none", "csv", "wandb"])
def test_whatever_the_trainer_logs_to(case: Case, logger: str, tmp_path: Path) -> None:
    loggers: dict[str, Any] = {"none": False, "csv": CSVLogger(tmp_path)}
    if logger == "wandb":
        loggers["wandb"] = WandbLogger(save_dir=tmp_path, offline=True)
    metrics = fit(tmp_path / "fit", [case.make()], logger=loggers[logger]).read()["metrics"]
    assert metrics[case.metric].isfinite()
    if logger == "csv":
        assert case.metric in next(tmp_path.rglob("metrics.csv")).read_text()
    if logger == "wandb":
        assert float(loggers["wandb"].experiment.summary[case.metric]) == pytest.approx(float(metrics[case.metric]))


@every_callback
def test_from_yaml(case: Case, tmp_path: Path) -> None:
    arguments = {**case.init_args, **{name: vars(value) for name, value in case.nested.items()}}
    spec = {"class_path": f"fulgurite.callbacks.{case.kind.__name__}", "init_args": arguments}
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({"trainer": {"callbacks": [spec], "max_epochs": 2}}))
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    quiet |= {"enable_checkpointing": False, "default_root_dir": str(tmp_path), "devices": 1}
    args = ["fit", "--config", str(config)]
    cli = LightningCLI(Classifier, trainer_defaults=quiet, save_config_callback=None, args=args)
    assert case.metric in cli.trainer.callback_metrics


@every_callback
def test_a_dry_run(case: Case, tmp_path: Path) -> None:
    fit(tmp_path, [case.make()], fast_dev_run=2)
    assert not list(tmp_path.rglob("*.png"))


@every_callback
def test_validation_alone(case: Case, tmp_path: Path) -> None:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(callbacks=[case.make()], devices=1, default_root_dir=tmp_path, **quiet)
    module = Classifier()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    (results,) = trainer.validate(module, verbose=False)
    assert_same(module.state_dict(), before)
    assert (case.metric in results) == case.validates
