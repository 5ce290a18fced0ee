import math
from itertools import combinations

import pytest
import torch

from fulgurite.plugins.comm.gradient_codes import UndecodableError, decode_vector, encoding_matrix

CODES = ("balanced", "fractional_repetition", "cyclic")


def possible(n: int, s: int, code: str) -> bool:
    return code != "fractional_repetition" or n % (s + 1) == 0


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("n", range(1, 8))
def test_any_s_workers_may_be_missing(n: int, code: str) -> None:
    for s in range(n):
        if not possible(n, s, code):
            continue
        E = encoding_matrix(n, s, code)
        assert E.shape == (n, n)
        assert E.dtype == torch.float64
        for received in combinations(range(n), n - s):
            a = decode_vector(E, received)
            assert float((a @ E - 1).abs().max()) < 1e-6
            assert set(a.nonzero()[:, 0].tolist()) <= set(received)
            if code != "cyclic":
                assert set(a.tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("n", range(1, 8))
def test_one_more_missing_can_be_too_many(n: int) -> None:
    for code in CODES:
        for s in range(n):
            if possible(n, s, code):
                E = encoding_matrix(n, s, code)
                few = [[i for i in range(n) if i not in gone] for gone in combinations(range(n), s + 1)]
                failed = 0
                for received in few:
                    try:
                        decode_vector(E, received)
                    except UndecodableError:
                        failed += 1
                assert failed, (code, s)


def test_no_code_is_the_identity() -> None:
    for code in CODES:
        assert torch.equal(encoding_matrix(6, 0, code), torch.eye(6, dtype=torch.float64))


@pytest.mark.parametrize(("n", "s"), [(6, 2), (8, 3), (256, 15)])
def test_fractional_repetition_has_blocks(n: int, s: int) -> None:
    group = torch.arange(n) // (s + 1)
    blocks = (group[:, None] == group).double()
    assert torch.equal(encoding_matrix(n, s, "fractional_repetition"), blocks)
    assert torch.equal(encoding_matrix(n, s, "balanced"), blocks)


def test_balanced_classes_cut_the_chunks_into_runs() -> None:
    E = encoding_matrix(7, 2)  # classes 0 3 6, 1 4, 2 5
    assert E[[0, 3, 6]].tolist() == [[1, 1, 0, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1]]
    for members in ([1, 4], [2, 5]):
        assert E[members].tolist() == [[1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1, 1]]


@pytest.mark.parametrize(("n", "s"), [(256, 27), (256, 15), (64, 15), (10, 3), (9, 8)])
def test_largest_load_of_balanced(n: int, s: int) -> None:
    assert int(encoding_matrix(n, s).sum(1).max()) == math.ceil(n / (n // (s + 1)))


def test_largest_load_named_for_256_workers() -> None:
    assert int(encoding_matrix(256, 27).sum(1).max()) == 29


def test_cyclic_supports() -> None:
    E = encoding_matrix(7, 2, "cyclic")
    for i in range(7):
        assert E[i, i] == 1
        assert sorted(E[i].nonzero()[:, 0].tolist()) == sorted((i + step) % 7 for step in range(3))


def test_cyclic_depends_on_its_seed_alone() -> None:
    first = encoding_matrix(7, 2, "cyclic", seed=3)
    torch.rand(5)
    assert torch.equal(first, encoding_matrix(7, 2, "cyclic", seed=3))
    assert not torch.equal(first, encoding_matrix(7, 2, "cyclic", seed=4))


def test_a_matrix_belongs_to_its_caller() -> None:
    encoding_matrix(5, 1).zero_()
    assert encoding_matrix(5, 1).sum() == 10


@pytest.mark.parametrize(("n", "s"), [(8, 2), (64, 15), (256, 27)])
def test_balanced_sums_of_whole_numbers_are_exact(n: int, s: int) -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randint(-999, 999, (n, 5), generator=generator).float()
    E = encoding_matrix(n, s)
    for _ in range(20):
        received = torch.randperm(n, generator=generator)[: n - s].tolist()
        decoded = decode_vector(E, received).float() @ (E.float() @ gradients)
        assert torch.equal(decoded, gradients.sum(0))


@pytest.mark.parametrize(
    ("n", "s", "median", "worst"),
    [(8, 2, 3e-6, 1e-4), (64, 15, 5e-4, 2e-2)],
)
def test_cyclic_amplifies_the_rounding_of_floats(n: int, s: int, median: float, worst: float) -> None:
    def errors(code: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        E, found = encoding_matrix(n, s, code), []
        for _ in range(20):
            gradients = torch.randn(n, 50, dtype=torch.float64, generator=generator)
            received = torch.randperm(n, generator=generator)[: n - s].tolist()
            sent = (E @ gradients).float()
            decoded = decode_vector(E, received).float() @ sent
            found.append((decoded - gradients.sum(0)).norm() / gradients.sum(0).norm())
        return torch.stack(found)

    cyclic, balanced = errors("cyclic"), errors("balanced")
    assert float(cyclic.median()) < median
    assert float(cyclic.max()) < worst
    assert float(balanced.max()) < 1e-6
    assert float(cyclic.median()) > float(balanced.max())


def test_received_workers_may_be_more_than_needed_and_in_any_order() -> None:
    for code in CODES:
        E = encoding_matrix(6, 2, code)
        for received in ([5, 4, 3, 2, 1, 0], [0, 1, 2, 3, 4], [4, 4, 0, 2, 1]):
            assert float((decode_vector(E, received) @ E - 1).abs().max()) < 1e-6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 4), r"`s` is how many of the 4 workers may be missing and must be from 0 to 3, got 4"),
        ((4, -1), r"`s` .* got -1"),
        ((0, 0), r"`n` counts workers .* got 0"),
        ((7, 2, "fractional_repetition"), r"needs `s` \+ 1 \(3\) to divide the 7 workers: use code='balanced'"),
        ((7, 2, "random"), r"`code` must be one of .*, got 'random'"),
    ],
)
def test_bad_codes(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encoding_matrix(*arguments)


def test_bad_received() -> None:
    E = encoding_matrix(4, 1)
    with pytest.raises(ValueError, match=r"`received` must name workers from 0 to 3, got \[2, 4\]"):
        decode_vector(E, [4, 2])
    for received in ([], [0, 1]):
        with pytest.raises(UndecodableError, match=f"`received` holds the results of {len(received)} of 4 workers"):
            decode_vector(E, received)
    with pytest.raises(UndecodableError):
        decode_vector(encoding_matrix(6, 2, "cyclic"), [0, 1, 2])
