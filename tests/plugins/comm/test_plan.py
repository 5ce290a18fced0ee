import ast
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fulgurite.plugins.comm.plan import LEVELS, OVERLAP_STEPS, SYNC_EVERY, Job, main, plan, recommend, write_figure
from fulgurite.plugins.comm.simulate import compute_utilization

JOB = Job(params=1e9, layers=24, step_seconds=0.1, bandwidth_gbps=1.0)
FLAGS = ["--params", "1e9", "--layers", "24", "--step-seconds", "0.1", "--bandwidth-gbps", "1"]
NAMES = ["DDP", "DiLoCo", "Streaming DiLoCo", "Streaming + overlap", "Streaming + overlap + 4 bit"]


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fulgurite.plugins.comm.plan", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def four_bits(job: Job, sync_every: int, overlap_steps: int) -> float:
    return compute_utilization(
        job.bandwidth_gbps,
        method="streaming",
        params=job.params,
        layers=job.layers,
        step_seconds=job.step_seconds,
        sync_every=sync_every,
        overlap_steps=overlap_steps,
        bits_per_param=4.0625 * (job.workers - 1),
    )


@pytest.mark.parametrize("workers", [2, 3, 8])
@pytest.mark.parametrize("bits", [16, 32])
def test_bytes_are_those_of_ring_and_gather(workers: int, bits: int) -> None:
    sent = [row.bytes_per_step for row in plan(replace(JOB, workers=workers, bits=bits))]
    ring = 1e9 * bits / 8 * 2 * (workers - 1) / workers
    gather = 1e9 * 4.0625 / 8 * (workers - 1)
    assert sent == pytest.approx([ring, ring / 100, ring / 100, ring / 100, gather / 100])


def test_four_bits_send_788_times_less_than_ddp() -> None:
    rows = plan(JOB)
    assert rows[0].bytes_per_step / rows[-1].bytes_per_step == pytest.approx(788, abs=0.5)


@pytest.mark.parametrize(("layers", "blocks", "share"), [(24, 3, 3 / 24), (25, 3, 4 / 25), (24, 24, 1.0)])
def test_peak_is_the_largest_fragment(layers: int, blocks: int, share: float) -> None:
    ddp, diloco, *streaming, quantised = plan(replace(JOB, layers=layers, blocks_per_fragment=blocks))
    assert ddp.peak_bytes == diloco.peak_bytes == 4e9
    assert [row.peak_bytes for row in streaming] == pytest.approx(2 * [share * 4e9])
    assert quantised.peak_bytes == pytest.approx(share * 1e9 * 4.0625 / 8)


def test_rows_come_from_the_simulation() -> None:
    rows = plan(JOB)
    assert [row.name for row in rows] == NAMES
    assert rows[-1].utilization == four_bits(JOB, sync_every=100, overlap_steps=1)
    for row in rows:
        assert list(row.required_gbps) == sorted(row.required_gbps)
        for level, gbps in zip(LEVELS, row.required_gbps, strict=True):
            there = plan(replace(JOB, bandwidth_gbps=gbps))[NAMES.index(row.name)]
            below = plan(replace(JOB, bandwidth_gbps=gbps / 1.11))[NAMES.index(row.name)]
            assert below.utilization < level <= there.utilization


def test_latency_can_put_a_level_out_of_reach() -> None:
    ddp, *_, quantised = plan(replace(JOB, latency=0.1))
    assert ddp.required_gbps == (math.inf, math.inf, math.inf)
    assert quantised.required_gbps[0] < math.inf


@pytest.mark.parametrize("gbps", [0.5, 1.0, 2.0, 10.0])
def test_recommends_the_mildest_setting_that_is_enough(gbps: float) -> None:
    job = replace(JOB, bandwidth_gbps=gbps)
    advice = recommend(job)
    assert advice.utilization == four_bits(job, advice.sync_every, advice.overlap_steps) >= 0.95
    for sync_every in (each for each in SYNC_EVERY if each < advice.sync_every):  # with 5 steps of overlap at most
        assert four_bits(job, sync_every, overlap_steps=5) < 0.95
    if advice.overlap_steps > 0:
        assert four_bits(job, advice.sync_every, advice.overlap_steps - 1) < 0.95


def test_overlap_above_five_only_where_nothing_else_is_enough() -> None:
    job = replace(JOB, bandwidth_gbps=0.45)
    advice = recommend(job)
    assert advice.utilization >= 0.95
    assert advice.overlap_steps > 5
    assert all(four_bits(job, sync_every, overlap_steps=5) < 0.95 for sync_every in SYNC_EVERY)


def test_says_what_comes_closest_where_nothing_is_enough() -> None:
    job = replace(JOB, bandwidth_gbps=0.02)
    advice = recommend(job)
    best = max(four_bits(job, sync, overlap) for sync in SYNC_EVERY for steps in OVERLAP_STEPS for overlap in steps)
    assert advice.method is None
    assert advice.utilization == best < 0.95


@pytest.mark.parametrize(
    ("gbps", "method"),
    [(1000, "DDP"), (100, "DiLoCo"), (40, "Streaming DiLoCo"), (25, "Streaming + overlap"), (3, NAMES[-1]), (1, None)],
)
def test_prefers_the_method_closest_to_ddp(gbps: float, method: str | None) -> None:
    assert recommend(replace(JOB, bandwidth_gbps=gbps)).method == method


