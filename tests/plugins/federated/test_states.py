"""What clients remember, wherever they train."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fulgurite.plugins.federated.states import ClientStates
from tests.suites.processes import in_processes

ROUNDS = [[[0, 3], [5]], [[3], [4, 0]], [[], [1, 5, 3]], [[5], []]]


def tensors(client: int, number: int) -> list[Tensor]:
    """Of several types and shapes, one of them empty."""
    value = 10.0 * client + number
    return [
        torch.full((3, 2), value),
        torch.tensor(value, dtype=torch.float64),
        torch.full((5,), value, dtype=torch.bfloat16),
        torch.empty(0),
        torch.tensor([client, number]),
    ]


def train(rank: int, world_size: int, folder: Path | None) -> dict[int, Any]:
    states = ClientStates(6, rank, world_size, folder=folder)
    seen: dict[int, int] = {}
    for number, plan in enumerate(ROUNDS):
        mine = [client for clients in plan for client in clients] if world_size == 1 else plan[rank]
        plan = [mine] if world_size == 1 else plan
        states.borrow(plan)
        for client in mine:
            before = states[client]
            if before is None:
                assert client not in seen
            else:
                torch.testing.assert_close(before, tensors(client, int(before[4][1])), rtol=0, atol=0)
            states[client] = tensors(client, number)
        states.give_back(plan)
        seen |= {client: number for clients in plan for client in clients}
        assert states.touched == set(seen)
    return dict(states.owned())


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("world_size", [1, 2])
def test_each_client_has_what_it_left(world_size: int, mapped: bool, tmp_path: Path) -> None:
    folder = tmp_path / "states" if mapped else None
    owners = [train(0, 1, folder)] if world_size == 1 else in_processes(2, train, 2, folder)
    latest = {client: number for number, plan in enumerate(ROUNDS) for clients in plan for client in clients}
    for rank, held in enumerate(owners):
        assert held.keys() == {client for client in latest if client % world_size == rank}
        for client in held:
            torch.testing.assert_close(held[client], tensors(client, latest[client]), rtol=0, atol=0)


def test_a_file_costs_what_its_clients_touched(tmp_path: Path) -> None:
    states = ClientStates(1000, folder=tmp_path)
    states.borrow([[500]])
    states[500] = [torch.ones(2**16)]
    states.give_back([[500]])
    (file,) = tmp_path.iterdir()
    assert file.stat().st_size == 1000 * 2**18
    assert file.stat().st_blocks * 512 < 4 * 2**18


def restore(rank: int, folder: str) -> list[Any]:
    states = ClientStates(6, rank, 2)
    states.load(folder, 1, [2])
    states.borrow([[], [2]])  # rank 1 has seen no shapes yet
    held = states[2] if rank == 1 else []
    assert held is not None
    return held


def test_saved_states_reach_another_rank_of_another_world(tmp_path: Path) -> None:
    folder = str(tmp_path / "of.ckpt.clients")
    states = ClientStates(6)
    states.borrow([[2]])
    states[2] = tensors(2, 7)
    states.give_back([[2]])
    states.save(folder, 1)
    torch.testing.assert_close(in_processes(2, restore, folder)[1], tensors(2, 7), rtol=0, atol=0)
    with pytest.raises(FileNotFoundError, match=r"3-1\.pt is missing: copy the folder"):
        states.load(folder, 1, [2, 3])


def test_a_file_that_was_cut_short_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "of.ckpt.clients"
    folder.mkdir()
    (folder / "2-1.pt").write_bytes(b"PK")
    with pytest.raises(OSError, match=r"of\.ckpt\.clients/2-1\.pt cannot be read: if a crash has cut it short"):
        ClientStates(6).load(str(folder), 1, [2])


def test_files_of_another_round_stay_until_they_are_to_go(tmp_path: Path) -> None:
    states = ClientStates(6)
    states[2] = tensors(2, 7)
    states.give_back([[2]])
    for number in (9, 19):
        states.save(str(tmp_path), number)
    assert {path.name for path in tmp_path.iterdir()} == {"2-9.pt", "2-19.pt"}
    states.forget_others(str(tmp_path), 9)
    assert {path.name for path in tmp_path.iterdir()} == {"2-9.pt"}
