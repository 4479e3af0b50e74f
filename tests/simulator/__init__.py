"""A functional simulator of an NVIDIA GPU for tests: runs the PTX of nvcc and Triton on CPU, strictly, and counts."""

from tests.simulator.error import SimulatorError
from tests.simulator.module import Module

__all__ = ["Module", "SimulatorError"]
