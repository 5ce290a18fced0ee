"""Accuracy under attack."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics import Metric

from fulgurite.plugins.federated.attack import PGD
from fulgurite.plugins.seeds import derived_seed


class RobustAccuracy(Metric):
    """Share of samples that stay rightly classified when an attack has raised their loss (arXiv 1706.06083).

    It needs gradients of the input alone and works under ``no_grad`` and ``inference_mode`` too. Random starts come
    from the number of the update, so that two evaluations attack alike and the global generators are not touched.

    Args:
        attack: perturbs the input; its ``mode`` plays no part, the model is attacked as it is.
        **kwargs: for :class:`~torchmetrics.Metric`.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    correct: Tensor
    total: Tensor

    def __init__(self, attack: PGD, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.attack = attack
        self.add_state("correct", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, logits_fn: Callable[[Tensor], Tensor], x: Tensor, target: Tensor) -> None:
        """Attacks a batch and counts what is still right.

        Args:
            logits_fn: maps ``x`` to ``(N, C, ...)`` logits of at least two classes.
            x: ``(N, ...)`` floating.
            target: ``(N, ...)`` classes.

        Raises:
            ValueError: the logits have another shape, or as :class:`~fulgurite.plugins.federated.PGD` says.
        """
        # Autograd saves no inference tensor: clones made out of that mode are ordinary ones.
        with torch.inference_mode(False), torch.enable_grad():
            x, target = x.clone(), target.clone()
            generator = torch.Generator(x.device).manual_seed(derived_seed("robust_accuracy", self.update_count))
            adversarial = self.attack(lambda perturbed: _loss(logits_fn(perturbed), target), x, generator)
        right = logits_fn(adversarial).argmax(1) == target
        self.correct = self.correct + right.sum()  # not in place: an inference tensor is fixed outside of that mode
        self.total = self.total + right.numel()

    def compute(self) -> Tensor:
        """Scalar in ``[0, 1]``."""
        return self.correct / self.total


def _loss(logits: Tensor, target: Tensor) -> Tensor:
    if logits.dim() < 2 or logits.shape[1] < 2:
        raise ValueError(f"`logits_fn` must return (N, C, ...) with a logit a class, got shape {tuple(logits.shape)}")
    loss = cross_entropy(logits, target)
    return loss * 2.0**14 if logits.dtype == torch.float16 else loss  # small gradients would be zero, without a sign
