import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from fulgurite.callbacks import GradientCoherence
from fulgurite.plugins.metrics import m_coherence
from fulgurite.strategies import StreamingDiLoCoStrategy
from tests.suites.fits import fit

ROWS, CLASSES = 24, 3


def dataset() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(
        torch.randn(ROWS, 6, generator=generator).double(), torch.randint(CLASSES, (ROWS,), generator=generator)
    )


class Net(LightningModule):
    """As a user has it, in double precision, with batches in the data's order."""

    def __init__(self, batch_size: int = 8, reduction: str = "mean", norm: bool = False, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        middle = nn.BatchNorm1d(5) if norm else nn.Tanh()
        self.net = nn.Sequential(nn.Linear(6, 5), middle, nn.Linear(5, CLASSES)).double()
        self.batch_size, self.reduction = batch_size, reduction

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.to(self.net[0].weight.dtype))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        return cross_entropy(self(batch[0]), batch[1], reduction=self.reduction)

    def train_dataloader(self) -> DataLoader[Any]:
        rows = range(self.trainer.global_rank, ROWS, self.trainer.world_size)
        return DataLoader(torch.utils.data.Subset(dataset(), list(rows)), self.batch_size)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def by_hand(module: Net, rows: list[int]) -> dict[str, Tensor]:
    """The gradient of each example's loss, by parameter, ``(m, n)``."""
    x, y = dataset()[rows]
    found = [
        torch.autograd.grad(cross_entropy(module(x[i : i + 1]), y[i : i + 1]), module.parameters())
        for i in range(len(x))
    ]
    names = [name for name, _ in module.named_parameters()]
    return {name: torch.stack([one[k].flatten() for one in found]) for k, name in enumerate(names)}


def check(record: dict[str, Any], grads: dict[str, Tensor], rel: float = 1e-10) -> None:
    whole = torch.cat(list(grads.values()), 1)
    m, alpha_m = len(whole), float(m_coherence(whole))
    assert record["m"] == m
    assert record["alpha_m"] == pytest.approx(alpha_m, rel)
    assert record["alpha"] == pytest.approx(alpha_m / m, rel)
    assert record["alpha_unbiased"] == pytest.approx((alpha_m - 1) / (m - 1), rel)
    assert record["grad_norm"] == pytest.approx(float(whole.mean(0).norm()), rel)
    assert record["mean_example_norm"] == pytest.approx(float(whole.norm(dim=1).mean()), rel)
    assert record["layers"].keys() == grads.keys()
    for name, part in grads.items():
        assert record["layers"][name] == pytest.approx(float(m_coherence(part)), rel)


def history(
    tmp_path: Path, module: Net, callback: GradientCoherence | None = None, **options: Any
) -> list[dict[str, Any]]:
    callback = callback or GradientCoherence(every_n_steps=2, figure=False)
    options = {"strategy": "auto", "devices": 1, "max_steps": 3, **options}
    fit(tmp_path, module, callbacks=[callback, *options.pop("callbacks", ())], **options)
    return callback.history


def test_equals_the_gradients_of_each_example(tmp_path: Path) -> None:
    records = history(tmp_path, Net())
    assert [record["step"] for record in records] == [0, 2]
    check(records[0], by_hand(Net(), list(range(8))))


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_clip_val": 1e-3},
        {"accumulate_grad_batches": 2, "module": {"batch_size": 4}},
        {"accumulate_grad_batches": 4, "module": {"batch_size": 2}},
    ],
    ids=str,
)
def test_is_of_the_whole_step_before_clipping(options: dict[str, Any], tmp_path: Path) -> None:
    module = Net(**options.pop("module", {}))
    check(history(tmp_path, module, **options)[0], by_hand(Net(), list(range(8))))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_does_not_depend_on_the_reduction(reduction: str, tmp_path: Path) -> None:
    record = history(tmp_path, Net(reduction=reduction))[0]
    grads = torch.cat(list(by_hand(Net(), list(range(8))).values()), 1)
    assert record["alpha_m"] == pytest.approx(float(m_coherence(grads)))
    factor = 8 if reduction == "sum" else 1
    assert record["grad_norm"] == pytest.approx(factor * float(grads.mean(0).norm()))


