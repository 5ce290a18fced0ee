"""The benchmark plays what it says; its numbers are not tested."""

import json
import sys
from pathlib import Path

import pytest
import torch

from fulgurite.plugins.comm.straggler_sim import DelayProfile, SimResult, simulate
from tests.suites.scripts import load_benchmark

bench, sections = load_benchmark("sequential_gradient_coding"), load_benchmark("_sections")


def result(total_s: float) -> SimResult:
    return SimResult(total_s, torch.ones(1), 0, torch.ones(1))


def test_the_best_run_is_as_fast_as_any_of_the_grid() -> None:
    profile = bench.QUICK.profile("short_dear", seed=0)
    found = bench.best("sr_sgc", bench.QUICK.grid("sr_sgc"), profile, bench.QUICK.jobs, "complete")
    runs = [
        simulate("sr_sgc", profile, bench.QUICK.jobs, B=B, W=W, lam=lam)
        for B, W in ((1, 2), (2, 3), (1, 3))
        for lam in (8, 28)
    ]
    assert found.total_s == min(run.total_s for run in runs)
    assert len({run.total_s for run in runs}) > 1


def test_schemes_are_compared_on_the_same_seeds() -> None:
    found = bench.compared({"gc": [result(2.0), result(10.0)], "m_sgc": [result(1.0), result(20.0)]})
    assert found["m_sgc"]["over_gc"]["of_seeds"] == [0.5, 2.0]
    assert found["m_sgc"]["over_gc"]["mean"] == 1.25
    assert found["m_sgc"]["seconds"]["mean"] == 10.5
    assert found["gc"]["over_gc"]["sd"] == 0


def test_seeds_draw_other_delays_and_profiles_are_of_the_same_size() -> None:
    profiles = {(name, seed): bench.QUICK.profile(name, seed) for name in bench.PROFILES for seed in (0, 1)}
    assert {profile.times.shape for profile in profiles.values()} == {(48, 16)}
    assert not torch.equal(profiles["long", 0].times, profiles["long", 1].times)
    # Who differ in the price of load alone share their delays.
    assert torch.equal(profiles["short_cheap", 0].times, profiles["short_dear", 0].times)
    assert profiles["short_dear", 0].seconds_per_load == 8.0


def test_both_worlds_are_played_and_drawn(tmp_path: Path) -> None:
    simulated, carried = bench.simulation(True), bench.carry_over(True)
    for name in bench.PROFILES:
        stopped = simulated["profiles"][name]
        assert stopped["uncoded"]["over_gc"]["mean"] >= 1  # s = 0 is of the grid
        assert carried["profiles"][name]["off"]["m_sgc"] == stopped["m_sgc"]
        assert carried["profiles"][name]["on"]["m_sgc"] != stopped["m_sgc"]
    results = json.loads(json.dumps({"simulation": simulated, "carry_over": carried}))
    (figure,) = bench.draw(results, tmp_path)
    assert figure == tmp_path / "sequential_gradient_coding_simulation.png"
    assert figure.stat().st_size > 10_000
    assert bench.draw({"simulation": simulated}, tmp_path) == []


@pytest.mark.slow
def test_schemes_train_to_the_same_weights() -> None:
    found = bench.live(True)
    for schemes in found["worlds"].values():
        assert set(schemes) == {"uncoded", "gc_2", "m_sgc"}
        assert schemes["uncoded"]["over_uncoded"]["median"] == 1
        assert all(figures["apart"] <= 1e-6 for figures in schemes.values())
        assert all(figures["seconds"]["q25"] >= 8 * 0.04 for figures in schemes.values())  # the sleep of 8 batches


def test_a_round_is_measured_beside_a_step_of_ddp() -> None:
    found = bench.overhead(True)
    for figures in found["batch_sizes"].values():
        assert set(figures["methods"]) == {"ddp", "uncoded"}
        assert figures["uncoded_over_ddp"]["median_step_s"]["median"] > 0


def test_a_run_and_a_search_are_timed() -> None:
    found = bench.simulator(True)
    assert set(found["runs"]) == set(bench.TIMED)
    assert all(figures["seconds"]["q25"] > 0 for figures in found["runs"].values())
    search = found["search"]
    assert search["parameter_sets"] > 50
    assert search["seconds_of_1000"]["median"] == pytest.approx(
        1000 / search["parameter_sets"] * search["seconds"]["median"]
    )


def test_recorded_delays_are_played(tmp_path: Path) -> None:
    drawn = DelayProfile.gilbert_elliott(32, 12, 0.05, 0.9, seed=3, seconds_per_load=2.0)
    drawn.to_csv(tmp_path / "profile.csv")
    found = bench.published_profile(True, tmp_path / "profile.csv")
    assert found["setting"]["jobs"] == 8
    assert found["best"]["uncoded"]["seconds"] == pytest.approx(simulate("gc", drawn, 8, s=0).total_s)
    s = found["best"]["gc"]["params"]["s"]
    assert found["best"]["gc"]["seconds"] == pytest.approx(simulate("gc", drawn, 8, s=s).total_s)


def test_what_is_given_no_path_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sections, "QUICK_RESULTS", tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    file = tmp_path / "profile.csv"
    DelayProfile.gilbert_elliott(16, 8, 0.05, 0.9).to_csv(file)
    for options in ([], ["--profile", str(file)]):
        monkeypatch.setattr(sys, "argv", ["bench", "published_profile", "--quick", *options])
        sections.main("it", None, bench.SECTIONS, bench.draw, bench.PATHS)
        (section,) = json.loads((tmp_path / "it.json").read_text()).values()
        assert ("skipped" in section) == (not options)
    torch.set_num_threads(threads)
    assert "skipped" in bench.peer(True, None)
