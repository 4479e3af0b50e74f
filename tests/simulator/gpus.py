"""Published figures of a few GPUs, for the estimates of report.py.

Sources: NVIDIA's T4 datasheet and Turing, A100, Ada and H100 (SXM) whitepapers for clocks, multiprocessors, memory and
tensor cores (dense, float16 with float32 sums); the CUDA C++ Programming Guide's tables "Technical Specifications per
Compute Capability" and "Throughput of Native Arithmetic Instructions" for the rest.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    name: str
    arch: str
    multiprocessors: int
    clock: float  # Hz, boost
    dram: float  # bytes / s
    tensor: int  # FLOP per clock and multiprocessor
    lanes: dict  # class of instructions -> threads served per clock and multiprocessor
    shared: int  # bytes of shared memory per multiprocessor
    shared_per_block: int
    shared_reserved: int  # of each block, by the system
    shared_unit: int  # bytes in which it is handed out
    threads: int  # per multiprocessor
    blocks: int
    registers: int = 65536  # per multiprocessor
    register_unit: int = 256  # per warp
    schedulers: int = 4  # each issues an instruction of a warp per clock


def _lanes(fp32, half, fp64):
    return {"fp32": fp32, "half": half, "fp64": fp64, "integer": 64, "special": 16, "shuffle": 32}


GPUS = (
    Gpu("T4", "sm_75", 40, 1.59e9, 320e9, 1024, _lanes(64, 64, 2), 65536, 65536, 0, 256, 1024, 16),
    Gpu("A100", "sm_80", 108, 1.41e9, 2039e9, 2048, _lanes(64, 128, 32), 167936, 166912, 1024, 128, 2048, 32),
    Gpu("H100", "sm_90", 132, 1.83e9, 3352e9, 4096, _lanes(128, 128, 64), 233472, 232448, 1024, 128, 2048, 32),
    Gpu("RTX 4090", "sm_89", 128, 2.52e9, 1008e9, 512, _lanes(128, 128, 2), 102400, 101376, 1024, 128, 1536, 24),
)
