"""Ordinary LightningModules, as a user would write them: none knows of Fulgurite."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

WIDTH = 6
MakeOptimizer = Callable[[Any], Optimizer]


def sgd(parameters: Any) -> Optimizer:
    return torch.optim.SGD(parameters, lr=0.05)


def adamw(parameters: Any) -> Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01)


def dataset(size: int, seed: int, dtype: torch.dtype = torch.float32) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(size, WIDTH, generator=generator, dtype=dtype)
    return TensorDataset(inputs, inputs.sin().sum(1, keepdim=True))


class Regressor(LightningModule):
    """Residual blocks between two linear layers; six blocks make three fragments with the defaults."""

    def __init__(self, blocks: int = 6, make_optimizer: MakeOptimizer = adamw) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(blocks))
        self.head = nn.Linear(WIDTH, 1)
        self.make_optimizer = make_optimizer

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.embed(inputs)
        for block in self.blocks:
            hidden = hidden + block(hidden).tanh()
        return self.head(hidden)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = mse_loss(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", mse_loss(self(batch[0]), batch[1]), sync_dist=True)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test_loss", mse_loss(self(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(dataset(64, seed=0), batch_size=4, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(dataset(32, seed=1), batch_size=8)

    def test_dataloader(self) -> DataLoader[Any]:
        return DataLoader(dataset(32, seed=2), batch_size=8)


class Pixels(Regressor):
    """With inputs in [0, 1]."""

    def train_dataloader(self) -> DataLoader[Any]:
        inputs, targets = dataset(64, seed=0).tensors
        return DataLoader(TensorDataset(inputs.sigmoid(), targets), batch_size=4, shuffle=True)


class Scheduled(Regressor):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.98)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Normalised(Regressor):
    """With batch norm, whose buffers differ between workers, and tied weights."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.blocks[0].weight = self.embed.weight

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(self.norm(inputs))


class Compiled(Regressor):
    """One submodule under ``torch.compile``; the eager backend needs no C++ compiler."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.head = torch.compile(self.head, backend="eager")


class Manual(Regressor):
    """Two optimizers, stepped by hand."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
        loss = mse_loss(self(batch[0]), batch[1])
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()
        self.log("train_loss", loss)

    def configure_optimizers(self) -> Any:
        outer = [*self.embed.parameters(), *self.head.parameters()]
        return [self.make_optimizer(outer), self.make_optimizer(self.blocks.parameters())]
