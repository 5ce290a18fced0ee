from functools import partial
from typing import Any

import pytest
import torch

from fulgurite.plugins.comm.coded_root import Waiting
from fulgurite.plugins.comm.coded_rounds import CodedRounds
from fulgurite.plugins.comm.gradient_codes import make_code
from tests.plugins.comm.rounds import SIZE, Worker
from tests.suites.processes import in_processes

ROUNDS = 5


def watched(rank: int, params: dict[str, Any], late: dict[int, set[int]], mu: float, record: bool) -> dict[str, Any]:
    make = partial(make_code, "gc", 3, **params)
    rounds = CodedRounds(make, SIZE, Waiting(mu=mu, timeout_s=30.0), record=record)
    worker = Worker(rounds, make(), late.get(rank, set()))
    stats = [rounds.run(worker).stats for _ in range(ROUNDS)]
    rounds.flush(worker)
    rounds.close()
    times = torch.stack(rounds.times()) if rounds.times() else torch.zeros(0, 3)
    return {"times": times, **{name: [getattr(one, name) for one in stats] for name in vars(stats[0])}}


def test_what_is_told_of_a_round_that_waits_for_all() -> None:
    results = in_processes(3, watched, {"s": 0}, {}, 100.0, True)
    for told in results:
        assert told["stragglers"] == told["waits"] == told["skipped_tasks"] == told["decode_error"] == [0] * ROUNDS
        vector = 4 * SIZE  # from and to each of two workers; nothing comes back in the first round
        assert told["bytes_sent"] == [2 * vector] + [4 * vector] * (ROUNDS - 1)
        assert min(told["round_s"]) > 0
    times = results[0]["times"]
    assert times.shape == (ROUNDS, 3)
    assert bool((times > 0).all())
    assert bool((times.max(1).values <= torch.tensor(results[0]["round_s"], dtype=torch.float64)).all())
    assert len(results[1]["times"]) == len(results[2]["times"]) == 0


def test_what_is_told_of_late_workers() -> None:
    """The cyclic code needs two of three workers: with a late one neither more nor fewer."""
    late = {1: {1}, 2: {0, 3}}
    results = in_processes(3, watched, {"s": 1, "code": "cyclic"}, late, 20.0, True)
    for told in results:
        assert [told["stragglers"][r] for r in (0, 1, 3)] == [1, 1, 1]
        assert sorted(told["skipped_tasks"]) == told["skipped_tasks"]
        assert told["skipped_tasks"][-1] >= 2
        assert 0 < max(told["decode_error"]) < 1e-9
        assert told["round_s"] == results[0]["round_s"]
    missing = results[0]["times"].isnan()
    for r, rank in [(0, 2), (1, 1), (3, 2)]:
        assert missing[r].nonzero().tolist() == [[rank]]


def test_a_round_that_outlasts_its_patience_is_a_wait() -> None:
    """The round that a late worker does not let end: it answers after a while, being indispensable."""
    told = in_processes(3, watched, {"s": 0}, {1: {2}}, 20.0, False)[0]
    assert told["waits"] == [0, 0, 1, 1, 1]
    assert told["stragglers"] == [0] * ROUNDS
    assert len(told["times"]) == 0


@pytest.mark.parametrize("rule", ["complete", "conform"])
def test_both_rules_wait_for_what_they_must(rule: Any) -> None:
    assert in_processes(4, crowds, rule) == [[2 if rule == "complete" else 0, True]] * 4


def crowds(rank: int, rule: Any) -> list[Any]:
    """Four workers are late in three rounds, twice as many as the model bears; all can be made up for all the same."""
    make = partial(make_code, "sr_sgc", 4, B=1, W=3, lam=2)
    rounds = CodedRounds(make, SIZE, Waiting(mu=20.0, rule=rule, timeout_s=30.0))
    worker = Worker(rounds, make(), {0} if rank > 1 else {2})
    ended = [rounds.run(worker) for _ in range(5)]
    ended += rounds.flush(worker)
    rounds.close()
    return [ended[2].stats.stragglers, all(one.vector is not None for one in ended[1:])]