@pytest.mark.parametrize("blocks", [3, 6])
def test_the_line_to_paste_is_python(blocks: int) -> None:
    advice = recommend(replace(JOB, blocks_per_fragment=blocks))
    (call,) = (
        node
        for node in ast.walk(ast.parse(advice.trainer))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "StreamingDiLoCoStrategy"
    )
    expected = {"sync_every": advice.sync_every, "overlap_steps": advice.overlap_steps}
    if blocks != 3:  # the strategy's default
        expected["blocks_per_fragment"] = blocks
    assert {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords} == expected


def test_the_command_prints_an_aligned_table_and_a_line_to_paste() -> None:
    result = run(*FLAGS)
    assert (result.returncode, result.stderr) == (0, "")
    table, prose, line = result.stdout.strip().split("\n\n")
    head, *rows = table.splitlines()
    assert [row[: len(name)] for row, name in zip(rows, NAMES, strict=True)] == NAMES
    assert {len(row) for row in rows} == {len(head)}
    assert "none reaches 95% utilisation at 1 Gbit/s" in prose
    assert line.strip() == recommend(JOB).trainer


def test_the_command_writes_json_and_a_figure(tmp_path: Path) -> None:
    figure = tmp_path / "plan.png"
    result = run(*FLAGS, "--json", "--figure", str(figure), "--latency-s", "0.1", "--workers", "3")
    assert (result.returncode, result.stderr) == (0, "")
    content = json.loads(result.stdout)
    job = replace(JOB, latency=0.1, workers=3)
    assert Job(**content["job"]) == job
    assert [row["utilization"] for row in content["rows"]] == [row.utilization for row in plan(job)]
    assert content["rows"][0]["required_gbps"] == {"0.5": None, "0.9": None, "0.95": None}
    assert content["recommendation"]["trainer"] == recommend(job).trainer
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_the_command_exits_with_two_and_no_traceback() -> None:
    result = run(*FLAGS, "--workers", "1")
    assert result.returncode == 2
    assert result.stdout == ""
    assert "fulgurite-plan: error: `workers` must be at least 2, got 1" in result.stderr
    assert "Traceback" not in result.stderr


def test_matplotlib_is_imported_for_a_figure_only() -> None:
    code = "import sys; from fulgurite.plugins.comm.plan import main; main(sys.argv[1:]); "
    code += "assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, *FLAGS], check=True, capture_output=True, timeout=120)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--bandwidth-gbps", "0"], "`bandwidth_gbps` is the speed of the link and must be positive, got 0.0"),
        (["--bandwidth-gbps", "inf"], "`bandwidth_gbps` is the speed of the link and must be positive, got inf"),
        (["--params", "-1"], "`params` counts the parameters of the model and must be positive"),
        (["--layers", "2.5"], "argument --layers: invalid int value: '2.5'"),
        (["--latency-s", "-1"], "`latency` is a time in seconds and must be at least 0"),
        (["--blocks-per-fragment", "25"], "`blocks_per_fragment` must be between 1 and `layers` (24), got 25"),
        (["--overlap-steps", "100"], "`overlap_steps` must be below the steps between two exchanges"),
        (["--bits", "8"], "`bits` is the size of a value on the wire and must be 16 or 32, got 8"),
        (["--target", "95"], "`target` is a utilisation above 0 and at most 1, got 95.0"),
        (["--figure", "no/such/folder/plan.png"], "No such file or directory"),
        (["--figure", "plan.nonsense"], "Format 'nonsense' is not supported"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_refuses(flags: list[str], message: str, capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        main([*FLAGS, *flags])
    out, err = capsys.readouterr()
    assert out == ""
    assert f"fulgurite-plan: error: {message}" in err or message in err.splitlines()[-1]


def test_names_what_to_install_without_matplotlib(capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"`--figure` needs matplotlib: pip install fulgurite\[figures\]"):
        write_figure(JOB, tmp_path / "plan.png")
    with pytest.raises(SystemExit, match="2"):
        main([*FLAGS, "--figure", str(tmp_path / "plan.png")])
    assert "pip install fulgurite[figures]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("gbps", "phrases"),
    [
        ("1000", ["DDP reaches 95% utilisation at 1 Tbit/s: stay with it.", 'Trainer(strategy="ddp")']),
        ("40", ["Closest to DDP among those that reach 95% utilisation at 40 Gbit/s: Streaming DiLoCo."]),
        ("0.02", ["none reaches 95% utilisation at 20 Mbit/s", "No setting of Streaming DiLoCo does; the best is ("]),
    ],
)
def test_prose(gbps: str, phrases: list[str], capsys: Any) -> None:
    main([*FLAGS, "--bandwidth-gbps", gbps])
    printed = capsys.readouterr().out
    assert all(phrase in printed for phrase in phrases)


@pytest.mark.parametrize("suffix", [".svg", ".pdf"])
def test_figure_of_any_format(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"plan{suffix}"
    write_figure(JOB, path)
    assert path.stat().st_size > 1000
