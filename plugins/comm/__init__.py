"""Quantised and asynchronous exchange, fragments, gradient codes, the planner and simulations."""

from fulgurite.plugins.comm.e3m0 import dequantize_e3m0, quantize_e3m0
from fulgurite.plugins.comm.exchange import Exchange
from fulgurite.plugins.comm.fragments import partition_parameters
from fulgurite.plugins.comm.gradient_codes import GradientCode, Multiplexed, SelectiveRepeat, UndecodableError
from fulgurite.plugins.comm.outer import OuterFragment, OuterSGD
from fulgurite.plugins.comm.simulate import compute_utilization, required_bandwidth
from fulgurite.plugins.comm.straggler_sim import DelayProfile

__all__ = [
    "DelayProfile",
    "Exchange",
    "GradientCode",
    "Multiplexed",
    "OuterFragment",
    "OuterSGD",
    "SelectiveRepeat",
    "UndecodableError",
    "compute_utilization",
    "dequantize_e3m0",
    "partition_parameters",
    "quantize_e3m0",
    "required_bandwidth",
]
