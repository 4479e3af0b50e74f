"""A functional simulator of an NVIDIA GPU for tests: runs the PTX of nvcc and Triton on CPU, strictly, and counts.

Module runs PTX text. install() goes further: it makes backend="cuda" on CPU tensors mean the shipped operator and
launcher with the simulator as the GPU.
"""

from tests.simulator.device import install, uninstall
from tests.simulator.error import SimulatorError
from tests.simulator.launches import Launch, host_memory, record, rewrite_ptx
from tests.simulator.module import Module

__all__ = ["Launch", "Module", "SimulatorError", "host_memory", "install", "record", "rewrite_ptx", "uninstall"]
