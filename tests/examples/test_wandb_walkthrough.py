"""What the walkthrough says arrives in each logger arrives there, and its sweep is a command that runs."""

import csv
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import wandb
import yaml

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "examples/wandb_walkthrough.yaml"
SMALL = {  # two rounds of two clients with two steps: eight in all
    "trainer.max_epochs": 2,
    "trainer.enable_progress_bar": "false",
    "trainer.strategy.init_args.local_steps": 2,
    "trainer.strategy.init_args.clients_per_round": 2,
}
WATCHED = {  # the values of the callbacks in a run this short
    "HessianSpectrum": {"every_n_steps": 4, "lanczos_steps": 8, "n_probes": 1},
    "GradientCoherence": {"every_n_steps": 2},
}
PNG = b"\x89PNG"


@pytest.fixture(autouse=True)
def in_its_own_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("WANDB_API_KEY", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    wandb.teardown()  # its process stays in the folder where it began, and each test has another
    yield
    wandb.teardown()


def small(*configs: Path) -> list[str]:
    """The arguments of a run of seconds."""
    callbacks = [
        {"class_path": f"fulgurite.callbacks.{name}", "init_args": settings} for name, settings in WATCHED.items()
    ]
    Path("small.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
    return [
        "fit",
        *(f"--config={path}" for path in (CONFIG, *configs, Path("small.yaml"))),
        *(f"--{name}={value}" for name, value in SMALL.items()),
    ]


def the_only(pattern: str) -> Path:
    (path,) = Path("runs").glob(pattern)
    return path


def test_wandb_has_settings_scalars_figures_and_a_table(example: ModuleType, printed: Callable[[], str]) -> None:
    stored = example.main(small())
    run = the_only("wandb/offline-run-*")

    strategy = stored.config["trainer"]["strategy"]
    assert strategy["class_path"] == "fulgurite.strategies.FederatedStrategy"
    assert strategy["init_args"]["alpha"] == 0.3  # from the file
    assert strategy["init_args"]["local_steps"] == 2  # from the command line
    assert strategy["init_args"]["weighting"] == "samples"  # a default
    callbacks = stored.config["trainer"]["callbacks"]
    for name, settings in WATCHED.items():
        assert callbacks[name].items() >= settings.items()
    assert callbacks["HessianSpectrum"]["at_steps"] == []
    assert stored.config["model"]["optimizer"]["init_args"]["lr"] == 0.3

    assert stored.axes["*"] == "trainer/global_step"
    assert set(stored.axes.values()) == {"trainer/global_step"}  # W&B 0.19 lists each metric as well
    assert all("trainer/global_step" in row for row in stored.history if set(row) - {"_step", "_runtime", "_timestamp"})
    assert [step for step, _ in stored.curve("hessian/lambda_max")] == [4, 8]
    assert [step for step, _ in stored.curve("coherence/alpha_m")] == [0, 2, 4, 6]
    assert [step for step, _ in stored.curve("val/acc")] == [3, 7]  # Lightning counts the steps it logs from 0
    assert [step for step, _ in stored.curve("fed/drift")] == [3, 7]

    kinds = stored.kinds()
    assert kinds["figures"] == ["coherence/layers", "hessian/density"]
    assert kinds["tables"] == ["hessian/eigenvalues"]
    for step, (at, figure) in zip((4, 8), stored.curve("hessian/density"), strict=True):
        assert at == step
        assert (run / "files" / figure["filenames"][0]).read_bytes().startswith(PNG)
    ((step, table),) = stored.curve("hessian/eigenvalues")
    rows = json.loads((run / "files" / table["path"]).read_text())["data"]
    assert step == 8
    assert {row[0] for row in rows} == {4, 8}

    assert Path("runs/wandb_walkthrough.png").read_bytes().startswith(PNG)
    out = printed()
    assert "hessian/eigenvalues" in out


def tensorboard() -> tuple[dict[str, list[tuple[int, float]]], list[str]]:
    """Its scalars, and the names of its images."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(the_only("tensorboard/version_0/events.*")), size_guidance={"scalars": 0}).Reload()
    names = set(events.Tags()["scalars"]) - {"hp_metric"}
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in names}, events.Tags()["images"]


def mlflow() -> tuple[dict[str, list[tuple[int, float]]], dict[str, str], list[str]]:
    """Its scalars, parameters and figures."""
    from mlflow import MlflowClient

    client = MlflowClient("file:runs/mlruns")
    (run,) = client.search_runs([client.get_experiment_by_name("fulgurite").experiment_id])
    scalars = {
        name: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)] for name in run.data.metrics
    }
    figures = [
        file.path
        for folder in client.list_artifacts(run.info.run_id, "figures")
        for file in client.list_artifacts(run.info.run_id, folder.path)
    ]
    return scalars, run.data.params, figures


def csv_file() -> dict[str, list[tuple[int, float]]]:
    with the_only("wandb_walkthrough/version_0/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = set(rows[0]) - {"step"}
    return {name: [(int(row["step"]), float(row[name])) for row in rows if row[name]] for name in names}


@pytest.mark.slow
def test_the_same_arrives_in_every_logger(example: ModuleType) -> None:
    stored = example.main(small(ROOT / "examples/wandb_side_by_side.yaml"))
    names = set(stored.kinds()["scalars"]) - {"trainer/global_step"}
    events, images = tensorboard()
    scalars, params, artifacts = mlflow()
    for found in (events, scalars, csv_file()):
        assert set(found) == names
        for name in names:
            # As a set: two loggers keep one value a step, and W&B and TensorBoard what came, in that order.
            expected = dict(stored.curve(name))
            got = dict(found[name])
            assert got.keys() == expected.keys()
            assert got == pytest.approx(expected, rel=1e-5, nan_ok=True)  # TensorBoard keeps single precision

    figures = {
        "figures/coherence/layers_8.png",
        "figures/hessian/density_4.png",
        "figures/hessian/density_8.png",
    }
    assert set(artifacts) == figures
    folder = the_only("wandb_walkthrough/version_0")
    assert {str(path.relative_to(folder)) for path in folder.rglob("*.png")} == figures
    assert sorted(images) == ["coherence/layers", "hessian/density"]

    for file in (folder / "hparams.yaml", Path("runs/tensorboard/version_0/hparams.yaml")):
        settings = yaml.safe_load(file.read_text())["trainer"]
        assert settings["strategy"]["init_args"]["alpha"] == 0.3
        assert settings["callbacks"]["GradientCoherence"]["every_n_steps"] == 2
    assert params["trainer/strategy/init_args/alpha"] == "0.3"
    assert params["trainer/callbacks/GradientCoherence/every_n_steps"] == "2"


@pytest.mark.parametrize(("variable", "mode"), [("WANDB_API_KEY", "online"), ("HOME", "offline")])
def test_a_key_makes_it_online(example: ModuleType, monkeypatch: pytest.MonkeyPatch, variable: str, mode: str) -> None:
    monkeypatch.setenv(variable, "x" * 40)
    monkeypatch.delenv("WANDB_MODE")
    importlib.reload(example)
    assert os.environ["WANDB_MODE"] == mode


@pytest.mark.parametrize(("flags", "mode"), [([], "offline"), (["--online"], "online")])
def test_a_flag_makes_it_online(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch, flags: list[str], mode: str
) -> None:
    monkeypatch.setattr(example.WalkthroughCLI, "_run_subcommand", lambda cli, name: None)  # it would want a network
    example.WalkthroughCLI(example.Classifier, example.Digits, args=["fit", f"--config={CONFIG}", *flags])
    assert os.environ["WANDB_MODE"] == mode


@pytest.mark.slow
def test_the_sweep_runs_the_example_with_its_parameters(example: ModuleType) -> None:
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    sweep = yaml.safe_load((ROOT / "examples/wandb_sweep.yaml").read_text())
    assert sweep["method"] == "grid"
    chosen = {name: {"value": choices["values"][0]} for name, choices in sweep["parameters"].items()}
    flags = create_sweep_command_args({"args": chosen})["args"]
    filled = {"${interpreter}": [sys.executable], "${program}": [sweep["program"]], "${args}": flags}
    filled |= {"${env}": [], "--online": []}
    command = [part for word in sweep["command"] for part in filled.get(word, [word])]
    Path("examples").symlink_to(ROOT / "examples")
    Path("sweep.yaml").write_text(yaml.safe_dump({"wandb_version": 1} | chosen))
    subprocess.run(
        [*command, *small()[2:]],  # without `fit` and the file, which the sweep names
        env=os.environ | {"WANDB_SWEEP_PARAM_PATH": "sweep.yaml", "WANDB_SWEEP_ID": "offline"},  # as an agent does
        check=True,
        timeout=600,
    )

    stored = example.read(the_only("wandb/offline-run-*/run-*.wandb"))
    assert sweep["metric"]["name"] in stored.kinds()["scalars"]
    for name, parameter in chosen.items():
        assert stored.config[name] == parameter["value"]
        place: Any = stored.config
        for part in name.split("."):
            place = place[part]
        assert place == parameter["value"]
