import importlib.util
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SubsetRandomSampler, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader
from typing_extensions import override

from fulgurite.callbacks import HessianSpectrum
from fulgurite.callbacks.hessian_spectrum import density_figure
from fulgurite.callbacks.training_batches import batch_at, training_batches
from tests.plugins.linalg.dense import CLASSES, SCALARS_OF_D, D, Dense, SquaredOnce, batch, network
from tests.suites.fits import streaming

close = torch.testing.assert_close


def trainer(*callbacks: Callback, **options: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks)}
    return Trainer(**quiet | {"accelerator": "cpu", "devices": 1, "max_steps": 2, "callbacks": [*callbacks]} | options)


class Quadratic(LightningModule):
    """``1/2 (theta - c)' A (theta - c)`` times the batch's only number."""

    def __init__(self, a: Tensor, lr: float = 0.0, momentum: float = 0.0, optimizer: Any = torch.optim.SGD) -> None:
        super().__init__()
        self.a, self.theta = a, nn.Parameter(torch.ones(len(a), dtype=a.dtype))
        self.optimizer = optimizer(self.parameters(), lr, **({"momentum": momentum} if momentum else {}))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        moved = self.theta - 0.5
        return batch.mean() * 0.5 * moved @ self.a @ moved

    def configure_optimizers(self) -> Any:
        return self.optimizer

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(torch.ones(4, dtype=torch.float64))


class Network(LightningModule):
    """In double precision, on the ten rows of the dense reference."""

    def __init__(self, rows: Any = slice(None), lr: float = 0.1) -> None:
        super().__init__()
        self.net, self.rows, self.lr = network(), rows, lr

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)

    def train_dataloader(self) -> DataLoader[Any]:
        data = TensorDataset(*(part[self.rows] for part in batch(n=8)))
        return DataLoader(data, batch_size=len(data))


def measured(module: LightningModule, data: Any = None, fit: Any = None, **options: Any) -> HessianSpectrum:
    callback = HessianSpectrum(**{"figure": False, "n_probes": 2, "ggn": False} | options)
    trainer(callback, **fit or {}).fit(module, data)
    return callback


# ---- what it measures ------------------------------------------------------------------------------------------------


def test_the_eigenvalues_of_any_quadratic() -> None:
    a = torch.randn(9, 9, dtype=torch.float64)
    a = a + a.T
    (record,) = measured(Quadratic(a), k=9, lanczos_steps=9, tol=1e-9).history
    close(record.eigenvalues, torch.linalg.eigvalsh(a).flip(0))


def test_the_scalars_of_a_diagonal_quadratic_are_exact() -> None:
    (record,) = measured(Quadratic(D.diag()), k=7, lanczos_steps=7, near_zero=0.004).history
    expected = SCALARS_OF_D | {"stability": 0.0}
    assert record.scalars == pytest.approx(expected | {"seconds": record.scalars["seconds"]}, rel=1e-6, abs=1e-9)
    assert record.scalars["seconds"] > 0
    assert record.step == 2


@pytest.mark.parametrize(("lr", "momentum"), [(1.9, 0.0), (2.1, 0.0), (3.6, 0.9), (4.0, 0.9)])
def test_stability_says_whether_gradient_descent_converges(lr: float, momentum: float) -> None:
    module = Quadratic(torch.tensor([[6.0, 0], [0, 1]], dtype=torch.float64), lr / 6, momentum)
    callback = measured(module, k=1, lanczos_steps=2, at_steps=[1], fit={"max_steps": 300, "max_epochs": -1})
    stability = callback.history[0].scalars["stability"]
    assert stability == pytest.approx(lr / (2 + 2 * momentum))
    assert (float((module.theta.detach() - 0.5).norm()) < 1e-3) == (stability < 1)


def test_stability_is_of_plain_sgd_alone() -> None:
    for optimizer in (torch.optim.Adam, lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9, nesterov=True)):
        assert "stability" not in measured(Quadratic(D.diag(), 0.1, optimizer=optimizer)).history[0].scalars


