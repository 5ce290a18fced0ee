"""Adversarial clients: the inner loop on an unchanged module leaves nothing but harder inputs."""

from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from fulgurite.plugins.federated import PGD, pgd
from fulgurite.plugins.optim import FedSpeed, FedSpeedServer
from fulgurite.strategies import FederatedAdversarialStrategy, FederatedStrategy
from tests.strategies.test_federated import Stochastic, Watch, quiet_trainer, slow_sgd, whole_batches
from tests.suites.fits import assert_same
from tests.suites.models import WIDTH, Compiled, Regressor, dataset

EPS = 0.2


class Tape(list[Tensor]):
    """Inputs of the module's steps; a plain list among its attributes would forget those of the inner steps."""


class Logistic(LightningModule):
    """Its worst input within a ball has a closed form."""

    def __init__(self, kind: Callable[[Tensor, Tensor], Any] = lambda x, y: [x, y]) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.linear = nn.Linear(WIDTH, 1, bias=False, dtype=torch.float64)
        self.kind = kind
        self.seen = Tape()

    def loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        return softplus(-labels * self.linear(inputs).squeeze(1)).mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, labels = unpack(batch)
        self.seen.append(inputs.detach().clone())
        loss = self.loss(inputs, labels)
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> DataLoader[Any]:
        def collate(rows: list[Any]) -> Any:
            return self.kind(*(torch.stack(column) for column in zip(*rows, strict=True)))

        return DataLoader(labelled(), batch_size=40, collate_fn=collate)


def labelled() -> TensorDataset:
    inputs = dataset(40, seed=0, dtype=torch.float64).tensors[0]
    return TensorDataset(inputs, torch.where(inputs.sum(1) > 0, 1.0, -1.0).double())


class Named(NamedTuple):
    image: Tensor
    label: Tensor


@dataclass
class Row:
    image: Tensor
    label: Tensor


Plain = namedtuple("Plain", "image label")


def unpack(batch: Any) -> tuple[Tensor, Tensor]:
    if isinstance(batch, dict):
        return batch["image"], batch["label"]
    return (batch.image, batch.label) if isinstance(batch, Row) else (batch[0], batch[1])


def adversarial(**options: Any) -> FederatedAdversarialStrategy:
    """One client that has everything, and takes a step a round, unless said."""
    return FederatedAdversarialStrategy(**{"partition": [list(range(40))], "local_steps": 1, **options})


CONTAINERS: list[tuple[Any, Any]] = [
    (lambda x, y: [x, y], 0),
    (lambda x, y: (x, y), 0),
    (Named, 0),
    (Plain, "image"),
    (lambda x, y: {"image": x, "label": y}, "image"),
    (Row, "image"),
]


