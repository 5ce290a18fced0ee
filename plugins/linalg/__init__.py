"""Curvature of the loss that a training step computes: matrix-free operators, Krylov methods and spectra."""

from fulgurite.plugins.linalg.curvature import FisherOperator, GGNOperator, HessianOperator, LossOperator
from fulgurite.plugins.linalg.example_gradients import example_gradients, per_example_sq_norms
from fulgurite.plugins.linalg.example_uses import Uses
from fulgurite.plugins.linalg.krylov import CGResult, EigenResult, LanczosResult, Ritz, cg, eigsh, lanczos
from fulgurite.plugins.linalg.module_loss import ModuleLoss
from fulgurite.plugins.linalg.operators import (
    CurvatureOperator,
    DenseOperator,
    DiagonalOperator,
    FunctionOperator,
    LowRankOperator,
)
from fulgurite.plugins.linalg.path import PathResult, connecting_path
from fulgurite.plugins.linalg.record import LossCall, LossGraph, record_loss
from fulgurite.plugins.linalg.slq import SpectralMeasure, hutchinson_diagonal, hutchinson_trace, slq
from fulgurite.plugins.linalg.spectrum import SpectrumRecord, spectrum

__all__ = [
    "CGResult",
    "CurvatureOperator",
    "DenseOperator",
    "DiagonalOperator",
    "EigenResult",
    "FisherOperator",
    "FunctionOperator",
    "GGNOperator",
    "HessianOperator",
    "LanczosResult",
    "LossCall",
    "LossGraph",
    "LossOperator",
    "LowRankOperator",
    "ModuleLoss",
    "PathResult",
    "Ritz",
    "SpectralMeasure",
    "SpectrumRecord",
    "Uses",
    "cg",
    "connecting_path",
    "eigsh",
    "example_gradients",
    "hutchinson_diagonal",
    "hutchinson_trace",
    "lanczos",
    "per_example_sq_norms",
    "record_loss",
    "slq",
    "spectrum",
]