def test_a_network_against_its_dense_matrices() -> None:
    module = Network()
    callback = HessianSpectrum(figure=False, k=4, tol=1e-9, n_probes=200, lanczos_steps=3, keep_vectors=True)
    trainer(callback).fit(module)
    (record,) = callback.history
    dense = Dense(module.net, *batch(n=8))
    h, g = dense.hessian(), dense.ggn()
    values, vectors = torch.linalg.eigh(h)
    close(record.eigenvalues, values.flip(0)[:4], rtol=1e-8, atol=1e-10)
    assert record.vectors is not None
    close(record.vectors @ record.vectors.T, vectors[:, -4:] @ vectors[:, -4:].T, rtol=0, atol=1e-6)
    assert abs(record.scalars["trace"] - float(h.trace())) < 4 * record.scalars["trace_stderr"]
    assert record.scalars["ggn_lambda_max"] == pytest.approx(float(torch.linalg.eigvalsh(g)[-1]), rel=1e-6)
    # 200 probes: five times their spread
    assert record.scalars["residual_ratio"] == pytest.approx(float((h - g).norm() / h.norm()), rel=5 / 200**0.5)


def test_traces_of_blocks_sum_to_the_trace() -> None:
    blocks: list[Any] = ["net.0.*", ["net.2.weight", "net.2.bias"]]
    options: dict[str, Any] = {"n_probes": 100, "lanczos_steps": 2, "k": 1, "gradient_overlap": False}
    module = Network(lr=0.0)
    parts = [measured(module, params=params, **options).history[0] for params in blocks]
    assert [part.measure.size for part in parts] == [30, 21]
    exact = float(Dense(module.net, *batch(n=8)).hessian().trace())
    spread = sum(part.scalars["trace_stderr"] ** 2 for part in parts) ** 0.5
    assert abs(sum(part.scalars["trace"] for part in parts) - exact) < 4 * spread


def test_k_follows_the_classes_and_is_clipped_once() -> None:
    assert len(measured(Network()).history[0].eigenvalues) == 3 * CLASSES + 5
    with pytest.warns(UserWarning, match="`lanczos_steps` .80. and `k` .8. is clipped to the 7 parameters") as caught:
        callback = measured(Quadratic(D.diag()), k=8, every_n_steps=1)
    assert len(callback.history) == 2
    assert sum("clipped" in str(warning.message) for warning in caught) == 1


def test_a_loss_without_a_gauss_newton_part_warns_once() -> None:
    with pytest.warns(UserWarning, match="no scalars of the Gauss-Newton matrix") as caught:
        callback = measured(Quadratic(D.diag()), every_n_steps=1, ggn=True, lanczos_steps=7, k=2)
    assert len(callback.history) == 2
    assert sum("Gauss-Newton" in str(warning.message) for warning in caught) == 1


def test_accumulated_and_repeated_batches_leave_the_loss_as_it_is() -> None:
    one = measured(Network(lr=0.0), k=3, tol=1e-9, fit={"max_steps": 1}).history[0]
    for options, fit in (({}, {"accumulate_grad_batches": 3, "max_epochs": 3}), ({"n_batches": 2}, {})):
        module = Network(lr=0.0)
        twice = DataLoader(torch.utils.data.ConcatDataset([module.train_dataloader().dataset] * 2), batch_size=8)
        again = measured(module, twice, k=3, tol=1e-9, fit={"max_steps": 1} | fit, **options).history[0]
        close(again.eigenvalues, one.eigenvalues, rtol=1e-8, atol=1e-10)


