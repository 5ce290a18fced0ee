"""Methods of the collection together: each pair trains as its parts promise, or is refused by name before it does."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import Strategy
from torch import Tensor
from torch.multiprocessing.spawn import ProcessRaisedException
from torch.optim import SGD, Optimizer
from typing_extensions import override

from fulgurite.callbacks import (
    CoherentGradients,
    CurvatureBatches,
    GradientCoherence,
    HessianSpectrum,
    JacobianHomeostasis,
)
from fulgurite.plugins.comm.outer import OuterSGD
from fulgurite.plugins.equilibrium import DenseField, EquilibriumLayer
from fulgurite.plugins.federated import PGD
from fulgurite.plugins.optim import (
    ExponentiatedGradient,
    FedSpeed,
    FedSpeedServer,
    GradientRegularizedNewton,
    dale_groups,
)
from fulgurite.strategies import (
    FederatedAdversarialStrategy,
    FederatedStrategy,
    SequentialGradientCodingStrategy,
    StreamingDiLoCoStrategy,
)
from tests.suites.fits import OwnData, assert_same, fit, make, streaming
from tests.suites.models import WIDTH, sgd

AVERAGES: dict[str, Any] = {"outer_lr": 1.0, "outer_momentum": 0.0, "quantize": "fp32"}  # the workers' mean, exactly


class Settling(OwnData):
    """With a layer that learns by equilibrium propagation."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.net = EquilibriumLayer(DenseField(WIDTH, {"l1": 8, "out": WIDTH}), step_size=0.6)

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(self.net(inputs))


class Dale(OwnData):
    """Under exponentiated gradient: weights keep their signs, biases need not."""

    def __init__(self, hypentropy: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.hypentropy = hypentropy

    def configure_optimizers(self) -> Optimizer:
        groups = [{**group, "hypentropy": group["hypentropy"] or self.hypentropy} for group in dale_groups(self)]
        return ExponentiatedGradient(groups, lr=0.3, max_log_step=0.5)


class Began(Callback):
    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        Path("began").touch()


class History(Callback):
    """Keeps what each process's GradientCoherence has measured."""

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        (coherence,) = (each for each in trainer.callbacks if isinstance(each, GradientCoherence))
        torch.save(coherence.history, f"history{trainer.global_rank}.pt")


class Metrics(Callback):
    """Keeps the metrics of the first process."""

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            torch.save(dict(trainer.callback_metrics), "metrics.pt")


def metrics() -> dict[str, Tensor]:
    return torch.load("metrics.pt", weights_only=True)


def history(rank: int) -> list[dict[str, Any]]:
    return torch.load(f"history{rank}.pt", weights_only=True)


def built(kind: type[OwnData], **options: Any) -> OwnData:
    torch.manual_seed(7)
    return kind(**options)


def apart() -> StreamingDiLoCoStrategy:
    """Workers that exchange and do not listen, so that each trains as if it were alone."""
    return streaming(sync_every=4, overlap_steps=1, alpha=1.0)


def federated(**options: Any) -> FederatedStrategy:
    return FederatedStrategy(**{"num_clients": 3, "start_method": "fork", **options})


def adversarial(**options: Any) -> FederatedStrategy:
    given = {"attack": PGD(eps=0.1, steps=2, clip=None), "num_clients": 3, "start_method": "fork"}
    return FederatedAdversarialStrategy(**given | options)


def coded(**options: Any) -> SequentialGradientCodingStrategy:
    return SequentialGradientCodingStrategy(**{"s": 1, "start_method": "fork", **options})


def hessian() -> HessianSpectrum:
    return HessianSpectrum(every_n_steps=2, lanczos_steps=4, n_probes=1, k=1, figure=False)


def coherence(**options: Any) -> GradientCoherence:
    return GradientCoherence(every_n_steps=1, figure=False, **options)


# ---- refused by name, before the first step --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "module", "callbacks", "message"),
    [
        (streaming, make, [hessian], 'HessianSpectrum.*StreamingDiLoCoStrategy.*use `strategy="ddp"`'),
        (federated, make, [hessian], 'HessianSpectrum.*FederatedStrategy.*use `strategy="ddp"`'),
        (coded, make, [hessian], "HessianSpectrum.*SequentialGradientCodingStrategy.*one process"),
        (coded, make, [coherence], 'GradientCoherence.*SequentialGradientCodingStrategy.*use `source="fixed"`'),
        (coded, make, [partial(CoherentGradients, "m3")], "CoherentGradients.*SequentialGradient.*rm3"),
        (coded, partial(built, Settling), [JacobianHomeostasis], "JacobianHomeostasis.*add `homeostatic_loss`"),
        (coded, partial(make, GradientRegularizedNewton), [], "GradientRegularizedNewton.*another optimizer"),
        (
            adversarial,
            partial(make, GradientRegularizedNewton),
            [CurvatureBatches],
            "CurvatureBatches.*FederatedAdversarialStrategy.*remove it",
        ),
        (streaming, make, [partial(CoherentGradients, "winsorize")], "winsorize.*2 processes: use one of each"),
        (streaming, partial(built, Dale), [], "ExponentiatedGradient keeps the signs.*set `outer_momentum=0`"),
        (
            partial(federated, server_optimizer=partial(SGD, lr=1.0, momentum=0.9)),
            partial(built, Dale),
            [],
            "ExponentiatedGradient keeps the signs.*`server_optimizer` SGD",
        ),
    ],
)
def test_refused_before_the_first_step(
    strategy: Callable[..., Strategy],
    module: Callable[[], LightningModule],
    callbacks: Sequence[Callable[[], Callback]],
    message: str,
    tmp_path: Path,
) -> None:
    given = [Began(), *(callback() for callback in callbacks)]
    with pytest.raises((MisconfigurationException, ProcessRaisedException), match=message):
        fit(tmp_path, module(), strategy(), callbacks=given, accumulate_grad_batches=1)
    assert not Path("began").exists()


