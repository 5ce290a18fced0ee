"""One way for every callback to run the user's module once more and leave the fit as it was."""

from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch import LightningModule, Trainer

from fulgurite.plugins.quiet import quiet
from fulgurite.plugins.seeds import isolate_generators


@contextmanager
def untouched(trainer: Trainer, pl_module: LightningModule, evaluate: bool = False) -> Iterator[None]:
    """Lets a callback call ``pl_module`` or its steps, in the Trainer's precision, without a trace in the fit.

    What :func:`~fulgurite.plugins.quiet.quiet` forgets is put back: modes, buffers, metrics, logs, rebound attributes;
    and so are the generators of Python, NumPy and torch and the gradients, which are None within the block. Weights
    and data loaders are shared with the fit.

    Args:
        trainer: whose precision the block runs in.
        pl_module: the module that is called.
        evaluate: in eval mode.
    """
    gradients = [(param, param.grad) for param in pl_module.parameters()]
    for param, _ in gradients:
        param.grad = None
    try:
        with isolate_generators(), quiet(pl_module, evaluate), trainer.precision_plugin.forward_context():
            yield
    finally:
        for param, gradient in gradients:
            param.grad = gradient
