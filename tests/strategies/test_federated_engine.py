"""Rounds that another engine counts, each a fit of its own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from fulgurite.plugins.optim import FedSpeed
from fulgurite.strategies import FederatedStrategy
from tests.strategies.test_federated import Clients, federated, train
from tests.suites.fits import assert_same
from tests.suites.models import Scheduled


def fedspeed(parameters: Any) -> FedSpeed:
    return FedSpeed(parameters, lr=0.02, server="active")


class States(Callback):
    """Keeps what each process has of the clients when training ends."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        torch.save(trainer.strategy.client_states(), self.folder / f"states_{trainer.global_rank}.pt")

    def read(self) -> dict[int, list[Tensor]]:
        files = self.folder.glob("states_*.pt")
        return {client: state for file in files for client, state in torch.load(file, weights_only=True).items()}


@pytest.mark.parametrize("devices", [1, 2])
def test_rounds_are_the_same_each_in_a_fit_of_its_own(devices: int, tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    states = States(tmp_path / "whole")
    module = Clients(make_optimizer=fedspeed)
    whole = train(tmp_path / "whole", module, federated(), rounds=3, devices=devices, callbacks=[states])
    parts, given = Clients(make_optimizer=fedspeed), {}
    for number in range(3):
        folder = tmp_path / str(number)
        folder.mkdir()
        kept, strategy = States(folder), federated()
        strategy.continue_from(number, given)
        part = train(folder, parts, strategy, rounds=1, devices=devices, callbacks=[kept])
        parts.load_state_dict(part["local"])
        given = kept.read()
    assert_same(part["local"], whole["local"])
    assert given.keys() == states.read().keys() == set(range(5))
    for client, tensors in states.read().items():
        assert all(map(torch.equal, tensors, given[client]))
        assert any(map(torch.any, tensors))


def test_a_scheduler_would_begin_anew_in_each_round(tmp_path: Path) -> None:
    class Decaying(Scheduled):
        @override
        def configure_optimizers(self) -> Any:
            configured = super().configure_optimizers()
            configured["lr_scheduler"]["interval"] = "epoch"
            return configured

    strategy = FederatedStrategy([range(64)])  # in this process, whose errors arrive as they are
    strategy.continue_from(0, {})
    with pytest.raises(MisconfigurationException, match="learning rate scheduler"):
        train(tmp_path, Decaying(), strategy)
