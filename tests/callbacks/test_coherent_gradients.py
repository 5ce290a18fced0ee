from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from fulgurite.callbacks import CoherentGradients, GradientCoherence
from fulgurite.plugins.metrics import m_coherence
from fulgurite.plugins.optim.coherent_gradients import winsorized_mean
from tests.callbacks.test_gradient_coherence import Manual, Net, by_hand
from tests.suites.fits import assert_same, fit


class Taken(Callback):
    """What the optimizer gets."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        grads = {name: p.grad.flatten() for name, p in pl_module.named_parameters()}
        torch.save(grads, self.folder / f"{trainer.global_step}_{trainer.global_rank}.pt")


def taken(folder: Path, module: Net, *callbacks: Any, **options: Any) -> list[dict[str, Tensor]]:
    """Of each optimizer step."""
    folder.mkdir(exist_ok=True)
    options = {"strategy": "auto", "devices": 1, "max_steps": 3, **options}
    fit(folder, module, callbacks=[*callbacks, Taken(folder)], **options)
    files = sorted(folder.glob("*_0.pt"), key=lambda path: int(path.stem.split("_")[0]))
    return [torch.load(file) for file in files]


def rates(module: Net) -> Net:
    """Without a change of the weights."""
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)  # type: ignore[method-assign]
    return module


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_winsorizes_over_examples(reduction: str, tmp_path: Path) -> None:
    found = taken(tmp_path, Net(reduction=reduction), CoherentGradients("winsorize", c=0.25))[0]
    scale = 8 if reduction == "sum" else 1
    expected = {name: scale * winsorized_mean(rows, 0.25) for name, rows in by_hand(Net(), list(range(8))).items()}
    assert_same(found, expected, tolerance=1e-10)


def test_what_is_excluded_keeps_its_mean(tmp_path: Path) -> None:
    found = taken(tmp_path, Net(), CoherentGradients("winsorize", c=0.25, exclude="*.bias"))[0]
    grads = by_hand(Net(), list(range(8)))
    expected = {n: rows.mean(0) if n.endswith("bias") else winsorized_mean(rows, 0.25) for n, rows in grads.items()}
    assert_same(found, expected, tolerance=1e-10)


def test_winsorize_of_nothing_is_the_mean(tmp_path: Path) -> None:
    ends = [Net(), Net()]
    fit(tmp_path, ends[0], "auto", devices=1, max_steps=6)
    fit(tmp_path, ends[1], "auto", devices=1, max_steps=6, callbacks=[CoherentGradients("winsorize", c=0.0)])
    assert_same(ends[1].state_dict(), ends[0].state_dict(), tolerance=1e-12)


@pytest.mark.parametrize("accumulate", [3, 6])
def test_m3_over_micro_batches(accumulate: int, tmp_path: Path) -> None:
    size = 12 // accumulate
    found = taken(tmp_path, Net(batch_size=size), CoherentGradients("m3"), accumulate_grad_batches=accumulate)[0]
    rows = by_hand(Net(), list(range(12)))
    expected = {name: torch.stack([part.mean(0) for part in r.split(4)]).median(0).values for name, r in rows.items()}
    assert_same(found, expected, tolerance=1e-10)


def test_m3_of_equal_thirds_is_the_mean(tmp_path: Path) -> None:
    class Same(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step([self.first[0], self.first[1]], batch_idx)

        def on_train_start(self) -> None:
            self.first = next(iter(self.train_dataloader()))

    found = taken(tmp_path, Same(), CoherentGradients("m3"), accumulate_grad_batches=3)[0]
    assert_same(found, {n: rows.mean(0) for n, rows in by_hand(Net(), list(range(8))).items()}, tolerance=1e-10)


@pytest.mark.parametrize("exclude", [[], ["net.2.*"]], ids=str)
def test_m3_over_ranks(exclude: list[str], tmp_path: Path) -> None:
    callback = CoherentGradients("m3", exclude=exclude)
    options: dict[str, Any] = {"strategy": "ddp_fork", "devices": 3, "max_steps": 1}
    found = taken(tmp_path, Net(batch_size=4), callback, **options)[0]
    parts = [by_hand(Net(), list(range(rank, 12, 3))) for rank in range(3)]
    expected = {}
    for name in parts[0]:
        means = torch.stack([part[name].mean(0) for part in parts])
        expected[name] = means.mean(0) if exclude and name.startswith("net.2") else means.median(0).values
    assert_same(found, expected, tolerance=1e-10)


def test_m3_over_micro_batches_of_two_ranks(tmp_path: Path) -> None:
    options: dict[str, Any] = {"strategy": "ddp_fork", "devices": 2, "max_steps": 1, "accumulate_grad_batches": 3}
    found = taken(tmp_path, Net(batch_size=2), CoherentGradients("m3"), **options)[0]
    rows = by_hand(Net(), list(range(12)))
    expected = {name: torch.stack([part.mean(0) for part in r.split(4)]).median(0).values for name, r in rows.items()}
    assert_same(found, expected, tolerance=1e-10)


def test_rm3_is_the_median_with_the_two_steps_before(tmp_path: Path) -> None:
    found = taken(tmp_path, rates(Net()), CoherentGradients("rm3"), max_steps=4)
    raw = [{n: r.mean(0) for n, r in by_hand(Net(), list(range(i, i + 8))).items()} for i in (0, 8, 16, 0)]
    assert_same(found[0], raw[0], tolerance=1e-10)
    assert_same(found[1], raw[1], tolerance=1e-10)
    for step in (2, 3):
        expected = {n: torch.stack([raw[step - k][n] for k in range(3)]).median(0).values for n in raw[0]}
        assert_same(found[step], expected, tolerance=1e-10)


def test_rm3_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole, second = Net(), Net()
    fit(tmp_path, whole, "auto", devices=1, max_steps=9, callbacks=[CoherentGradients("rm3")])
    saves = ModelCheckpoint(tmp_path / "kept", filename="three", every_n_train_steps=3)
    fit(tmp_path, Net(), "auto", devices=1, max_steps=3, callbacks=[CoherentGradients("rm3"), saves])
    path = tmp_path / "kept" / "three.ckpt"
    fit(tmp_path, second, "auto", devices=1, max_steps=9, ckpt_path=path, callbacks=[CoherentGradients("rm3")])
    assert_same(second.state_dict(), whole.state_dict())


def test_coherence_is_of_the_gradients_before(tmp_path: Path) -> None:
    watch = GradientCoherence(figure=False)
    taken(tmp_path, Net(), watch, CoherentGradients("winsorize", c=0.25))
    whole = torch.cat(list(by_hand(Net(), list(range(8))).values()), 1)
    assert watch.history[0]["alpha_m"] == pytest.approx(float(m_coherence(whole)))


def test_a_second_fit_begins_afresh(tmp_path: Path) -> None:
    used, ends = CoherentGradients("rm3"), [Net(), Net()]
    fit(tmp_path, Net(seed=5), "auto", devices=1, max_steps=4, callbacks=[used])
    fit(tmp_path, ends[0], "auto", devices=1, max_steps=4, callbacks=[used])
    fit(tmp_path, ends[1], "auto", devices=1, max_steps=4, callbacks=[CoherentGradients("rm3")])
    assert_same(ends[0].state_dict(), ends[1].state_dict())


class ByLBFGS(Net):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters())


@pytest.mark.parametrize(
    ("module", "callback", "options", "message"),
    [
        (Net, ("winsorize",), {"accumulate_grad_batches": 2}, r"accumulate_grad_batches=2 and 1 processes"),
        (Net, ("m3",), {"accumulate_grad_batches": 2}, r"accumulate_grad_batches=2 and 1 processes: make one of them"),
        (Manual, ("rm3",), {}, "use automatic optimization"),
        (Net, ("rm3", 0.1, "nope"), {}, r"`exclude`: no trainable parameter matches 'nope'; there are net.0.weight"),
        (Net, ("rm3", 0.1, "*"), {}, r"`exclude` \['\*'\] leaves no parameter"),
        (ByLBFGS, ("winsorize",), {}, "LBFGS makes several"),
    ],
)
def test_refuses_a_fit(module: Any, callback: Any, options: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises((MisconfigurationException, ValueError, RuntimeError), match=message):
        taken(tmp_path, module(), CoherentGradients(*callback), **options)


def test_refuses_gradients_that_are_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fulgurite.callbacks.coherent_gradients._MAX_BYTES", 1000)
    with pytest.raises(RuntimeError, match=r"gradients of 8 examples for `net.0.weight` take 0 MiB: add it"):
        taken(tmp_path, Net(), CoherentGradients("winsorize"))


@pytest.mark.parametrize(("rule", "c", "message"), [("m4", 0.1, "`rule` .*'m4'"), ("winsorize", 0.5, r"`c` .*got 0.5")])
def test_refuses_arguments(rule: Any, c: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CoherentGradients(rule, c)
