import torch
from torch import Tensor

from fulgurite.plugins.comm.collectives import average_, broadcast_
from tests.suites.processes import in_processes


def made(rank: int) -> dict[str, Tensor]:
    return {
        "plain": torch.full((3, 2), float(rank)),
        "strided": torch.full((2, 3, 4, 4), float(rank)).to(memory_format=torch.channels_last),
        "half": torch.tensor([rank, 1], dtype=torch.bfloat16),
        "whole": torch.tensor(rank + 5),
        "mask": torch.tensor([rank == 0]),
    }


def broadcast(rank: int) -> dict[str, Tensor]:
    tensors = made(rank)
    strides = tensors["strided"].stride()
    broadcast_(tensors.values())
    assert tensors["strided"].stride() == strides
    return tensors


def average(rank: int) -> dict[str, Tensor]:
    tensors = made(rank)
    average_(tensors.values())
    return tensors


def test_broadcast_gives_all_what_rank_0_has() -> None:
    for result in in_processes(3, broadcast):
        assert all(torch.equal(result[name], value) for name, value in made(0).items())


def test_average_of_floats_and_rank_0_of_the_rest() -> None:
    for result in in_processes(3, average):
        assert torch.equal(result["plain"], torch.ones(3, 2))
        assert torch.equal(result["strided"], torch.ones(2, 3, 4, 4))
        assert torch.equal(result["half"], torch.ones(2, dtype=torch.bfloat16))
        assert result["whole"] == 5
        assert result["mask"]