def test_two_ranks_with_half_the_batch_are_one_with_all_of_it(tmp_path: Path) -> None:
    class Halves(Network):
        @override
        def train_dataloader(self) -> DataLoader[Any]:
            self.rows = slice(4 * self.global_rank, 4 * self.global_rank + 4)
            return super().train_dataloader()

    class Write(Callback):
        @override
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            (record,) = callback.history
            kept = {"values": record.eigenvalues, "scalars": record.scalars}
            torch.save(kept, tmp_path / f"{trainer.global_rank}.pt")

    alone = measured(Network(), k=3, tol=1e-9, ggn=True, at_steps=[1]).history[0]
    for basis in ("full", "sharded"):
        callback = HessianSpectrum(figure=False, k=3, tol=1e-9, n_probes=2, at_steps=[1], basis=basis)  # type: ignore[arg-type]
        parallel = {"devices": 2, "strategy": "ddp_fork", "use_distributed_sampler": False}
        trainer(callback, Write(), **parallel).fit(Halves())
        first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
        assert first["scalars"] == second["scalars"]
        close(first["values"], alone.eigenvalues, rtol=1e-7, atol=1e-9)
        names = alone.scalars.keys() - {"seconds", "n_products"}
        found = {name: first["scalars"][name] for name in names}
        assert found == pytest.approx({name: alone.scalars[name] for name in names}, rel=1e-6, abs=1e-9)


# ---- when ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "fit", "steps"),
    [
        ({}, {}, [10]),
        ({"every_n_steps": 4}, {}, [4, 8]),
        ({"at_steps": [1, 7, 99]}, {}, [1, 7]),
        ({"at_epoch_end": True}, {}, [4, 8, 10]),
        ({"at_epoch_end": True, "every_n_steps": 4, "at_steps": (5,)}, {}, [4, 5, 8, 10]),
        ({"every_n_steps": 2}, {"accumulate_grad_batches": 2, "max_steps": 5}, [2, 4]),
    ],
    ids=str,
)
def test_steps(options: dict[str, Any], fit: dict[str, Any], steps: list[int]) -> None:
    callback = measured(
        Quadratic(D.diag()), k=1, lanczos_steps=7, fit={"max_steps": 10, "max_epochs": 3} | fit, **options
    )
    assert [record.step for record in callback.history] == steps


def test_weights_after_the_step() -> None:
    class Quartic(Quadratic):
        @override
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return (self.theta**4).sum() / 12  # curvature theta^2

    module = Quartic(D.diag(), lr=0.5)
    (record,) = measured(module, at_steps=[1], k=1, lanczos_steps=7, fit={"max_steps": 1}).history
    assert record.scalars["lambda_max"] == pytest.approx(float(module.theta.detach()[0]) ** 2)
    assert float(module.theta.detach()[0]) == pytest.approx(1 - 0.5 / 3)


def test_a_warm_start_and_the_drift() -> None:
    cold, warm = measured(Network(), every_n_steps=1, k=3, lanczos_steps=3, n_probes=1).history
    assert "drift" not in cold.scalars
    assert 0 <= warm.scalars["drift"] < 0.5  # one step later
    still = measured(Quadratic(D.diag()), every_n_steps=1, k=2, lanczos_steps=7).history[1]
    assert still.scalars["drift"] == pytest.approx(0, abs=1e-6)


# ---- of which batches ------------------------------------------------------------------------------------------------


class Noted(Quadratic):
    """Notes the numbers that the step gets; the curvature is their mean."""

    def __init__(self, **options: Any) -> None:
        super().__init__(D.diag(), **options)
        self.trained: list[float] = []

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.trained.append(float(batch))  # forgotten where the callback calls
        batch.zero_()
        return loss


def numbers(sampler: Any = None, n: int = 8) -> DataLoader[Any]:
    return DataLoader(torch.arange(1.0, 1 + n).double().tolist(), sampler=sampler, batch_size=1)


@pytest.mark.parametrize("n_batches", [1, 3])
def test_current_batches_are_the_last_ones(n_batches: int) -> None:
    module = Noted()
    options: dict[str, Any] = {"batches": "current", "n_batches": n_batches, "k": 1, "lanczos_steps": 7}
    loader = numbers(RandomSampler(range(8), generator=torch.Generator().manual_seed(1)))
    callback = measured(module, loader, every_n_steps=4, fit={"max_steps": 8}, **options)
    for record in callback.history:
        last = module.trained[record.step - n_batches : record.step]
        assert record.scalars["lambda_max"] == pytest.approx(6 * sum(last) / n_batches)


