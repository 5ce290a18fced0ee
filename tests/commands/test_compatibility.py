"""The table of what goes with what is what the probes find."""

import json
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback
from typing_extensions import override

from fulgurite.commands import probes
from fulgurite.commands.compatibility import render
from fulgurite.commands.main import main
from fulgurite.commands.probes import COLUMNS, ROWS, probe

FOUND = json.loads((Path(__file__).parents[2] / "benchmarks" / "results" / "compatibility.json").read_text())["cells"]
COLUMN = {column.name: column for column in COLUMNS}
ROW = {row.name: row for row in ROWS}
PLAIN = ROWS[0]


def test_the_committed_table_has_every_row_and_column() -> None:
    assert list(FOUND) == list(ROW)
    assert all(list(cells) == list(COLUMN) for cells in FOUND.values())


def test_nothing_fails_by_an_error_that_nobody_meant() -> None:
    assert [(row, column) for row, cells in FOUND.items() for column in cells if cells[column][0] == "fails"] == []


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ("`32-true`", "ddp"),
        ("`16-mixed`", "ddp"),
        ("`HessianSpectrum`", "streaming_diloco"),
        ("`ExponentiatedGradient`", "diloco"),
        ("`accumulate_grad_batches`", "federated"),
        ("`EquilibriumLayer`", "federated"),
        ("the same with `CurvatureBatches`", "federated_adversarial"),
        ("`GradientCoherence`", "gradient_coding"),
        ("`FedSpeed`", "sr_sgc"),
        ('`CoherentGradients("rm3")`', "m_sgc"),
    ],
)
def test_a_probe_finds_what_the_table_says(row: str, column: str) -> None:
    assert list(probe(ROW[row], COLUMN[column])) == FOUND[row][column]
    assert not list(Path().iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("row", ROW)
def test_a_whole_column_is_as_the_table_says(row: str) -> None:
    assert probe(ROW[row], COLUMN["streaming_diloco"])[0] == FOUND[row]["streaming_diloco"][0]
    assert not list(Path().iterdir())


# ---- what the probes tell apart --------------------------------------------------------------------------------------


class Raises(Callback):
    """As a defect would, by an error of a kind that refusals have too."""

    @override
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        raise ValueError("not from us. Nor is this")


class Freezes(Callback):
    @override
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        trainer.optimizers[0].param_groups[0]["lr"] = 0.0


def test_an_error_from_elsewhere_is_a_failure() -> None:
    assert probe(replace(PLAIN, callback=Raises), COLUMN["ddp"]) == ("fails", "not from us")


def test_a_fit_that_moves_nothing_is_a_failure() -> None:
    assert probe(replace(PLAIN, callback=Freezes), COLUMN["ddp"])[0] == "fails"


def test_an_error_before_the_processes_start_is_told_alike() -> None:
    row = replace(PLAIN, federated={"local_steps": 0})
    assert probe(row, COLUMN["federated"]) == ("refused", "`local_steps` must be at least 1, got 0")


def test_the_table_numbers_its_reasons() -> None:
    cells = {
        "a": {"x": ("works", ""), "y": ("refused", "because")},
        "b": {"x": ("refused", "else"), "y": ("fails", "because")},
    }
    assert render({"cells": cells}).splitlines() == [
        "|  | `x` | `y` |",
        "| --- | --- | --- |",
        "| a | yes | no 1 |",
        "| b | no 2 | **fails** 1 |",
        "",
        "1. because",
        "2. else",
    ]


@pytest.mark.parametrize("flags", [[], ["--json"]], ids=str)
def test_the_command_prints_them(
    flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(probes, "ROWS", ROWS[:1])
    monkeypatch.setattr(probes, "COLUMNS", COLUMNS[:1])
    main(["compat", *flags])
    printed = capsys.readouterr().out
    if flags:
        found = json.loads(printed)
        assert found["versions"]["torch"] == version("torch")
        assert found["cells"] == {"`32-true`": {"ddp": ["works", ""]}}
    else:
        assert printed == "|  | `ddp` |\n| --- | --- |\n| `32-true` | yes |\n\n"