@pytest.mark.parametrize("setting", [{"outer_momentum": 0.5}, {"outer_lr": 1.5}, {"quantize": "e3m0"}], ids=str)
def test_signs_are_refused_to_each_setting_that_may_change_them(setting: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="keeps the signs"):
        fit(tmp_path, built(Dale), StreamingDiLoCoStrategy(sync_every=4, **AVERAGES | setting), devices=1)


# ---- under Streaming DiLoCo each worker is as if alone, until it listens ---------------------------------------------

ALONE: dict[str, tuple[Callable[..., OwnData], list[Callable[[], Callback]], dict[str, Any]]] = {
    "GradientRegularizedNewton": (partial(make, GradientRegularizedNewton), [], {}),
    "CoherentGradients rm3": (make, [partial(CoherentGradients, "rm3")], {}),
    "CoherentGradients m3": (make, [partial(CoherentGradients, "m3")], {"accumulate_grad_batches": 3}),
    "EquilibriumLayer": (partial(built, Settling), [], {}),
    "GradientCoherence": (make, [coherence, History], {}),
}


@pytest.mark.parametrize("name", ALONE)
def test_a_worker_of_streaming_diloco_trains_as_if_alone(name: str, tmp_path: Path) -> None:
    make_module, callbacks, options = ALONE[name]
    given = {"max_steps": 8, **options}
    together = fit(tmp_path / "both", make_module(), apart(), callbacks=[make() for make in callbacks], **given)
    measured = [history(rank) for rank in (0, 1)] if History in callbacks else []
    for worker in (0, 1):
        alone = fit(
            tmp_path / str(worker),
            make_module(worker=worker),
            "auto",
            devices=1,
            callbacks=[make() for make in callbacks],
            **given,
        )
        assert_same(together.read(worker)["local"], alone.read(0)["local"])
        assert not measured or measured[worker] == history(0)


def test_homeostasis_under_streaming_diloco_trains_as_if_alone(tmp_path: Path) -> None:
    """Of the first worker, since probes depend on the rank."""
    together = fit(tmp_path / "both", built(Settling), apart(), callbacks=[JacobianHomeostasis()], max_steps=8)
    module = built(Settling, worker=0)
    alone = fit(tmp_path / "one", module, "auto", devices=1, callbacks=[JacobianHomeostasis()], max_steps=8)
    assert_same(together.read(0)["local"], alone.read(0)["local"])


