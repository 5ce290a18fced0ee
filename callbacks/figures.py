"""One way for every callback to show a figure, whatever the Trainer logs to."""

from typing import TYPE_CHECKING

from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def log_figure(trainer: Trainer, name: str, figure: "Figure") -> None:
    """Sends a figure to every logger of the Trainer, at ``trainer.global_step``, and closes it.

    Weights & Biases and TensorBoard get an image under ``name``, MLflow an artifact
    ``figures/NAME_STEP.png`` of the run. Any other logger, or none, leaves that PNG in the run's folder:
    ``logger.log_dir``, or the Trainer's ``default_root_dir`` where there is no such folder. ``fast_dev_run``
    and the tuner's trial fits log nothing, here as elsewhere.

    Every process may call this, and rank 0 alone writes; no process waits for another. What the figure shows
    is the caller's to compute on every rank. Needs matplotlib: ``pip install 'fulgurite[figures]'``.

    Args:
        trainer: the Trainer whose loggers receive the figure.
        name: the image's key, ``method/quantity``; in files, each slash opens a folder.
        figure: a matplotlib figure; closed on return, and after an error as well.

    Raises:
        ValueError: ``name`` has an empty part, ``.`` or ``..`` between slashes.
    """
    # Imported here: matplotlib is an extra, and who holds a figure has it.
    from matplotlib import pyplot as plt

    try:
        if not {"", ".", ".."}.isdisjoint(name.split("/")):
            raise ValueError(f"`name` is a key such as 'hessian/spectrum', and a relative path in files, got {name!r}")
        if trainer.is_global_zero and not getattr(trainer, "fast_dev_run", False):  # set, but nowhere declared
            loggers: list[Logger | None] = [*trainer.loggers] or [None]
            for logger in loggers:
                _send(trainer, logger, name, figure)
    finally:
        plt.close(figure)


def _send(trainer: Trainer, logger: Logger | None, name: str, figure: "Figure") -> None:
    step = trainer.global_step
    file = f"figures/{name}_{step}.png"
    match logger:
        case WandbLogger():
            logger.log_image(key=name, images=[figure], step=step)
        case TensorBoardLogger():
            logger.experiment.add_figure(name, figure, global_step=step, close=False)
        case MLFlowLogger():
            logger.experiment.log_figure(logger.run_id, figure, file)
        case DummyLogger():  # stands in for the user's loggers while the tuner tries out learning rates
            pass
        case _:
            # Not `trainer.log_dir`: that one is a broadcast, which rank 0 alone would wait for forever.
            folder = (logger.log_dir if logger is not None else None) or trainer.default_root_dir
            path = f"{folder}/{file}"
            filesystem = get_filesystem(path)  # the root may be a bucket
            filesystem.makedirs(path.rpartition("/")[0], exist_ok=True)
            with filesystem.open(path, "wb") as target:
                figure.savefig(target, format="png")
