"""Quantised and asynchronous exchange, fragments, and the planner."""

from fulgurite.plugins.comm.e3m0 import dequantize_e3m0, quantize_e3m0
from fulgurite.plugins.comm.exchange import Exchange
from fulgurite.plugins.comm.fragments import partition_parameters
from fulgurite.plugins.comm.outer import OuterFragment, OuterSGD
from fulgurite.plugins.comm.simulate import compute_utilization, required_bandwidth

__all__ = [
    "Exchange",
    "OuterFragment",
    "OuterSGD",
    "compute_utilization",
    "dequantize_e3m0",
    "partition_parameters",
    "quantize_e3m0",
    "required_bandwidth",
]