@pytest.mark.parametrize(("kind", "key"), CONTAINERS)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_one_step_attacks_a_linear_model_exactly(norm: Any, kind: Any, key: Any, tmp_path: Path) -> None:
    attack = PGD(eps=EPS, step_size=EPS, steps=1, norm=norm, random_start=False, clip=None)
    module = Logistic(kind)
    weight = module.linear.weight.detach().clone()
    inputs, labels = labelled().tensors
    given = adversarial(attack=attack, input_key=key)
    quiet_trainer(tmp_path, given).fit(module)
    toward = weight.sign() if norm == "linf" else weight / weight.norm()
    dual_norm = weight.abs().sum() if norm == "linf" else weight.norm()
    attacked, trained_on = module.seen
    order = torch.cdist(attacked, inputs).argmin(1)  # the client's own order of the rows
    torch.testing.assert_close(attacked, inputs[order], rtol=0, atol=0)
    torch.testing.assert_close(trained_on, (inputs - EPS * labels[:, None] * toward)[order], rtol=1e-12, atol=1e-12)
    expected = weight.clone().requires_grad_()
    margin = labels * (inputs @ expected[0])
    robust = softplus(-(margin - EPS * dual_norm)).mean()
    robust.backward()
    moved = (module.linear.weight.detach() - weight) / -0.1
    # The attacked inputs are constants of the step, so the norm is not differentiated.
    worst = (inputs - EPS * labels[:, None] * toward).requires_grad_(False)
    (gradient,) = torch.autograd.grad(softplus(-labels * (worst @ expected[0])).mean(), expected)
    torch.testing.assert_close(moved, gradient, rtol=1e-9, atol=1e-12)
    assert softplus(-labels * (worst @ weight[0])).mean() == pytest.approx(robust.item())


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("optimizer", ["sgd", "fedspeed"])
def test_an_empty_ball_is_plain_federated_training(mode: Any, optimizer: str, tmp_path: Path) -> None:
    attack = PGD(eps=0.0, random_start=False, clip=None, step_size=0.1, mode=mode)
    runs = []
    for kind in ("federated", "adversarial"):
        fedspeed = optimizer == "fedspeed"
        module = Stochastic(make_optimizer=(lambda p: FedSpeed(p, lr=0.02)) if fedspeed else slow_sgd)
        common = {"partition": whole_batches(6), "server_optimizer": FedSpeedServer if fedspeed else None}
        given = (
            FederatedStrategy(**common)
            if kind == "federated"
            else adversarial(**common, attack=attack, local_steps=None)
        )
        watch = Watch()
        trainer = quiet_trainer(tmp_path, given, max_epochs=3, callbacks=[watch])
        trainer.fit(module)
        metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
        assert (metrics.pop("fal/attack_gain", 0.0)) == 0.0 or mode == "train"  # dropout draws anew for each gradient
        runs.append((dict(module.state_dict()), metrics))
    assert_same(runs[1][0], runs[0][0])
    assert runs[1][1] == runs[0][1]


def test_metrics_see_each_sample_once(tmp_path: Path) -> None:
    module = Stochastic(make_optimizer=lambda parameters: FedSpeed(parameters, lr=0.02))
    given = adversarial(
        partition=whole_batches(6), attack=PGD(eps=0.1, clip=None), server_optimizer=FedSpeedServer, local_steps=None
    )
    trainer = quiet_trainer(tmp_path, given)
    trainer.fit(module)
    assert trainer.callback_metrics["seen"] == trainer.callback_metrics["fed/samples"] == 42
    assert trainer.callback_metrics["fal/attack_gain"] > 0


class Steps(Logistic):
    """With an optimizer that calls its closure twice."""

    def configure_optimizers(self) -> Any:
        return FedSpeed(self.parameters(), lr=0.1)


def test_one_attack_a_batch_at_the_weights_before_the_step(tmp_path: Path) -> None:
    attack = PGD(eps=EPS, steps=3, random_start=False, clip=None)
    module = Steps()
    reference = Steps()
    quiet_trainer(tmp_path, adversarial(attack=attack, server_optimizer=FedSpeedServer)).fit(module)
    *inner, first, second = module.seen
    assert len(inner) == 3
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    by_row = {tuple(row.tolist()): label for row, label in zip(*labelled().tensors, strict=True)}
    labels = torch.stack([by_row[tuple(row.tolist())] for row in inner[0]])
    expected = pgd(lambda x: reference.loss(x, labels), inner[0], eps=EPS, steps=3, random_start=False, clip=None)
    torch.testing.assert_close(first, expected, rtol=0, atol=0)


def test_the_attack_gain_is_that_of_the_inner_losses(tmp_path: Path) -> None:
    class Recorded(Logistic):
        def loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
            losses.append(super().loss(inputs, labels))
            return losses[-1]

    losses: list[Tensor] = []
    given = adversarial(attack=PGD(eps=EPS, steps=4, clip=None), local_steps=2)
    quiet_trainer(tmp_path, given).fit(Recorded())
    gains = [losses[start + 3] - losses[start] for start in (0, 5)]
    assert given.stats["fal/attack_gain"] == pytest.approx(sum(gains).item() / 2)


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.3, 2), (1.0, 6)])
def test_a_share_of_the_clients_attacks(share: float, count: int, tmp_path: Path) -> None:
    class Counted(Callback):
        attacked = 0

        @override
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            assert isinstance(pl_module, Logistic)
            self.attacked += len(pl_module.seen) > 1
            pl_module.seen.clear()

    counted = Counted()
    parts = [list(range(start, start + 5)) for start in range(0, 30, 5)]
    given = adversarial(partition=parts, attack=PGD(eps=EPS, clip=None), adversarial_clients=share)
    quiet_trainer(tmp_path, given, max_epochs=2, callbacks=[counted]).fit(Logistic())
    assert counted.attacked == 2 * count
    assert (given.stats["fal/attack_gain"] > 0) == (count > 0)  # nan without an attack