def test_fixed_batches_stay_and_training_reads_what_it_would() -> None:
    orders = []
    for callbacks in (
        [],
        [HessianSpectrum(every_n_steps=2, n_batches=2, k=1, lanczos_steps=7, ggn=False, figure=False)],
    ):
        module = Noted()
        loader = numbers(RandomSampler(range(8), generator=torch.Generator().manual_seed(1)))
        trainer(*callbacks, max_steps=12, max_epochs=2).fit(module, loader)
        orders.append(module.trained)
    assert orders[0] == orders[1]
    values = [record.scalars["lambda_max"] for record in callbacks[0].history]
    assert len(values) == 6
    assert values == pytest.approx(values[:1] * 6)


def test_a_second_fit_draws_from_its_own_data() -> None:
    callback = HessianSpectrum(k=1, lanczos_steps=7, ggn=False, figure=False)
    for n in (8, 2):
        trainer(callback, max_steps=1).fit(Noted(), numbers(range(n - 1, -1, -1), n))
    assert [record.scalars["lambda_max"] for record in callback.history] == pytest.approx([6 * 8, 6 * 2])
    assert "drift" not in callback.history[1].scalars


def test_fixed_batches_come_from_the_loaders_own_sampler() -> None:
    rows = [5, 6, 7]
    loader = numbers(SubsetRandomSampler(rows))
    drawn = list(training_batches(loader, 0, ""))
    assert sorted(float(batch) for _, batch in drawn) == [6, 7, 8]
    assert [float(batch) for _, batch in training_batches(loader, 0, "")] == [float(batch) for _, batch in drawn]
    assert [float(batch_at(loader, index, 0)) for index, _ in drawn] == [float(batch) for _, batch in drawn]
    orders = {tuple(float(batch) for _, batch in training_batches(loader, seed, "")) for seed in range(8)}
    assert len(orders) > 1


def test_random_augmentations_and_unbatched_data() -> None:
    class Augmented(torch.utils.data.Dataset[Tensor]):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> Tensor:
            return torch.rand(2) + index

    for options in ({"batch_size": 2}, {"batch_size": None}):
        loader = DataLoader(Augmented(), shuffle=True, **options)  # type: ignore[arg-type]
        before = torch.get_rng_state()
        drawn = list(training_batches(loader, 3, ""))
        assert torch.equal(torch.get_rng_state(), before)
        for index, found in drawn:
            close(batch_at(loader, index, 3), found, rtol=0, atol=0)


class Stream(IterableDataset[float]):
    def __iter__(self) -> Iterator[float]:
        return iter([1.0, 2.0, 3.0, 4.0])


def test_streams() -> None:
    for loader in (DataLoader(Stream()), [torch.tensor([float(i)]) for i in (1, 2, 3, 4)]):
        data = loader if isinstance(loader, DataLoader) else SimpleLoader(loader)
        callback = measured(Noted(), data, n_batches=2, k=1, lanczos_steps=7)
        assert callback.history[0].scalars["lambda_max"] == pytest.approx(6 * 1.5)
    single = DataLoader(Once())
    with pytest.raises(ValueError, match=r"can be iterated only once.*`batches=\"current\"`"):
        measured(Noted(), single)
    current = measured(Noted(), DataLoader(Once()), batches="current", k=1, lanczos_steps=7)
    assert current.history[0].scalars["lambda_max"] == pytest.approx(6 * 2)
    with pytest.raises(ValueError, match="several training loaders"):
        next(training_batches([numbers(), numbers()], 0, ""))


class SimpleLoader:
    def __init__(self, batches: list[Tensor]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Tensor]:
        return (batch.clone() for batch in self.batches)