class Write(Callback):
    """Keeps what a forked process has seen."""

    def __init__(self, watched: GradientCoherence, folder: Path) -> None:
        self.watched, self.folder = watched, folder

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        found = {"history": self.watched.history, "logged": float(trainer.callback_metrics["coherence/alpha_m"])}
        torch.save(found, self.folder / f"rank{trainer.global_rank}.pt")


@pytest.mark.parametrize("source", ["train_batch", "fixed"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_ranks_are_one(source: str, accumulate: int, tmp_path: Path) -> None:
    callback = GradientCoherence(figure=False, source=source, n_batches=accumulate)
    options = {"strategy": "ddp_fork", "devices": 2, "max_steps": 1, "accumulate_grad_batches": accumulate}
    history(tmp_path, Net(batch_size=4), callback, callbacks=[Write(callback, tmp_path)], **options)
    for rank in range(2):
        found = torch.load(tmp_path / f"rank{rank}.pt")
        check(found["history"][0], by_hand(Net(), list(range(8 * accumulate))))
        assert found["logged"] == pytest.approx(found["history"][0]["alpha_m"])


def test_fixed_measures_the_same_examples(tmp_path: Path) -> None:
    module = Net()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)  # type: ignore[method-assign]
    callback = GradientCoherence(every_n_steps=1, source="fixed", n_batches=2, figure=False)
    records = history(tmp_path, module, callback)
    assert len(records) == 3
    check(records[0], by_hand(Net(), list(range(16))))
    assert {record["alpha_m"] for record in records} == {records[0]["alpha_m"]}


@pytest.mark.parametrize("source", ["train_batch", "fixed"])
def test_bf16(source: str, tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    module = Net().float()
    callback = GradientCoherence(figure=False, source=source)
    record = history(tmp_path, module, callback, precision="bf16-mixed")[0]
    exact = torch.cat(list(by_hand(Net(), list(range(8))).values()), 1)
    assert record["alpha_m"] == pytest.approx(float(m_coherence(exact)), 0.05)


def test_some_modules(tmp_path: Path) -> None:
    for modules, names in (("net.0", {"net.0.weight", "net.0.bias"}), (["*.bias"], {"net.0.bias", "net.2.bias"})):
        callback = GradientCoherence(modules=modules, figure=False)
        record = history(tmp_path, Net(), callback)[0]
        grads = by_hand(Net(), list(range(8)))
        check(record, {name: grads[name] for name in grads if name in names})


def test_a_skipped_batch_is_no_event(tmp_path: Path) -> None:
    class Skips(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx == 0 else loss

    records = history(tmp_path, Skips(), GradientCoherence(every_n_steps=1, figure=False))
    assert records[0]["step"] == 1
    check(records[0], by_hand(Net(), list(range(8, 16))))


def test_history_goes_on_after_a_checkpoint(tmp_path: Path) -> None:
    whole = history(tmp_path / "a", Net(), GradientCoherence(1, figure=False), max_steps=6)
    saves = ModelCheckpoint(tmp_path / "kept", filename="three", every_n_train_steps=3)
    history(tmp_path / "b", Net(), GradientCoherence(1, figure=False), callbacks=[saves])
    torch.load(tmp_path / "kept" / "three.ckpt", weights_only=True)
    resumed = GradientCoherence(1, figure=False)
    assert history(tmp_path / "c", Net(), resumed, max_steps=6, ckpt_path=tmp_path / "kept" / "three.ckpt") == whole


def test_logs_and_draws(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(tmp_path)
    history(tmp_path, Net(norm=True), GradientCoherence(every_n_steps=1), logger=logger, max_steps=4)
    rows = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    names = ["alpha", "alpha_m", "alpha_unbiased", "coupled", "covered", "grad_norm", "layer/net.0.bias", "m"]
    assert {f"coherence/{name}" for name in names} <= set(rows[0].split(","))
    assert len(rows) == 5
    assert list(tmp_path.rglob("layers_*.png"))


def test_zero_gradients_are_not_a_number(tmp_path: Path) -> None:
    class Flat(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return 0 * super().training_step(batch, batch_idx)

    with pytest.warns(UserWarning, match="all gradients are zero"):
        record = history(tmp_path, Flat())[0]
    assert math.isnan(record["alpha_m"])


def test_a_penalty_is_said_to_be_of_no_example(tmp_path: Path) -> None:
    class Penalised(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) + 100 * sum(p.square().sum() for p in self.parameters())

    with pytest.warns(UserWarning, match="of none of them, such as a penalty"):
        history(tmp_path, Penalised())


def test_a_last_batch_of_one_is_left_out(tmp_path: Path) -> None:
    callback = GradientCoherence(every_n_steps=1, figure=False)
    with pytest.warns(UserWarning, match="set `drop_last`"):
        records = history(tmp_path, Net(batch_size=23), callback)
    assert [record["m"] for record in records] == [23, 23]


def test_replicas_that_stay_apart_measure_their_own(tmp_path: Path) -> None:
    for source in ("train_batch", "fixed"):
        callback = GradientCoherence(figure=False, source=source)
        strategy = StreamingDiLoCoStrategy(sync_every=5, start_method="fork")
        options = {"strategy": strategy, "devices": 2, "max_steps": 5}
        history(tmp_path, Net(), callback, callbacks=[Write(callback, tmp_path)], **options)
        for rank in range(2):
            found = torch.load(tmp_path / f"rank{rank}.pt")
            check(found["history"][0], by_hand(Net(), list(range(rank, 16, 2))))


def test_batch_norm_is_said_to_couple(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="couples the examples"):
        history(tmp_path, Net(norm=True))


class Manual(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss, retain_graph=True)
        self.manual_backward(loss)
        self.optimizers().step()


class Stale(Net):
    """Its gradients add up over the steps."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(super().training_step(batch, batch_idx))
        self.optimizers().step()


class TwoOptimizers(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net[i].parameters(), lr=0.1) for i in (0, 2)]


def compiled() -> Net:
    module = Net()
    module.net.compile(backend="eager")
    return module


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (lambda: Net(batch_size=1), {}, ValueError, "at least 2 examples in a step, got 1"),
        (Net, {"modules": "encoder"}, ValueError, r"`modules`: no trainable .* 'encoder'; there are net.0.weight"),
        (Manual, {"source": "fixed"}, MisconfigurationException, 'use `source="train_batch"`'),
        (Stale, {"every_n_steps": 1}, RuntimeError, "gradients of an earlier step"),
        (TwoOptimizers, {}, MisconfigurationException, "2 optimizers have several"),
        (Manual, {}, RuntimeError, "two backward passes in one step"),
        (compiled, {}, MisconfigurationException, 'source="fixed"'),
    ],
)
def test_refuses_a_fit(make: Any, options: Any, error: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        history(tmp_path, make(), GradientCoherence(figure=False, **options))


def test_a_compiled_module_is_measured_uncompiled(tmp_path: Path) -> None:
    record = history(tmp_path, compiled(), GradientCoherence(source="fixed", figure=False))[0]
    check(record, by_hand(Net(), list(range(8))))


def test_refuses_what_has_no_examples(tmp_path: Path) -> None:
    class Fused(Net):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(6, 6, batch_first=True).double()

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.rnn(x[:, None])[0][:, 0])

    with pytest.raises(RuntimeError, match=r"`rnn`, LSTM, fused: use `nn.LSTMCell`"):
        history(tmp_path, Fused())
    callback = GradientCoherence(unsupported="skip", figure=False)
    names = {f"net.{i}.{name}" for i in (0, 2) for name in ("weight", "bias")}
    assert set(history(tmp_path, Fused(), callback)[0]["layers"]) == names


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_steps": 0}, "`every_n_steps` .*got 0"),
        ({"n_batches": 0}, "`n_batches` .*got 0"),
        ({"max_bytes": 0}, "`max_bytes` .*got 0"),
        ({"batch_dim": -1}, "`batch_dim` .*got -1"),
        ({"source": "test"}, "`source` .*got 'test'"),
        ({"unsupported": "warn"}, "`unsupported` .*got 'warn'"),
    ],
    ids=str,
)
def test_refuses_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradientCoherence(**options)
