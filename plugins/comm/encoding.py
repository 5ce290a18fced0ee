"""Gradient codes: which chunks of a batch each worker sums up so that some may be missing (arXiv 1612.03301)."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor

Code = Literal["balanced", "fractional_repetition", "cyclic"]
_TOLERANCE = 1e-6  # of the ones that a combination must give; float64 leaves 1e-8 with 256 workers


class UndecodableError(RuntimeError):
    """Too few results have come in to give the gradient of a batch."""


def encoding_matrix(n: int, s: int, code: Code = "balanced", seed: int = 0) -> Tensor:
    """The matrix E of a code that bears ``s`` missing workers: worker i sends ``sum_c E[i, c] g_c`` (arXiv 1612.03301).

    - ``"balanced"``: workers ``i mod (s+1) = k`` are class k, and each class alone cuts the chunks into runs of nearly
      equal length. ``s`` missing workers leave one of the ``s+1`` classes whole. Coefficients are 0 and 1, and the
      largest load is ``ceil(n / floor(n / (s+1)))`` chunks.
    - ``"fractional_repetition"``: groups of ``s+1`` neighbours all hold the same ``s+1`` chunks.
    - ``"cyclic"``: worker i holds chunks ``i..i+s``, with random coefficients that decoding inverts: the rounding of
      the sum grows with ``n`` and ``s``.

    Args:
        n: workers, and chunks of equal weight.
        s: workers that may be missing, from 0 to ``n - 1``.
        code: see above.
        seed: of the cyclic code.

    Returns:
        ``(n, n)``, float64.

    Raises:
        ValueError: ``s`` is out of range, ``code`` unknown, or ``s + 1`` does not divide ``n`` in the second code.

    Example:
        >>> encoding_matrix(4, 1)
        tensor([[1., 1., 0., 0.],
                [1., 1., 0., 0.],
                [0., 0., 1., 1.],
                [0., 0., 1., 1.]], dtype=torch.float64)
    """
    return _encoding_matrix(n, s, code, seed).clone()


@lru_cache(maxsize=32)
def _encoding_matrix(n: int, s: int, code: Code, seed: int) -> Tensor:
    check_missing(n, s)
    if code not in get_args(Code):
        raise ValueError(f"`code` must be one of {get_args(Code)}, got {code!r}")
    if code == "fractional_repetition" and n % (s + 1):
        raise ValueError(
            f"`code='fractional_repetition'` needs `s` + 1 ({s + 1}) to divide the {n} workers: use code='balanced'"
        )
    return _cyclic(n, s, seed) if code == "cyclic" else _runs(n, s)


def check_missing(n: int, s: int) -> None:
    """Refuses a number of missing workers that no code bears."""
    if n < 1:
        raise ValueError(f"`n` counts workers and must be at least 1, got {n}")
    if s < 0:
        raise ValueError(f"`s` is how many workers may be missing and must be at least 0, got {s}")
    if s >= n:
        raise ValueError(f"`s` is how many of the {n} workers may be missing and must be from 0 to {n - 1}, got {s}")


def _runs(n: int, s: int) -> Tensor:
    """The balanced code; where ``s + 1`` divides ``n`` it is fractional repetition."""
    matrix = torch.zeros(n, n, dtype=torch.float64)
    for k in range(s + 1):
        members = range(k, n, s + 1)
        for a, worker in enumerate(members):
            matrix[worker, n * a // len(members) : n * (a + 1) // len(members)] = 1
    return matrix


def _cyclic(n: int, s: int, seed: int) -> Tensor:
    """Rows in the null space of a random ``(s, n)`` matrix; its rows sum to 0, so the row of ones is in there too."""
    matrix = torch.eye(n, dtype=torch.float64)
    if s:
        generator = torch.Generator().manual_seed(seed)
        parity = torch.randn(s, n, dtype=torch.float64, generator=generator)
        parity[:, -1] = -parity[:, :-1].sum(1)
        for i in range(n):
            others = (torch.arange(1, s + 1) + i) % n
            matrix[i, others] = -torch.linalg.solve(parity[:, others], parity[:, i])
    return matrix


def decode_vector(E: Tensor, received: Sequence[int]) -> Tensor:
    """The weights a of the workers' results whose combination is the sum over all chunks: ``a' E = 1'``.

    A code of zeros and ones is decoded by zeros and ones: no rounding beyond that of the sum.

    Args:
        E: ``(n, n)``, from :func:`encoding_matrix`.
        received: the workers whose results are there.

    Returns:
        ``(n,)``, float64, zero outside of ``received``.

    Raises:
        ValueError: ``received`` names a worker that does not exist.
        UndecodableError: the results do not determine the sum.
    """
    n = len(E)
    workers = sorted(set(received))
    if workers and not 0 <= workers[0] <= workers[-1] < n:
        raise ValueError(f"`received` must name workers from 0 to {n - 1}, got {workers}")
    weights = E.new_zeros(n)
    if workers:
        if bool(((E == 0) | (E == 1)).all()):
            weights[_cover(E, workers)] = 1
        else:
            ones = E.new_ones(n, 1)
            weights[workers] = torch.linalg.lstsq(E[workers].T, ones, driver="gelsd").solution[:, 0]
    error = float((weights @ E - 1).abs().max())
    if not error < _TOLERANCE:
        raise UndecodableError(
            f"`received` holds the results of {len(workers)} of {n} workers, which do not determine the sum"
        )
    return weights


def _cover(E: Tensor, workers: list[int]) -> list[int]:
    """Workers whose runs of chunks follow one another from the first chunk to the last; none if there are none such."""
    starts = E.argmax(1).tolist()
    lengths = E.sum(1).long().tolist()
    paths: dict[int, list[int]] = {0: []}
    for worker in sorted(workers, key=starts.__getitem__):
        if starts[worker] in paths:
            paths.setdefault(starts[worker] + lengths[worker], [*paths[starts[worker]], worker])
    return paths.get(len(E), [])
