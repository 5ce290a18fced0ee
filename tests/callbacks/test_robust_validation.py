from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

from fulgurite.callbacks import RobustValidation
from fulgurite.plugins.federated import PGD
from fulgurite.plugins.metrics import RobustAccuracy

CLASSES = 3
NAMES = {"fal/robust_acc", "fal/clean_acc"}
ATTACK = PGD(eps=0.2, steps=3)
STILL = PGD(eps=0.2, steps=3, random_start=False)


def dataset(size: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(size, 6, generator=generator)
    return TensorDataset(x, (x[:, :2].sum(1) * 1.5).long().clamp(max=CLASSES - 1))


class Classifier(LightningModule):
    """As a user has it: dropout, batch norm, a metric in the forward pass, and a prediction that is drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2))
        self.head = nn.Linear(16, CLASSES)
        self.accuracy = MulticlassAccuracy(CLASSES, average="micro")
        self.forwards = 0
        self.noise = 1e-3

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        return self.head(self.net(x + self.noise * torch.randn_like(x)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        x, target = batch.values() if isinstance(batch, dict) else batch
        self.accuracy(self(x), target)
        self.log("accuracy", self.accuracy)
        x.zero_()  # its own by now

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(dataset(64, seed=0), batch_size=8, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(dataset(32, seed=1), batch_size=8)


def make() -> Classifier:
    torch.manual_seed(7)
    return Classifier()


def trainer(**options: Any) -> Trainer:
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return Trainer(**quiet | {"accelerator": "cpu", "devices": 1, "max_epochs": 2} | options)


class Recorder(Callback):
    """Keeps the generator's state and the metrics after each validation, and whether a weight got a gradient in it."""

    def __init__(self) -> None:
        self.generators: list[Tensor] = []
        self.metrics: list[dict[str, float]] = []

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.generators.append(torch.get_rng_state())
        self.metrics.append({name: value.item() for name, value in trainer.callback_metrics.items()})
        assert all(parameter.grad is None for parameter in pl_module.parameters())


def test_a_fit_stays_as_it_was_bit_for_bit() -> None:
    kept = []
    for callbacks in ([], [RobustValidation(ATTACK)]):
        module, recorder = make(), Recorder()
        fit = trainer(callbacks=[*callbacks, recorder])
        fit.fit(module)
        kept.append((module, recorder, fit))
    (module, recorder, _), (watched, watched_recorder, _) = kept
    for (name, one), two in zip(module.state_dict().items(), watched.state_dict().values(), strict=True):
        assert torch.equal(one, two), name
    for one, two in zip(recorder.generators, watched_recorder.generators, strict=True):
        assert torch.equal(one, two)
    assert module.forwards == watched.forwards
    assert len(watched_recorder.metrics) == 3  # the sanity check and two epochs
    assert NAMES.isdisjoint(watched_recorder.metrics[0])
    for one, two in zip(recorder.metrics, watched_recorder.metrics, strict=True):
        assert one == {name: value for name, value in two.items() if name not in NAMES}
    assert watched_recorder.metrics[-1].keys() >= NAMES


def expected(module: Classifier, loader: DataLoader[Any], attack: PGD = STILL) -> dict[str, float]:
    """By hand."""
    module.eval()
    module.noise = 0.0
    robust, right, total = RobustAccuracy(attack), 0, 0
    for x, target in loader:
        robust.update(module, x, target)
        right += int((module(x).argmax(1) == target).sum())
        total += len(x)
    return {"fal/robust_acc": robust.compute().item(), "fal/clean_acc": right / total}


@pytest.fixture(scope="module")
def trained() -> Classifier:
    module = make()
    module.noise = 0.0
    trainer(max_epochs=20, limit_val_batches=0).fit(module)
    return module


@pytest.mark.parametrize("inference_mode", [True, False])
def test_trainer_validate_gives_what_is_counted_by_hand(trained: Classifier, inference_mode: bool) -> None:
    validate = trainer(callbacks=[RobustValidation(STILL)], inference_mode=inference_mode)
    logged = validate.validate(trained, verbose=False)[0]
    by_hand = expected(trained, trained.val_dataloader())
    assert 0 < by_hand["fal/robust_acc"] < by_hand["fal/clean_acc"]
    assert {name: logged[name] for name in NAMES} == pytest.approx(by_hand)
    assert logged["fal/clean_acc"] == pytest.approx(logged["accuracy"])


def test_two_validations_agree_with_random_starts_too(trained: Classifier) -> None:
    results = [trainer(callbacks=[RobustValidation(ATTACK)]).validate(trained, verbose=False) for _ in range(2)]
    assert results[0] == results[1]


def test_two_processes_validate_as_one(trained: Classifier, tmp_path: Path) -> None:
    class Write(Callback):
        @override
        def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            kept = {name: trainer.callback_metrics[name] for name in NAMES}
            torch.save(kept, tmp_path / f"{trainer.world_size} {trainer.global_rank}.pt")

    for devices in (1, 2):
        options = {"strategy": "ddp_fork"} if devices == 2 else {}
        trainer(callbacks=[RobustValidation(STILL), Write()], devices=devices, **options).validate(
            trained, verbose=False
        )
    one, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1 0", "2 0", "2 1"))
    assert first == second == one


def test_batches_by_key_and_a_limit(trained: Classifier) -> None:
    rows = [{"image": x, "class": y} for x, y in dataset(32, seed=1)]
    callback = RobustValidation(STILL, input_key="image", target_key="class", limit_batches=2)
    logged = trainer(callbacks=[callback]).validate(trained, DataLoader(rows, batch_size=8), verbose=False)[0]
    first = TensorDataset(*dataset(32, seed=1)[:16])
    by_hand = expected(trained, DataLoader(first, batch_size=8))
    assert {name: logged[name] for name in NAMES} == pytest.approx(by_hand)
    assert by_hand != pytest.approx(expected(trained, trained.val_dataloader()))


def test_several_loaders_count_together(trained: Classifier) -> None:
    loaders = [DataLoader(dataset(16, seed=seed), batch_size=8) for seed in (2, 3)]
    results = trainer(callbacks=[RobustValidation(STILL)]).validate(trained, loaders, verbose=False)
    both = TensorDataset(*(torch.cat(parts) for parts in zip(*(dataset(16, seed)[:] for seed in (2, 3)), strict=True)))
    by_hand = expected(trained, DataLoader(both, batch_size=8))
    logged = {name: value for result in results for name, value in result.items()}
    assert {name: logged[name] for name in NAMES} == pytest.approx(by_hand)


def test_a_checkpoint_can_follow_it(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, monitor="fal/robust_acc", mode="max")
    trainer(callbacks=[RobustValidation(ATTACK), checkpoint], enable_checkpointing=True).fit(make())
    assert checkpoint.best_model_score is not None
    assert not any(
        "robust" in name for name in torch.load(checkpoint.best_model_path, weights_only=False)["state_dict"]
    )


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_runs_in_the_precision_of_validation(precision: Any) -> None:
    seen = set()

    class Seeing(Classifier):
        @override
        def forward(self, x: Tensor) -> Tensor:
            seen.add((torch.is_autocast_enabled("cpu"), torch.get_default_dtype()))
            return super().forward(x)

    validate = trainer(callbacks=[RobustValidation(STILL)], precision=precision)
    logged = validate.validate(Seeing(), verbose=False)[0]
    assert seen == {(True, torch.float32) if precision == "bf16-mixed" else (False, torch.float64)}
    assert 0 <= logged["fal/robust_acc"] <= logged["fal/clean_acc"] <= 1


def test_nothing_in_the_sanity_check() -> None:
    callback = RobustValidation(ATTACK, input_key="missing")
    trainer(callbacks=[callback], num_sanity_val_steps=2, check_val_every_n_epoch=99).fit(make())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_key": 2}, "the batch, a list, has no entry 2 but 0, 1"),
        ({"input_key": 1}, "must be a floating tensor, got torch.int64"),
        ({"attack": PGD(clip=(0.0, 0.5))}, "`clip` is .* units of the batch"),
    ],
    ids=str,
)
def test_bad_batches(options: dict[str, Any], message: str) -> None:
    callback = RobustValidation(**{"attack": ATTACK} | options)
    with pytest.raises(ValueError, match=message):
        trainer(callbacks=[callback]).validate(make(), verbose=False)


def test_bad_limit() -> None:
    with pytest.raises(ValueError, match="`limit_batches` must be None or at least 1, got 0"):
        RobustValidation(ATTACK, limit_batches=0)


def test_can_be_built_from_yaml() -> None:
    options = {"attack": {"eps": 0.2, "steps": 3}, "input_key": "image", "limit_batches": 4}
    callback = {"class_path": "fulgurite.callbacks.RobustValidation", "init_args": options}
    config = {"trainer": {"accelerator": "cpu", "logger": False, "callbacks": [callback]}}
    cli = LightningCLI(Classifier, args=config, run=False, save_config_callback=None)
    (built,) = (callback for callback in cli.trainer.callbacks if isinstance(callback, RobustValidation))
    assert (built.attack, built.input_key, built.limit_batches) == (ATTACK, "image", 4)
