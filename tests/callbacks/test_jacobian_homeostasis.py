import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader
from typing_extensions import override

from fulgurite.callbacks import JacobianHomeostasis
from fulgurite.plugins.equilibrium import (
    ConvField,
    DenseField,
    EquilibriumField,
    EquilibriumLayer,
    adjoint_response,
    homeostatic_loss,
    jacobian_symmetry,
)
from tests.suites.fits import Snapshot, assert_same

INPUTS, CLASSES = 6, 3


def dataset(size: int = 16, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(size, INPUTS, generator=generator)
    return TensorDataset(x, (x[:, :2].sum(1) * 1.5).long().clamp(max=CLASSES - 1))


class Classifier(LightningModule):
    """As a user has it: a layer and a read-out."""

    def __init__(self, gradient: str = "ep", batch_size: int = 4, size: int = 16, lr: float = 0.1) -> None:
        super().__init__()
        field = DenseField(INPUTS, {"l1": 5, "out": 4})
        self.net = EquilibriumLayer(field, gradient=gradient, free_steps=40, tol=0.0)  # type: ignore[arg-type]
        self.readout = nn.Linear(4, CLASSES)
        self.batch_size, self.size, self.lr = batch_size, size, lr

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = cross_entropy(self.readout(self.net(batch[0])), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", cross_entropy(self.readout(self.net(batch[0])), batch[1]), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.5)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(dataset(self.size), batch_size=self.batch_size)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(dataset(8, seed=1), batch_size=4)


def make(double: bool = False, **options: Any) -> Classifier:
    torch.manual_seed(7)
    return Classifier(**options).double() if double else Classifier(**options)


def fit(module: LightningModule, *callbacks: Callback, ckpt_path: Any = None, **options: Any) -> Trainer:
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        "limit_val_batches": 0,
    }
    settings = quiet | {"accelerator": "cpu", "devices": 1, "max_epochs": 1} | options
    trainer = Trainer(**settings, callbacks=[*callbacks])
    trainer.fit(module, ckpt_path=ckpt_path)
    return trainer


class Doubles(Classifier):
    """In double precision throughout, so that equal means equal; ranks take turns at the rows."""

    def train_dataloader(self) -> DataLoader[Any]:
        x, y = dataset(self.size).tensors
        rank, ranks = self.trainer.global_rank, self.trainer.world_size
        return DataLoader(TensorDataset(x.double()[rank::ranks], y[rank::ranks]), batch_size=self.batch_size)


def doubles(**options: Any) -> Doubles:
    torch.manual_seed(7)
    return Doubles(**options).double()


class Gradients(Callback):
    """What the optimizer sees."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        grads = [(name, param) for name, param in pl_module.named_parameters() if param.grad is not None]
        self.seen.append({name: param.grad.clone() for name, param in grads})


def gradients_of(module: LightningModule, *callbacks: Callback, **options: Any) -> dict[str, Tensor]:
    seen = Gradients()
    fit(module, *callbacks, seen, **{"max_steps": 1} | options)
    return seen.seen[0]


def penalty_gradients(module: Classifier, coef: float) -> dict[str, Tensor]:
    """By hand, from the closed form."""
    loss = coef * homeostatic_loss(module.net.field, torch.zeros(1, 9), torch.zeros(1, INPUTS), estimator="exact")
    grads = torch.autograd.grad(loss, list(module.parameters()), allow_unused=True, materialize_grads=True)
    return dict(zip(dict(module.named_parameters()), grads, strict=True))


def test_the_penalty_joins_the_gradient_of_the_loss() -> None:
    plain = gradients_of(doubles())
    added = penalty_gradients(doubles(), 0.7)
    both = gradients_of(doubles(), JacobianHomeostasis(0.7, estimator="exact"))
    assert_same({name: plain[name] + added[name] for name in plain}, both, 1e-14)
    assert added["net.field.weights.l1-out"].abs().max() > 1e-3


@pytest.mark.parametrize("estimator", ["vjp", "jvp"])
def test_probes_push_the_same_way(estimator: Any) -> None:
    plain = gradients_of(doubles())
    added = penalty_gradients(doubles(), 1.0)
    both = gradients_of(doubles(), JacobianHomeostasis(1.0, estimator=estimator, probes=500))
    for name in ("net.field.weights.l1-out", "net.field.weights.out-l1"):
        pushed = (both[name] - plain[name]).flatten()
        assert torch.cosine_similarity(pushed, added[name].flatten(), 0) > 0.99


def test_a_coefficient_of_0_only_watches() -> None:
    logged = fit(watched := make(), JacobianHomeostasis(0.0)).callback_metrics
    fit(plain := make())
    assert_same(plain.state_dict(), watched.state_dict())
    assert logged["homeostasis/loss"] > 0


def test_it_makes_the_jacobian_symmetric() -> None:
    indices = []
    for coef in (0.0, 5.0):
        module = make(size=64)
        fit(module, JacobianHomeostasis(coef), max_epochs=10)
        indices.append(jacobian_symmetry(module.net.field, torch.zeros(1, 9), torch.zeros(1, INPUTS)).item())
    assert indices[0] < 0.7
    assert indices[1] > 0.9


def test_accumulated_batches_are_one_double_batch() -> None:
    callback = {"coef": 0.7, "estimator": "exact"}
    whole = gradients_of(doubles(batch_size=8), JacobianHomeostasis(**callback))
    halves = gradients_of(doubles(batch_size=4), JacobianHomeostasis(**callback), accumulate_grad_batches=2)
    assert_same(whole, halves, 1e-12)


@pytest.mark.parametrize("callbacks", [[], [{"coef": 0.0}], [{"coef": 0.7, "estimator": "exact"}]], ids=str)
def test_two_ranks_are_one_with_the_joined_batch(callbacks: list[Any], tmp_path: Path) -> None:
    class Save(Gradients):
        @override
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            torch.save(self.seen[0], tmp_path / f"{trainer.global_rank}.pt")

    one = gradients_of(doubles(batch_size=8), *(JacobianHomeostasis(**options) for options in callbacks))
    both = [JacobianHomeostasis(**options) for options in callbacks]
    two = {"devices": 2, "strategy": "ddp_fork", "use_distributed_sampler": False}
    fit(doubles(batch_size=4), *both, Save(), max_steps=1, **two)
    for rank in range(2):
        assert_same(one, torch.load(tmp_path / f"{rank}.pt"), 1e-12)


def test_ranks_draw_probes_of_their_own_and_a_resumed_fit_goes_on_as_it_was(tmp_path: Path) -> None:
    class Losses(Callback):
        def __init__(self, name: str) -> None:
            self.name, self.seen = name, []

        @override
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            self.seen.append(trainer.callback_metrics["homeostasis/loss"].item())

        @override
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            torch.save(self.seen, tmp_path / f"{self.name} {trainer.global_rank}.pt")

    def run(name: str, **options: Any) -> Any:
        kept = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        snapshot = Snapshot(tmp_path / name)
        snapshot.folder.mkdir()
        losses = Losses(name)
        two = {"devices": 2, "strategy": "ddp_fork"}
        fit(make(size=16, batch_size=2), JacobianHomeostasis(), losses, snapshot, kept, **two | options)
        return snapshot

    whole = run("whole", max_epochs=3)
    assert torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["callbacks"]["JacobianHomeostasis"]["draws"] == 4
    torch.manual_seed(99)  # another seed in the process that resumes
    resumed = run("resumed", max_epochs=3, ckpt_path=tmp_path / "epoch=0.ckpt")
    for rank in range(2):
        assert_same(whole.read(rank)["local"], resumed.read(rank)["local"])
        seen = torch.load(tmp_path / f"whole {rank}.pt")
        assert seen[4:] == torch.load(tmp_path / f"resumed {rank}.pt")
    assert seen[0] != torch.load(tmp_path / "whole 0.pt")[0]


def test_one_process_resumes_within_an_epoch(tmp_path: Path) -> None:
    class Stateful(Classifier):
        @override
        def train_dataloader(self) -> StatefulDataLoader[Any]:
            return StatefulDataLoader(dataset(), batch_size=4)

    torch.manual_seed(7)
    whole = Stateful()
    fit(whole, JacobianHomeostasis(), ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1), max_epochs=2)
    resumed = Stateful()
    (path,) = tmp_path.glob("*step=3.ckpt")
    fit(resumed, JacobianHomeostasis(), ckpt_path=path, max_epochs=2)
    assert_same(whole.state_dict(), resumed.state_dict())


def test_probes_leave_the_global_generator_alone() -> None:
    states = []
    for callbacks in ([], [JacobianHomeostasis()]):
        fit(make(), *callbacks)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_a_loss_scale_cancels(scale: float) -> None:
    class Bfloat(MixedPrecision):
        """16-mixed as on a GPU, with a type that the CPU has kernels for."""

        def __init__(self) -> None:
            super().__init__("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=scale))

        @override
        def autocast_context_manager(self) -> torch.autocast:
            return torch.autocast("cpu", torch.bfloat16)

    module = make()
    fit(module, JacobianHomeostasis(0.7, estimator="exact"), plugins=[Bfloat()], max_steps=1)
    other = make()
    fit(other, JacobianHomeostasis(0.7, estimator="exact"), precision="bf16-mixed", max_steps=1)
    assert_same(module.state_dict(), other.state_dict(), 1e-6)


def test_clipping_sees_the_sum() -> None:
    callback = {"coef": 50.0, "estimator": "exact"}
    before = gradients_of(doubles(), JacobianHomeostasis(**callback))
    module = doubles(lr=1.0)
    start = torch.cat([param.detach().flatten().clone() for param in module.parameters()])
    fit(module, JacobianHomeostasis(**callback), gradient_clip_val=0.5, max_steps=1)
    step = start - torch.cat([param.detach().flatten() for param in module.parameters()])
    whole = torch.cat([grad.flatten() for grad in before.values()])
    assert whole.norm() > 1
    torch.testing.assert_close(step, 0.5 * whole / whole.norm(), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true", "32-true"])
def test_precisions(precision: Any) -> None:
    trainer = fit(make(), JacobianHomeostasis(), precision=precision, limit_val_batches=1)
    assert trainer.callback_metrics["homeostasis/loss"].isfinite()


def test_probes_are_not_rounded_under_mixed_precision() -> None:
    first = [
        fit(make(), JacobianHomeostasis(), precision=precision, max_steps=1).callback_metrics["homeostasis/loss"].item()
        for precision in ("32-true", "bf16-mixed")
    ]
    assert first[0] == pytest.approx(first[1], rel=1e-6)


def test_manual_optimization() -> None:
    class Manual(Classifier):
        automatic_optimization = False

        @override
        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    torch.manual_seed(7)
    manual = Manual()
    fit(manual, JacobianHomeostasis(0.7))
    automatic = make()
    fit(automatic, JacobianHomeostasis(0.7))
    assert_same(manual.state_dict(), automatic.state_dict(), 1e-6)


class Recorder(Callback):
    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []

    @override
    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.metrics.append({name: value.item() for name, value in trainer.callback_metrics.items()})


def test_what_is_logged() -> None:
    module, recorder = make(), Recorder()
    callback = JacobianHomeostasis(0.0, estimator="exact", log_alignment_every_n_steps=1)
    fit(module, callback, recorder, max_steps=1)
    (logged,) = recorder.metrics
    fresh = make()
    x, y = dataset()[:4]
    loss = cross_entropy(fresh.readout(fresh.net(x)), y)
    loss.backward()
    net = fresh.net
    r = net.activation(net.last_state)
    assert logged["loss"] == pytest.approx(loss.item())
    assert logged["homeostasis/loss"] == pytest.approx(
        homeostatic_loss(net.field, r, x, estimator="exact").item(), rel=1e-5
    )
    assert logged["homeostasis/symmetry"] == pytest.approx(jacobian_symmetry(net.field, r, x).mean().item(), abs=0.02)
    assert logged["homeostasis/residual"] == pytest.approx(net.last_residual.item(), abs=1e-7)
    exact = adjoint_response(net.field, net.activation, net.last_state, x, net.last_backward.signal, steps=400)
    hidden = net.field.block("l1")
    cosine = torch.cosine_similarity(exact[:, hidden], net.last_backward.response[:, hidden]).mean().item()
    assert logged["homeostasis/alignment"] == pytest.approx(cosine, abs=1e-4)
    assert abs(cosine) < 0.99


class Called(Classifier):
    """With an exact gradient, whose alignment is 1, and calls by the test's own ways."""

    def __init__(self, way: str) -> None:
        super().__init__("adjoint", batch_size=8)
        self.way = way

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        if self.way == "unused":
            return cross_entropy(self.readout(x[:, :4]), y)
        with torch.set_grad_enabled(self.way != "no_grad"):
            out = self.net(x)
        if self.way == "twice":
            out = out + self.net(1 - x)
        if self.way == "two sizes":
            out = out + self.net(1 - x[:2]).sum()
        if self.way == "other batch":
            self.net(x[:3])
        if self.way == "no_grad batch":
            with torch.no_grad():
                self.net(x[:3])
        return cross_entropy(self.readout(out.detach() if self.way == "detached" else out), y)


@pytest.mark.parametrize("way", ["once", "twice", "two sizes", "other batch", "no_grad batch"])
def test_the_alignment_of_an_exact_gradient_is_1(way: str) -> None:
    torch.manual_seed(7)
    callback = JacobianHomeostasis(0.0, log_alignment_every_n_steps=1)
    logged = fit(Called(way), callback).callback_metrics
    assert logged["homeostasis/alignment"] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("coef", [0.0, 1.0])
@pytest.mark.parametrize("way", ["unused", "detached", "no_grad"])
def test_a_layer_that_takes_no_part_has_no_alignment(way: str, coef: float) -> None:
    logged = fit(Called(way), JacobianHomeostasis(coef, log_alignment_every_n_steps=1)).callback_metrics
    assert "homeostasis/alignment" not in logged
    assert ("homeostasis/residual" in logged) == (way == "detached")


def test_a_frozen_layer_is_only_watched() -> None:
    module = make()
    module.net.requires_grad_(False)
    before = [param.clone() for param in module.net.parameters()]
    logged = fit(module, JacobianHomeostasis(log_alignment_every_n_steps=1)).callback_metrics
    assert "homeostasis/alignment" not in logged
    assert logged["homeostasis/loss"] > 0
    assert all(torch.equal(one, two) for one, two in zip(before, module.net.parameters(), strict=True))


@pytest.mark.parametrize("linear", [False, True])
def test_a_second_derivative_and_the_penalty_exclude_each_other(linear: bool) -> None:
    class Twice(Classifier):
        @override
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            out = self.net(batch[0])
            loss = out.sum() if linear else out.square().sum()
            weight = self.net.field.weights["l1-out"]
            (grad,) = torch.autograd.grad(loss, weight, create_graph=True)
            return grad.square().sum()

    with pytest.raises(RuntimeError, match=r"no second derivative .* JacobianHomeostasis .* set its `coef` to 0"):
        fit(Twice("unroll"), JacobianHomeostasis())
    fit(Twice("unroll"), JacobianHomeostasis(0.0))


def test_how_often() -> None:
    module, recorder = make(size=32), Recorder()
    seen = Gradients()
    fit(module, JacobianHomeostasis(1e3, estimator="exact", every_n_steps=3), recorder, seen, max_steps=7)
    large = [grads["net.field.weights.l1-out"].norm() > 10 for grads in seen.seen]
    assert large == [step % 3 == 0 for step in range(7)]
    assert "homeostasis/alignment" not in recorder.metrics[-1]


def test_validation_is_left_alone() -> None:
    callback = JacobianHomeostasis()
    module = make()
    trainer = fit(module, callback, limit_val_batches=2, num_sanity_val_steps=1)
    assert callback.state_dict()["draws"] == 4
    trainer.validate(module, verbose=False)
    assert callback.state_dict()["draws"] == 4
    assert not module.net._forward_hooks


def test_an_exception_takes_the_hooks_along() -> None:
    class Fails(Classifier):
        @override
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            raise RuntimeError("the user's")

    module = Fails()
    with pytest.raises(RuntimeError, match="the user's"):
        fit(module, JacobianHomeostasis())
    assert not module.net._forward_hooks


class Two(Classifier):
    """With two layers, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.second = EquilibriumLayer(ConvField((1, 8, 8), (2,), 5), free_steps=20)

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images = nn.functional.pad(self.net(batch[0]), (0, 60)).view(-1, 1, 8, 8)
        return self.second(images).square().mean()


@pytest.mark.parametrize(
    ("modules", "penalised"), [(None, {"net", "second"}), (["second"], {"second"}), ("second", {"second"})]
)
def test_all_layers_or_some(modules: str | list[str] | None, penalised: set[str]) -> None:
    found = []
    for callbacks in ([], [JacobianHomeostasis(100.0, modules=modules)]):
        torch.manual_seed(0)
        found.append(gradients_of(Two(), *callbacks))
    plain, pushed = found
    assert {name.partition(".")[0] for name in plain if not torch.equal(pushed[name], plain[name])} == penalised


class Nonlinear(EquilibriumField):
    def forward(self, r: Tensor, x: Tensor) -> Tensor:
        return x[:, :4] + r.sin()


def with_field(field: EquilibriumField, **options: Any) -> Classifier:
    module = make()
    module.net = EquilibriumLayer(field, **options)
    return module


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (lambda: NoLayer(), {}, "NoLayer has no EquilibriumLayer"),
        (make, {"modules": ["nett"]}, "`modules` names nett, and the module's EquilibriumLayers are net"),
        (
            lambda: with_field(Nonlinear({"out": 4})),
            {"estimator": "exact"},
            r"`estimator='exact'` needs a field .* linear .* net \(Nonlinear\) .* use 'vjp'",
        ),
        (
            lambda: with_field(DenseField(6, {"out": 4}), gradient="unroll"),
            {"log_alignment_every_n_steps": 1},
            "net has gradient='unroll': use 'ep' or 0",
        ),
    ],
    ids=["layer", "modules", "exact", "unroll"],
)
def test_refused_at_setup(module: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        fit(module(), JacobianHomeostasis(**options))


class NoLayer(LightningModule):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        raise AssertionError("the fit must not start")

    def configure_optimizers(self) -> None:
        return None

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(dataset(), batch_size=4)


def test_sharded_weights_are_refused() -> None:
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy_was, trainer._accelerator_connector.strategy = trainer.strategy, FSDPStrategy()
    with pytest.raises(MisconfigurationException, match="FSDPStrategy holds pieces: train by"):
        JacobianHomeostasis().setup(trainer, make(), "fit")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coef": -1.0}, "`coef` .* at least 0, got -1.0"),
        ({"coef": math.nan}, "`coef` .* got nan"),
        ({"probes": 0}, "`probes` .* at least 1, got 0"),
        ({"estimator": "best"}, "`estimator` must be 'vjp', 'jvp' or 'exact', got 'best'"),
        ({"every_n_steps": 0}, "^`every_n_steps` .* at least 1, got 0"),
        ({"log_alignment_every_n_steps": -1}, "^`log_alignment_every_n_steps` .* 0 for none, got -1"),
    ],
    ids=str,
)
def test_bad_input(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        JacobianHomeostasis(**options)


def test_can_be_built_from_yaml() -> None:
    options = {"coef": 0.5, "estimator": "exact", "modules": ["net"]}
    callback = {"class_path": "fulgurite.callbacks.JacobianHomeostasis", "init_args": options}
    config = {"trainer": {"accelerator": "cpu", "logger": False, "callbacks": [callback]}}
    cli = LightningCLI(Classifier, args=config, run=False, save_config_callback=None)
    (built,) = (part for part in cli.trainer.callbacks if isinstance(part, JacobianHomeostasis))
    assert (built.coef, built.estimator, built.modules) == (0.5, "exact", ["net"])
