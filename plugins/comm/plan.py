"""Which method suits a link, before anything is rented: the command ``fulgurite-plan``.

It asks the simulation of Streaming DiLoCo (arXiv 2501.18512) with the bits that our strategies send, per parameter and
exchange, from one of W workers:

    DDP, DiLoCo, Streaming DiLoCo   2 (W-1)/W * bits    ring all-reduce, bits = 32 unless told
    4 bit                           (W-1) * 4.0625      all-gather; a block of 128 values shares a scale of 8 bits

so from 16 workers on the all-gather of 4 bits sends more than the ring of 32.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from fulgurite.plugins.comm.simulate import Method, Setting, compute_utilization, required_bandwidth
from fulgurite.plugins.output import print_out

LEVELS = (0.5, 0.9, 0.95)  # the utilisations that the table gives a bandwidth for
SYNC_EVERY = (30, 50, 100, 200, 500)  # H, from close to DDP to cheap
OVERLAP_STEPS = (range(6), range(6, 11))  # the paper advises at most 5, and still trains well with 10
E3M0_BITS = 4 + 8 / 128
_GRID = np.logspace(-6, 4, 241)  # Gbit/s, a factor of 1.10 apart
_DEFAULT_BLOCKS = 3
_COLORS = ("#000000", "#0072b2", "#009e73", "#e69f00", "#d55e00")  # Okabe and Ito: distinct to the colour-blind too


@dataclass(frozen=True)
class Job:
    """A model, its workers and the link between them.

    Args:
        params: parameters of the model.
        layers: equal layers they are spread over.
        step_seconds: seconds an optimizer step of one worker takes without communication.
        bandwidth_gbps: speed of each worker's link in Gbit/s each way.
        workers: workers (groups of devices) that the link connects, at least 2.
        latency: seconds that each layer's exchange occupies the link beyond its payload.
        sync_every: optimizer steps between two exchanges of the same parameter, for all but DDP.
        blocks_per_fragment: layers a fragment of Streaming DiLoCo holds.
        overlap_steps: steps that hide an exchange, in the rows with overlap.
        bits: bits of a value that is not quantised, 32 or 16.

    Raises:
        ValueError: the bandwidth, ``workers`` or ``bits`` is out of its range; :func:`plan` checks the others.
    """

    params: float
    layers: int
    step_seconds: float
    bandwidth_gbps: float
    workers: int = 2
    latency: float = 0.0
    sync_every: int = 100
    blocks_per_fragment: int = _DEFAULT_BLOCKS
    overlap_steps: int = 1
    bits: int = 32

    def __post_init__(self) -> None:
        if not 0 < self.bandwidth_gbps < math.inf:
            raise ValueError(
                f"`bandwidth_gbps` is the speed of the link and must be positive, got {self.bandwidth_gbps}"
            )
        if self.workers < 2:
            raise ValueError(f"`workers` must be at least 2, got {self.workers}: one alone has nobody to exchange with")
        if self.bits not in (16, 32):
            raise ValueError(f"`bits` is the size of a value on the wire and must be 16 or 32, got {self.bits}")


@dataclass(frozen=True)
class Row:
    """What one method costs on the link.

    Args:
        name: the method.
        utilization: share of the time in which a worker computes, 0 to 1.
        required_gbps: bandwidth in Gbit/s for each of ``LEVELS``, ``inf`` above the 10 000 that are tried.
        bytes_per_step: bytes a worker sends, averaged over steps.
        peak_bytes: bytes a worker sends in its largest exchange.
    """

    name: str
    utilization: float
    required_gbps: tuple[float, ...]
    bytes_per_step: float
    peak_bytes: float


@dataclass(frozen=True)
class Recommendation:
    """What to run.

    Args:
        method: the first row of the plan, so the one closest to DDP, that reaches ``target``; None if no row does.
        sync_every: for ``StreamingDiLoCoStrategy`` with 4 bits.
        overlap_steps: the same.
        blocks_per_fragment: the same.
        utilization: what these three reach on the link.
        target: the utilisation that was asked for.
    """

    method: str | None
    sync_every: int
    overlap_steps: int
    blocks_per_fragment: int
    utilization: float
    target: float

    @property
    def trainer(self) -> str:
        """The line to paste."""
        blocks = self.blocks_per_fragment
        extra = "" if blocks == _DEFAULT_BLOCKS else f", blocks_per_fragment={blocks}"
        return (
            f"Trainer(strategy=StreamingDiLoCoStrategy(sync_every={self.sync_every}, "
            f"overlap_steps={self.overlap_steps}{extra}))"
        )


def plan(job: Job) -> list[Row]:
    """Compares DDP, DiLoCo, Streaming DiLoCo, and the latter with overlap and with 4 bits as well.

    Args:
        job: the model, its workers and their link.

    Returns:
        One row a method, each a step further from DDP than the last.

    Raises:
        ValueError: a number of the job is out of its range.

    Example:
        >>> for row in plan(Job(params=1e9, layers=24, step_seconds=0.1, bandwidth_gbps=2)):
        ...     print(f"{row.name:27} {row.utilization:4.0%} {row.bytes_per_step:.1e}")
        DDP                           1% 4.0e+09
        DiLoCo                       39% 4.0e+07
        Streaming DiLoCo             39% 4.0e+07
        Streaming + overlap          40% 4.0e+07
        Streaming + overlap + 4 bit  93% 5.1e+06
    """
    return [_row(job, name, setting) for name, setting in _settings(job).items()]


def recommend(job: Job, target: float = 0.95) -> Recommendation:
    """Picks the method closest to DDP that keeps workers busy, and the mildest setting of Streaming DiLoCo that does.

    The loss grows with ``sync_every`` and hardly with ``overlap_steps`` up to 5. So the setting found has the smallest
    ``sync_every`` of ``SYNC_EVERY``, and with it the smallest ``overlap_steps``; 6 to 10 are tried only where no
    ``sync_every`` does with 5. Where none does at all, it is the one that comes closest.

    Args:
        job: the model, its workers and their link; its own ``sync_every`` and ``overlap_steps`` count for ``method``.
        target: utilisation to reach, above 0 and at most 1.

    Returns:
        The recommendation; its ``utilization`` is below ``target`` where no setting reaches that.

    Raises:
        ValueError: ``target`` or a number of the job is out of its range.

    Example:
        >>> recommend(Job(params=1e9, layers=24, step_seconds=0.1, bandwidth_gbps=2)).trainer
        'Trainer(strategy=StreamingDiLoCoStrategy(sync_every=30, overlap_steps=2))'
    """
    if not 0 < target <= 1:
        raise ValueError(f"`target` is a utilisation above 0 and at most 1, got {target}")
    busy = {name: compute_utilization(job.bandwidth_gbps, **setting) for name, setting in _settings(job).items()}
    method = next((name for name, utilization in busy.items() if utilization >= target), None)
    tried = []
    for sync_every, overlap_steps in _mildest_first():
        setting = _setting(job, "streaming", _gather_bits(job), sync_every, overlap_steps)
        utilization = compute_utilization(job.bandwidth_gbps, **setting)
        tried.append(Recommendation(method, sync_every, overlap_steps, job.blocks_per_fragment, utilization, target))
        if utilization >= target:
            return tried[-1]
    return max(tried, key=lambda advice: advice.utilization)


def write_figure(job: Job, path: Path) -> None:
    """Draws utilisation against bandwidth for each method of :func:`plan`.

    Args:
        job: the model, its workers and their link, which a vertical line marks.
        path: file to write; its ending chooses the format.

    Raises:
        ImportError: without matplotlib.
        ValueError: for an ending that matplotlib does not know.
    """
    try:
        from matplotlib.figure import Figure  # not pyplot: needs no display and leaves the caller's backend alone
    except ImportError as error:
        raise ImportError("`--figure` needs matplotlib: pip install fulgurite[figures]") from error
    settings = _settings(job)
    bandwidths = _interesting(job, list(settings.values()))
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for (name, setting), color in zip(settings.items(), _COLORS, strict=True):
        busy = [100 * compute_utilization(float(gbps), **setting) for gbps in bandwidths]
        axes.semilogx(bandwidths, busy, color=color, linewidth=2, label=name)
    axes.axvline(job.bandwidth_gbps, color="0.4", linewidth=1, linestyle="--", label="this link")
    axes.set(xlabel="bandwidth of the link (Gbit/s)", ylabel="compute utilisation (%)", ylim=(0, 102))
    axes.set_xlim(bandwidths[0], bandwidths[-1])
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs ``fulgurite-plan``.

    Args:
        argv: its arguments; those of the process if None.
    """
    parser = _parser()
    flags = vars(parser.parse_args(argv))
    if flags["blocks_per_fragment"] == _DEFAULT_BLOCKS:  # the default shall not refuse a small model
        flags["blocks_per_fragment"] = max(1, min(_DEFAULT_BLOCKS, flags["layers"]))
    figure, as_json, target = flags.pop("figure"), flags.pop("json"), flags.pop("target")
    try:
        job = Job(**flags)
        rows, advice = plan(job), recommend(job, target)
        if figure is not None:
            write_figure(job, figure)
    except (ValueError, ImportError, OSError) as error:
        parser.error(str(error))
    print_out(_as_json(job, rows, advice) if as_json else f"{_table(rows)}\n\n{_prose(job, advice)}")


