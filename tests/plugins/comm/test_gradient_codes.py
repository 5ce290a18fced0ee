from collections.abc import Callable, Iterable
from io import BytesIO
from typing import Any

import pytest
import torch
from torch import Tensor

from fulgurite.plugins.comm.gradient_codes import (
    ArbitraryModel,
    BurstyModel,
    BurstyOrFewModel,
    GradientCode,
    Multiplexed,
    PerRoundModel,
    SelectiveRepeat,
    Task,
    UndecodableError,
    encoding_matrix,
    make_code,
)
from tests.plugins.comm.patterns import all_patterns

Code = GradientCode | SelectiveRepeat | Multiplexed
DIM = 2
CODES = ("balanced", "fractional_repetition", "cyclic")


def gradient(job: int, chunk: int) -> Tensor:
    """A mean gradient of whole numbers, different for each chunk of each job."""
    return torch.tensor([1000.0 * job + chunk * chunk + 1, 7.0 * chunk - job], dtype=torch.float64)


def computed(task: Task, weights: Tensor) -> Tensor:
    parts = [float(a * weights[c]) * gradient(task.job, c) for a, c in zip(task.coeffs, task.chunks, strict=True)]
    return torch.stack(parts).sum(0)


def expected(code: Code, job: int, weights: Tensor) -> Tensor:
    return torch.stack([float(weights[c]) * gradient(job, c) for c in range(code.n_chunks)]).sum(0)


def whole_weights(code: Code) -> Tensor:
    """The weights as multiples of the smallest: sums of whole numbers are exact."""
    return (code.chunk_weights / code.chunk_weights.min()).round()


def play(code: Code, pattern: Iterable[Iterable[bool]], weights: Tensor) -> dict[int, Tensor]:
    """Runs the rounds of a pattern, a column each; returns what was decodable in time."""
    decoded: dict[int, Tensor] = {}
    for r, late in enumerate(pattern):
        tasks = code.assign(r)
        for worker, is_late in enumerate(late):
            if not is_late:
                code.receive(r, worker, [computed(task, weights) for task in tasks[worker]])
        due = r - code.delay
        if due >= 0 and code.decodable(due):
            decoded[due] = code.decode(due)
    return decoded


