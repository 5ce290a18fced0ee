"""The common suite for strategies: a new one adds a row to ``CASES`` and passes."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import Strategy, StrategyRegistry
from torch.multiprocessing.spawn import ProcessRaisedException

import fulgurite.strategies
from fulgurite.plugins.comm.coding_schemes import Scheme
from fulgurite.plugins.federated import PGD
from tests.suites.fits import assert_same, fit, loaded_without_fulgurite, make
from tests.suites.models import Compiled, Manual, Normalised, Pixels, Regressor, Scheduled

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Case:
    """A strategy under test.

    Args:
        name: as registered, without the suffix of the start method.
        make: the strategy with settings for a fit of a few dozen steps, in forked processes.
        metric: one that it logs.
        steps: after which defaults alone have logged it.
        init_args: what the strategy cannot do without.
        module: what it trains with defaults alone.
        save_every: of ModelCheckpoint, ``save_steps`` optimizer steps.
        refuses: by the name of a module or of an argument of the Trainer, why the strategy cannot train so.
        trainer: what it wants of the Trainer.
        twins: all processes read the same batches.
        resumes_within: how far a resumed run may be from the undisturbed one.
    """

    name: str
    make: Callable[[], Strategy]
    metric: str
    steps: int
    init_args: Mapping[str, Any] = field(default_factory=dict)
    module: type[Regressor] = Regressor
    save_every: Mapping[str, int] = field(default_factory=lambda: {"every_n_train_steps": 10})
    save_steps: int = 10
    refuses: Mapping[str, str] = field(default_factory=dict)
    trainer: Mapping[str, Any] = field(default_factory=dict)
    twins: bool = False
    resumes_within: float = 0.0

    def __str__(self) -> str:
        return self.name


def streaming_diloco() -> Strategy:
    return fulgurite.strategies.StreamingDiLoCoStrategy(sync_every=6, overlap_steps=2, start_method="fork")


def diloco() -> Strategy:
    return StrategyRegistry["diloco_fork"]["strategy"](
        **StrategyRegistry["diloco_fork"]["init_params"] | {"sync_every": 6}
    )


def federated() -> Strategy:
    return fulgurite.strategies.FederatedStrategy(num_clients=8, clients_per_round=5, start_method="fork")


def federated_adversarial() -> Strategy:
    attack = PGD(eps=0.1, steps=2, clip=None)
    return fulgurite.strategies.FederatedAdversarialStrategy(attack=attack, num_clients=6, start_method="fork")


def gradient_coding() -> Strategy:
    return fulgurite.strategies.SequentialGradientCodingStrategy(s=1, start_method="fork")


def sequential(scheme: Scheme) -> Strategy:
    window = {"B": 1, "W": 2, "lam": 1}
    return fulgurite.strategies.SequentialGradientCodingStrategy(scheme, **window, start_method="fork")


CODED: dict[str, Any] = {
    "metric": "gradient_coding/load",
    "steps": 20,
    "save_every": {"every_n_train_steps": 6},
    "save_steps": 6,
    "twins": True,
    "resumes_within": 1e-5,  # results are summed as they come in
}
IN_WINDOWS = {"trainer": {"accumulate_grad_batches": 4}}
FEDERATED: dict[str, Any] = {
    "steps": 40,
    "init_args": {"num_clients": 4},
    "save_every": {"every_n_epochs": 1},
    "refuses": {
        "accumulate_grad_batches": "would straddle two clients",
        "val_check_interval": "use `check_val_every_n_epoch`",
        "Scheduled": "an epoch being a round",
        "Manual": "let Lightning step the optimizer",
    },
}
CASES = [
    Case("streaming_diloco", streaming_diloco, "diloco/bytes_sent", 120),
    Case("diloco", diloco, "diloco/bytes_sent", 500),
    Case("federated", federated, "fed/update_norm", save_steps=18, **FEDERATED),
    Case("federated_adversarial", federated_adversarial, "fal/attack_gain", module=Pixels, save_steps=24, **FEDERATED),
    Case("gradient_coding", gradient_coding, init_args={"s": 1}, refuses={"Manual": "let Lightning step"}, **CODED),
    Case(
        "sr_sgc",
        partial(sequential, "sr_sgc"),
        init_args={"scheme": "sr_sgc", "B": 1, "W": 2, "lam": 1},
        refuses={"Manual": "manual optimization"},
        **CODED | IN_WINDOWS,
    ),
    Case(
        "m_sgc",
        partial(sequential, "m_sgc"),
        init_args={"scheme": "m_sgc", "B": 1, "W": 2, "lam": 1},
        refuses={"Manual": "manual optimization", "Normalised": "too few for BatchNorm"},
        **CODED | IN_WINDOWS,
    ),
]
every_strategy = pytest.mark.parametrize("case", CASES, ids=str)


def quiet(folder: Path, **options: Any) -> dict[str, Any]:
    return {
        "accelerator": "cpu",
        "devices": 2,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
        **options,
    }


# ---- every way to switch it on ---------------------------------------------------------------------------------------


@every_strategy
def test_by_name_with_defaults_alone(case: Case, tmp_path: Path) -> None:
    options = quiet(tmp_path, enable_checkpointing=False, **case.trainer)
    trainer = Trainer(strategy=f"{case.name}_fork", max_steps=case.steps, **options)
    trainer.fit(case.module())
    assert trainer.callback_metrics[case.metric] > 0
    assert trainer.test(case.module(), verbose=False)[0]["test_loss"] > 0


@every_strategy
def test_by_yaml(case: Case, tmp_path: Path) -> None:
    kind = type(case.make())
    strategy = {"class_path": f"{kind.__module__}.{kind.__qualname__}"}
    strategy |= {"init_args": {"start_method": "fork", **case.init_args}}
    config = tmp_path / "config.yaml"
    config.write_text(
        f"""
        trainer:
          strategy: {strategy}
          max_steps: 120
          accelerator: cpu
          devices: 2
        """
    )
    options = {key: value for key, value in quiet(tmp_path).items() if key not in ("accelerator", "devices")}
    options |= case.trainer
    cli = LightningCLI(
        case.module,
        trainer_defaults=options | {"default_root_dir": str(tmp_path)},
        save_config_callback=None,
        args=["fit", "--config", str(config)],
    )
    assert cli.trainer.callback_metrics[case.metric] > 0


SCRIPT = """
import sys
import fulgurite.strategies
from lightning.pytorch import Trainer
from tests.suites import models