def test_coherence_under_streaming_diloco_logs_that_of_the_first_worker(tmp_path: Path) -> None:
    callbacks = [coherence(), History()]
    fit(tmp_path, make(), apart(), callbacks=callbacks, max_steps=8, logger=CSVLogger(tmp_path, name="", version=""))
    first, second = (history(rank) for rank in (0, 1))
    assert all(one["m"] == 4 and one["alpha_m"] != two["alpha_m"] for one, two in zip(first, second, strict=True))
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("coherence/alpha_m")
    logged = [float(line.split(",")[column]) for line in lines[1:] if line.split(",")[column]]
    assert logged == pytest.approx([event["alpha_m"] for event in first], rel=1e-6)


def test_within_a_worker_of_two_devices_both_count(tmp_path: Path) -> None:
    options: dict[str, Any] = {"devices": 4, "max_steps": 4}
    strategy = streaming(sync_every=2, devices_per_worker=2)
    fit(tmp_path, make(), strategy, callbacks=[coherence(), History()], **options)
    of = [history(rank) for rank in range(4)]
    assert all(event["m"] == 8 for event in of[0])
    assert of[0] == of[1] != of[2] == of[3]
    with pytest.raises(ProcessRaisedException, match=r"HessianSpectrum.*StreamingDiLoCoStrategy"):
        fit(tmp_path, make(), streaming(sync_every=2, devices_per_worker=2), callbacks=[hessian()], **options)


# ---- exponentiated gradient ------------------------------------------------------------------------------------------


def flips(before: dict[str, Tensor], after: dict[str, Tensor]) -> int:
    return sum(int((after[name].sign() != p.sign()).sum()) for name, p in before.items() if p.ndim >= 2)


def test_signs_survive_the_exchanges_of_averages(tmp_path: Path) -> None:
    module = built(Dale)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    snapshot = fit(tmp_path, module, streaming(sync_every=4, overlap_steps=1, **AVERAGES), max_steps=40)
    for rank in (0, 1):
        found = snapshot.read(rank)
        assert found["stats"]["diloco/syncs"] > 20
        assert flips(before, found["local"]) == flips(before, found["outer"]) == 0
    assert any(not torch.equal(value, before[name]) for name, value in found["outer"].items())


def test_signs_survive_federated_rounds(tmp_path: Path) -> None:
    module = built(Dale, twins=True)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    fit(tmp_path, module, federated(), max_steps=-1, max_epochs=3)
    after = dict(module.named_parameters())
    assert flips(before, after) == 0
    assert not torch.equal(after["embed.weight"], before["embed.weight"])


def test_hypentropy_bears_any_outer_step(tmp_path: Path) -> None:
    snapshot = fit(tmp_path, built(Dale, hypentropy=1.0), streaming(sync_every=4), max_steps=12)
    assert all(bool(value.isfinite().all()) for value in snapshot.read(0)["outer"].values())


def test_why_an_outer_step_with_momentum_is_refused() -> None:
    """Workers that halve a weight at each exchange never cross 0; the momentum of their way does."""

    def after_three(step: OuterSGD) -> float:
        value, velocity = torch.ones(1), torch.zeros(1)
        for _ in range(3):
            value, velocity = step(value, velocity, value / 2)
        return float(value)

    assert after_three(OuterSGD()) < 0
    assert after_three(OuterSGD(lr=1.0, momentum=0.0)) == 1 / 8


# ---- federated -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clients", [1, 3])
def test_coherence_in_a_federation_is_of_each_clients_steps(clients: int, tmp_path: Path) -> None:
    """Whoever trains a client measures it: two processes find together what one does, and idle ones nothing."""

    def measured(devices: int) -> list[float]:
        module = make(sgd, twins=True, batches=9)
        options: dict[str, Any] = {"devices": devices, "max_steps": -1, "max_epochs": 1}
        fit(tmp_path, module, federated(num_clients=clients), callbacks=[coherence(), History()], **options)
        return sorted(event["alpha_m"] for rank in range(devices) for event in history(rank))

    together, alone = measured(2), measured(1)
    assert len(alone) == 9
    assert together == pytest.approx(alone, rel=1e-6)


