"""Whether weights obey Dale's law, and whether their magnitudes are log-normal."""

import math
from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor
from torch.nn.functional import pad
from typing_extensions import override

from fulgurite.callbacks.figures import log_figure
from fulgurite.callbacks.logs import log_now

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BLOCK = 2**20  # weights looked at together; a multiple of 8
_BINS, _LOWEST, _HIGHEST = 64, math.log(1e-5), math.log(1e1)  # of the histogram of log|w|; the ends take the rest


class _Statistics(NamedTuple):
    flips: float
    zero_fraction: float
    mean: float
    std: float
    skew: float
    histogram: Tensor


class DaleLaw(Callback):
    """Logs how many weights changed their sign, and moments of ``log|w|`` (arXiv 2510.02730).

    The weights are the module's parameters with two or more dimensions, trained or frozen, of any optimizer. Logged are
    ``dale/sign_flips``, how many have another sign than when the fit began (0 and what is not finite have none);
    ``dale/zero_fraction``; and of ``log|w|`` over all weights that are neither 0 nor infinite ``dale/log_abs_mean``,
    ``dale/log_abs_std`` and ``dale/log_abs_skew``, which is 0 for log-normal weights and nan for equal ones.

    Signs are kept in one bit a weight, and in checkpoints, so that a resumed fit counts from the same beginning.
    Sharded weights stay where they are: sums are reduced, and bits are gathered for a checkpoint. Replicas are equal
    and count once. The fit stays as it was, bit for bit.

    Args:
        every_n_steps: optimizer steps between two looks, at least 1, each of which is logged, whatever the Trainer's
            ``log_every_n_steps``; a look passes twice over the weights.
        figures: log ``dale/log_abs`` at the end of each training epoch, a histogram of ``log|w|`` then and at first;
            needs matplotlib.

    Raises:
        ValueError: for ``every_n_steps`` below 1.
        ModuleNotFoundError: for ``figures`` without matplotlib.
        MisconfigurationException: when the fit begins, for a module without such weights.
    """

    def __init__(self, every_n_steps: int = 50, figures: bool = False) -> None:
        if every_n_steps < 1:
            raise ValueError(f"`every_n_steps` counts optimizer steps and must be at least 1, got {every_n_steps}")
        if figures and find_spec("matplotlib") is None:
            raise ModuleNotFoundError("`figures` needs matplotlib: pip install 'fulgurite[figures]'")
        self.every_n_steps, self.figures = every_n_steps, figures
        self._weights: dict[str, Tensor] = {}
        self._signs: dict[str, Tensor] = {}  # packed, of this process's shards
        self._first: Tensor | None = None  # histogram
        self._loaded: dict[str, Any] = {}
        self._last_look = 0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._weights = {name: p for name, p in pl_module.named_parameters() if p.ndim >= 2}
        if not self._weights:
            raise MisconfigurationException(
                "`DaleLaw` looks at parameters of two or more dimensions, and the module has none; FSDPStrategy hides"
                " them in flat ones: use ModelParallelStrategy"
            )
        kept = self._loaded.get("signs", {})
        self._signs = {name: _signs_of(p, kept.get(name)) for name, p in self._weights.items()}
        self._first, self._loaded, self._last_look = self._loaded.get("histogram"), {}, trainer.global_step
        if self.figures and self._first is None:
            self._first = self._look().histogram

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step  # stays while batches accumulate
        if step == self._last_look or step % self.every_n_steps:
            return
        self._last_look = step
        found = self._look()
        moments = {"log_abs_mean": found.mean, "log_abs_std": found.std, "log_abs_skew": found.skew}
        scalars = {"sign_flips": found.flips, "zero_fraction": found.zero_fraction} | moments
        log_now(trainer, {f"dale/{name}": value for name, value in scalars.items()})

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.figures and self._first is not None:
            found = self._look()
            if trainer.is_global_zero:
                log_figure(trainer, "dale/log_abs", _draw(self._first, found))

    @override
    def state_dict(self) -> dict[str, Any]:
        signs = {name: _gathered(self._weights[name], bits).cpu() for name, bits in self._signs.items()}
        return {"signs": signs, "histogram": self._first}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict

    @torch.no_grad()
    def _look(self) -> _Statistics:
        firsts, seconds = [], []
        for name, p in self._weights.items():
            firsts += [(p, _counts(w, negative)) for w, negative in _blocks(p, self._signs[name])]
        size, zeros, flips, count, total, *histogram = _reduced(firsts)
        mean = total / count if count else math.nan
        for name, p in self._weights.items():
            seconds += [(p, _central_sums(w, mean)) for w, _ in _blocks(p, self._signs[name])]
        squares, cubes = _reduced(seconds)
        std = math.sqrt(squares / count) if count else math.nan
        skew = cubes / count / std**3 if std > 1e-6 else math.nan
        return _Statistics(flips, zeros / size, mean, std, skew, torch.tensor(histogram))


def _logs(w: Tensor) -> Tensor:
    return w[(w != 0) & w.isfinite()].abs().double().log_()