class Once(IterableDataset[float]):
    """As around an open file."""

    def __init__(self) -> None:
        self.rest = iter([1.0, 2.0, 3.0])

    def __iter__(self) -> Iterator[float]:
        return self.rest


@pytest.mark.parametrize("batches", ["fixed", "current"])
def test_a_skipped_batch_makes_way_for_the_next(batches: Any) -> None:
    class Skips(Noted):
        @override
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
            return None if batch == 1 or batch == 4 else super().training_step(batch, batch_idx)

    module = Skips()
    options: dict[str, Any] = {"batches": batches, "n_batches": 2, "k": 1, "lanczos_steps": 7}
    callback = measured(module, numbers(), fit={"max_steps": 5}, **options)
    expected = (2 + 3) / 2 if batches == "fixed" else (3 + 5) / 2
    assert callback.history[-1].scalars["lambda_max"] == pytest.approx(6 * expected)
    assert module.trained == [2, 3, 5]

    class WarmsUp(Noted):
        @override
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
            return None if batch_idx == 0 else super().training_step(batch, batch_idx)

    callback = measured(WarmsUp(), numbers(), fit={"max_steps": 3}, **options)
    assert callback.history[-1].scalars["lambda_max"] == pytest.approx(6 * (2 + 3) / 2)

    class SkipsAll(Noted):
        @override
        def training_step(self, batch: Tensor, batch_idx: int) -> None:  # type: ignore[override]
            return None

    if batches == "fixed":
        with pytest.raises(ValueError, match="`training_step` returned no loss for any batch"):
            measured(SkipsAll(), numbers())


# ---- any training ----------------------------------------------------------------------------------------------------


class ByHand(Quadratic):
    def __init__(self) -> None:
        super().__init__(D.diag(), lr=0.01)
        self.automatic_optimization = False

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> None:  # type: ignore[override]
        for _ in range(2):
            self.manual_backward(self.hessian_loss(batch))
        self.optimizers().step()

    def hessian_loss(self, batch: Tensor) -> Tensor:
        return super().training_step(batch, 0)


def test_manual_optimization_needs_a_step_of_its_own() -> None:
    with pytest.raises(MisconfigurationException, match=r'`HessianSpectrum\(step="hessian_loss"\)`'):
        measured(ByHand())
    callback = measured(ByHand(), step="hessian_loss", k=1, lanczos_steps=7, every_n_steps=1)
    assert [record.scalars["lambda_max"] for record in callback.history] == pytest.approx([6, 6])


@pytest.mark.parametrize("how", ["trainer", "part", "in place"])
def test_compiled_modules_are_measured_uncompiled(how: str) -> None:
    module: Any = Network()
    expected = measured(Network(), k=3, tol=1e-9).history[0].eigenvalues
    if how == "trainer":
        module = torch.compile(module, backend="aot_eager")
    elif how == "part":
        module.net = torch.compile(module.net, backend="aot_eager")
    else:
        module.net.compile(backend="aot_eager")
    close(measured(module, k=3, tol=1e-9).history[0].eigenvalues, expected, rtol=1e-7, atol=1e-9)


def test_vectors_are_single_and_the_step_in_autocast() -> None:
    seen = []

    class Seeing(Network):
        @override
        def training_step(self, batch: list[Tensor]) -> Tensor:
            out = self.net(batch[0].float())
            seen.append(out.dtype)
            return F.cross_entropy(out, batch[1])

    module = Seeing().float()
    (record,) = measured(module, fit={"precision": "bf16-mixed"}, k=3, keep_vectors=True).history
    assert set(seen) == {torch.bfloat16}
    assert record.vectors is not None
    assert record.vectors.dtype == torch.float32
    close(record.vectors.T @ record.vectors, torch.eye(3), rtol=0, atol=1e-5)


