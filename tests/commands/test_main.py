"""Commands beside other programs."""

import os
import subprocess
import sys

import pytest

PLAN = ["--params", "1e9", "--layers", "24", "--step-seconds", "0.5", "--bandwidth-gbps", "0.2"]


@pytest.mark.parametrize(
    "command", [["fulgurite.commands.main"], ["fulgurite.plugins.comm.plan", *PLAN]], ids=["fulgurite", "plan"]
)
def test_a_reader_that_has_left_ends_a_command_quietly(command: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    told = subprocess.run(
        [sys.executable, "-m", *command], stdout=writing, stderr=subprocess.PIPE, text=True, timeout=100, check=False
    )
    os.close(writing)
    assert (told.returncode, told.stderr) == (1, "")