def _gather_bits(job: Job) -> float:
    return (job.workers - 1) * E3M0_BITS


def _setting(job: Job, method: Method, bits: float, sync_every: int, overlap_steps: int = 0) -> Setting:
    return {
        "method": method,
        "params": job.params,
        "layers": job.layers,
        "step_seconds": job.step_seconds,
        "sync_every": sync_every,
        "blocks_per_fragment": job.blocks_per_fragment,
        "overlap_steps": overlap_steps,
        "bits_per_param": bits,
        "latency": job.latency,
    }


def _settings(job: Job) -> dict[str, Setting]:
    ring, sync_every = 2 * (job.workers - 1) / job.workers * job.bits, job.sync_every
    return {
        "DDP": _setting(job, "ddp", ring, sync_every),
        "DiLoCo": _setting(job, "diloco", ring, sync_every),
        "Streaming DiLoCo": _setting(job, "streaming", ring, sync_every),
        "Streaming + overlap": _setting(job, "streaming", ring, sync_every, job.overlap_steps),
        "Streaming + overlap + 4 bit": _setting(job, "streaming", _gather_bits(job), sync_every, job.overlap_steps),
    }


def _row(job: Job, name: str, setting: Setting) -> Row:
    utilization = compute_utilization(job.bandwidth_gbps, **setting)  # first: it checks every number
    sent = job.params * setting["bits_per_param"] / 8
    fragments = job.layers // job.blocks_per_fragment if setting["method"] == "streaming" else 1
    return Row(
        name=name,
        utilization=utilization,
        required_gbps=tuple(required_bandwidth(LEVELS, grid=_GRID, **setting)),
        bytes_per_step=sent if setting["method"] == "ddp" else sent / job.sync_every,
        peak_bytes=sent * math.ceil(job.layers / fragments) / job.layers,
    )


