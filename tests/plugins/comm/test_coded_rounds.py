import os
import signal
import time
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor

from fulgurite.plugins.comm.coded_messages import Ended
from fulgurite.plugins.comm.coded_root import _MOST_BEHIND, Waiting
from fulgurite.plugins.comm.coded_rounds import CodedRounds
from fulgurite.plugins.comm.gradient_codes import Task, make_code
from tests.plugins.comm.rounds import SIZE, Worker, gradient_of_batch, outcome, threads, until, write
from tests.suites.processes import in_processes, of_survivors

# n, scheme and parameters, late (rank, round) pairs that the scheme bears, jobs of each window
Late = set[tuple[int, int]]
RUNS: list[tuple[int, str, dict[str, int], Late, list[int]]] = [
    (3, "gc", {"s": 0}, set(), [3, 1]),
    (3, "gc", {"s": 1}, {(r % 3, r) for r in range(8)}, [1, 3, 2]),
    (4, "gc", {"s": 2}, {(r % 4, r) for r in range(9)} | {((r + 1) % 4, r) for r in range(9)}, [4, 1, 1]),
    (4, "sr_sgc", {"B": 1, "W": 2, "lam": 2}, {(0, 1), (3, 1), (1, 3), (2, 4), (0, 6), (1, 6)}, [5, 1, 1]),
    (3, "sr_sgc", {"B": 2, "W": 3, "lam": 3}, {(2, 0), (1, 0), (0, 3), (1, 3)}, [4, 1]),
    (3, "m_sgc", {"B": 1, "W": 2, "lam": 1}, {(0, 0), (1, 2), (2, 4), (0, 6)}, [4, 1, 2]),
    (4, "m_sgc", {"B": 2, "W": 3, "lam": 2}, {(1, 1), (1, 2), (2, 2), (0, 6), (0, 7), (3, 7)}, [5, 1, 2]),
    (3, "m_sgc", {"B": 1, "W": 2, "lam": 3}, {(0, 1), (1, 1), (0, 3), (2, 3)}, [3, 1]),
]


def trained(rank: int, n: int, scheme: Any, params: Any, late: Late, windows: list[int], total: bool) -> dict[str, Any]:
    code = make_code(scheme, n, **params)
    make = partial(make_code, scheme, n, **params)
    rounds = CodedRounds(make, SIZE, Waiting(mu=20.0, timeout_s=30.0), total=total)
    worker = Worker(rounds, code, {r for i, r in late if i == rank})
    brought = []
    for worker.window, jobs in enumerate(windows):
        ended = [own(rounds.run(worker)) for _ in range(jobs)]
        ended += map(own, rounds.flush(worker))
        brought.append([(one.job, one.vector, one.over) for one in ended])
    rounds.close()
    return {"brought": brought, "threads": threads(), "closed": rounds.is_closed}


def own(ended: Ended) -> Ended:
    """A copy of what a round brought, whose vector a process may then write to."""
    if ended.vector is None:
        return ended
    kept = replace(ended, vector=ended.vector.clone())
    ended.vector.fill_(torch.nan)
    return kept


@pytest.mark.parametrize(("n", "scheme", "params", "late", "windows"), RUNS)
def test_gradients_are_exact_and_alike(n: int, scheme: Any, params: Any, late: Late, windows: list[int]) -> None:
    results = in_processes(n, trained, n, scheme, params, late, windows, False)
    code = make_code(scheme, n, **params)
    for result in results:
        assert result["threads"] == []
        assert result["closed"]
        for window, ended in enumerate(result["brought"]):
            assert len(ended) == windows[window] + max(code.delay, 1)
            assert [over for _, _, over in ended] == [False] * (len(ended) - 1) + [True]
            vectors = {job: vector for job, vector, _ in ended if vector is not None}
            assert list(vectors) == list(range(windows[window]))  # each once, in order
            for job, vector in vectors.items():
                assert torch.equal(vector, gradient_of_batch(code, window, job))


@pytest.mark.parametrize(("n", "scheme", "params", "late", "windows"), RUNS)
def test_a_flush_brings_the_total(n: int, scheme: Any, params: Any, late: Late, windows: list[int]) -> None:
    results = in_processes(n, trained, n, scheme, params, late, windows, True)
    code = make_code(scheme, n, **params)
    for result in results:
        for window, ended in enumerate(result["brought"]):
            *others, (_, total, over) = ended
            assert over
            assert all(vector is None for _, vector, _ in others)
            wanted = torch.stack([gradient_of_batch(code, window, job) for job in range(windows[window])])
            assert torch.equal(total, wanted.sum(0))


