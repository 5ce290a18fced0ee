"""A small byte language model and its data, Python's own source: ordinary Lightning code, shared by what trains it."""

import math
import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

VOCABULARY = 256  # bytes
HELD_OUT = 200_000  # bytes at the end


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (B, T, 3, heads, width / heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, T, width / heads)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))  # (B, T, width)


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(width), Attention(width, heads))
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.mlp(x)


class ByteLM(LightningModule):
    """A GPT over bytes; 333 312 parameters at the defaults.

    Args:
        width: of the residual stream, a multiple of ``heads``.
        depth: blocks.
        heads: of each attention.
        context: bytes that the model sees.
        lr: peak of the schedule: linear warmup, then a cosine down to a tenth.
        betas: of AdamW.
        warmup_steps: optimizer steps until the peak.
    """

    def __init__(
        self,
        width: int = 64,
        depth: int = 6,
        heads: int = 4,
        context: int = 32,
        lr: float = 4e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        warmup_steps: int = 20,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr, self.betas, self.warmup_steps = lr, betas, warmup_steps
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """``(B, T)`` bytes to ``(B, T, 256)`` logits of the byte after each."""
        x = self.embedding(tokens) + self.position.weight[: tokens.shape[1]]  # (B, T, width)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def loss(self, crops: Tensor) -> Tensor:
        """Nats a byte, from crops of shape ``(B, T + 1)``."""
        tokens = crops.long()
        return F.cross_entropy(self(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(*batch)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/nats_per_byte", self.loss(*batch), prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        steps = self.trainer.estimated_stepping_batches

        def factor(step: int) -> float:
            if step < self.warmup_steps:
                return (step + 1) / self.warmup_steps
            progress = min(1.0, (step - self.warmup_steps) / max(1, steps - self.warmup_steps))
            return 0.55 + 0.45 * math.cos(math.pi * progress)

        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, betas=self.betas)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}


class PythonSource(LightningDataModule):
    """Crops of the source of Python's standard library, which every interpreter brings along.

    The modules at its top, in alphabetical order, are one string of bytes, and its last 200 kB are held out.

    Args:
        batch_size: crops a step and process.
        context: bytes a model sees; a crop has one more.
        megabytes: how much of the source to take.
        crops: in an epoch, over all processes; at random places, the same ones in each epoch.
        val_crops: evenly spaced in the held-out part.
        seed: of the random places.
    """

    def __init__(
        self,
        batch_size: int = 8,
        context: int = 32,
        megabytes: float = 3.0,
        crops: int = 65_536,
        val_crops: int = 1024,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.batch_size, self.context, self.megabytes = batch_size, context, megabytes
        self.crops, self.val_crops, self.seed = crops, val_crops, seed

    def setup(self, stage: str) -> None:
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        source = b"".join(file.read_bytes() for file in files)[: int(self.megabytes * 1e6)]
        self.source = torch.frombuffer(bytearray(source), dtype=torch.uint8)
        self.train, self.held_out = self.source[:-HELD_OUT], self.source[-HELD_OUT:]

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        windows = self.train.unfold(0, self.context + 1, 1)  # (places, context + 1), a view
        generator = torch.Generator().manual_seed(self.seed)
        crops = windows[torch.randint(len(windows), (self.crops,), generator=generator)]
        return DataLoader(TensorDataset(crops), self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        windows = self.held_out.unfold(0, self.context + 1, 1)
        places = torch.linspace(0, len(windows) - 1, self.val_crops).long()
        return DataLoader(TensorDataset(windows[places]), batch_size=128)

    def unigram_nats(self) -> float:
        """Nats a held-out byte when each is predicted from the frequencies in the training part alone."""
        counts = torch.bincount(self.train.long(), minlength=VOCABULARY) + 1.0
        return F.nll_loss((counts / counts.sum()).log().expand(HELD_OUT, -1), self.held_out.long()).item()
