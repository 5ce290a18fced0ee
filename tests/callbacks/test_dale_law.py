"""Dale's law counted by hand, without a trace in the fit, whole and sharded."""

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from typing_extensions import override

from fulgurite.callbacks import DaleLaw
from fulgurite.callbacks.dale_law import _pack, _unpack
from fulgurite.plugins.optim import ExponentiatedGradient, dale_groups, dale_init_
from tests.suites.models import Regressor
from tests.suites.processes import in_processes

NAMES = {f"dale/{name}" for name in ("sign_flips", "zero_fraction", "log_abs_mean", "log_abs_std", "log_abs_skew")}


class Model(Regressor):
    def __init__(self, law: bool = True) -> None:
        super().__init__(blocks=2)
        self.law = law
        dale_init_(self)

    @override
    def configure_optimizers(self) -> Any:
        if self.law:
            return ExponentiatedGradient(dale_groups(self), lr=0.02)
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)


def make(law: bool = True) -> Model:
    torch.manual_seed(7)
    return Model(law)


def trainer(**options: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0}
    return Trainer(**quiet | {"accelerator": "cpu", "enable_checkpointing": False, "max_steps": 20} | options)


class Seen(Callback):
    """Keeps what was logged in each step, and the generator's state."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []
        self.generators: list[Tensor] = []

    @override
    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        self.generators.append(torch.get_rng_state())


def by_hand(before: list[Tensor], after: list[Tensor]) -> dict[str, float]:
    first, now = (torch.cat([w.detach().flatten() for w in ws]).double().numpy() for ws in (before, after))
    logs = np.log(np.abs(now[now != 0]))
    deviations = logs - logs.mean()
    return {
        "dale/sign_flips": float((np.sign(first) != np.sign(now)).sum()),
        "dale/zero_fraction": float((now == 0).mean()),
        "dale/log_abs_mean": logs.mean(),
        "dale/log_abs_std": logs.std(),
        "dale/log_abs_skew": (deviations**3).mean() / logs.std() ** 3,
    }


def weights(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters() if p.ndim >= 2]


@pytest.mark.parametrize("law", [True, False], ids=["exponentiated gradient", "SGD"])
def test_counts_as_by_hand(law: bool) -> None:
    module, seen = make(law), Seen()
    before = weights(module)
    trainer(callbacks=[DaleLaw(every_n_steps=5), seen]).fit(module)
    expected = by_hand(before, weights(module))
    assert {name: seen.logged[-1][name] for name in NAMES} == pytest.approx(expected, rel=1e-5)
    assert (expected["dale/sign_flips"] == 0) == law
    assert [logged.keys() >= NAMES for logged in seen.logged[3:6]] == [False, True, True]


def test_every_look_is_a_row_of_the_log(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    trainer(callbacks=[DaleLaw(every_n_steps=3)], logger=logger, log_every_n_steps=50, max_steps=10).fit(make())
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["dale/sign_flips"]]
    assert [int(row["step"]) for row in rows] == [3, 6, 9]
    assert all(row[name] for row in rows for name in NAMES)


def test_a_pruned_weight_is_no_flip_and_counts_as_zero() -> None:
    class Prune(Callback):
        @override
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            with torch.no_grad():
                pl_module.embed.weight[0] = 0.0

    module, seen = make(), Seen()
    trainer(callbacks=[DaleLaw(1), Prune(), seen]).fit(module)
    size = sum(w.numel() for w in weights(module))
    assert seen.logged[-1]["dale/zero_fraction"] == pytest.approx(6 / size)
    assert seen.logged[-1]["dale/sign_flips"] == 0


def test_what_is_not_finite_is_no_flip() -> None:
    class Break(Callback):
        @override
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
            with torch.no_grad():
                pl_module.embed.weight[0] = torch.nan
                pl_module.embed.weight[1] = torch.inf

    seen = Seen()
    trainer(callbacks=[Break(), DaleLaw(1), seen], max_steps=1).fit(make())
    assert seen.logged[-1]["dale/sign_flips"] == 0
    assert all(math.isfinite(seen.logged[-1][name]) for name in NAMES)


def test_equal_weights_have_no_skew() -> None:
    seen = Seen()
    module = make()
    for w in module.parameters():
        nn.init.constant_(w, -0.25)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=1e-30)  # type: ignore[method-assign]
    trainer(callbacks=[DaleLaw(1), seen], max_steps=1).fit(module)
    assert seen.logged[-1]["dale/log_abs_mean"] == pytest.approx(math.log(0.25))
    assert seen.logged[-1]["dale/log_abs_std"] == pytest.approx(0, abs=1e-9)
    assert math.isnan(seen.logged[-1]["dale/log_abs_skew"])


@pytest.mark.parametrize("options", [{}, {"precision": "bf16-mixed"}, {"accumulate_grad_batches": 3}], ids=str)
def test_the_fit_stays_as_it_was_bit_for_bit(options: dict[str, Any]) -> None:
    kept = []
    for callbacks in ([], [DaleLaw(2, figures=True)]):
        module, seen = make(), Seen()
        torch.manual_seed(3)
        trainer(callbacks=[*callbacks, seen], **options).fit(module)
        kept.append((module, seen))
    (module, seen), (watched, watched_seen) = kept
    for one, two in zip(module.state_dict().values(), watched.state_dict().values(), strict=True):
        assert torch.equal(one, two)
    for one, two in zip(seen.generators, watched_seen.generators, strict=True):
        assert torch.equal(one, two)
    for one, two in zip(seen.logged, watched_seen.logged, strict=True):
        assert one == {name: value for name, value in two.items() if name not in NAMES}


def test_a_resumed_fit_counts_from_the_first_beginning(tmp_path: Path) -> None:
    module, seen = make(law=False), Seen()
    before = weights(module)
    kept = ModelCheckpoint(tmp_path, filename="at10", every_n_train_steps=10)
    trainer(callbacks=[DaleLaw(5), kept], max_steps=10, enable_checkpointing=True).fit(module)
    state = torch.load(tmp_path / "at10.ckpt", weights_only=True)["callbacks"]["DaleLaw"]
    assert sum(bits.numel() for bits in state["signs"].values()) <= sum(-(-w.numel() // 8) for w in before)
    resumed = Model(law=False)
    law = DaleLaw(5)
    trainer(callbacks=[law, seen]).fit(resumed, ckpt_path=tmp_path / "at10.ckpt")
    assert seen.logged[-1]["dale/sign_flips"] == by_hand(before, weights(resumed))["dale/sign_flips"] > 0
    before = weights(resumed)
    trainer(callbacks=[law, seen]).fit(resumed)  # and another fit from its own
    assert seen.logged[-1]["dale/sign_flips"] == by_hand(before, weights(resumed))["dale/sign_flips"]


def test_replicas_count_once(tmp_path: Path) -> None:
    class Write(Callback):
        @override
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            kept = {name: float(value) for name, value in trainer.callback_metrics.items() if name in NAMES}
            torch.save((kept, weights(pl_module)), tmp_path / f"{trainer.global_rank}.pt")

    module = make(law=False)
    before = weights(module)
    trainer(callbacks=[DaleLaw(5), Write()], devices=2, strategy="ddp_fork", max_steps=5).fit(module)
    (one, after), (two, _) = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert one == two == pytest.approx(by_hand(before, after), rel=1e-5)


def _sharded(rank: int) -> list[float]:
    """Shards, one of them empty, and a replica, looked at and taken through a checkpoint."""
    mesh = init_device_mesh("cpu", (2,))
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator) for shape in ((5, 3), (1, 7), (4, 6), (2, 2))]
    placements = [Shard(0), Shard(0), Shard(1), Replicate()]
    module = LightningModule()
    for i, (tensor, at) in enumerate(zip(tensors, placements, strict=True)):
        setattr(module, f"w{i}", nn.Parameter(distribute_tensor(tensor, mesh, [at])))
    module.plain = nn.Parameter(torch.full((3, 3), -0.5))
    law, resumed = DaleLaw(), DaleLaw()
    law.on_train_start(trainer(), module)
    with torch.no_grad():
        module.w0.mul_(-1)
    resumed.load_state_dict(law.state_dict())
    resumed.on_train_start(trainer(), module)
    assert all(isinstance(p, DTensor) == (name != "plain") for name, p in module.named_parameters())
    looks = [law._look(), resumed._look()]
    now = [-tensors[0], *tensors[1:], module.plain.detach()]
    expected = by_hand([*tensors, module.plain], now)
    for look in looks:
        assert list(look[:5]) == pytest.approx(list(expected.values()))
        assert look.histogram.sum() == sum(w.numel() for w in now)
    return list(looks[0][:5])


def test_shards_are_summed() -> None:
    first, second = in_processes(2, _sharded)
    assert first == second
    assert first[0] == 15


@pytest.mark.parametrize("count", [1, 7, 8, 9, 1000])
def test_bits_come_back(count: int) -> None:
    flags = torch.rand(count) < 0.5
    octets = _pack(flags)
    assert octets.dtype == torch.uint8
    assert len(octets) == -(-count // 8)
    assert torch.equal(_unpack(octets, count), flags)


@pytest.mark.parametrize("size", [2**20 - 1, 2**20 + 9])
def test_large_weights_in_blocks(size: int) -> None:
    module = LightningModule()
    module.w = nn.Parameter(torch.randn(size, 1))
    law = DaleLaw()
    law.on_train_start(trainer(), module)
    before = weights(module)
    with torch.no_grad():
        module.w[-3:].mul_(-1)
        module.w[5] = 0
    look = law._look()
    expected = by_hand(before, weights(module))
    assert look.flips == 3
    assert list(look[1:5]) == pytest.approx(list(expected.values())[1:])


def test_figures_go_to_the_loggers(tmp_path: Path) -> None:
    logger = WandbLogger(project="fulgurite", save_dir=tmp_path)
    trainer(callbacks=[DaleLaw(2, figures=True)], logger=logger, max_steps=-1, max_epochs=2).fit(make())
    assert len(list(tmp_path.rglob("media/images/dale/log_abs_*.png"))) == 2


def test_figures_without_a_logger(tmp_path: Path) -> None:
    trainer(callbacks=[DaleLaw(figures=True)], default_root_dir=tmp_path, max_steps=-1, max_epochs=1).fit(make())
    assert [path.read_bytes()[:4] for path in tmp_path.rglob("*.png")] == [b"\x89PNG"]


def test_can_be_built_from_yaml() -> None:
    callback = {"class_path": "fulgurite.callbacks.DaleLaw", "init_args": {"every_n_steps": 7, "figures": True}}
    config = {"trainer": {"accelerator": "cpu", "logger": False, "callbacks": [callback]}}
    cli = LightningCLI(Model, args=config, run=False, save_config_callback=None)
    (built,) = (callback for callback in cli.trainer.callbacks if isinstance(callback, DaleLaw))
    assert (built.every_n_steps, built.figures) == (7, True)


def test_bad_interval() -> None:
    with pytest.raises(ValueError, match="`every_n_steps` counts optimizer steps and must be at least 1, got 0"):
        DaleLaw(every_n_steps=0)


def test_nothing_to_look_at() -> None:
    module = LightningModule()
    module.w = nn.Parameter(torch.ones(3))
    with pytest.raises(MisconfigurationException, match="two or more dimensions, and the module has none"):
        DaleLaw().on_train_start(trainer(), module)


def test_figures_want_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fulgurite.callbacks.dale_law.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"`figures` needs matplotlib: pip install 'fulgurite\[figures\]'"):
        DaleLaw(figures=True)
