"""Which patterns of slow workers a code bears: the models of sequential gradient coding (arXiv 2211.13802)."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Pattern = NDArray[np.bool_]  # (n, rounds): worker i is late in round r


class StragglerModel(Protocol):
    """A condition on every window of ``window`` rounds in a row."""

    @property
    def window(self) -> int:
        """Rounds that the condition looks at."""

    def admits(self, pattern: Pattern) -> bool:
        """Whether a pattern of at most ``window`` rounds fulfils it."""


@dataclass(frozen=True)
class PerRoundModel:
    """Every round has at most ``s`` late workers."""

    s: int

    def __post_init__(self) -> None:
        if self.s < 0:
            raise ValueError(f"`s` counts late workers and must be at least 0, got {self.s}")

    @property
    def window(self) -> int:
        """A single round."""
        return 1

    def admits(self, pattern: Pattern) -> bool:
        """Whether no round of the pattern has more."""
        return not pattern.size or int(pattern.sum(0).max()) <= self.s


@dataclass(frozen=True)
class BurstyModel:
    """In ``W`` rounds in a row at most ``lam`` workers are late, each within ``B`` rounds.

    Args:
        B: rounds from a worker's first late round in the window to its last, both counted; from 1 to ``W - 1``.
        W: rounds of a window.
        lam: different late workers in a window, at least 0.
    """

    B: int
    W: int
    lam: int

    def __post_init__(self) -> None:
        check_burst(self.B, self.W, self.lam)

    @property
    def window(self) -> int:
        """``W`` rounds."""
        return self.W

    def admits(self, pattern: Pattern) -> bool:
        """Whether late workers are few and their bursts short."""
        late = pattern[pattern.any(1)]
        if not len(late):
            return True
        first, last = late.argmax(1), late.shape[1] - 1 - late[:, ::-1].argmax(1)
        return len(late) <= self.lam and int((last - first).max()) < self.B


@dataclass(frozen=True)
class ArbitraryModel:
    """In ``W`` rounds in a row at most ``lam`` workers are late, each in at most ``N`` rounds.

    Args:
        N: late rounds of a worker in a window, at least 0.
        W: rounds of a window (W' in the paper), at least 1.
        lam: different late workers in a window, at least 0.
    """

    N: int
    W: int
    lam: int

    def __post_init__(self) -> None:
        if self.N < 0 or self.W < 1 or self.lam < 0:
            raise ValueError(
                f"`N` and `lam` must be at least 0 and `W` at least 1, got N={self.N}, W={self.W}, lam={self.lam}"
            )

    @property
    def window(self) -> int:
        """``W`` rounds."""
        return self.W

    def admits(self, pattern: Pattern) -> bool:
        """Whether late workers are few, and each of them late in few rounds."""
        counts = pattern.sum(1)
        return int(np.count_nonzero(counts)) <= self.lam and (not counts.size or int(counts.max()) <= self.N)


@dataclass(frozen=True)
class BurstyOrFewModel:
    """Each window is as in :class:`BurstyModel`, or each of its rounds has at most ``s`` late workers."""

    B: int
    W: int
    lam: int
    s: int

    @property
    def window(self) -> int:
        """``W`` rounds."""
        return self.W

    def admits(self, pattern: Pattern) -> bool:
        """Whether one of the two holds."""
        return PerRoundModel(self.s).admits(pattern) or BurstyModel(self.B, self.W, self.lam).admits(pattern)


def conforms(pattern: Tensor, model: StragglerModel) -> bool:
    """Whether a model admits a pattern of late workers.

    Args:
        pattern: ``(n, rounds)``, boolean: worker i is late in round r. Fewer rounds than a window are one window.
        model: a :class:`PerRoundModel`, :class:`BurstyModel`, :class:`ArbitraryModel` or :class:`BurstyOrFewModel`.

    Raises:
        ValueError: the pattern has another shape.

    Example:
        >>> late = torch.tensor([[True, False, True], [False, False, False]])
        >>> conforms(late, BurstyModel(B=1, W=2, lam=1)), conforms(late, BurstyModel(B=1, W=3, lam=1))
        (True, False)
    """
    if pattern.dim() != 2:
        raise ValueError(f"`pattern` must have a row a worker and a column a round, got shape {tuple(pattern.shape)}")
    late = pattern.bool().numpy()
    windows = max(1, late.shape[1] - model.window + 1)
    return all(model.admits(late[:, start : start + model.window]) for start in range(windows))


def check_burst(B: int, W: int, lam: int) -> None:
    """Refuses a burst that fills its window, and a negative number of workers."""
    if not 1 <= B < W:
        raise ValueError(f"`B` is the length of a burst and must be from 1 to `W` - 1 ({W - 1}), got {B}")
    if lam < 0:
        raise ValueError(f"`lam` counts late workers and must be at least 0, got {lam}")
