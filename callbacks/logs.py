"""One way for every callback to log what it measures at steps of its own."""

from lightning.pytorch import Trainer
from torch import tensor


def log_now(trainer: Trainer, metrics: dict[str, float]) -> None:
    """Sends scalars to every logger at ``trainer.global_step``, whatever ``log_every_n_steps`` is.

    They also join ``trainer.callback_metrics``. Equal values are to come on all ranks; rank 0's are logged.
    """
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=trainer.global_step)
    trainer.callback_metrics.update({name: tensor(value) for name, value in metrics.items()})
