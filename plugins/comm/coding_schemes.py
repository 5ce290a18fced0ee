"""The schemes by name, and what they cost: loads, delays and the least load of any (arXiv 2211.13802)."""

from typing import Literal, get_args

from fulgurite.plugins.comm.coded_schedule import (
    GradientCodeSchedule,
    MultiplexedSchedule,
    Schedule,
    SelectiveRepeatSchedule,
    check_window,
)

Scheme = Literal["gc", "sr_sgc", "m_sgc"]
_SCHEMES: tuple[Scheme, ...] = get_args(Scheme)  # once: a search asks for hundreds of schedules


def make_schedule(
    scheme: Scheme,
    n: int,
    *,
    s: int | None = None,
    B: int | None = None,
    W: int | None = None,
    lam: int | None = None,
    jobs: int | None = None,
) -> Schedule:
    """The schedule of a scheme by its name; ``"gc"`` takes ``s`` alone, the others ``B``, ``W`` and ``lam``.

    Raises:
        ValueError: an argument is missing, does not belong to the scheme, or is out of range.
    """
    if scheme not in _SCHEMES:
        raise ValueError(f"`scheme` must be one of {_SCHEMES}, got {scheme!r}")
    if scheme == "gc":
        if (B, W, lam) != (None, None, None):
            raise ValueError(f"`B`, `W` and `lam` do not belong to 'gc': give `s`; got B={B}, W={W}, lam={lam}")
        if s is None:
            raise ValueError("`s` is missing: 'gc' needs to know how many workers may be late in a round")
        return GradientCodeSchedule(n, s, jobs)
    if s is not None:
        raise ValueError(f"`s` does not belong to {scheme!r}: give `B`, `W` and `lam`; got s={s}")
    if B is None or W is None or lam is None:
        raise ValueError(f"{scheme!r} needs `B`, `W` and `lam`, got B={B}, W={W}, lam={lam}")
    return (SelectiveRepeatSchedule if scheme == "sr_sgc" else MultiplexedSchedule)(n, B, W, lam, jobs)


def normalized_load(
    scheme: Scheme,
    n: int,
    *,
    s: int | None = None,
    B: int | None = None,
    W: int | None = None,
    lam: int | None = None,
) -> float:
    """Share of one batch that a worker computes in a round (L in the paper); uncoded it is ``1 / n``.

    Args:
        scheme: ``"gc"``, ``"sr_sgc"`` or ``"m_sgc"``.
        n: workers.
        s: late workers in a round, for ``"gc"``.
        B: rounds of a burst, for the other two.
        W: rounds of a window.
        lam: different late workers in a window.

    Raises:
        ValueError: as in :func:`make_schedule`.

    Example:
        >>> round(normalized_load("m_sgc", 256, B=1, W=2, lam=27), 6)
        0.007543
    """
    return make_schedule(scheme, n, s=s, B=B, W=W, lam=lam).load


def delay(
    scheme: Scheme,
    n: int,
    *,
    s: int | None = None,
    B: int | None = None,
    W: int | None = None,
    lam: int | None = None,
) -> int:
    """Rounds from the start of a job until it must be whole (T in the paper).

    Arguments and errors are those of :func:`normalized_load`.

    Example:
        >>> delay("m_sgc", 8, B=2, W=3, lam=2)
        3
    """
    return make_schedule(scheme, n, s=s, B=B, W=W, lam=lam).delay


def lower_bound(n: int, B: int, W: int, lam: int) -> float:
    """The least load of any scheme that bears ``lam`` workers with bursts of ``B`` late rounds in ``W - 1 + B``.

    Args:
        n: workers.
        B: rounds of a burst.
        W: rounds of a window, above ``B``.
        lam: different late workers in a window, at most ``n``.

    Raises:
        ValueError: an argument is out of range.
    """
    check_window(n, B, W, lam)
    return (W - 1 + B) / (n * (W - 1) + B * (n - lam))