@pytest.mark.parametrize(
    ("make", "model", "rounds"),
    [
        (lambda: GradientCode(4, 1), PerRoundModel(1), 2),
        (lambda: GradientCode(5, 2), PerRoundModel(2), 2),
        (lambda: GradientCode(6, 2, code="fractional_repetition"), PerRoundModel(2), 1),
        (lambda: SelectiveRepeat(3, B=1, W=2, lam=2), BurstyOrFewModel(1, 2, 2, 1), 4),
        (lambda: SelectiveRepeat(3, B=2, W=3, lam=2), BurstyModel(2, 3, 2), 5),
        (lambda: Multiplexed(3, B=1, W=2, lam=2), BurstyModel(1, 2, 2), 5),
        (lambda: Multiplexed(3, B=1, W=2, lam=3), BurstyModel(1, 2, 3), 4),
        (lambda: Multiplexed(3, B=2, W=3, lam=1), ArbitraryModel(2, 4, 1), 6),
        (lambda: Multiplexed(4, B=1, W=2, lam=2), BurstyModel(1, 2, 2), 3),
        (lambda: Multiplexed(2, B=2, W=4, lam=1), BurstyModel(2, 4, 1), 7),
    ],
)
def test_the_gradient_is_exact_for_every_admitted_pattern(make: Callable[[], Code], model: Any, rounds: int) -> None:
    jobs = rounds - make().delay
    weights = whole_weights(make())
    wanted = {job: expected(make(), job, weights) for job in range(jobs)}
    for pattern in all_patterns(make().n, rounds, model):
        decoded = play(make(), pattern, weights)
        assert decoded.keys() == wanted.keys(), pattern
        assert all(torch.equal(decoded[job], wanted[job]) for job in wanted), pattern


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize(
    "make",
    [
        lambda code: GradientCode(6, 2, code=code, jobs=4),
        lambda code: SelectiveRepeat(6, B=1, W=2, lam=4, code=code, jobs=4),
        lambda code: Multiplexed(6, B=1, W=2, lam=2, code=code, jobs=4),
        lambda code: Multiplexed(6, B=2, W=3, lam=2, code=code, jobs=5),
    ],
)
def test_codes_with_the_weights_of_the_batch(make: Callable[[str], Code], code: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        coded = make(code)
        late = torch.zeros(6, 4 + coded.delay + 1, dtype=torch.bool)
        late[torch.randperm(6, generator=generator)[:2], torch.randint(0, 4, (2,), generator=generator)] = True
        decoded = play(coded, late.T.tolist(), coded.chunk_weights)
        for job in range(4):
            torch.testing.assert_close(decoded[job], expected(coded, job, coded.chunk_weights), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "make",
    [
        lambda: GradientCode(7, 3),
        lambda: SelectiveRepeat(7, B=2, W=5, lam=3),
        lambda: Multiplexed(7, B=2, W=4, lam=3),
        lambda: Multiplexed(7, B=1, W=3, lam=7),
        lambda: Multiplexed(7, B=1, W=3, lam=0),
    ],
)
def test_weights_cover_the_batch_and_tasks_cost_the_load(make: Callable[[], Code]) -> None:
    code = make()
    assert code.chunk_weights.shape == (code.n_chunks,)
    assert float(code.chunk_weights.sum()) == pytest.approx(1)
    for r in range(code.delay + 1):  # from then on a round is full
        tasks = code.assign(r)
        for worker in range(code.n):
            code.receive(r, worker, [torch.zeros(1)] * len(tasks[worker]))
    costs = torch.stack([sum(code.chunk_weights[task.chunks].sum() for task in worker) for worker in tasks])
    without_repeats = 1 / 7 if code.schedule.groups == 0 else code.load  # lam = n: slots for repeats stay idle
    assert float(costs.mean()) == pytest.approx(without_repeats)


def test_numbering_of_multiplexed_chunks() -> None:
    code = Multiplexed(3, B=2, W=3, lam=1)
    E = encoding_matrix(3, 1)
    for r in range(4):
        tasks = code.assign(r)
        for worker in range(3):
            code.receive(r, worker, [torch.zeros(1)] * len(tasks[worker]))
    for i, worker in enumerate(tasks):
        assert [(task.job, task.kind, task.index) for task in worker] == [
            (3, "plain", 0),
            (2, "plain", 1),
            (1, "coded", 0),
            (0, "coded", 1),
        ]
        assert [task.chunks for task in worker[:2]] == [[2 * i], [2 * i + 1]]
        for group, task in enumerate(worker[2:]):
            assert task.chunks == [6 + 3 * group + c for c in range(3) if E[i, c]]
            assert task.coeffs.tolist() == [1.0] * len(task.chunks)


def test_a_lost_chunk_is_a_plain_task_in_a_coded_slot() -> None:
    code = Multiplexed(3, B=1, W=2, lam=1)
    weights = whole_weights(code)
    tasks = code.assign(0)
    for worker in (1, 2):
        code.receive(0, worker, [computed(task, weights) for task in tasks[worker]])
    tasks = code.assign(1)
    assert [(task.job, task.kind, task.index, task.chunks) for task in tasks[0]] == [
        (1, "plain", 0, [0]),
        (0, "plain", 0, [0]),
    ]
    assert [task.kind for task in tasks[1]] == ["plain", "coded"]
    for worker in range(3):
        code.receive(1, worker, [computed(task, weights) for task in tasks[worker]])
    assert torch.equal(code.decode(0), expected(code, 0, weights))


def test_a_worker_can_build_the_task_from_its_name() -> None:
    code = Multiplexed(5, B=2, W=3, lam=2, code="cyclic", seed=3)
    other = Multiplexed(5, B=2, W=3, lam=2, code="cyclic", seed=3)
    for r in range(4):
        for worker, tasks in enumerate(code.assign(r)):
            for task in tasks:
                built = other.task(worker, task.job, task.kind, task.index)
                assert built.chunks == task.chunks
                assert torch.equal(built.coeffs, task.coeffs)
            code.receive(r, worker, [torch.zeros(1)] * len(tasks))


@pytest.mark.parametrize("code", CODES)
def test_late_results_serve_open_jobs_once(code: str) -> None:
    coded = Multiplexed(4, B=2, W=3, lam=1, code=code)
    weights = whole_weights(coded)
    kept = []
    for r in range(4):
        tasks = coded.assign(r)
        kept.append([[computed(task, weights) for task in worker] for worker in tasks])
        for worker in range(4):
            if (r, worker) not in {(0, 2), (1, 2)}:
                coded.receive(r, worker, kept[r][worker])
                coded.receive(r, worker, kept[r][worker])  # a second copy counts for nothing
        if r == 2:
            assert [task.kind for task in tasks[2]] == ["plain"] * 3
            coded.receive(1, 2, kept[1][2])  # chunk 1 of job 0 and chunk 0 of job 1
        if r == 3:
            assert [(task.job, task.kind) for task in tasks[2]] == [
                (3, "plain"),
                (2, "plain"),
                (1, "coded"),
                (0, "coded"),
            ]
    torch.testing.assert_close(coded.decode(0), expected(coded, 0, weights), rtol=1e-9, atol=1e-9)
    for r in range(4, 9):
        coded.assign(r)
    coded.receive(0, 2, [])  # whatever it holds: its jobs are over
    with pytest.raises(UndecodableError, match="job 0 is not open: its results are kept from round 0 to round 3"):
        coded.decode(0)


def test_a_late_result_leaves_the_worker_late() -> None:
    code = GradientCode(3, 0)
    code.assign(0)
    code.receive(0, 1, [torch.ones(1)])
    code.assign(1)
    code.receive(0, 0, [torch.ones(1)])
    assert not code.decodable(0)
    late = Multiplexed(3, B=1, W=2, lam=1)
    for r in range(2):
        late.assign(r)
        for worker in range(1, 3):
            late.receive(r, worker, [torch.ones(1)] * (r + 1))
        if r == 1:
            late.receive(0, 0, [torch.ones(1)])
    assert late.affordable(1, {0}, "complete")  # its chunk came after all
    assert not late.affordable(1, {0}, "conform")  # but it was late twice in a row


def test_a_pattern_outside_of_the_model_is_never_decoded_wrongly() -> None:
    generator = torch.Generator().manual_seed(0)
    seen = {True: 0, False: 0}
    for make in (
        lambda: GradientCode(5, 1),
        lambda: SelectiveRepeat(5, B=1, W=2, lam=2),
        lambda: Multiplexed(5, B=1, W=2, lam=1),
    ):
        for _ in range(30):
            code = make()
            weights = whole_weights(code)
            for r in range(6):
                tasks = code.assign(r)
                for worker in range(5):
                    if torch.rand((), generator=generator) < 0.7:
                        code.receive(r, worker, [computed(task, weights) for task in tasks[worker]])
                due = r - code.delay
                if due >= 0:
                    seen[code.decodable(due)] += 1
                    if code.decodable(due):
                        assert torch.equal(code.decode(due), expected(code, due, weights))
                    else:
                        with pytest.raises(UndecodableError, match=rf"job {due} cannot be decoded yet: have \d+, need"):
                            code.decode(due)
    assert min(seen.values()) > 50


@pytest.mark.parametrize(("n", "s"), [(7, 2), (9, 2), (12, 4)])
@pytest.mark.parametrize("B", [1, 2])
def test_sums_take_the_place_of_results(n: int, s: int, B: int) -> None:
    """At most ``s + 2`` vectors an open job, however late workers are."""
    generator = torch.Generator().manual_seed(0)
    code = Multiplexed(n, B=B, W=3, lam=s)
    most = 0
    for r in range(20):
        tasks = code.assign(r)
        for worker in torch.randperm(n, generator=generator).tolist():
            if torch.rand((), generator=generator) < 0.8:
                code.receive(r, worker, [torch.ones(DIM)] * len(tasks[worker]))
            sums = code.state_dict()["sums"]
            assert len(sums) <= code.delay + 1
            for job in sums.values():
                most = max(most, (job["total"] is not None) + len(job["parts"]))
                assert (job["total"] is not None) + len(job["parts"]) <= 1 + B * (s + 1)
    assert most >= 2 or n % (s + 1) == 0


def test_results_are_not_kept_nor_changed() -> None:
    for code in ("balanced", "cyclic"):
        coded = GradientCode(5, 1, code=code)
        tasks = coded.assign(0)
        buffer = torch.zeros(DIM, dtype=torch.float64)
        for worker in range(1, 5):
            buffer.copy_(computed(tasks[worker][0], coded.chunk_weights))
            before = buffer.clone()
            coded.receive(0, worker, [buffer])
            assert torch.equal(buffer, before)
            buffer.fill_(torch.nan)
        torch.testing.assert_close(coded.decode(0), expected(coded, 0, coded.chunk_weights))


@pytest.mark.parametrize(
    "make",
    [
        lambda: GradientCode(5, 2),
        lambda: GradientCode(5, 2, code="cyclic"),
        lambda: SelectiveRepeat(5, B=2, W=3, lam=3),
        lambda: Multiplexed(5, B=2, W=3, lam=2, code="cyclic"),
        lambda: Multiplexed(7, B=1, W=3, lam=2),
    ],
)
def test_state_goes_on_in_the_middle_of_a_round(make: Callable[[], Code]) -> None:
    def rest(code: Code, r: int, workers: range) -> None:
        tasks = code.assign(r)
        for worker in workers:
            code.receive(r, worker, [computed(task, code.chunk_weights) for task in tasks[worker]])

    for stop in range(4):
        code, again = make(), make()
        for r in range(stop):
            rest(code, r, range(code.n - (r == 0)))
        rest(code, stop, range(2))
        buffer = BytesIO()
        torch.save(code.state_dict(), buffer)
        rest(code, stop, range(2, code.n))  # what goes on does not change what was saved
        buffer.seek(0)
        again.load_state_dict(torch.load(buffer, weights_only=True))
        rest(again, stop, range(2, code.n))
        for r in range(stop + 1, stop + 1 + code.delay):
            rest(code, r, range(code.n))
            rest(again, r, range(code.n))
        assert torch.equal(code.decode(stop), again.decode(stop))
        for missing in ({0}, {0, 1}, {0, 1, 2}):
            for rule in ("complete", "conform"):
                r = stop + code.delay
                assert code.affordable(r, missing, rule) == again.affordable(r, missing, rule)


def test_no_sums_are_left_when_all_jobs_are_over() -> None:
    code = Multiplexed(3, B=1, W=2, lam=1, jobs=2)
    for r in range(5):
        for worker, tasks in enumerate(code.assign(r)):
            code.receive(r, worker, [torch.ones(1)] * len(tasks))
        assert any(map(len, code.assign(r))) == (r < 3)
    assert code.state_dict()["sums"] == {}


def test_a_copy_of_a_state_is_apart() -> None:
    code = GradientCode(4, 1)
    code.assign(0)
    code.receive(0, 0, [torch.ones(2)])
    state = code.state_dict()
    code.receive(0, 1, [torch.ones(2)])
    code.receive(0, 2, [torch.ones(2)])
    again = GradientCode(4, 1)
    again.load_state_dict(state)
    assert not again.decodable(0)
    again.receive(0, 3, [torch.full((2,), 5.0)])
    assert again.decode(0).tolist() == [6, 6]
    assert code.decode(0).tolist() == [2, 2]


def test_more_than_s_may_be_missing_where_the_others_hold_all_chunks() -> None:
    code = GradientCode(6, 2)  # workers 0 1 2 hold one half, 3 4 5 the other
    tasks = code.assign(0)
    for worker in (1, 5):
        code.receive(0, worker, [computed(tasks[worker][0], whole_weights(code))])
    assert torch.equal(code.decode(0), expected(code, 0, whole_weights(code)))
    assert not code.affordable(0, {0, 2, 3, 4})


def test_bad_calls() -> None:
    code = Multiplexed(4, B=1, W=2, lam=1)
    with pytest.raises(ValueError, match="`r` is 0, and the last round assigned is -1: assign it first"):
        code.receive(0, 0, [])
    code.assign(0)
    with pytest.raises(ValueError, match="one vector for each of the 1 tasks of worker 2 in round 0, got 2"):
        code.receive(0, 2, [torch.ones(1)] * 2)
    with pytest.raises(ValueError, match="`worker` must be from 0 to 3, got 4"):
        code.receive(0, 4, [torch.ones(1)])
    with pytest.raises(ValueError, match="`r` must be the round that runs, 0, got 1"):
        code.affordable(1, set())
    with pytest.raises(ValueError, match="`r` must be the round after the last, 1, got 2"):
        code.assign(2)
    with pytest.raises(UndecodableError, match="job 0 cannot be decoded yet: have 0, need 4 results of plain chunks"):
        code.decode(0)


def test_decode_says_what_it_lacks() -> None:
    code = GradientCode(7, 2)
    code.assign(0)
    for worker in (0, 1):
        code.receive(0, worker, [torch.ones(1)])
    assert not code.decodable(0)
    with pytest.raises(UndecodableError, match="job 0 cannot be decoded yet: have 2, need 5 coded results of group 0"):
        code.decode(0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GradientCode(4, 4), "`s` is how many of the 4 workers may be missing .* got 4"),
        (lambda: GradientCode(5, 1, code="fractional_repetition"), r"to divide the 5 workers: use code='balanced'"),
        (lambda: SelectiveRepeat(4, B=2, W=4, lam=1), "`B` must divide `W` - 1"),
        (lambda: Multiplexed(4, B=2, W=2, lam=1), "`B` is the length of a burst"),
        (lambda: Multiplexed(4, B=1, W=2, lam=5), "`lam` counts late workers and must be at most the 4"),
        (lambda: Multiplexed(4, B=1, W=2, lam=1, jobs=0), "`jobs` counts gradients"),
    ],
)
def test_bad_arguments(make: Callable[[], Code], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "make",
    [
        lambda: GradientCode(4, 2),
        lambda: SelectiveRepeat(4, B=1, W=2, lam=2),
        lambda: SelectiveRepeat(4, B=2, W=3, lam=4),
        lambda: Multiplexed(4, B=1, W=2, lam=2),
        lambda: Multiplexed(4, B=2, W=4, lam=1),
        lambda: Multiplexed(4, B=2, W=3, lam=4),
    ],
)
@pytest.mark.parametrize("jobs", [0, 1, 2, 5])
def test_the_end_is_that_of_a_code_that_knew_it(make: Callable[[], Code], jobs: int) -> None:
    """The round in which the end is told has been given out with a job more; a worker is late in the one before."""
    code = make()
    weights = whole_weights(code)
    for r in range(jobs):
        tasks = code.assign(r)
        for worker in range(code.n - (r == jobs - 1)):
            code.receive(r, worker, [computed(task, weights) for task in tasks[worker]])
        if r >= code.delay:
            assert torch.equal(code.decode(r - code.delay), expected(code, r - code.delay, weights))
    assert all(task.job == jobs for tasks in code.assign(jobs) for task in tasks[:1] if task.kind == "plain")
    tasks = code.end()
    for r in range(jobs, jobs + code.delay):
        assert all(task.job < jobs for worker in tasks for task in worker)
        assert [[(task.job, task.chunks) for task in own] for own in code.assign(r)] == [
            [(task.job, task.chunks) for task in own] for own in tasks
        ]
        for worker in range(code.n):
            code.receive(r, worker, [computed(task, weights) for task in tasks[worker]])
        if r >= code.delay:
            assert torch.equal(code.decode(r - code.delay), expected(code, r - code.delay, weights))
        tasks = code.assign(r + 1)
    assert tasks == [[]] * code.n
    with pytest.raises(UndecodableError, match=f"job {jobs} is not open"):
        code.decode(jobs)


