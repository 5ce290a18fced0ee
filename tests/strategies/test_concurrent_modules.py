"""Modules trained in turns: each as if it were alone, coded or not."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from fulgurite.strategies import ConcurrentModules, SequentialGradientCodingStrategy
from tests.suites.fits import assert_same, fit
from tests.suites.models import Normalised, Regressor, Scheduled, dataset, sgd

SCHEMES: list[dict[str, Any]] = [
    {"s": 1},
    {"scheme": "sr_sgc", "B": 1, "W": 2, "lam": 1},
    {"scheme": "m_sgc", "B": 1, "W": 3, "lam": 1},
]
IDS = ["gc", "sr_sgc", "m_sgc"]


def coded(**options: Any) -> SequentialGradientCodingStrategy:
    return SequentialGradientCodingStrategy(pipeline="interleaved", start_method="fork", **options)


def loader(batches: int = 12) -> DataLoader[Any]:
    return DataLoader(dataset(batches * 24, seed=0), batch_size=24)


class Together(ConcurrentModules):
    """Three modules of different sizes, with their data."""

    def __init__(self, kind: type[Regressor] = Regressor, count: int = 3) -> None:
        modules = []
        for index in range(count):
            torch.manual_seed(index)
            modules.append(kind(blocks=2 + index))
        super().__init__(modules)

    def train_dataloader(self) -> DataLoader[Any]:
        return loader()

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(dataset(32, seed=1), batch_size=8)


def weights(folder: Path, module: Any, strategy: Any = "auto", devices: int = 1, **options: Any) -> dict[str, Tensor]:
    snapshot = fit(folder, module, strategy, devices, **{"max_steps": -1, "max_epochs": 2, **options})
    first, *others = (snapshot.read(rank)["local"] for rank in range(devices))
    for other in others:
        assert_same(other, first)
    return first


@pytest.mark.parametrize("kind", [Regressor, Scheduled])
def test_each_trains_as_if_alone(kind: type[Regressor], tmp_path: Path) -> None:
    together = weights(tmp_path / "together", Together(kind))
    for index in range(3):
        torch.manual_seed(index)
        module = kind(blocks=2 + index)
        batches = [batch for i, batch in enumerate(loader()) if i % 3 == index]
        rows = torch.utils.data.TensorDataset(*(torch.cat(part) for part in zip(*batches, strict=True)))
        module.train_dataloader = lambda rows=rows: DataLoader(rows, batch_size=24)  # type: ignore[method-assign, misc]
        alone = weights(tmp_path / f"alone{index}", module)
        assert_same({f"members.{index}.{name}": value for name, value in alone.items()}, select(together, index))


def select(state: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if name.startswith(f"members.{index}.")}


@pytest.mark.parametrize("scheme", SCHEMES, ids=IDS)
@pytest.mark.parametrize("kind", [Regressor, Scheduled])
def test_interleaved_rounds_change_nothing(scheme: dict[str, Any], kind: type[Regressor], tmp_path: Path) -> None:
    alone = weights(tmp_path / "alone", Together(kind), limit_val_batches=1.0)
    rounds = weights(tmp_path / "coded", Together(kind), coded(**scheme), devices=3, limit_val_batches=1.0)
    assert_same(rounds, alone, 1e-5)


def test_interleaved_resumes(tmp_path: Path) -> None:
    scheme = SCHEMES[2]
    checkpoint = ModelCheckpoint(tmp_path, filename="last", every_n_epochs=1)
    whole = weights(tmp_path / "whole", Together(), coded(**scheme), devices=3, max_epochs=3)
    weights(tmp_path / "first", Together(), coded(**scheme), devices=3, max_epochs=1, callbacks=[checkpoint])
    options = {"max_steps": 7}  # in the middle of an epoch, with gradients under way
    cut_short = weights(tmp_path / "short", Together(), coded(**scheme), devices=3, **options)
    assert_same(cut_short, weights(tmp_path / "short alone", Together(), **options), 1e-5)
    resumed = weights(
        tmp_path / "rest", Together(), coded(**scheme), devices=3, max_epochs=3, ckpt_path=tmp_path / "last.ckpt"
    )
    assert_same(resumed, whole, 1e-5)


def test_metrics_have_the_module_s_number(tmp_path: Path) -> None:
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False, default_root_dir=tmp_path
    )
    trainer.fit(Together())
    assert {"0/train_loss", "1/val_loss", "2/val_loss"} <= trainer.callback_metrics.keys()
    tests = trainer.test(Together(), DataLoader(dataset(8, seed=2), batch_size=8), verbose=False)
    assert {"0/test_loss", "2/test_loss"} <= tests[0].keys()


def test_batch_norm_flushed_in_validation_is_still_in_training_mode(tmp_path: Path) -> None:
    options = {"limit_val_batches": 1.0, "max_epochs": 1, "limit_train_batches": 2}
    alone = weights(tmp_path / "alone", Together(Normalised), coded(s=0), devices=3, **options)
    delayed = weights(tmp_path / "coded", Together(Normalised), coded(**SCHEMES[1]), devices=3, **options)
    assert_same(delayed, alone, 1e-5)


class Lists(Regressor):
    def configure_optimizers(self) -> Any:
        optimizer = sgd(self.parameters())
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1)]


def test_the_forms_of_configure_optimizers(tmp_path: Path) -> None:
    class Ends(Together):
        def on_fit_end(self) -> None:
            rates = [optimizer.param_groups[0]["lr"] for optimizer in self.trainer.optimizers]
            assert rates == pytest.approx([0.05 * 0.1**2] * 3)

    weights(tmp_path, Ends(Lists))


class Seldom(Regressor):
    def __init__(self, interval: str = "step", **options: Any) -> None:
        super().__init__(**options)
        self.interval = interval

    def configure_optimizers(self) -> Any:
        optimizer = sgd(self.parameters())
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": self.interval, "frequency": 3},
        }


@pytest.mark.parametrize(("interval", "epochs", "halvings"), [("step", 2, 2), ("epoch", 3, 1)])  # 4 steps an epoch
def test_schedulers_step_as_often_as_they_ask_for(interval: str, epochs: int, halvings: int, tmp_path: Path) -> None:
    class Ends(ConcurrentModules):
        def train_dataloader(self) -> DataLoader[Any]:
            return loader()

        def on_fit_end(self) -> None:
            rates = [optimizer.param_groups[0]["lr"] for optimizer in self.trainer.optimizers]
            assert rates == pytest.approx([0.05 * 0.5**halvings] * 3)

    weights(tmp_path, Ends([Seldom(interval) for _ in range(3)]), max_epochs=epochs)


class Terse(Regressor):
    """Takes batches alone, tells loaders apart, predicts and clips."""

    def training_step(self, batch: list[Tensor]) -> Tensor:  # type: ignore[override]
        return super().training_step(batch, 0)

    def validation_step(self, batch: list[Tensor], batch_idx: int, dataloader_idx: int) -> None:  # type: ignore[override]
        self.log("loader", float(dataloader_idx))

    def predict_step(self, batch: list[Tensor]) -> Tensor:  # type: ignore[override]
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return sgd(self.parameters())

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        assert optimizer.param_groups[0]["params"][0] is next(self.parameters())
        torch.nn.utils.clip_grad_norm_(self.parameters(), 1e-9)


@pytest.mark.parametrize("devices", [1, 3])
def test_steps_take_what_they_ask_for(devices: int, tmp_path: Path) -> None:
    class Loaders(Together):
        def val_dataloader(self) -> Any:
            return [DataLoader(dataset(32, seed=seed), batch_size=8) for seed in (1, 2)]

        def on_fit_end(self) -> None:
            found = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
            assert found["1/loader/dataloader_idx_1"] == 1

    together = Loaders(Terse)
    before = {name: value.clone() for name, value in together.named_parameters()}
    strategy = "auto" if devices == 1 else coded(s=1)
    assert_same(weights(tmp_path, together, strategy, devices, limit_val_batches=1.0), before, 1e-7)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    rows = dataset(16, seed=1)
    predictions = trainer.predict(together, DataLoader(rows, batch_size=8))
    assert torch.equal(predictions[1][2], together.members[2](rows.tensors[0][8:]))


class Two(Regressor):
    def configure_optimizers(self) -> Any:
        return [sgd(self.embed.parameters()), sgd(self.head.parameters())]


class Plateau(Regressor):
    def configure_optimizers(self) -> Any:
        optimizer = sgd(self.parameters())
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}


@pytest.mark.parametrize(
    ("kind", "message"), [(Two, "module 0 must give one optimizer"), (Plateau, "ReduceLROnPlateau")]
)
def test_refusals(kind: type[Regressor], message: str, tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        weights(tmp_path, Together(kind))


def test_none_at_all() -> None:
    with pytest.raises(ValueError, match="at least one LightningModule"):
        ConcurrentModules([])


def test_too_few_for_the_delay(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"3 modules or more.* of as many, got 2"):
        weights(tmp_path, Together(count=2), coded(**SCHEMES[2]), devices=3)
