"""What an optimizer says to take part in federated rounds."""

from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class FederatedOptimizer(Protocol):
    """An optimizer that is told where a client's round begins and ends, and whose state outlives the round.

    For each client of a round, ``FederatedStrategy`` loads the server's weights into the parameters, empties the
    optimizer's state and gives its groups the values they had when the round began; then it calls ``begin_round``, lets
    the client take its steps, and calls ``end_round``. What ``end_round`` returns is kept for this client until
    its next round. An optimizer without these methods starts each client afresh.

    An attribute ``round_metrics``, a ``dict[str, float]``, is optional: the strategy reads it after ``end_round``, and
    logs its mean over the clients of the round.
    """

    def begin_round(self, state: list[Tensor] | None) -> None:
        """Opens a round at the present parameters.

        Args:
            state: what ``end_round`` last returned for this client; None in the client's first round.
        """

    def end_round(self) -> list[Tensor]:
        """Closes the round; the parameters are then the client's model.

        Returns:
            What the client must know in its next round, one tensor for each parameter in the order of the groups.
        """