def test_dropout_repeats_and_eval_mode_has_none() -> None:
    class Dropped(Network):
        def __init__(self) -> None:
            super().__init__(lr=0.0)
            self.net.insert(2, nn.Dropout(0.5))

    first, second = measured(Dropped(), every_n_steps=1, k=3, tol=1e-9).history
    close(first.eigenvalues, second.eigenvalues, rtol=1e-9, atol=0)
    module = Dropped()
    plain = measured(module, eval_mode=True, k=3, tol=1e-9).history[0]
    values = torch.linalg.eigvalsh(Dense(module.net.eval(), *batch(n=8)).hessian())
    close(plain.eigenvalues, values.flip(0)[:3], rtol=1e-8, atol=1e-10)
    assert module.training


def test_a_loss_that_is_not_finite_is_noted_and_training_goes_on() -> None:
    class Breaks(Quadratic):
        @override
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * (math.inf if self.global_step == 2 else 1)

        @override
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.0)

        @override
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            for param in self.parameters():
                param.grad = None

    seen = []

    class Look(Callback):
        @override
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            seen.append(float(trainer.callback_metrics["hessian/lambda_max"]))

    callback = HessianSpectrum(every_n_steps=1, k=1, lanczos_steps=7, ggn=False, figure=False)
    with pytest.warns(UserWarning, match="the loss is not finite after step 2"):
        trainer(callback, Look(), max_steps=4).fit(Breaks(D.diag()))
    assert [record.step for record in callback.history] == [1, 3, 4]
    assert seen == pytest.approx([6, math.nan, 6, 6], nan_ok=True)


# ---- state and loggers -----------------------------------------------------------------------------------------------


def test_the_history_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    def run(folder: Path, keep: bool, steps: int, path: Any = None) -> HessianSpectrum:
        torch.manual_seed(5)
        callback = HessianSpectrum(every_n_steps=2, k=3, lanczos_steps=4, figure=False, keep_vectors=keep)
        checkpoint = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=4)
        module = Network()
        data = StatefulDataLoader(TensorDataset(*batch(n=32)), batch_size=4)
        trainer(callback, checkpoint, max_steps=steps, max_epochs=9).fit(module, data, ckpt_path=path)
        return callback

    for keep in (True, False):
        folder = tmp_path / str(keep)
        whole = run(folder, keep, 8)
        path = folder / "step=4.ckpt"
        state = torch.load(path, weights_only=True)["callbacks"]["HessianSpectrum"]
        assert [entry["step"] for entry in state["history"]] == [2, 4]
        assert (state["history"][0]["vectors"] is None) != keep
        assert [len(index) for rank in state["indices"] for index, _ in rank] == [4]
        resumed = run(folder / "more", keep, 8, path)
        for one, two in itertools.zip_longest(resumed.history, whole.history):
            assert one.step == two.step
            close(
                one.eigenvalues, two.eigenvalues, **({"rtol": 0, "atol": 0} if keep else {"rtol": 1e-3, "atol": 1e-3})
            )
            close(one.measure.nodes, two.measure.nodes, rtol=0, atol=0)
            if keep:
                same = {name: value for name, value in one.scalars.items() if name != "seconds"}
                assert same == {name: value for name, value in two.scalars.items() if name != "seconds"}


def test_checkpoints_can_follow_an_eigenvalue(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, monitor="hessian/lambda_max", every_n_train_steps=1)
    callback = HessianSpectrum(every_n_steps=1, figure=False, k=1)
    trainer(callback, checkpoint, max_steps=4).fit(Network())
    assert checkpoint.best_model_score is not None
    least = min(record.scalars["lambda_max"] for record in callback.history)
    assert float(checkpoint.best_model_score) == pytest.approx(least)


def test_the_figure_has_the_density_and_a_tick_an_eigenvalue() -> None:
    (record,) = measured(Network(), k=4).history
    figure = density_figure(record, title="a title")
    (axes,) = figure.axes
    density, ticks = axes.get_lines()
    grid, values = (torch.as_tensor(data) for data in density.get_data())
    assert float(torch.trapezoid(values, grid)) == pytest.approx(1, abs=1e-3)
    assert ticks.get_xdata() == pytest.approx(record.eigenvalues.tolist())
    assert (axes.get_xscale(), axes.get_yscale(), axes.get_title(loc="left")) == ("symlog", "log", "a title")


