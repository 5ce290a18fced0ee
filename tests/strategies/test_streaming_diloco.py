"""Streaming DiLoCo against what it must equal: DDP, local SGD, solo runs, and a loop in plain torch."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.multiprocessing.spawn import ProcessRaisedException
from torch.utils.data import DataLoader

from fulgurite.plugins.comm import dequantize_e3m0, partition_parameters, quantize_e3m0
from fulgurite.strategies import StreamingDiLoCoStrategy
from tests.suites.fits import BATCH, OwnData, assert_refused, assert_same, fit, make, streaming
from tests.suites.models import Manual, dataset, sgd

EXACT = {"quantize": "fp32", "outer_lr": 1.0, "outer_momentum": 0.0, "overlap_steps": 0}


# ---- identities ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_fragments", [1, 3])
def test_one_step_between_exchanges_is_ddp(tmp_path: Path, num_fragments: int) -> None:
    ddp = fit(tmp_path / "ddp", make(make_optimizer=sgd), "ddp_fork")
    strategy = streaming(sync_every=1, num_fragments=num_fragments, **EXACT)
    ours = fit(tmp_path / "ours", make(make_optimizer=sgd), strategy)
    assert_same(ours.read(1)["local"], ddp.read(1)["local"], tolerance=1e-6)


def test_outer_rate_one_without_momentum_is_local_sgd(tmp_path: Path) -> None:
    ours = fit(tmp_path / "ours", make(), streaming(sync_every=20, num_fragments=1, **EXACT))
    alone = [fit(tmp_path / str(worker), make(worker=worker), "auto", devices=1).read(0)["local"] for worker in (0, 1)]
    mean = {name: (alone[0][name] + alone[1][name]) / 2 for name in alone[0]}
    assert_same(ours.read(0)["local"], mean, tolerance=1e-6)


def test_alpha_one_leaves_each_worker_to_itself_while_the_shared_weights_move(tmp_path: Path) -> None:
    module = make()
    initial = {name: value.detach().clone() for name, value in module.named_parameters()}
    ours = fit(tmp_path / "ours", module, streaming(sync_every=5, overlap_steps=2, alpha=1.0))
    for worker in (0, 1):
        alone = fit(tmp_path / str(worker), make(worker=worker), "auto", devices=1)
        assert_same(ours.read(worker)["local"], alone.read(0)["local"])
    assert not torch.equal(ours.read(0)["outer"]["embed.weight"], initial["embed.weight"])


def test_twins_train_as_one_process(tmp_path: Path) -> None:
    ours = fit(tmp_path / "ours", make(twins=True), streaming(sync_every=4, num_fragments=2, **EXACT))
    alone = fit(tmp_path / "alone", make(twins=True), "auto", devices=1)
    assert_same(ours.read(1)["local"], alone.read(0)["local"], tolerance=1e-6)


# ---- against a loop in plain torch -----------------------------------------------------------------------------------


def reference(
    steps: int,
    sync_every: int,
    num_fragments: Any = "auto",
    overlap_steps: int | list[int] = 1,
    alpha: float = 0.5,
    quantize: str = "e3m0",
    outer_lr: float = 0.4,
    outer_momentum: float = 0.9,
) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """The algorithm as the paper writes it, two workers in one process: their weights and the shared ones."""
    modules = [make(worker=worker).double() for worker in (0, 1)]
    optimizers = [module.configure_optimizers() for module in modules]
    batches = [list(module.rows(worker)) for worker, module in enumerate(modules)]
    local = [dict(module.named_parameters()) for module in modules]
    overlaps = overlap_steps if isinstance(overlap_steps, list) else [overlap_steps] * 2
    fragments = partition_parameters(modules[0], num_fragments)
    outer = []  # of each fragment: the shared values, and the optimizer that moves them
    for names in fragments:
        values = [nn.Parameter(local[0][name].detach().clone()) for name in names]
        outer.append((values, torch.optim.SGD(values, outer_lr, outer_momentum, nesterov=outer_momentum > 0)))

    in_flight: list[tuple[int, int, Tensor]] = []
    for step in range(1, steps + 1):
        for module, optimizer, rows in zip(modules, optimizers, batches, strict=True):
            inputs, targets = (tensor.double() for tensor in rows[(step - 1) % len(rows)])
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(module(inputs), targets).backward()
            optimizer.step()
        for index, names in enumerate(fragments):
            if (step - index * sync_every // len(fragments)) % sync_every == 0:
                shared = torch.cat([value.detach().flatten() for value in outer[index][0]])
                mine = [torch.cat([weights[name].detach().flatten() for name in names]) for weights in local]
                deltas = [(shared - weights).float() for weights in mine]
                if quantize == "e3m0":
                    deltas = [dequantize_e3m0(*quantize_e3m0(delta), delta.numel()) for delta in deltas]
                in_flight.append((index, step, torch.stack(deltas).mean(0).double()))
        in_flight = [entry for entry in in_flight if step <= entry[1] + max(overlaps)]
        for index, sent_at, delta in in_flight:
            values, outer_optimizer = stepped = copy.deepcopy(outer[index])  # a preview, until it is due for all
            for value, part in zip(values, delta.split([value.numel() for value in values]), strict=True):
                value.grad = part.view_as(value)
            outer_optimizer.step()
            for weights, overlap in zip(local, overlaps, strict=True):
                if step == sent_at + overlap:
                    weight = alpha if overlap else 0.0
                    for name, value in zip(fragments[index], values, strict=True):
                        weights[name].data = weight * weights[name].data + (1 - weight) * value.data
            if step == sent_at + max(overlaps):
                outer[index] = stepped
    shared_now = {
        name: value.detach()
        for names, (values, _) in zip(fragments, outer, strict=True)
        for name, value in zip(names, values, strict=True)
    }
    return [{name: value.detach() for name, value in weights.items()} for weights in local], shared_now


@pytest.mark.parametrize(
    "options",
    [
        {"sync_every": 5, "num_fragments": 1, "overlap_steps": 0, "quantize": "fp32"},
        {"sync_every": 6, "num_fragments": 3, "overlap_steps": 1, "quantize": "fp32"},
        {"sync_every": 6, "num_fragments": 3, "overlap_steps": 4},
        {"sync_every": 6, "overlap_steps": 5, "outer_lr": 0.7, "outer_momentum": 0.5, "alpha": 0.2},
        {"sync_every": 3, "num_fragments": 5, "overlap_steps": 2},
        {"sync_every": 6, "num_fragments": 3, "overlap_steps": [0, 4]},
    ],
    ids=str,
)
def test_equals_a_loop_in_plain_torch(tmp_path: Path, options: dict[str, Any]) -> None:
    ours = fit(tmp_path / "ours", make(), streaming(**options), max_steps=31, precision="64-true")
    local, shared = reference(31, **options)
    for worker in (0, 1):
        assert_same(ours.read(worker)["local"], local[worker], tolerance=3e-7)  # outer gradients travel in float32
        assert_same(ours.read(worker)["outer"], shared, tolerance=3e-7)


def test_three_workers_scattering_agree_with_gathering(tmp_path: Path) -> None:
    gathered, scattered = (
        fit(tmp_path / name, make(), streaming(sync_every=6, overlap_steps=3, reduction=name), devices=3)
        for name in ("gather", "scatter")
    )
    for rank in range(1, 3):
        assert_same(scattered.read(rank)["outer"], scattered.read(0)["outer"])
    assert_same(scattered.read(0)["outer"], gathered.read(0)["outer"], tolerance=0.02)  # rounded once more, to bfloat16


def test_shared_weights_are_bit_equal_on_all_workers(tmp_path: Path) -> None:
    ours = fit(tmp_path / "ours", make(), streaming(sync_every=6, overlap_steps=2), devices=3)
    for rank in (1, 2):
        assert_same(ours.read(rank)["outer"], ours.read(0)["outer"])
        assert not torch.equal(ours.read(rank)["local"]["head.weight"], ours.read(0)["local"]["head.weight"])


@pytest.mark.parametrize("options", [{}, {"offload": True}, {"reduction": "scatter", "overlap_steps": 3}], ids=str)
def test_workers_of_two_devices_are_workers_of_twice_the_batch(tmp_path: Path, options: dict[str, Any]) -> None:
    class Halves(OwnData):
        def train_dataloader(self) -> DataLoader[Any]:  # a worker's two processes read every other row
            worker, place = divmod(self.trainer.global_rank, 2)
            rows = dataset(48 * BATCH, seed=worker)[place::2]
            return DataLoader(torch.utils.data.TensorDataset(*rows), batch_size=BATCH // 2)

    torch.manual_seed(7)
    strategy = streaming(sync_every=6, devices_per_worker=2, **options)
    halves = fit(tmp_path / "halves", Halves(make_optimizer=sgd), strategy, devices=4)
    whole = fit(tmp_path / "whole", make(make_optimizer=sgd), streaming(sync_every=6, **options))
    for first, second in ((0, 1), (2, 3)):
        assert_same(halves.read(first)["local"], halves.read(second)["local"])
    assert_same(halves.read(3)["outer"], whole.read(1)["outer"], tolerance=2e-3)  # 4-bit scales group other neighbours
    assert halves.read(0)["stats"]["diloco/outer_cosine" if not options.get("reduction") else "diloco/syncs"] != 0


# ---- what is shown and sent ------------------------------------------------------------------------------------------


def test_validation_on_the_shared_weights_changes_nothing(tmp_path: Path) -> None:
    seen: list[bool] = []

    class Looks(Callback):
        def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
            if not trainer.sanity_checking:
                shared = trainer.strategy.outer_state_dict()  # type: ignore[attr-defined]
                seen.append(all(torch.equal(value, shared[name]) for name, value in pl_module.named_parameters()))
                assert all(seen)

        def on_train_end(self, *args: Any) -> None:
            assert len(seen) >= 4

    options = {"sync_every": 6, "overlap_steps": 2}
    without = fit(tmp_path / "without", make(), streaming(**options))
    validated = {"limit_val_batches": 1, "val_check_interval": 5, "callbacks": [Looks()]}
    with_it = fit(tmp_path / "with", make(), streaming(**options), **validated)
    for rank in (0, 1):
        assert_same(with_it.read(rank)["local"], without.read(rank)["local"])
        assert_same(with_it.read(rank)["outer"], without.read(rank)["outer"])


def test_after_the_fit_the_module_holds_the_shared_weights(tmp_path: Path) -> None:
    module = make()
    ours = fit(tmp_path / "ours", module, streaming(sync_every=6))
    assert_same({name: value.detach() for name, value in module.named_parameters()}, ours.read(0)["outer"])


@pytest.mark.parametrize("devices", [2, 3])
def test_bytes_on_the_wire(tmp_path: Path, devices: int) -> None:
    module = make()
    ours = fit(tmp_path / "ours", module, streaming(sync_every=6, overlap_steps=1), devices=devices, max_steps=20)
    sizes = dict(module.named_parameters())
    expected, peak, syncs = 0, 0, 0
    fragments = partition_parameters(module)
    for index, names in enumerate(fragments):
        blocks = -(-sum(sizes[name].numel() for name in names) // 128)
        message = blocks * 64 + blocks
        received = sum((step - index * 6 // len(fragments)) % 6 == 0 for step in range(1, 20))  # the last step's flies
        expected, peak, syncs = expected + received * message, max(peak, message), syncs + received
    stats = ours.read(0)["stats"]
    assert stats["diloco/bytes_sent"] == stats["diloco/bytes_received"] == (devices - 1) * expected
    assert stats["diloco/peak_bytes"] == peak
    assert stats["diloco/syncs"] == syncs
    assert 0 <= stats["diloco/wait_seconds"] < 60
    assert -1 <= stats["diloco/outer_cosine"] <= 1
    assert stats["diloco/drift"] > 0
    assert stats["diloco/outer_grad_norm"] > 0


def test_twins_send_equal_outer_gradients(tmp_path: Path) -> None:
    ours = fit(tmp_path / "ours", make(twins=True), streaming(sync_every=6))
    assert ours.read(0)["stats"]["diloco/outer_cosine"] == pytest.approx(1.0)


def test_one_worker_runs_as_lookahead(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="one worker, so nothing is exchanged and Streaming DiLoCo runs as Lookahead"):
        ours = fit(tmp_path / "ours", make(), StreamingDiLoCoStrategy(sync_every=6), devices=1)
    assert ours.read(0)["stats"]["diloco/bytes_sent"] == 0
    assert not torch.equal(ours.read(0)["outer"]["head.bias"], ours.read(0)["local"]["head.bias"])


def test_given_partition(tmp_path: Path) -> None:
    def in_order(module: torch.nn.Module) -> list[list[str]]:
        names = [name for name, _ in module.named_parameters()]
        return [names[:3], names[3:]]

    ours = fit(tmp_path / "ours", make(), streaming(sync_every=5, overlap_steps=0, partition=in_order), max_steps=10)
    assert ours.read(0)["stats"]["diloco/syncs"] == 4


def test_stochastic_rounding_repeats_with_the_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for name, seed in (("first", "3"), ("again", "3"), ("other", "4")):
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)
        results.append(fit(tmp_path / name, make(), streaming(sync_every=6, rounding="stochastic")).read(0)["outer"])
    assert_same(results[0], results[1])
    assert not torch.equal(results[0]["head.weight"], results[2]["head.weight"])


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sync_every": 0}, "`sync_every` counts optimizer steps and must be at least 1, got 0"),
        ({"num_fragments": 0}, "`num_fragments` must be 'auto' or at least 1, got 0"),
        ({"blocks_per_fragment": 0}, "`blocks_per_fragment` must be at least 1, got 0"),
        ({"overlap_steps": -1}, r"`overlap_steps` must be from 0 to below `sync_every` \(100\).*, got -1"),
        ({"overlap_steps": 20, "sync_every": 20}, r"`overlap_steps` must be from 0 to below `sync_every` \(20\)"),
        ({"overlap_steps": [1, 100]}, r"`overlap_steps` must be .*, got \[1, 100\]"),
        ({"alpha": 1.1}, r"`alpha` is the weight of the local value and must be in \[0, 1\], got 1.1"),
        ({"alpha": float("nan")}, "`alpha`"),
        ({"sync_every": 10.5}, "`sync_every` .*, got 10.5"),
        ({"overlap_steps": 1.5}, "`overlap_steps` .*, got 1.5"),
        ({"outer_lr": float("inf")}, "`outer_lr` must be positive and finite, got inf"),
        ({"outer_lr": 0.0}, "`outer_lr` must be positive and finite, got 0.0"),
        ({"outer_momentum": 1.0}, r"`outer_momentum` must be in \[0, 1\), got 1.0"),
        ({"block_size": 7}, "`block_size` must be even, since two values share a byte, and at least 2, got 7"),
        ({"block_size": 0}, "`block_size` must be even"),
        ({"pattern": "spiral"}, "`pattern` must be one of .*strided.*, got 'spiral'"),
        ({"quantize": "int8"}, "`quantize` must be one of .*e3m0.*, got 'int8'"),
        ({"rounding": "up"}, "`rounding` must be one of .*stochastic.*, got 'up'"),
        ({"reduction": "tree"}, "`reduction` must be one of .*scatter.*, got 'tree'"),
    ],
    ids=str,
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StreamingDiLoCoStrategy(**arguments)


def test_one_overlap_a_worker(tmp_path: Path) -> None:
    assert_refused(
        tmp_path, r"`overlap_steps` must have one number a worker, that is 1, got 2: \[1, 2\]", overlap_steps=[1, 2]
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda names: names[1:], r"leaves out \['embed.weight'\]"),
        (lambda names: [*names, "head.bias"], r"repeats \['head.bias'\]"),
        (lambda names: [*names, "tail"], r"names, though not a trainable parameter, \['tail'\]"),
    ],
)
def test_a_partition_holds_each_name_once(tmp_path: Path, change: Any, message: str) -> None:
    def partition(module: nn.Module) -> list[list[str]]:
        return [change([name for name, _ in module.named_parameters()])]

    assert_refused(
        tmp_path, f"`partition` must hold each trainable parameter once, but it {message}", partition=partition
    )


def test_a_run_without_an_exchange(tmp_path: Path) -> None:
    message = "`sync_every` is 21 and the run has 20 optimizer steps: the workers would never exchange"
    assert_refused(tmp_path, message, sync_every=21)


def test_a_run_of_few_exchanges_warns(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"under ten outer steps a fragment, in which the outer momentum still swings"):
        fit(tmp_path, make(), StreamingDiLoCoStrategy(sync_every=5), devices=1)


def test_a_fast_dev_run_needs_no_exchange(tmp_path: Path) -> None:
    fit(tmp_path, make(), StreamingDiLoCoStrategy(), devices=1, fast_dev_run=3)
    assert Path(tmp_path, "0.pt").exists()


def test_unfreezing_during_the_fit(tmp_path: Path) -> None:
    class Unfreeze(Callback):
        def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
            pl_module.head.requires_grad_(False)

        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            pl_module.head.requires_grad_(batch_idx > 6)

    with pytest.raises(MisconfigurationException, match=r"`head.weight` was unfrozen or replaced during the fit"):
        fit(tmp_path, make(), StreamingDiLoCoStrategy(sync_every=5), devices=1, callbacks=[Unfreeze()])


def test_a_diverged_worker_is_told_before_the_shared_weights_move(tmp_path: Path) -> None:
    class Diverge(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
            if trainer.global_rank == 1 and trainer.global_step == 7:
                pl_module.head.weight.data.fill_(float("inf"))

        def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
            kept = {"outer": trainer.strategy.outer_state_dict()}  # type: ignore[attr-defined]
            torch.save(kept, tmp_path / f"outer{trainer.global_rank}.pt")
            Path(tmp_path, f"message{trainer.global_rank}").write_text(str(exception))

    with pytest.raises(ProcessRaisedException):
        fit(tmp_path / "run", make(), streaming(sync_every=5, num_fragments=1), callbacks=[Diverge()])
    told = [path.read_text() for path in tmp_path.glob("message*")]  # the first to fail ends the other
    assert told
    assert all("the outer gradient of fragment 0 that arrived at step 11 is not finite" in message for message in told)
    for path in tmp_path.glob("outer*"):
        assert all(value.isfinite().all() for value in torch.load(path, weights_only=True)["outer"].values())


def test_replacing_a_parameter_during_the_fit(tmp_path: Path) -> None:
    class Replace(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 3:
                pl_module.head.weight = nn.Parameter(pl_module.head.weight.detach().clone())

    with pytest.raises(MisconfigurationException, match=r"`head.weight` was unfrozen or replaced during the fit"):
        fit(tmp_path, make(), StreamingDiLoCoStrategy(sync_every=5), devices=1, callbacks=[Replace()])


def test_fragments_that_never_moved_are_told(tmp_path: Path) -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.global_step == 7

    strategy = StreamingDiLoCoStrategy(sync_every=10, num_fragments=2)  # sent at 5 and at 10
    with pytest.warns(UserWarning, match=r"after 7 steps, before the outer values of fragments \[0\] moved"):
        fit(tmp_path, make(), strategy, devices=1, callbacks=[Stop()])


def test_steps_of_several_optimizers_are_not_added_up(tmp_path: Path) -> None:
    message = "`sync_every` is 15 and the run has 10 optimizer steps"
    assert_refused(tmp_path, message, Manual(), sync_every=15)


def test_a_parameter_frozen_during_the_fit_is_shown_shared_all_the_same(tmp_path: Path) -> None:
    class Freeze(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
            pl_module.head.requires_grad_(trainer.global_step < 8)

    module = make()
    ours = fit(tmp_path / "ours", module, streaming(sync_every=6), callbacks=[Freeze()])
    assert_same({name: value.detach() for name, value in module.named_parameters()}, ours.read(1)["outer"])