def _mildest_first() -> list[tuple[int, int]]:
    return [(sync, overlap) for overlaps in OVERLAP_STEPS for sync in SYNC_EVERY for overlap in overlaps]


def _interesting(job: Job, settings: list[Setting]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Bandwidths from where the first method wakes up to where the last is busy."""
    ends = [gbps for s in settings for gbps in required_bandwidth((0.05, 0.95), grid=_GRID, **s) if gbps < math.inf]
    ends.append(job.bandwidth_gbps)
    return np.geomspace(min(ends) / 2, max(ends) * 2, 100)


def _table(rows: list[Row]) -> str:
    head = ["method", "utilisation", *(f"{level:.0%} from" for level in LEVELS), "sent a step", "peak message"]
    cells = [head]
    for row in rows:
        sent = [_amount(count, "B") for count in (row.bytes_per_step, row.peak_bytes)]
        cells.append([row.name, _percent(row.utilization), *map(_speed, row.required_gbps), *sent])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for name, *numbers in cells:
        aligned = (number.rjust(width) for number, width in zip(numbers, widths[1:], strict=True))
        lines.append("  ".join([name.ljust(widths[0]), *aligned]))
    return "\n".join(lines)


def _prose(job: Job, advice: Recommendation) -> str:
    goal = f"{100 * advice.target:g}% utilisation at {_amount(1e9 * job.bandwidth_gbps, 'bit/s')}"
    if advice.method == "DDP":
        return f'DDP reaches {goal}: stay with it.\n\n    Trainer(strategy="ddp")'
    if advice.method is not None:
        simplest = f"Closest to DDP among those that reach {goal}: {advice.method}."
    else:
        simplest = f"As set above, none reaches {goal}."
    reached = f"{_percent(advice.utilization)} with 4 bits"
    if advice.utilization >= advice.target:
        setting = f"The mildest setting of Streaming DiLoCo that does ({reached}):"
    else:
        setting = f"No setting of Streaming DiLoCo does; the best is ({reached}):"
    return f"{simplest}\n{setting}\n\n    {advice.trainer}"


def _percent(share: float) -> str:
    return f"{math.floor(1000 * share + 1e-9) / 10:.1f}%"  # rounds down: 94.96 must not read as 95.0


def _speed(gbps: float) -> str:
    return _amount(float(f"{1e9 * gbps:.2g}"), "bit/s") if gbps < math.inf else "> 10 Tbit/s"  # the grid has two digits


def _amount(count: float, unit: str) -> str:
    prefixes = ("", "k", "M", "G", "T", "P")
    power = min(max(0, math.floor(math.log10(count) / 3)), len(prefixes) - 1)
    return f"{count / 1000**power:.3g} {prefixes[power]}{unit}"


def _as_json(job: Job, rows: list[Row], advice: Recommendation) -> str:
    def plain(row: Row) -> dict[str, Any]:
        needed = {
            f"{level:g}": gbps if gbps < math.inf else None  # JSON knows no infinity
            for level, gbps in zip(LEVELS, row.required_gbps, strict=True)
        }
        return asdict(row) | {"required_gbps": needed}

    content = {
        "job": asdict(job),
        "rows": [plain(row) for row in rows],
        "recommendation": asdict(advice) | {"trainer": advice.trainer},
    }
    return json.dumps(content, indent=2, allow_nan=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fulgurite-plan",
        description="Which training method suits the link between your workers, by simulation (arXiv 2501.18512).",
        epilog="One of W workers sends, per parameter and exchange: 2 (W-1)/W times --bits in a ring all-reduce (DDP, "
        "DiLoCo, Streaming DiLoCo), or 4.0625 (W-1) bits in an all-gather (4 bit), which from 16 workers on is more.",
    )
    add = parser.add_argument
    add("--params", type=float, required=True, metavar="N", help="parameters of the model, as 1e9")
    add("--layers", type=int, required=True, metavar="L", help="layers they are spread over")
    add("--step-seconds", type=float, required=True, metavar="T", help="time of an optimizer step of one worker alone")
    add("--bandwidth-gbps", type=float, required=True, metavar="G", help="speed of each worker's link, each way")
    add("--workers", type=int, metavar="W", help="workers (groups of devices) that the link connects [%(default)s]")
    add("--latency-s", dest="latency", type=float, metavar="S", help="added to each layer's exchange [%(default)s]")
    add("--sync-every", type=int, metavar="H", help="steps between two exchanges of a parameter [%(default)s]")
    add("--blocks-per-fragment", type=int, metavar="B", help="layers exchanged at a time [%(default)s]")
    add("--overlap-steps", type=int, metavar="TAU", help="steps that hide an exchange [%(default)s]")
    add("--bits", type=int, metavar="BITS", help="of a value that is not quantised, 32 or 16 [%(default)s]")
    add("--target", type=float, default=0.95, metavar="U", help="utilisation to recommend for [%(default)s]")
    add("--figure", type=Path, metavar="PATH", help="draw utilisation against bandwidth (needs matplotlib)")
    add("--json", action="store_true", help="print JSON; a bandwidth that is out of reach is null")
    parser.set_defaults(**{field.name: field.default for field in fields(Job) if field.default is not MISSING})
    return parser


if __name__ == "__main__":
    main()
