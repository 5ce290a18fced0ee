"""Federated adversarial learning: clients train on the worst inputs near their own."""

from typing import Any, ClassVar

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from fulgurite.plugins.federated.attack import PGD
from fulgurite.plugins.federated.batch import get_entry, replace_entry
from fulgurite.plugins.quiet import quiet
from fulgurite.plugins.seeds import derived_seed
from fulgurite.strategies.concurrent_modules import loss_of
from fulgurite.strategies.federated import FederatedStrategy

_FP16_SCALE = 2.0**14  # a gradient that underflows has no sign, and the attack would stand still without a word


class FederatedAdversarialStrategy(FederatedStrategy):
    """Trains clients on adversarial inputs, so that the global model resists perturbation (arXiv 2208.03635).

    Before each local step the client's inputs are moved within a small ball, by gradient ascent on the loss that
    ``training_step`` itself computes at the present local weights; the step is then taken on these inputs alone. The
    inner calls leave no logs, metrics or statistics.

    Args:
        attack: how inputs are perturbed, in their own units; None is ``PGD()``, 8/255 for pixels in [0, 1].
        input_key: where a batch has its inputs: index into a tuple or list, key of a dict, field of a dataclass.
        adversarial_clients: share of the clients, in [0, 1], that train so, chosen by ``seed``; the others train clean.
        **federated_kwargs: for :class:`FederatedStrategy`.

    Raises:
        ValueError: for an argument out of its range.
        MisconfigurationException: at setup, and at the first batch where its inputs cannot be perturbed.

    Example:
        >>> from fulgurite.plugins.federated import PGD
        >>> strategy = FederatedAdversarialStrategy(num_clients=20, clients_per_round=5, attack=PGD(eps=0.1))
    """

    _sum_names: ClassVar[tuple[str, ...]] = (*FederatedStrategy._sum_names, "attack_gain", "attacks")

    def __init__(
        self,
        *,
        attack: PGD | None = None,
        input_key: int | str = 0,
        adversarial_clients: float = 1.0,
        **federated_kwargs: Any,
    ) -> None:
        super().__init__(**federated_kwargs)
        if not 0 <= adversarial_clients <= 1:
            raise ValueError(f"`adversarial_clients` is a share and must be in [0, 1], got {adversarial_clients}")
        self.attack = PGD() if attack is None else attack
        self.input_key = input_key
        self.adversarial_clients = adversarial_clients
        generator = torch.Generator().manual_seed(derived_seed(self.seed, "adversarial"))
        shuffled = torch.randperm(self.num_clients, generator=generator).tolist()
        self._adversarial = frozenset(shuffled[: round(adversarial_clients * self.num_clients)])
        self._perturbed: Tensor | None = None

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._perturbed = None
        super().on_train_batch_start(batch, batch_idx, dataloader_idx)

    @override
    def training_step(self, batch: Any, *args: Any) -> Any:
        if self._turn is None or self._turn.client not in self._adversarial:
            return super().training_step(batch, *args)
        if self._perturbed is None:  # once a batch, also for an optimizer that calls its closure again
            self._perturbed = self._perturb(batch, *args)
        return super().training_step(replace_entry(batch, self.input_key, self._perturbed), *args)

    def _perturb(self, batch: Any, *args: Any) -> Tensor:
        losses: list[Tensor] = []
        scale = _FP16_SCALE if self.precision_plugin.precision == "16-mixed" else 1.0

        def scaled_loss(inputs: Tensor) -> Tensor:
            with self.precision_plugin.train_step_context():
                output = self._module.training_step(replace_entry(batch, self.input_key, inputs), *args)
            loss = loss_of(output)
            losses.append(loss.detach())
            return loss * scale

        self._seed("attack")
        try:
            with quiet(self._module, evaluate=self.attack.mode == "eval"):
                perturbed = self.attack(scaled_loss, get_entry(batch, self.input_key))
        except ValueError as error:
            raise MisconfigurationException(f"`input_key` is {self.input_key!r}, and {error}") from error
        self._seed("step")  # dropout as without the attack
        self._sums["attack_gain"] += float(losses[-1] - losses[0])
        self._sums["attacks"] += 1
        return perturbed

    @override
    def _round_metrics(self, changes: list[Tensor], weight: float, sums: dict[str, float]) -> dict[str, float]:
        gain, attacks = sums.pop("attack_gain"), sums.pop("attacks")
        mean_gain = gain / attacks if attacks else float("nan")
        return super()._round_metrics(changes, weight, sums) | {"fal/attack_gain": mean_gain}
