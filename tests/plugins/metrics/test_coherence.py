import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fulgurite.plugins.linalg import per_example_sq_norms
from fulgurite.plugins.metrics import MCoherence, m_coherence
from tests.suites.processes import in_processes

ORACLES = [
    (torch.eye(4), 1.0),
    (torch.ones(5, 3), 5.0),
    (torch.tensor([[1.0, 0], [1, 0], [0, 1]]), 5 / 3),
    (torch.tensor([[1.0, 0], [-1, 0]]), 0.0),
    (torch.tensor([[3.0, 4], [0, 5]]), 1.8),
    (torch.tensor([[1.0], [-2]]), 1 / 5),
    (torch.eye(3).repeat_interleave(4, 0), 4.0),
]


def rows(m: int = 7, dim: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(m, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 0.3


@pytest.mark.parametrize(("grads", "expected"), ORACLES)
def test_cases_by_hand(grads: Tensor, expected: float) -> None:
    assert float(m_coherence(grads)) == pytest.approx(expected)
    m = len(grads)
    for how, value in (("m", expected), ("one", expected / m), ("unbiased", (expected - 1) / (m - 1))):
        metric = MCoherence(normalize=how)
        metric.update_grads(grads)
        assert float(metric.compute()) == pytest.approx(value, abs=1e-7)


@given(seed=st.integers(0, 2**16), scale=st.floats(1e-3, 1e3))
def test_does_not_depend_on_scale_rotation_or_order(seed: int, scale: float) -> None:
    grads = rows(seed=seed)
    rotation = torch.linalg.qr(rows(5, 5, seed + 1)).Q
    expected = m_coherence(grads)
    torch.testing.assert_close(m_coherence(scale * grads), expected)
    torch.testing.assert_close(m_coherence(grads @ rotation), expected)
    torch.testing.assert_close(m_coherence(grads.flip(0)), expected)
    assert 0 <= expected <= len(grads) + 1e-9


def test_says_what_a_step_on_one_example_does() -> None:
    """A small step on g_i lowers the mean loss ``alpha_m`` times as much as if only i profited, on average."""
    grads = rows()
    gained = (grads @ grads.mean(0)).sum()
    alone = grads.square().sum() / len(grads)
    torch.testing.assert_close(gained / alone, m_coherence(grads))


def test_unbiased_is_the_mean_over_pairs_of_different_examples() -> None:
    grads = rows()
    products = grads @ grads.T
    m = len(grads)
    pairs = (products.sum() - products.trace()) / (m * (m - 1))
    metric = MCoherence("unbiased")
    metric.update_grads(grads)
    torch.testing.assert_close(metric.compute(), pairs / (products.trace() / m))


@pytest.mark.parametrize("sizes", [[7], [1, 6], [3, 3, 1]], ids=str)
@pytest.mark.parametrize("per_layer", [False, True])
def test_chunks_do_not_matter(sizes: list[int], per_layer: bool) -> None:
    grads = rows()
    metric = MCoherence(per_layer=per_layer)
    for part in grads.split(sizes):
        sums = {"a": part[:, :2].sum(0), "b": part[:, 2:].sum(0)}
        metric.update(sums, {"a": part[:, :2].square().sum(), "b": part[:, 2:].square().sum()}, len(part))
    layers = {"a": m_coherence(grads[:, :2]), "b": m_coherence(grads[:, 2:])}
    torch.testing.assert_close(metric.compute(), layers if per_layer else m_coherence(grads))
    metric.reset()
    one = torch.tensor(1.0, dtype=torch.float64)
    metric.update({"a": one.expand(2), "b": one.expand(3)}, {"a": 2 * one, "b": 3 * one}, 1)
    torch.testing.assert_close(metric.compute(), {"a": one, "b": one} if per_layer else one)


def test_the_whole_is_the_mean_of_layers_weighted_by_their_squares() -> None:
    grads = rows()
    parts = grads.split([2, 3], 1)
    squares = torch.stack([part.square().sum() for part in parts])
    layers = torch.stack([m_coherence(part) for part in parts])
    torch.testing.assert_close((squares * layers).sum() / squares.sum(), m_coherence(grads))


def test_from_an_ordinary_backward() -> None:
    """Linear regression: ``g_i = 2 (x_i w - y_i) x_i``."""
    x, y = rows(6, 4), rows(6, 1, 3)
    net = nn.Linear(4, 1, bias=False).double()
    with per_example_sq_norms(net) as norms:
        nn.MSELoss()(net(x), y).backward()
    metric = MCoherence()
    metric.update(net.weight.grad, norms["weight"].sum(), 6)
    torch.testing.assert_close(metric.compute(), m_coherence((2 * (net(x) - y) * x).detach()))


def test_zero_gradients_have_no_coherence() -> None:
    metric = MCoherence()
    metric.update_grads(torch.zeros(3, 2))
    assert math.isnan(metric.compute())


def two_ranks(rank: int) -> None:
    metric = MCoherence(per_layer=True)
    for part in rows()[:4] if rank == 0 else rows()[4:]:
        metric.update({"all": part}, {"all": part.square().sum()}, 1)
    torch.testing.assert_close(metric.compute(), {"all": m_coherence(rows())})


def test_ranks_are_one() -> None:
    in_processes(2, two_ranks)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (({"a": torch.ones(2)}, {"b": torch.tensor(2.0)}), None, r"\['a', 'b'\]"),
        ((torch.ones(2), torch.ones(2)), None, r"got \(2,\) and \(2,\)"),
        (({"a": torch.ones(2)}, {"a": torch.tensor(2.0)}), (torch.ones(2), torch.tensor(2.0)), r"\['', 'a'\]"),
        ((torch.ones(2), torch.tensor(2.0)), (torch.ones(3), torch.tensor(2.0)), r"shape \(2,\) and \(\), got \(3,\)"),
    ],
)
def test_refuses_what_does_not_fit(first: Any, second: Any, message: str) -> None:
    metric = MCoherence()
    if second is not None:
        metric.update(*first, 1)
    with pytest.raises(ValueError, match=message):
        metric.update(*(second or first), 1)


def test_refuses_a_wrong_argument_and_nothing() -> None:
    with pytest.raises(ValueError, match=r"`normalize` must be one of \('m', 'one', 'unbiased'\), got 'two'"):
        MCoherence(normalize="two")  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="has seen no gradient"):
        MCoherence().compute()
