import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typing_extensions import override

from fulgurite.callbacks.untouched import untouched
from tests.suites.fits import assert_same, fit


class Dropped(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))
        self.seen: list[int] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.seen.append(batch_idx)
        loss = self.net(batch).square().mean() + random.random() * np.random.rand()
        self.log("loss", loss)
        return loss

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(torch.randn(24, 3, generator=torch.Generator().manual_seed(0)), 4)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Probe(Callback):
    """Runs the step where gradients lie about, and once fails."""

    def __init__(self) -> None:
        self.dtypes: list[torch.dtype] = []
        self.kept: list[bool] = []

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        before = [param.grad for param in pl_module.parameters()]
        drawn = torch.get_rng_state(), np.random.get_state()[2], random.getstate()
        with pytest.raises(ZeroDivisionError):
            self.fail(trainer, pl_module)
        self.kept.append(all(p.grad is g for p, g in zip(pl_module.parameters(), before, strict=True)))
        assert torch.equal(torch.get_rng_state(), drawn[0])
        assert (np.random.get_state()[2], random.getstate()) == drawn[1:]

    def fail(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with untouched(trainer, pl_module, evaluate=True):
            assert not pl_module.training
            assert all(param.grad is None for param in pl_module.parameters())
            batch = torch.randn(4, 3)
            self.dtypes.append(pl_module.net(batch).dtype)
            pl_module.training_step(batch, 0).backward()
            raise ZeroDivisionError


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_fit_goes_on_as_without(precision: str, tmp_path: Path) -> None:
    ends = []
    probe = Probe()
    for callbacks in ([], [probe]):
        seed_everything(1)
        module = Dropped()
        fit(tmp_path, module, "auto", devices=1, max_epochs=2, max_steps=-1, precision=precision, callbacks=callbacks)
        ends.append(module)
    assert_same(ends[1].state_dict(), ends[0].state_dict())
    assert ends[1].seen == ends[0].seen
    assert probe.kept == [True] * 12
    assert set(probe.dtypes) == {torch.bfloat16 if "bf16" in precision else torch.float32}
