"""The example runs from its YAML, however it is started, and its checkpoints serve."""

import csv
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
RUN = Path("runs/streaming_diloco")  # in the test's own folder


def command(max_steps: int, *more: str) -> list[str]:
    trainer = {"max_steps": max_steps, "val_check_interval": 20, "enable_progress_bar": "false"}
    flags = [f"--trainer.{name}={value}" for name, value in trainer.items()]
    shorter = ["--trainer.strategy.init_args.sync_every=4", "--data.val_crops=256"]
    return ["fit", f"--config={EXAMPLES / 'streaming_diloco.yaml'}", *flags, *shorter, *more]


def held_out(version: int) -> dict[int, float]:
    """Nats a byte by optimizer step, as the run logged them."""
    with (RUN / f"version_{version}" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["val/nats_per_byte"]]
    return {int(row["step"]) + 1: float(row["val/nats_per_byte"]) for row in rows}


def check_checkpoint(path: Path, step: int) -> None:
    from byte_lm import ByteLM, PythonSource

    assert torch.load(path, weights_only=True)["global_step"] == step
    model = ByteLM.load_from_checkpoint(path, map_location="cpu")
    data = PythonSource(val_crops=256)
    data.setup("validate")
    with torch.no_grad():
        losses = [model.loss(*batch) for batch in data.val_dataloader()]
    logged = held_out(int(path.parts[-3].removeprefix("version_")))[step]
    assert torch.stack(losses).mean().item() == pytest.approx(logged, rel=1e-5)  # the weights that were validated


def test_it_trains_writes_checkpoints_and_resumes(example: ModuleType) -> None:
    forked = "--trainer.strategy.init_args.start_method=fork"
    example.main(command(40, forked))
    losses = held_out(0)
    assert sorted(losses) == [20, 40]
    assert losses[40] < losses[20] < math.log(256)
    last = RUN / "version_0" / "checkpoints" / "last.ckpt"
    check_checkpoint(last, step=40)

    example.main(command(60, forked, f"--ckpt_path={last}"))
    assert sorted(held_out(1)) == [60]
    check_checkpoint(RUN / "version_1" / "checkpoints" / "last.ckpt", step=60)


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher", [[], ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]], ids=["script", "torchrun"]
)
def test_it_starts_as_its_docstring_says(launcher: list[str], example: ModuleType) -> None:
    process = [sys.executable, *launcher, example.__file__, *command(40)]
    done = subprocess.run(process, env=os.environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    check_checkpoint(RUN / "version_0" / "checkpoints" / "step=40.ckpt", step=40)
    assert list(Path("wandb").glob("offline-run-*/run-*.wandb"))