def test_fedspeed_under_attack_is_the_same_on_one_process_and_two(tmp_path: Path) -> None:
    def ends(devices: int) -> dict[str, Tensor]:
        module = make(partial(FedSpeed, lr=0.05), twins=True)
        strategy = adversarial(server_optimizer=FedSpeedServer)
        fit(tmp_path, module, strategy, devices=devices, callbacks=[Metrics()], max_steps=-1, max_epochs=2)
        assert metrics()["fal/attack_gain"] > 0
        assert metrics()["fedspeed/dual_norm"] > 0
        return dict(module.named_parameters())

    assert_same(ends(2), ends(1), tolerance=1e-5)


NEGLIGIBLE = PGD(eps=1e-9, steps=2, clip=None)


def test_the_steps_of_an_attack_are_no_part_of_coherence(tmp_path: Path) -> None:
    def measured(strategy: Strategy) -> list[float]:
        module = make(sgd, twins=True, batches=6)
        callbacks = [coherence(), History()]
        fit(tmp_path, module, strategy, devices=1, callbacks=callbacks, max_steps=-1, max_epochs=1)
        return [event["alpha_m"] for event in history(0)]

    assert measured(adversarial(attack=NEGLIGIBLE)) == pytest.approx(measured(federated()), rel=1e-5)


def test_the_steps_of_an_attack_are_no_part_of_winsorized_gradients(tmp_path: Path) -> None:
    def ends(strategy: Strategy) -> dict[str, Tensor]:
        module = make(sgd, twins=True, batches=6)
        callbacks = [CoherentGradients("winsorize", 0.3)]
        fit(tmp_path, module, strategy, devices=1, callbacks=callbacks, max_steps=-1, max_epochs=1)
        return dict(module.named_parameters())

    assert_same(ends(adversarial(attack=NEGLIGIBLE)), ends(federated()), tolerance=1e-6)


def test_the_steps_of_an_attack_are_no_part_of_the_homeostatic_loss(tmp_path: Path) -> None:
    def measured(strategy: Strategy) -> float:
        callbacks = [JacobianHomeostasis(estimator="exact"), Metrics()]
        module = built(Settling, twins=True, batches=6)
        fit(tmp_path, module, strategy, devices=1, callbacks=callbacks, max_steps=-1, max_epochs=1)
        return float(metrics()["homeostasis/loss"])

    assert measured(adversarial(attack=NEGLIGIBLE)) == pytest.approx(measured(federated()), rel=1e-5)


@pytest.mark.parametrize("optimizer", [GradientRegularizedNewton, partial(ExponentiatedGradient, zeros="keep")])
def test_other_optimizers_begin_anew_with_each_client(optimizer: Any, tmp_path: Path) -> None:
    module = make(optimizer, twins=True, batches=12)
    fit(tmp_path, module, federated(), callbacks=[Metrics()], max_steps=-1, max_epochs=2)
    assert metrics()["fed/update_norm"] > 0


# ---- gradient codes --------------------------------------------------------------------------------------------------


def test_coherence_of_fixed_batches_under_a_code_is_that_of_one_process(tmp_path: Path) -> None:
    callbacks = [coherence(source="fixed", n_batches=2), History()]
    fit(tmp_path, make(sgd, twins=True), coded(), callbacks=callbacks, max_steps=3)
    first, second = history(0), history(1)
    assert first == second
    callbacks = [coherence(source="fixed", n_batches=2), History()]
    fit(tmp_path, make(sgd, twins=True), "auto", devices=1, callbacks=callbacks, max_steps=3)
    assert [event["m"] for event in first] == [8.0] * 3
    alone = [event["alpha_m"] for event in history(0)]
    assert [event["alpha_m"] for event in first] == pytest.approx(alone, rel=1e-4)


def test_median_of_three_steps_under_a_code_is_that_of_one_process(tmp_path: Path) -> None:
    options: dict[str, Any] = {"callbacks": [CoherentGradients("rm3")], "max_steps": 8}
    together = fit(tmp_path / "two", make(sgd, twins=True), coded(), **options)
    alone = fit(tmp_path / "one", make(sgd, twins=True), "auto", devices=1, **options)
    for rank in (0, 1):
        assert_same(together.read(rank)["local"], alone.read(0)["local"], tolerance=1e-5)