def flushed(rank: int, scheme: Any, params: Any) -> dict[str, Any]:
    rounds = CodedRounds(partial(make_code, scheme, 3, **params), SIZE, Waiting(timeout_s=30.0), total=True)
    worker = Worker(rounds, make_code(scheme, 3, **params))
    empty = [rounds.flush(worker) for _ in range(2)]
    rounds.run(worker)
    full = rounds.flush(worker)
    rounds.close()
    rounds.close()  # a second time does nothing
    return {"empty": [ended[-1].vector is None and ended[-1].over for ended in empty], "full": full[-1].vector}


@pytest.mark.parametrize(
    ("scheme", "params"),
    [("gc", {"s": 1}), ("sr_sgc", {"B": 1, "W": 2, "lam": 2}), ("m_sgc", {"B": 2, "W": 3, "lam": 1})],
)
def test_a_flush_of_nothing(scheme: Any, params: Any) -> None:
    for result in in_processes(3, flushed, scheme, params):
        assert result["empty"] == [True, True]
        assert torch.equal(result["full"], gradient_of_batch(make_code(scheme, 3, **params), 0, 0))


def opened_again_and_again(rank: int) -> list[int]:
    files = []
    for _ in range(3):
        flushed(rank, "gc", {"s": 1})
        files.append(len(os.listdir("/dev/fd")))
    return files


def test_closing_leaves_no_connection_open() -> None:
    for files in in_processes(3, opened_again_and_again):
        assert files[-1] < files[0] + 2  # one more each time would be two


def late_by_a_window(rank: int, second: Any, sent: Any) -> list[Tensor | None]:
    code = make_code("gc", 3, s=1)
    rounds = CodedRounds(partial(make_code, "gc", 3, s=1), SIZE, Waiting(timeout_s=30.0))
    brought: list[Tensor | None] = []

    def compute(task: Task, row: Tensor) -> bool:
        window = len(brought)
        if rank == 2 and window == 0:
            until(second.is_set)  # and answers all the same
        if rank < 2 and window == 1:
            second.set()
            until(sent.is_set)
        write(code, window, task, row)
        return True

    for _ in range(2):
        brought.append(rounds.run(compute).vector)
        if rank == 2:
            sent.set()
        rounds.flush(compute)
    rounds.close()
    return brought


def test_a_late_result_of_an_earlier_window_is_dropped() -> None:
    code, context = make_code("gc", 3, s=1), mp.get_context("fork")
    for brought in in_processes(3, late_by_a_window, context.Event(), context.Event()):
        for window, vector in enumerate(brought):
            assert torch.equal(vector, gradient_of_batch(code, window, 0))


def late_by_many(rank: int, newest: Any, many: int) -> dict[str, Any]:
    code = make_code("gc", 3, s=1, code="cyclic")
    rounds = CodedRounds(partial(make_code, "gc", 3, s=1, code="cyclic"), SIZE, Waiting(mu=20.0, timeout_s=30.0))
    worker = Worker(rounds, code)
    reached = []

    def compute(task: Task, row: Tensor) -> bool:
        if rank == 0:
            newest.value = rounds.round
        if rank == 2 and rounds.round == 0:
            until(lambda: newest.value == _MOST_BEHIND)
            time.sleep(0.2)  # in which the others would do all their rounds, if they did not wait
            reached.append(newest.value)
        return worker(task, row)

    brought = [rounds.run(compute) for _ in range(many)]
    rounds.flush(compute)
    rounds.close()
    vectors = torch.stack([ended.vector for ended in brought if ended.vector is not None])
    return {"vectors": vectors, "begun": worker.begun, "reached": reached, "skipped": brought[-1].stats.skipped_tasks}


def test_one_that_is_far_behind_is_waited_for_and_catches_up_by_what_the_others_did() -> None:
    many = 3 * _MOST_BEHIND
    results = in_processes(3, late_by_many, mp.get_context("fork").Value("i", -1), many)
    assert results[2]["reached"] == [_MOST_BEHIND]
    assert not set(results[2]["begun"]) & set(range(1, _MOST_BEHIND))
    assert results[0]["begun"] == results[1]["begun"] == list(range(many))
    for result in results:
        assert result["vectors"].shape == (many, SIZE)
        assert torch.equal(result["vectors"], results[0]["vectors"])
        assert result["skipped"] >= _MOST_BEHIND - 1