def _counts(w: Tensor, negative: Tensor) -> Tensor:
    """Of weights, their zeros, their flips, their logarithms and the sum of these; then the histogram."""
    signed = (w != 0) & w.isfinite()
    logs = _logs(w)
    bins = ((logs - _LOWEST) * (_BINS / (_HIGHEST - _LOWEST))).long().clamp_(0, _BINS - 1)
    flips = (signed & ((w < 0) != negative)).sum()
    counts = torch.stack([(w == 0).sum(), flips, signed.sum()])
    head = [logs.new_tensor([w.numel()]), counts.double(), logs.sum().view(1)]
    return torch.cat([*head, torch.bincount(bins, minlength=_BINS).double()])


def _central_sums(w: Tensor, mean: float) -> Tensor:
    deviations = _logs(w) - mean
    squares = deviations.square()
    return torch.stack([squares.sum(), (squares * deviations).sum()])


def _blocks(p: Tensor, bits: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Of this process's shard some weights, and whether each was negative at first."""
    flat = _local(p).reshape(-1)
    for start in range(0, max(1, len(flat)), _BLOCK):  # one at least: an empty shard has its part in the sums
        w = flat[start : start + _BLOCK]
        yield w, _unpack(bits[start // 8 : (start + _BLOCK) // 8], len(w))


def _reduced(parts: list[tuple[Tensor, Tensor]]) -> list[float]:
    """The sum over parts and, where their parameter is sharded, over its shards; never over replicas."""
    sums: dict[Any, Tensor] = {}
    for p, part in parts:
        key = (p.device_mesh, tuple(at.is_shard() for at in p.placements)) if isinstance(p, DTensor) else None
        part = part if isinstance(p, DTensor) else part.cpu()
        sums[key] = sums[key] + part if key in sums else part
    for key, part in sums.items():
        if key is not None:
            mesh, sharded = key
            placements = [Partial() if shard else Replicate() for shard in sharded]
            sums[key] = DTensor.from_local(part, mesh, placements).full_tensor().cpu()
    return [float(value) for value in torch.stack(list(sums.values())).sum(0)]


# ---- signs in bits ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def _signs_of(p: Tensor, kept: Tensor | None) -> Tensor:
    """The packed signs of this process's shard: those of a checkpoint where they are of this weight, else today's."""
    flat = _local(p).reshape(-1)
    if kept is None or 8 * len(kept) - p.numel() not in range(8):
        return torch.cat([_pack(part < 0) for part in torch.split(flat, _BLOCK)])
    kept = kept.to(flat.device)
    if isinstance(p, DTensor):
        whole = _unpack(kept, p.numel()).view(p.shape).to(torch.uint8)
        return _pack(distribute_tensor(whole, p.device_mesh, p.placements).to_local().reshape(-1) > 0)
    return kept


@torch.no_grad()
def _gathered(p: Tensor, bits: Tensor) -> Tensor:
    """The packed signs of the whole parameter."""
    if not isinstance(p, DTensor):
        return bits
    local = _local(p)
    flags = _unpack(bits, local.numel()).view(local.shape).to(torch.uint8)
    whole = DTensor.from_local(flags, p.device_mesh, p.placements, shape=p.shape, stride=p.stride()).full_tensor()
    return _pack(whole.reshape(-1) > 0)


def _pack(flags: Tensor) -> Tensor:
    """``(n,)`` truth values to ``(ceil(n / 8),)`` bytes."""
    octets = pad(flags.to(torch.uint8), (0, -len(flags) % 8)).view(-1, 8)
    return (octets << torch.arange(8, dtype=torch.uint8, device=flags.device)).sum(1, dtype=torch.uint8)


def _unpack(octets: Tensor, count: int) -> Tensor:
    flags = (octets[:, None] >> torch.arange(8, dtype=torch.uint8, device=octets.device)) & 1
    return flags.view(-1)[:count].bool()


def _local(p: Tensor) -> Tensor:
    return (p.to_local() if isinstance(p, DTensor) else p).detach()


# ---- a figure --------------------------------------------------------------------------------------------------------


def _draw(first: Tensor, now: _Statistics) -> "Figure":
    """Both histograms as shares of the weights a bin, and the normal density of the present moments."""
    from matplotlib.figure import Figure

    width = (_HIGHEST - _LOWEST) / _BINS
    edges = [_LOWEST + width * k for k in range(_BINS + 1)]
    figure = Figure(figsize=(5.5, 3.2), dpi=160, layout="constrained")
    axes = figure.subplots()
    axes.stairs((first / first.sum()).tolist(), edges, color="#6b7280", label="at first")
    axes.stairs(
        (now.histogram / now.histogram.sum()).tolist(), edges, color="#ea580c", fill=True, alpha=0.5, label="now"
    )
    if now.std > 0:
        density = [math.exp(-(((x - now.mean) / now.std) ** 2) / 2) for x in edges]
        scale = width / now.std / math.sqrt(2 * math.pi)
        axes.plot(edges, [scale * value for value in density], color="black", linewidth=1, label="log-normal")
    decades = range(-5, 2)
    axes.set_xticks([math.log(10.0**k) for k in decades], [f"$10^{{{k}}}$" for k in decades])
    axes.set(xlabel="|w|", ylabel="share of the weights", xlim=(_LOWEST, _HIGHEST), ylim=(0, None))
    title = f"{now.flips:,.0f} weights changed their sign; skewness of log|w| {now.skew:.2f}"
    axes.set_title(title, fontsize="medium", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left")
    return figure