def test_an_end_does_not_put_off_an_earlier_one() -> None:
    code = GradientCode(3, 1, jobs=1)
    for r in range(4):
        code.assign(r)
    assert code.end() == [[]] * 3
    assert code.schedule.jobs == 1


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize(
    "make",
    [
        lambda code: GradientCode(6, 2, code=code),
        lambda code: SelectiveRepeat(6, B=1, W=2, lam=4, code=code),
        lambda code: Multiplexed(6, B=2, W=3, lam=2, code=code),
        lambda code: Multiplexed(6, B=1, W=3, lam=6, code=code),
    ],
)
def test_a_worker_is_given_the_chunks_that_it_holds(make: Callable[[str], Code], code: str) -> None:
    coded = make(code)
    generator = torch.Generator().manual_seed(0)
    given = [set[int]() for _ in range(6)]
    for r in range(30):
        for worker, tasks in enumerate(coded.assign(r)):
            given[worker] |= {chunk for task in tasks for chunk in task.chunks}
            if torch.rand((), generator=generator) < 0.7:
                coded.receive(r, worker, [torch.zeros(1)] * len(tasks))
    held = [coded.chunks_of(worker) for worker in range(6)]
    assert held == [sorted(chunks) for chunks in given]
    assert set().union(*held) == set(range(coded.n_chunks))


