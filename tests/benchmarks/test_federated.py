"""The benchmark measures what it says; its numbers are not tested."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fulgurite.plugins.federated import PGD
from tests.suites.scripts import load_benchmark

bench = load_benchmark("federated")
fed, sections = load_benchmark("_federated"), load_benchmark("_sections")


def robust_results() -> dict[str, Any]:
    """Made up, for two seeds: FAL ends 0.2 above FedAvg under attack, and 0.01 below without."""
    ends = {"fedavg": (0.9, 0.4), "fal": (0.89, 0.6), "fal_fedspeed": (0.9, 0.7), "fal_one_step": (0.5, 0.3)}
    fits = {
        name: [
            [{"clean": (clean + seed) * k / 4, "robust": (robust + seed) * k / 4} for k in range(1, 5)]
            for seed in (0.0, 0.02)
        ]
        for name, (clean, robust) in ends.items()
    }
    return bench.robust_results(fits, [1, 2, 4])  # type: ignore[no-any-return]


@pytest.mark.parametrize("federated", [True, False], ids=["federated", "lightning"])
def test_the_hand_loop_takes_the_steps_of_the_strategy(federated: bool) -> None:
    fit = fed.apart(fed.beside_hand_loop, "small", rounds=1, batch_size=2, federated=federated)
    assert len(fit["fit_s"]) == len(fit["hand_s"]) == 1
    assert fit["steps"] == 100
    # Means of ten clients in float32, weights of order 1, two rounds: a few rounding errors; other steps move by 0.01.
    assert (fit["max_difference"] < 1e-5) == federated


def test_one_fit_has_plain_steps_and_steps_of_both_attacks() -> None:
    (measured,) = fed.apart(fed.attacked_steps, rounds=1, batch_size=2, attack=PGD(eps=0.1, steps=1))
    assert set(measured) == {"plain", "fal", "backward"}
    assert all(seconds > 0 for seconds in measured.values())


def test_the_peers_attack_is_ours() -> None:
    torch.manual_seed(0)
    net, x, y = fed.convolutions(), torch.rand(4, 3, 32, 32), torch.arange(4)

    def loss(inputs: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(net(inputs), y)

    attacks = fed.AttacksInTurn(PGD(eps=0.1, steps=3), net)
    found = {}
    for _ in range(2):
        torch.manual_seed(1)  # the same random start
        adversarial = attacks(loss, x)
        found[attacks.last] = adversarial
    assert set(found) == {"fal", "backward"}
    torch.testing.assert_close(found["fal"], found["backward"])
    assert all(parameter.grad is None for parameter in net.parameters())


def test_accuracies_are_of_each_round() -> None:
    curve = fed.apart(fed.robust_fit, "fal_fedspeed", seed=0, rounds=2)
    assert len(curve) == 2
    assert all(0 <= point["robust"] <= point["clean"] <= 1 for point in curve)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux's /proc")
def test_only_touched_clients_take_space_on_disk(tmp_path: Path) -> None:
    fit = fed.apart(fed.memory_of_fit, clients=1000, rounds=1, duals=True, folder=str(tmp_path))
    assert fit["clients_with_duals"] == 10
    assert fit["file_bytes_apparent"] >= 1000 * fit["model_bytes"]
    # Pages of 4096 bytes, one more at each end of a client's row.
    assert fit["file_bytes_on_disk"] <= 10 * (fit["model_bytes"] + 3 * 4096)
    assert fit["peak_of_fit_bytes"] > 10 * fit["model_bytes"]


def test_targets_are_seed_by_seed() -> None:
    found = robust_results()
    assert found["over_fedavg"]["robust"]["fal"]["mean"] == pytest.approx(0.2)
    assert found["over_fedavg"]["robust"]["fal"]["sd"] == pytest.approx(0, abs=1e-9)
    assert [target["met"] for target in found["targets"].values()] == [True, True]
    assert found["methods"]["fal"]["round2"]["clean"]["mean"] == pytest.approx(0.45)
    assert found["methods"]["fal"]["curve"]["robust"]["mean"] == pytest.approx([0.1525, 0.305, 0.4575, 0.61])


def test_a_section_replaces_its_part_alone_and_by_measurements_alone(tmp_path: Path) -> None:
    for section, result in (
        ("engine", {"a": 1}),
        ("robust", {"b": 2}),
        ("engine", {"c": 3}),
        ("engine", {"skipped": ""}),
    ):
        path = sections.save("federated", section, result, tmp_path)
    assert json.loads(path.read_text()) == {"engine": {"c": 3}, "robust": {"b": 2}}


def test_the_figure_is_drawn_from_what_was_measured(tmp_path: Path) -> None:
    (drawn,) = bench.draw({"robust": robust_results()}, tmp_path)
    assert drawn == tmp_path / "federated_robust.png"
    assert drawn.stat().st_size > 10_000
    assert bench.draw({"engine": {}}, tmp_path) == []
