"""The benchmark measures what it says; its numbers are not tested."""

import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.suites.scripts import load_benchmark

bench, netns, worker = (load_benchmark(name) for name in ("streaming_diloco", "_netns", "_worker"))

WEIGHTS = 333_312


def link_results() -> dict[str, Any]:
    """Made up: DDP takes 100 times as long as the others and sends 800 times as much."""
    rows = {
        name: [
            {
                "seconds_per_step": slow,
                "wire_bytes_per_step": bytes_,
                "payload_bytes_per_step": bytes_,
                "peak_bytes": 8,
                "stall": 0.0,
            }
            for _ in range(2)
        ]
        for name, slow, bytes_ in (
            ("solo", 0.01, 0),
            ("ddp", 1.0, 8e5),
            ("diloco", 0.02, 8e3),
            ("streaming", 0.01, 1e3),
        )
    }
    return {"mbit10": bench.link_results(rows)}


def loss_results() -> dict[str, Any]:
    curve = [{"step": 10.0 * k, "nats_per_byte": 3.0 / k, "bytes_sent": 1e6 * k} for k in range(1, 6)]
    one = {"curve": curve, "payload_bytes": 5e6, "wall_s": 1.0}
    fits = {name: [one, one] for name in ("solo", "ddp", "diloco", "streaming")}
    return {"setting": {"workers": 2, "tokens_per_step_and_worker": 128}, **bench.loss_results(fits)}


def test_ratios_are_taken_within_a_repetition() -> None:
    rows = {"a": [{"x": 2.0}, {"x": 30.0}, {"x": 4.0}], "b": [{"x": 1.0}, {"x": 10.0}, {"x": 4.0}]}
    assert bench.ratio(rows, "a", "b", "x")["median"] == 2
    found = link_results()["mbit10"]
    assert found["ratios"]["ddp_over_streaming_wire_bytes_per_step"]["median"] == pytest.approx(800)
    assert found["ratios"]["streaming_over_solo_time"]["median"] == pytest.approx(1)
    assert [target["met"] for target in found["targets"].values()] == [True, True, True, False]


def test_steps_are_timed_finely_however_long_the_clock_has_run() -> None:
    start = 10.0 * 24 * 3600
    assert worker.median_gap([start, start + 0.0101, start + 0.0202, start + 0.5]) == pytest.approx(0.0101, abs=1e-6)


def test_figures_are_drawn_from_what_was_measured(tmp_path: Path) -> None:
    results = {"link": link_results(), "loss": loss_results()}
    drawn = bench.draw(results, tmp_path)
    assert [path.name for path in drawn] == ["streaming_diloco_loss.png", "streaming_diloco_link.png"]
    assert all(path.stat().st_size > 10_000 for path in drawn)
    assert bench.draw({"link": {"skipped": "no root"}}, tmp_path) == []


def test_two_workers_measure_a_fit() -> None:
    job = worker.Job(
        "streaming", steps=16, sync_every=8, batch_size=2, val_every=8, val_crops=64, options={"overlap_steps": 1}
    )
    first, second = worker.run(job)
    # Fragments of 34 944, 149 184 and 149 184 weights, due at 8 16, 2 10 and 5 13; 65 bytes for 128 weights.
    sizes = [34_944, 149_184, 149_184]
    assert first["parameters"] == sum(sizes) == WEIGHTS
    assert first["payload_bytes"] == 2 * sum(-(-size // 128) * 65 for size in sizes)
    assert first["peak_bytes"] == 1166 * 65
    assert [point["step"] for point in first["curve"]] == [8, 16]
    assert first["curve"] == second["curve"], "validation is on the shared weights, over all workers"
    assert set(first["protocol_us"]) == {"idle", "send", "receive"}
    assert first["wire_bytes"] is None
    assert 0 < first["wait_s"] < first["wall_s"]


@pytest.mark.slow
def test_bytes_on_a_throttled_link_are_those_of_the_method(tmp_path: Path) -> None:
    reason = netns.why_not()
    if reason is not None:
        pytest.skip(reason)
    with netns.link(200) as places:
        ddp = worker.run(worker.Job("ddp", steps=4, wire=True), places)
        local = worker.run(worker.Job("post_local_sgd", steps=4, sync_every=2, wire=True), places)
    for measured, rounds in ((ddp, 4), (local, 2)):
        for one in measured:
            assert one["payload_bytes"] == rounds * 4 * WEIGHTS
            assert 1 < one["wire_bytes"] / one["payload_bytes"] < 1.15
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    assert places[0].prefix[-1] not in left