def test_the_error_of_a_decoding() -> None:
    errors = {}
    for name in CODES:
        code = GradientCode(6, 2, code=name, seed=1)
        tasks = code.assign(0)
        assert code.decode_error(0) == 0
        for worker in (0, 2, 3, 5):
            code.receive(0, worker, [computed(tasks[worker][0], code.chunk_weights)])
        errors[name] = code.decode_error(0)
    matrix = encoding_matrix(6, 2, "cyclic", 1)
    combination = torch.linalg.lstsq(matrix[[0, 2, 3, 5]].T, torch.ones(6, 1, dtype=torch.float64)).solution
    residual = float((combination.T @ matrix[[0, 2, 3, 5]] - 1).abs().max())
    assert errors["balanced"] == errors["fractional_repetition"] == 0
    assert 0 < errors["cyclic"] < 1e-12 > residual


@pytest.mark.parametrize(
    ("scheme", "params", "kind"),
    [
        ("gc", {"s": 2}, GradientCode),
        ("gc", {"s": 0}, GradientCode),
        ("sr_sgc", {"B": 1, "W": 2, "lam": 2}, SelectiveRepeat),
        ("m_sgc", {"B": 1, "W": 2, "lam": 2}, Multiplexed),
    ],
)
def test_a_code_by_its_name(scheme: Any, params: dict[str, int], kind: type[Code]) -> None:
    code = make_code(scheme, 5, **params, code="cyclic", seed=4)
    alike = kind(5, **params, code="cyclic", seed=4)
    assert type(code) is kind
    assert (code.load, code.delay, code.n_chunks) == (alike.load, alike.delay, alike.n_chunks)
    own = code.task(1, 0, "coded", 0)
    assert torch.equal(own.coeffs, alike.task(1, 0, "coded", 0).coeffs)


@pytest.mark.parametrize(
    ("scheme", "params", "message"),
    [
        ("gc", {}, "`s`"),
        ("gc", {"s": 1, "B": 1}, "`B`"),
        ("gc", {"s": 5}, "`s` is how many of the 5 workers may be missing"),
        ("m_sgc", {"s": 1, "B": 1, "W": 2, "lam": 1}, "`s`"),
        ("m_sgc", {"B": 1, "W": 2}, "`lam`"),
        ("sr_sgc", {"B": 2, "W": 4, "lam": 1}, "`B` must divide `W` - 1"),
        ("mds", {"s": 1}, "mds"),
    ],
)
def test_bad_names_and_parameters(scheme: Any, params: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_code(scheme, 5, **params)
