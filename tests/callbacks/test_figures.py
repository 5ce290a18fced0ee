import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from fulgurite.callbacks import log_figure

NAME = "hessian/spectrum"
STEPS = 2
PNG = b"\x89PNG\r\n\x1a\n"


def a_figure() -> Figure:
    figure, axes = plt.subplots(figsize=(2, 2))
    axes.plot([0, 1], [1, 0])
    return figure


class Plot(Callback):
    """Logs a figure after every optimizer step, on every rank, under a name that `name_of` may make of the rank."""

    def __init__(self, name_of: Callable[[int], str] = lambda _: NAME) -> None:
        self.name_of = name_of

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        log_figure(trainer, self.name_of(trainer.global_rank), a_figure())
        assert plt.get_fignums() == [], f"a figure stayed open on rank {trainer.global_rank}"


class LooksAtWeights(BoringModel):
    """A user's module that draws by itself: `log_figure` asks for no callback of ours."""

    def on_train_batch_end(self, *_: Any) -> None:
        figure, axes = plt.subplots()
        axes.imshow(self.layer.weight.detach().cpu())
        log_figure(self.trainer, "weights", figure)


def fit(logger: Logger | list[Logger] | bool, model: LightningModule | None = None, **kwargs: Any) -> Trainer:
    kwargs = {"max_steps": STEPS, "callbacks": [Plot()], "accelerator": "cpu", "devices": 1} | kwargs
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = Trainer(logger=logger, limit_val_batches=0, log_every_n_steps=1, **quiet, **kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on workers and devices
        trainer.fit(model or BoringModel())
    return trainer


def pngs(folder: Path) -> list[str]:
    """The names of the images below a folder, each looked at: it is a PNG."""
    files = sorted(folder.rglob("*.png"))
    assert all(file.read_bytes().startswith(PNG) for file in files)
    return [file.relative_to(folder).as_posix() for file in files]


@pytest.fixture(autouse=True)
def no_figure_stays_open() -> Iterator[None]:
    yield
    assert plt.get_fignums() == []


def test_csv_logger_gets_a_png_in_its_run(tmp_path: Path) -> None:
    fit(CSVLogger(tmp_path, name="run", version=3))
    assert pngs(tmp_path) == [f"run/version_3/figures/{NAME}_{step}.png" for step in (1, 2)]


def test_no_logger_writes_below_the_root(tmp_path: Path) -> None:
    fit(False, default_root_dir=tmp_path / "root")
    assert pngs(tmp_path) == [f"root/figures/{NAME}_{step}.png" for step in (1, 2)]


def test_the_root_may_be_a_remote_filesystem(tmp_path: Path) -> None:
    log_figure(Trainer(accelerator="cpu", logger=False, default_root_dir="memory://bucket"), NAME, a_figure())
    assert fsspec.filesystem("memory").cat(f"/bucket/figures/{NAME}_0.png").startswith(PNG)
    assert pngs(tmp_path) == []


def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fit(TensorBoardLogger(tmp_path, name="run", version=0))
    events = EventAccumulator(str(tmp_path / "run/version_0"), size_guidance={"images": 0}).Reload()
    assert events.Tags()["images"] == [NAME]
    images = events.Images(NAME)
    assert [image.step for image in images] == [1, 2]
    assert all(image.encoded_image_string.startswith(PNG) for image in images)
    assert pngs(tmp_path) == []  # in the event file alone


def test_wandb_offline(tmp_path: Path) -> None:
    logger = WandbLogger(save_dir=tmp_path)
    trainer = fit(logger)
    summary = logger.experiment.summary
    assert summary["trainer/global_step"] == trainer.global_step == STEPS
    assert summary[NAME]["_type"] == "images/separated"
    (run,) = tmp_path.glob("wandb/offline-run-*")
    # W&B counts its own steps in file names; the Trainer's is in the history.
    media = pngs(run / "files/media/images")
    assert [name.rpartition("_")[0] for name in media] == [f"{NAME}_0", f"{NAME}_1"]
    assert list(run.glob("run-*.wandb"))


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # newer releases want a database, which mlflow-skinny lacks
    logger = MLFlowLogger("experiment", tracking_uri=f"file:{tmp_path}/mlruns")
    fit(logger)
    artifacts = logger.experiment.list_artifacts(logger.run_id, f"figures/{Path(NAME).parent}")
    assert [artifact.path for artifact in artifacts] == [f"figures/{NAME}_{step}.png" for step in (1, 2)]
    (folder,) = tmp_path.rglob("artifacts")
    assert pngs(folder) == [artifact.path for artifact in artifacts]


def test_every_logger_of_several_gets_it(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fit([TensorBoardLogger(tmp_path / "tensorboard", version=0), CSVLogger(tmp_path / "csv", version=0)])
    (event_file,) = tmp_path.rglob("events.out.*")
    assert EventAccumulator(str(event_file)).Reload().Tags()["images"] == [NAME]
    assert pngs(tmp_path / "csv/lightning_logs/version_0/figures") == [f"{NAME}_1.png", f"{NAME}_2.png"]


def test_the_step_counts_optimizer_steps_not_batches(tmp_path: Path) -> None:
    fit(CSVLogger(tmp_path), max_steps=2, accumulate_grad_batches=2)
    assert {Path(name).stem for name in pngs(tmp_path)} == {"spectrum_0", "spectrum_1", "spectrum_2"}


def test_rank_zero_alone_writes(tmp_path: Path) -> None:
    plot = Plot(name_of="rank{}".format)
    fit(CSVLogger(tmp_path, version=0), callbacks=[plot], strategy="ddp_fork", devices=2)
    assert [Path(name).name for name in pngs(tmp_path)] == ["rank0_1.png", "rank0_2.png"]


def test_a_module_may_call_it(tmp_path: Path) -> None:
    fit(CSVLogger(tmp_path), LooksAtWeights(), callbacks=[])
    assert [Path(name).name for name in pngs(tmp_path)] == ["weights_1.png", "weights_2.png"]


@pytest.mark.parametrize("logger", [True, False])
def test_fast_dev_run_writes_nothing(tmp_path: Path, logger: bool) -> None:
    fit(logger, fast_dev_run=True, default_root_dir=tmp_path)
    assert pngs(tmp_path) == []


def test_nothing_from_the_trial_fits_of_the_tuner(tmp_path: Path) -> None:
    log_figure(Trainer(accelerator="cpu", logger=DummyLogger(), default_root_dir=tmp_path), NAME, a_figure())
    assert pngs(tmp_path) == []


def test_a_figure_made_without_pyplot(tmp_path: Path) -> None:
    log_figure(Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path), "plain", Figure())
    assert pngs(tmp_path) == ["figures/plain_0.png"]


def test_closed_when_a_logger_fails(tmp_path: Path) -> None:
    (tmp_path / "figures").write_text("in the way of the folder")
    trainer = Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path)
    with pytest.raises(OSError, match="figures"):
        log_figure(trainer, NAME, a_figure())


@pytest.mark.parametrize("name", ["", "/etc/figure", "../figure", "a/../../figure", "a/", "a//b"])
def test_a_name_that_would_leave_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    trainer = Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path / "root")
    with pytest.raises(ValueError, match="`name` is a key"):
        log_figure(trainer, name, a_figure())
    assert pngs(tmp_path) == []
