"""What the Hessian of a loss looks like: its top eigenpairs, its density, and numbers that sum them up."""

import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from fulgurite.plugins.linalg.curvature import GGNOperator, HessianOperator, split
from fulgurite.plugins.linalg.distributed import Sharded, Whole
from fulgurite.plugins.linalg.krylov import LanczosResult, eigsh
from fulgurite.plugins.linalg.module_loss import ModuleLoss
from fulgurite.plugins.linalg.slq import SpectralMeasure, check_probes, slq

_K_WITHOUT_CLASSES = 10


@dataclass(eq=False)
class SpectrumRecord:
    """The spectrum of a Hessian at one moment; see :func:`spectrum`.

    Attributes:
        step: optimizer steps so far.
        eigenvalues: ``(k,)``, the largest ones, descending.
        residuals: ``(k,)``, an eigenvalue of the Hessian lies within the residual of each.
        measure: the whole spectrum.
        scalars: what sums it up, by name.
        vectors: ``(P, k)``, eigenvectors; of ``basis="sharded"`` this rank's rows.
    """

    step: int
    eigenvalues: Tensor
    residuals: Tensor
    measure: SpectralMeasure
    scalars: dict[str, float]
    vectors: Tensor | None = field(default=None, repr=False)


def spectrum(
    loss: ModuleLoss,
    *,
    k: int | Literal["classes"] = "classes",
    lanczos_steps: int = 80,
    n_probes: int = 4,
    ggn: bool = True,
    gradient_overlap: bool = True,
    near_zero: float = 0.01,
    tol: float = 1e-3,
    basis: Literal["full", "sharded"] = "full",
    params: Iterable[Tensor] | None = None,
    previous: Tensor | None = None,
    step: int = 0,
    group: dist.ProcessGroup | None = None,
    generator: torch.Generator | None = None,
) -> SpectrumRecord:
    """The spectrum of the Hessian H of ``loss``, and of its Gauss-Newton part G (arXiv 1706.04454, 1901.10159).

    Scalars: ``lambda_max``, ``lambda_min``; ``trace``, ``trace_stderr``, ``frobenius``; ``negative_mass``, the share of
    the negative eigenvalues in the sum of magnitudes; ``near_zero_fraction``; ``outliers``, the place of the largest
    ratio of neighbours among the top eigenvalues, ``outlier_gap``, that ratio, and ``gap_at_classes``, the larger one
    of the ratios on both sides of the C-th; ``bulk_median`` of the magnitudes; ``gradient_overlap``, the share of the
    squared gradient in the space of the top eigenvectors; ``drift``, the largest angle between that space and the
    previous one, in radians; ``ggn_lambda_max``, ``ggn_trace``, ``residual_ratio``, which is ``|H - G|_F / |H|_F``;
    ``n_products``, ``seconds``. Those that are not defined are missing.

    Args:
        loss: its kept graphs are released by its owner.
        k: eigenpairs; ``"classes"`` for ``3 C + 5`` where the loss is cross entropy of C classes, else 10.
        lanczos_steps: of each probe, one product each.
        n_probes: random vectors of signs.
        ggn: the scalars of G; dropped with a warning where G is not defined.
        gradient_overlap: costs a gradient.
        near_zero: as a fraction of the largest eigenvalue.
        tol: a residual may be that large a fraction of the largest magnitude; else more products follow.
        basis: as in :func:`lanczos`.
        params: for the principal block of some parameters; None for all.
        previous: eigenvectors of an earlier record: a warm start.
        step: for the record.
        group: the data-parallel ranks; None for all.
        generator: draws the probes, on rank 0.

    Raises:
        ValueError: for a loss that is not finite, and for an argument out of its range.
    """
    start = time.perf_counter()
    params = None if params is None else list(params)
    hessian = HessianOperator(loss, params, group=group)
    value = float(hessian.peers.agree_(hessian.loss))
    if not abs(value) < float("inf"):
        raise ValueError(f"the loss is {value}: it has no spectrum")
    classes, undefined = _classes(loss)
    gauss_newton = GGNOperator(loss, params, group=group) if ggn and undefined is None else None
    if ggn and undefined is not None:
        warnings.warn(f"no scalars of the Gauss-Newton matrix: {undefined}", stacklevel=2)
    size = hessian.shape[0]
    wanted = (3 * classes + 5 if classes else _K_WITHOUT_CLASSES) if k == "classes" else k
    if k != "classes" and k > size:
        warnings.warn(f"`k` is clipped from {k} to the {size} parameters", stacklevel=2)

    run, measure, scalars = _probe(hessian, gauss_newton, lanczos_steps, n_probes, basis, generator)
    values, vectors, residuals = _top(hessian, run, min(wanted, size), tol, basis, previous, generator)
    scalars |= _summary(measure, values, near_zero) | outliers(values, classes)
    space = Sharded(hessian) if basis == "sharded" else Whole(hessian)
    if gradient_overlap:
        gradient = hessian.gradient
        inside = space.total_(vectors.T @ space.own(gradient))
        scalars["gradient_overlap"] = float(inside.square().sum() / gradient.square().sum())
    if previous is not None:
        cosines = torch.linalg.svdvals(space.total_(previous.to(vectors).T @ vectors))
        scalars["drift"] = float(cosines.min().clamp(max=1).arccos())
    if gauss_newton is not None:
        scalars["ggn_lambda_max"] = float(eigsh(gauss_newton, 1, tol=tol, basis=basis, generator=generator).values[0])
    scalars["n_products"] = float(hessian.n_products + (gauss_newton.n_products if gauss_newton is not None else 0))
    scalars["seconds"] = time.perf_counter() - start
    return SpectrumRecord(step, values, residuals, measure, scalars, vectors)