def test_figures_are_written_and_say_what_they_show(tmp_path: Path) -> None:
    callback = HessianSpectrum(every_n_steps=1, k=2, params="net.2.*")
    trainer(callback, default_root_dir=tmp_path).fit(Network())
    assert sorted(path.name for path in tmp_path.rglob("*.png")) == ["density_1.png", "density_2.png"]


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lanczos_steps": 1}, "`lanczos_steps` is a count and must be at least 2, got 1"),
        ({"n_probes": 0}, "`n_probes` .* at least 1, got 0"),
        ({"k": 0}, "`k` .* at least 1, got 0"),
        ({"k": "all"}, "`k` .* got 'all'"),
        ({"n_batches": 0}, "`n_batches` .* at least 1, got 0"),
        ({"every_n_steps": 0}, "`every_n_steps` .* at least 1, got 0"),
        ({"at_steps": [3, -1]}, r"`at_steps\[1\]` .* at least 1, got -1"),
        ({"sigma": 0.0}, "`sigma` must be positive, got 0.0"),
        ({"near_zero": -1.0}, "`near_zero` must be positive"),
        ({"tol": math.nan}, "`tol` must be positive"),
        ({"batches": "all"}, "`batches` must be 'fixed' or 'current', got 'all'"),
        ({"basis": "none"}, "`basis` must be 'full', 'sharded' or 'auto', got 'none'"),
        ({"basis": "sharded", "keep_vectors": True}, "`keep_vectors` writes whole vectors"),
    ],
    ids=str,
)
def test_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HessianSpectrum(**options)


def test_what_it_cannot_measure_is_refused_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    sharded = SimpleNamespace(strategy=FSDPStrategy())
    with pytest.raises(MisconfigurationException, match="FSDPStrategy holds pieces: train by"):
        HessianSpectrum().setup(sharded, Network(), "fit")  # type: ignore[arg-type]
    HessianSpectrum().setup(sharded, Network(), "validate")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"no trainable parameter matches 'net.9.\*'; there are net.0.weight"):
        measured(Network(), params=["net.0.*", "net.9.*"])
    with pytest.raises(MisconfigurationException, match="`step`: Network has no method `hessian_loss`"):
        measured(Network(), step="hessian_loss")
    with torch.inference_mode(), pytest.raises(MisconfigurationException, match=r"outside of `torch.inference_mode`"):
        measured(Network())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MisconfigurationException, match="`figure` needs matplotlib"):
        HessianSpectrum().setup(SimpleNamespace(strategy=None), Network(), "fit")  # type: ignore[arg-type]


def test_replicas_that_differ_are_refused() -> None:
    with pytest.raises(Exception, match=r"HessianSpectrum.*StreamingDiLoCoStrategy promises"):
        trainer(HessianSpectrum(), devices=2, strategy=streaming(sync_every=4)).fit(Network())


def test_losses_without_a_second_derivative_are_refused_before_the_first_step() -> None:
    class Custom(Quadratic):
        stepped = False

        @override
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return SquaredOnce.apply(self.theta).square().sum()

        @override
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            type(self).stepped = True

    class Detached(Quadratic):
        @override
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.theta.detach().sum()

    with pytest.raises(RuntimeError, match=r"lacks a derivative: .*once_differentiable.*`params`"):
        measured(Custom(D.diag()))
    assert not Custom.stepped
    with pytest.raises(ValueError, match="`loss` depends on no parameter"):
        measured(Detached(D.diag()))


def test_graphs_are_released_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    released = []

    def fail(loss: Any, **_: Any) -> None:
        next(loss.graphs())
        assert loss._graphs
        released.append(loss)
        raise ZeroDivisionError

    monkeypatch.setattr("fulgurite.callbacks.hessian_spectrum.spectrum", fail)
    with pytest.raises(ZeroDivisionError):
        measured(Network())
    assert not released[0]._graphs
