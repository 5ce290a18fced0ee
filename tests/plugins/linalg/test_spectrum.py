import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fulgurite.plugins.linalg import HessianOperator, ModuleLoss, SpectrumRecord, spectrum
from fulgurite.plugins.linalg.spectrum import outliers
from tests.plugins.linalg.dense import CLASSES, SCALARS_OF_D, D, Dense, batch, network
from tests.plugins.linalg.test_module_loss import Plain
from tests.suites.processes import in_processes

close = torch.testing.assert_close


class Quadratic(nn.Module):
    def __init__(self, a: Tensor, theta: Tensor) -> None:
        super().__init__()
        self.a, self.theta = a, nn.Parameter(theta)

    def training_step(self, scale: float, batch_idx: int) -> Tensor:
        return scale * 0.5 * self.theta @ self.a @ self.theta


class Linear(nn.Module):
    def __init__(self, compare: Any) -> None:
        super().__init__()
        self.compare, self.net = compare, nn.Linear(4, CLASSES).double()

    def training_step(self, data: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self.compare(self.net(data[0]), data[1])


def quadratic(a: Tensor, scale: float = 1.0, **kwargs: Any) -> SpectrumRecord:
    theta = torch.ones(len(a), dtype=torch.float64)
    loss = ModuleLoss(Quadratic(a, theta), [(scale, 0)])
    return spectrum(loss, ggn=False, lanczos_steps=len(a), **kwargs)


def plain(n_probes: int = 2, rank: int | None = None, **kwargs: Any) -> SpectrumRecord:
    x, y = batch(n=8)
    mine = slice(None) if rank is None else slice(4 * rank, 4 * rank + 4)
    loss = ModuleLoss(Plain(), [((x[mine], y[mine]), 0)])
    generator = torch.Generator().manual_seed(0)
    return spectrum(loss, n_probes=n_probes, generator=generator, **{"lanczos_steps": 12, "tol": 1e-9} | kwargs)


def test_scalars_of_a_diagonal_quadratic_are_exact() -> None:
    record = quadratic(D.diag(), k=7, n_probes=2, near_zero=0.004, step=5)
    close(record.eigenvalues, D)
    assert record.step == 5
    assert record.scalars == pytest.approx(SCALARS_OF_D | {"seconds": record.scalars["seconds"]}, rel=1e-6, abs=1e-9)
    assert record.scalars["seconds"] > 0
    assert not record.measure.runs
    assert "trace_stderr" not in quadratic(D.diag(), k=7, n_probes=1).scalars


def test_a_multiple_of_the_loss_and_more_of_the_same_data() -> None:
    one, two = quadratic(D.diag(), k=3), quadratic(D.diag(), scale=2.5, k=3)
    close(two.eigenvalues, 2.5 * one.eigenvalues)
    assert two.scalars["negative_mass"] == pytest.approx(one.scalars["negative_mass"])
    twice = ModuleLoss(Plain(), [(batch(n=8), 0)] * 2)
    close(spectrum(twice, k=3, tol=1e-9, ggn=False).eigenvalues, plain(k=3).eigenvalues, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("steps", [51, 3])  # converged in the probe's run, and not
def test_a_network_against_its_dense_matrices(steps: int) -> None:
    record, dense = plain(n_probes=200 if steps == 3 else 2, k=4, lanczos_steps=steps), Dense(network(), *batch(n=8))
    h, g = dense.hessian(), dense.ggn()
    values, vectors = torch.linalg.eigh(h)
    close(record.eigenvalues, values.flip(0)[:4], rtol=1e-8, atol=1e-10)
    assert record.vectors is not None
    close(record.vectors @ record.vectors.T, vectors[:, -4:] @ vectors[:, -4:].T, rtol=0, atol=1e-6)
    gradient = dense.gradient()
    overlap = float((vectors[:, -4:].T @ gradient).square().sum() / gradient.square().sum())
    assert record.scalars["gradient_overlap"] == pytest.approx(overlap, rel=1e-6)
    assert record.scalars["ggn_lambda_max"] == pytest.approx(float(torch.linalg.eigvalsh(g)[-1]), rel=1e-6)
    if steps == 3:  # 200 probes: five times their spread, which is below the norm of the matrix
        error = 5 / 200**0.5
        assert abs(record.scalars["trace"] - float(h.trace())) < 4 * record.scalars["trace_stderr"]
        assert abs(record.scalars["ggn_trace"] - float(g.trace())) < error * float(g.norm())
        assert record.scalars["residual_ratio"] == pytest.approx(float((h - g).norm() / h.norm()), rel=error)
    else:
        assert record.scalars["lambda_min"] == pytest.approx(float(values[0]))


@pytest.mark.parametrize("compare", [F.cross_entropy, F.mse_loss])
def test_the_hessian_of_a_linear_model_is_gauss_newton(compare: Any) -> None:
    record = spectrum(ModuleLoss(Linear(compare), [(batch(compare), 0)]), k=3, n_probes=2)
    assert record.scalars["residual_ratio"] < 1e-6
    assert record.scalars["negative_mass"] < 1e-12
    assert record.scalars["ggn_trace"] == pytest.approx(record.scalars["trace"])


def test_k_follows_the_classes() -> None:
    assert len(plain(ggn=False).eigenvalues) == 3 * CLASSES + 5
    assert len(spectrum(ModuleLoss(Linear(F.mse_loss), [(batch(F.mse_loss), 0)]), ggn=False).eigenvalues) == 10
    assert len(quadratic(D.diag()).eigenvalues) == 7
    with pytest.warns(UserWarning, match="`k` is clipped from 8 to the 7 parameters"):
        quadratic(D.diag(), k=8)


def test_a_warm_start_and_the_drift() -> None:
    first = plain(k=2)
    again = plain(k=2, previous=first.vectors)
    assert again.scalars["drift"] == pytest.approx(0, abs=1e-6)
    turned = torch.eye(7, dtype=torch.float64)[:, [0, 2]]
    angle = 0.3
    turned[:2, 0] = torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
    turned[1:3, 1] = torch.tensor([math.cos(angle), 0], dtype=torch.float64)
    turned, _ = torch.linalg.qr(turned)
    record = quadratic(D.diag(), k=2, previous=turned)
    cosines = torch.linalg.svdvals(turned[:2])
    assert record.scalars["drift"] == pytest.approx(math.acos(min(1.0, float(cosines.min()))), abs=1e-6)
    cut = quadratic(torch.diag(D), k=2, previous=torch.eye(7, dtype=torch.float64)[:, [0, 6]])
    assert cut.scalars["drift"] == pytest.approx(math.pi / 2)


def test_outliers_are_counted_among_the_top_and_positive_ones() -> None:
    values = torch.tensor([10.0, 8.0, 1.0, 0.9, 0.1, -0.1, -3.0])
    assert outliers(values) == pytest.approx({"outliers": 4, "outlier_gap": 9.0})
    assert outliers(values, 3) == pytest.approx({"outliers": 4, "outlier_gap": 9.0, "gap_at_classes": 8.0})
    assert outliers(-values) == {}
    many = torch.tensor([2.0**-i for i in range(13)] + [1e-9])
    assert outliers(many, 2)["outliers"] < 12  # the gap beyond 3 C + 5 does not count


def test_a_loss_without_a_gauss_newton_matrix_warns_and_goes_on() -> None:
    loss = ModuleLoss(Quadratic(D.diag(), torch.ones(7, dtype=torch.float64)), [(1.0, 0)])
    with pytest.warns(UserWarning, match="no scalars of the Gauss-Newton matrix: no known loss function"):
        record = spectrum(loss, k=2)
    assert "ggn_trace" not in record.scalars
    bad = ModuleLoss(Quadratic(D.diag(), torch.full((7,), torch.nan, dtype=torch.float64)), [(1.0, 0)])
    with pytest.raises(ValueError, match="the loss is nan"):
        spectrum(bad)
    with pytest.raises(ValueError, match="`n_probes` counts"):
        quadratic(D.diag(), n_probes=0)


def test_a_principal_block() -> None:
    module = Plain()
    weight = module.net[2].weight
    loss = ModuleLoss(module, [(batch(n=8), 0)])
    record = spectrum(loss, k=2, params=[weight], tol=1e-10)
    close(record.eigenvalues, torch.linalg.eigvalsh(HessianOperator(loss, [weight]).to_dense()).flip(0)[:2])


def shared(rank: int, basis: Any) -> dict[str, Tensor]:
    record = plain(rank=rank, k=2, basis=basis)
    again = plain(rank=rank, k=2, basis=basis, previous=record.vectors)
    names = sorted(record.scalars.keys() - {"seconds", "n_products"})
    scalars = [record.scalars[name] for name in names]
    assert again.scalars["drift"] < 1e-4
    assert record.vectors is not None
    rows = torch.tensor(len(record.vectors))
    return {"values": record.eigenvalues, "scalars": torch.tensor(scalars, dtype=torch.float64), "rows": rows}


@pytest.mark.parametrize("basis", ["full", "sharded"])
def test_two_ranks_with_half_the_batch_are_one_with_all_of_it(basis: str) -> None:
    alone = plain(k=2)
    names = sorted(alone.scalars.keys() - {"seconds", "n_products"})
    for result in in_processes(2, shared, basis):
        close(result["values"], alone.eigenvalues, rtol=1e-7, atol=1e-9)
        expected = torch.tensor([alone.scalars[name] for name in names], dtype=torch.float64)
        close(result["scalars"], expected, rtol=1e-6, atol=1e-8)
        assert result["rows"] == (51 if basis == "full" else 26)