def broken(rank: int, how: str, victim: int, params: Any, size: int) -> dict[str, Any]:
    """All run on until they hear of an error; one worker breaks in its fourth round."""
    n = 3
    rounds = CodedRounds(partial(make_code, "gc", n, **params), size, Waiting(timeout_s=1.0))

    def compute(task: Task, row: Tensor) -> bool:
        if rank == victim and rounds.round == 3:
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "fail":
                raise ZeroDivisionError("division by zero")
            until(rounds.is_over)  # hangs
        row.fill_(1.0)
        return True

    def train() -> None:
        while True:
            rounds.run(compute)

    try:
        error = outcome(train)
    except ZeroDivisionError as raised:
        rounds.fail(str(raised))
        error = "its own"
    return {"error": error, "closed": rounds.is_closed, "again": outcome(rounds.close)}


@pytest.mark.parametrize("victim", [0, 1])
def test_one_that_fails_stops_all_with_its_cause(victim: int) -> None:
    results = of_survivors(3, broken, "fail", victim, {"s": 1}, SIZE)
    for rank in range(3):
        wanted = "its own" if rank == victim else f"rank {victim} has failed: division by zero"
        assert results[rank] == {"error": wanted, "closed": True, "again": "no error"}


@pytest.mark.parametrize("victim", [0, 1])
def test_one_that_never_answers_is_named(victim: int) -> None:
    for result in of_survivors(3, broken, "hang", victim, {"s": 0}, SIZE).values():
        assert result["error"].startswith(f"rank(s) {victim} have not answered in round 3 for 1 s after they were due")
        assert result["closed"]


@pytest.mark.parametrize("size", [SIZE, 100_000])
@pytest.mark.parametrize("s", [0, 1])
@pytest.mark.parametrize("victim", [0, 1])
def test_one_that_dies_is_named(victim: int, s: int, size: int) -> None:
    results = of_survivors(3, broken, "kill", victim, {"s": s}, size)
    assert results.keys() == {0, 1, 2} - {victim}
    for result in results.values():
        assert result["error"].startswith(f"the connection to rank {victim} broke: ")
        assert result["closed"]


def hung_at_the_end(rank: int) -> str:
    rounds = CodedRounds(partial(make_code, "m_sgc", 3, B=1, W=2, lam=3), SIZE, Waiting(mu=20.0, timeout_s=1.0))
    worker = Worker(rounds, make_code("m_sgc", 3, B=1, W=2, lam=3))

    def compute(task: Task, row: Tensor) -> bool:
        if rank == 1:
            until(rounds.is_over)
        return not rounds.is_over() and worker(task, row)

    def train() -> None:
        rounds.run(compute)
        rounds.flush(compute)

    return outcome(train)


def test_one_that_never_answers_is_named_although_no_other_has_a_task() -> None:
    for error in in_processes(3, hung_at_the_end):
        assert error.startswith("rank(s) 1 have not answered in round 1 for 1 s")


def left_early(rank: int) -> str:
    rounds = CodedRounds(partial(make_code, "gc", 3, s=1), SIZE, Waiting(timeout_s=30.0))
    rounds.run(Worker(rounds, make_code("gc", 3, s=1)))
    if rank == 1:
        rounds.fail("it had enough")
    return outcome(rounds.close)


def test_a_failure_ends_the_wait_of_those_that_close() -> None:
    error = "rank 1 has failed: it had enough"
    assert of_survivors(3, left_early) == {0: error, 1: "no error", 2: error}


def stopped(rank: int, s: int, who: int) -> list[bool]:
    rounds = CodedRounds(partial(make_code, "gc", 3, s=s), SIZE, Waiting(timeout_s=30.0))
    worker = Worker(rounds, make_code("gc", 3, s=s))
    stops = []
    for r in range(4):
        rounds.stopped = rank == who and r == 2  # one round alone: what was asked for stays so
        stops.append(rounds.run(worker).stop)
    stops += [ended.stop for ended in rounds.flush(worker)]
    rounds.close()
    return stops


@pytest.mark.parametrize("who", [0, 2])
def test_all_stop_in_the_same_round(who: int) -> None:
    assert in_processes(3, stopped, 0, who) == [[False, False, True, True, True]] * 3
    with_a_code = in_processes(3, stopped, 1, who)  # one that is late may be heard in the next round
    assert with_a_code[0] == with_a_code[1] == with_a_code[2]
    assert with_a_code[0][-1]


def of_doubles(rank: int) -> Tensor | None:
    rounds = CodedRounds(partial(make_code, "gc", 3, s=1), 1, Waiting(timeout_s=30.0), dtype=torch.float64)

    def compute(task: Task, row: Tensor) -> bool:
        row.fill_(float(len(task.chunks)) * (1 + 2.0**-40))
        return True

    vector = rounds.run(compute).vector
    rounds.flush(compute)
    rounds.close()
    return vector


def test_gradients_of_doubles() -> None:
    for vector in in_processes(3, of_doubles):
        assert vector.dtype == torch.float64
        assert vector.tolist() == [3 * (1 + 2.0**-40)]