def test_a_frozen_part_stays_frozen_and_eval_mode_ends(tmp_path: Path) -> None:
    modes: list[tuple[bool, bool]] = []

    class Frozen(Stochastic):
        def on_train_epoch_start(self) -> None:
            self.norm.eval()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            modes.append((self.dropout.training, self.norm.training))
            return super().training_step(batch, batch_idx)

    module = Frozen(make_optimizer=slow_sgd)
    given = adversarial(partition=whole_batches(1), attack=PGD(eps=0.1, steps=2, clip=None))
    quiet_trainer(tmp_path, given).fit(module)
    assert modes == [(False, False), (False, False), (True, False)]
    assert module.norm.num_batches_tracked == 0


def test_compiled_parts_are_attacked(tmp_path: Path) -> None:
    given = adversarial(num_clients=4, partition="iid", attack=PGD(eps=0.1, steps=2, clip=None), local_steps=2)
    quiet_trainer(tmp_path, given).fit(Compiled())
    assert given.stats["fal/attack_gain"] > 0


YAML = """
trainer:
  strategy:
    class_path: fulgurite.strategies.FederatedAdversarialStrategy
    init_args:
      partition: dirichlet
      num_clients: 4
      clients_per_round: 0.5
      label_key: 2
      attack: {eps: 0.05, steps: 2, norm: l2, clip: null}
      server_optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.5, momentum: 0.9}}
"""


def test_is_built_from_yaml(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(YAML)
    quiet = {"logger": False, "enable_checkpointing": False, "max_epochs": 1, "accelerator": "cpu", "devices": 1}
    cli = LightningCLI(
        Labelled,
        trainer_defaults=quiet,
        save_config_callback=None,
        args=["fit", "--config", str(config)],
    )
    strategy = cli.trainer.strategy
    assert isinstance(strategy, FederatedAdversarialStrategy)
    assert strategy.attack == PGD(eps=0.05, steps=2, norm="l2", clip=None)
    assert strategy.stats["fed/clients"] == 2
    assert strategy._server.param_groups[0]["momentum"] == 0.9


class Labelled(Regressor):
    def train_dataloader(self) -> DataLoader[Any]:
        inputs, targets = dataset(64, seed=0).tensors
        return DataLoader(TensorDataset(inputs, targets, (targets > 0).long().flatten()), batch_size=4)


class Embeds(Logistic):
    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.arange(40), torch.ones(40)), batch_size=8)


class Detached(Logistic):
    def loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        return super().loss(inputs.detach(), labels)


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (Logistic, {}, r"`input_key` is 0, and `clip` is \(0.0, 1.0\) and the input reaches from"),
        (Logistic, {"input_key": 7}, "`input_key` is 7, and the batch, a list, has no entry 7"),
        (Embeds, {"attack": PGD(clip=None)}, "must be a floating tensor, got torch.int64"),
        (Detached, {"attack": PGD(clip=None)}, "`input_key` is 0, and the loss does not depend"),
    ],
    ids=str,
)
def test_inputs_that_cannot_be_perturbed(module: Any, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        quiet_trainer(tmp_path, adversarial(**options)).fit(module())


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_the_share_is_checked(share: float) -> None:
    with pytest.raises(ValueError, match=r"`adversarial_clients` is a share and must be in \[0, 1\]"):
        adversarial(adversarial_clients=share)