if __name__ == "__main__":
    trainer = Trainer(accelerator="cpu", devices=2, strategy=sys.argv[1], max_steps=int(sys.argv[2]), logger=False,
                      enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
                      accumulate_grad_batches=int(sys.argv[5]))
    trainer.fit(getattr(models, sys.argv[4])())
    if trainer.is_global_zero:
        print("METRIC", float(trainer.callback_metrics[sys.argv[3]]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "launcher"),
    [*((case, "popen") for case in CASES), (CASES[0], "spawn"), (CASES[0], "torchrun")],  # the last two are Lightning's
    ids=str,
)
def test_by_script(case: Case, launcher: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = start if launcher == "torchrun" else [sys.executable]
    name = f"{case.name}_spawn" if launcher == "spawn" else case.name
    accumulate = str(case.trainer.get("accumulate_grad_batches", 1))
    finished = subprocess.run(
        [*command, str(script), name, str(case.steps), case.metric, case.module.__name__, accumulate],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=120,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert float(finished.stdout.split("METRIC")[1].split()[0]) > 0


# ---- whatever the module and the Trainer do --------------------------------------------------------------------------


@every_strategy
@pytest.mark.parametrize(
    ("module", "options"),
    [
        (Regressor, {"accumulate_grad_batches": 2}),
        (Regressor, {"gradient_clip_val": 0.1}),
        (Regressor, {"precision": "bf16-mixed"}),
        (Regressor, {"precision": "bf16-true"}),
        (Regressor, {"num_sanity_val_steps": 2, "val_check_interval": 3}),
        (Scheduled, {}),
        (Normalised, {}),
        (Compiled, {}),
        (Manual, {}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else str(value),
)
def test_trains(case: Case, module: type[LightningModule], options: dict[str, Any], tmp_path: Path) -> None:
    trained = module()
    before = {name: value.detach().clone() for name, value in trained.named_parameters()}
    options = {**case.trainer, **options}
    trainer = Trainer(strategy=case.make(), max_epochs=4, **quiet(tmp_path, logger=CSVLogger(tmp_path), **options))
    for name, reason in case.refuses.items():
        if name in options or name == module.__name__:
            with pytest.raises((MisconfigurationException, ProcessRaisedException), match=reason):
                trainer.fit(trained)
            return
    trainer.fit(trained)
    assert trainer.callback_metrics[case.metric] > 0
    assert trainer.callback_metrics["val_loss"].isfinite()
    assert all(not torch.equal(value.float(), before[name]) for name, value in trained.named_parameters())


# ---- checkpoints -----------------------------------------------------------------------------------------------------


@every_strategy
def test_a_checkpoint_loads_without_fulgurite(case: Case, tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, monitor="val_loss", filename="best")
    options = quiet(tmp_path, **case.trainer)
    Trainer(strategy=case.make(), max_epochs=3, callbacks=[checkpoint], **options).fit(Regressor())
    Regressor().load_state_dict(loaded_without_fulgurite(tmp_path / "best.ckpt")["state_dict"])
    Regressor.load_from_checkpoint(tmp_path / "best.ckpt", make_optimizer=torch.optim.SGD, weights_only=True)


@every_strategy
def test_a_checkpoint_holds_what_was_validated(case: Case, tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, monitor="val_loss", filename="best")
    trainer = Trainer(strategy=case.make(), max_epochs=1, callbacks=[checkpoint], **quiet(tmp_path, **case.trainer))
    trainer.fit(Regressor())
    alone = Trainer(**quiet(tmp_path, devices=1)).validate(Regressor(), ckpt_path=tmp_path / "best.ckpt", verbose=False)
    assert alone[0]["val_loss"] == pytest.approx(trainer.callback_metrics["val_loss"].item(), rel=1e-5)


@every_strategy
def test_resume_is_exact(case: Case, tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, **case.save_every)
    steps = 2 * case.save_steps
    options = {"max_steps": steps, **case.trainer}
    whole = fit(tmp_path / "whole", make(twins=case.twins), case.make(), callbacks=[checkpoint], **options)
    path = tmp_path / f"step={case.save_steps}.ckpt"
    resumed = fit(tmp_path / "resumed", make(twins=case.twins), case.make(), ckpt_path=path, **options)
    for rank in (0, 1):
        assert_same(resumed.read(rank)["local"], whole.read(rank)["local"], case.resumes_within)