def outliers(values: Tensor, classes: int | None = None) -> dict[str, float]:
    """Where the top eigenvalues end and the bulk begins (arXiv 1706.04454).

    Args:
        values: ``(k,)``, descending.
        classes: C; None where it is not known.

    Returns:
        ``outliers`` and ``outlier_gap`` of the largest ratio of neighbours, and ``gap_at_classes``; those defined.
    """
    positive = values[: int((values > 0).cumprod(0).sum())]
    ratios = positive[:-1] / positive[1:]
    among = ratios[: 3 * classes + 5] if classes else ratios
    found = {}
    if len(among):
        found = {"outliers": float(among.argmax() + 1), "outlier_gap": float(among.max())}
    if classes and classes >= 2 and len(ratios) >= classes:
        found["gap_at_classes"] = float(ratios[classes - 2 : classes].max())
    return found


def _summary(measure: SpectralMeasure, values: Tensor, near_zero: float) -> dict[str, float]:
    """What the measure tells of H, whose largest eigenvalues are ``values``."""
    top, size = float(values[0]), measure.size
    magnitudes = SpectralMeasure(measure.nodes.abs(), measure.weights, size)
    mass = magnitudes.moment(1)
    trace, trace_stderr = measure.trace()
    return {
        "lambda_max": top,
        "lambda_min": float(measure.nodes.min()),
        "trace": trace,
        "frobenius": (size * measure.moment(2)) ** 0.5,
        "negative_mass": measure.integrate(lambda nodes: nodes.clamp(max=0).abs())[0] / mass if mass else 0.0,
        "near_zero_fraction": magnitudes.integrate(lambda nodes: (nodes < near_zero * top).to(nodes))[0],
        "bulk_median": magnitudes.quantile(0.5),
    } | ({"trace_stderr": trace_stderr} if len(measure.nodes) > 1 else {})


def _probe(
    hessian: HessianOperator,
    gauss_newton: GGNOperator | None,
    lanczos_steps: int,
    n_probes: int,
    basis: Literal["full", "sharded"],
    generator: torch.Generator | None,
) -> tuple[LanczosResult, SpectralMeasure, dict[str, float]]:
    """The longest run, the measure, and the trace of G and its distance from H on the same probes."""
    check_probes(n_probes)
    longest: LanczosResult | None = None
    measure: SpectralMeasure | None = None
    traces, apart, norms = 0.0, 0.0, 0.0
    for _ in range(n_probes):
        probe = slq(hessian, lanczos_steps, 1, basis=basis, keep_lanczos=True, generator=generator)
        run = probe.runs.pop()  # one basis at a time, and the longest, are all that memory holds
        measure = probe if measure is None else measure.merge(probe)
        if gauss_newton is not None:
            first = run.tridiagonal()[:, 0]
            vector = run.lift(torch.eye(len(run), 1, dtype=torch.float64)[:, 0])
            image = gauss_newton @ vector
            traces += float(vector @ image) * hessian.shape[0] / n_probes
            apart += float((run.lift(first) - image).square().sum())
            norms += float(first.square().sum())
        if longest is None or len(run) > len(longest):
            longest = run
    assert longest is not None
    assert measure is not None
    if gauss_newton is None:
        return longest, measure, {}
    scalars = {"ggn_trace": traces} | ({"residual_ratio": (apart / norms) ** 0.5} if norms else {})
    return longest, measure, scalars


def _top(
    hessian: HessianOperator,
    run: LanczosResult,
    k: int,
    tol: float,
    basis: Literal["full", "sharded"],
    previous: Tensor | None,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The largest pairs: of the run where they have converged, else of more products."""
    ritz = run.ritz()
    order = (-ritz.values).argsort()[:k]
    close = ritz.residuals[order] <= tol * ritz.values.abs().max()
    if hessian.peers.decide(len(order) == k and bool(close.all()), hessian.device):
        vectors = run.lift(ritz.coefficients[:, order], whole=False)
        return ritz.values[order], vectors, ritz.residuals[order]
    space = Sharded(hessian) if basis == "sharded" else Whole(hessian)
    start = run.lift(ritz.coefficients[:, order].sum(1)) if previous is None else space.whole(previous.sum(1))
    return eigsh(hessian, k, tol=tol, v0=start, basis=basis, generator=generator)


def _classes(loss: ModuleLoss) -> tuple[int | None, ValueError | None]:
    """C of cross entropy, and why there is no Gauss-Newton matrix."""
    _, graph = next(graphs := loss.graphs())
    try:
        split(graph)
        undefined = None
    except ValueError as error:
        undefined = error
    call = graph.calls[0] if graph.calls and graph.calls[0].name == "cross_entropy" else None
    classes = None if call is None else call.input.shape[1 if call.input.dim() > 2 else -1]
    graphs.close()
    return classes, undefined
