"""What drives each unit of a network that settles."""

from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor, nn
from typing_extensions import override


class EquilibriumField(nn.Module, ABC):
    """The input ``H(r, x)`` that all units get at activities ``r``; the network settles where ``u = H(phi(u), x)``.

    A subclass defines ``forward``, by operations that are holomorphic in ``r`` where more than two points are to be
    used, and deterministic. It may define ``at`` and ``recurrent_matrix``, which save time.

    Args:
        sizes: units of each block, by name; activities are concatenated in this order.

    Attributes:
        sizes: as given.
        n: units in all.

    Raises:
        TypeError: ``sizes`` is no dictionary.
        ValueError: a block has no unit, or a name that a connection ``"pre-post"`` could not bear.
    """

    def __init__(self, sizes: dict[str, int]) -> None:
        super().__init__()
        if not isinstance(sizes, dict):
            raise TypeError(
                f'`sizes` must map names of blocks to their units, as {{"l1": 32, "out": 16}}, got {sizes!r}'
            )
        for name, size in sizes.items():
            if size < 1 or not name or name == "in" or "-" in name or "." in name:
                raise ValueError(
                    f"`sizes` has the entry {name!r}: {size}; blocks have at least 1 unit, and a name other than 'in' "
                    "without dash or dot"
                )
        if not sizes:
            raise ValueError("`sizes` is empty: give at least one block of units")
        self.sizes = dict(sizes)
        self.n = sum(sizes.values())

    @abstractmethod
    @override
    def forward(self, r: Tensor, x: Tensor) -> Tensor:
        """``H(r, x)``.

        Args:
            r: ``(B, n)``, real or complex.
            x: ``(B, ...)``, real.

        Returns:
            ``(B, n)``, of the type of ``r``.
        """

    def at(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """``r -> H(r, x)``; an override computes once what does not depend on ``r``."""
        return lambda r: self(r, x)

    def recurrent_matrix(self) -> Tensor | None:
        """``dH/dr``, ``(n, n)``, differentiable in the weights, where it depends on neither ``r`` nor ``x``."""
        return None

    def block(self, name: str) -> slice:
        """Where the units of a block stand in ``r``."""
        start = 0
        for other, size in self.sizes.items():
            if other == name:
                return slice(start, start + size)
            start += size
        raise ValueError(f"there is no block {name!r} in `sizes`, which has {', '.join(self.sizes)}")
