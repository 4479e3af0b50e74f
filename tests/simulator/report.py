"""Counts to lower bounds: how long a launch takes at least, per unit of a GPU. An estimate, not a measurement.

Each bound is work divided by the unit's published rate, as if that unit alone were busy on every multiprocessor.
Latency, dependences, caches and the tail of a grid are left out, so that a real launch takes longer. Instructions are
those of the PTX; what ptxas removes (moves) or adds (addresses) shows in the issue bound only.
"""

import math
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.simulator.gpus import GPUS

_SECTOR = 32  # bytes


@dataclass(frozen=True)
class Resources:
    """What the compiler gave a kernel. spills: bytes per thread, stored and loaded together."""

    registers: int
    shared: int  # static, bytes
    spills: int


def compile_facts(ptx, kernel, arch):
    """The Resources that ptxas reports for a kernel; FileNotFoundError without ptxas, RuntimeError if it refuses."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        command = [_ptxas(), "-v", f"--gpu-name={arch}", str(file), "-o", str(Path(folder) / "kernel.cubin")]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ptxas: {done.stderr[-2000:]}")
    text = done.stderr.partition(f"entry function '{kernel}'")[2].partition("Compiling entry function")[0]
    if not text:
        raise RuntimeError(f"ptxas compiled no kernel {kernel!r}")
    registers = int(re.search(r"Used (\d+) registers", text)[1])
    shared = re.search(r"(\d+) bytes smem", text)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)
    return Resources(registers, int(shared[1]) if shared else 0, int(spills[1]) + int(spills[2]))


def _ptxas():
    found = shutil.which("ptxas")
    if found:
        return found
    try:
        from triton.knobs import nvidia
    except ImportError:
        raise FileNotFoundError("ptxas is in neither the PATH nor an installed triton") from None
    return nvidia.ptxas.path


@dataclass(frozen=True)
class Occupancy:
    blocks: int  # per multiprocessor
    warps: int
    limit: str  # registers, shared, threads or blocks

    def share(self, gpu):
        return self.warps * 32 / gpu.threads


def occupancy(gpu, registers, shared, threads):
    """Blocks of `threads` threads, each with `registers`, and `shared` bytes per block, that a multiprocessor holds."""
    warps = math.ceil(threads / 32)
    per_warp = _round_up(max(registers, 1) * 32, gpu.register_unit)
    by = {
        "threads": gpu.threads // (warps * 32),
        "blocks": gpu.blocks,
        # Each of the schedulers has its own part of the registers.
        "registers": gpu.registers // gpu.schedulers // per_warp * gpu.schedulers // warps,
        "shared": gpu.shared // max(_round_up(shared + gpu.shared_reserved, gpu.shared_unit), 1),
    }
    if shared > gpu.shared_per_block:
        by["shared"] = 0
    limit = min(by, key=by.get)
    return Occupancy(by[limit], by[limit] * warps, limit)


def _round_up(value, unit):
    return -(-value // unit) * unit


@dataclass(frozen=True)
class Estimate:
    """bounds: unit -> seconds at least; binding: the unit with the largest of them."""

    bounds: dict

    @property
    def binding(self):
        return max(self.bounds, key=self.bounds.get)

    @property
    def seconds(self):
        return self.bounds[self.binding]


def estimate(counts, gpu, dram_bytes=None):
    """The lower bounds of one launch on a GPU.

    counts:     what Module.launch returned
    dram_bytes: that have to cross the memory bus; by default every sector that was touched, which is too many where
                the L2 cache serves a second reader
    """
    clocks = gpu.multiprocessors * gpu.clock
    if dram_bytes is None:
        dram_bytes = counts["global"]["sectors"] * _SECTOR
    bounds = {
        "tensor": counts["mma_flops"] / (gpu.tensor * clocks),
        "issue": counts["total"] / (gpu.schedulers * clocks),
        "shared memory": counts["shared"]["wavefronts"] / clocks,
        "DRAM": dram_bytes / gpu.dram,
    }
    for unit, lanes in gpu.lanes.items():
        bounds[unit] = counts["classes"].get(unit, 0) * 32 / (lanes * clocks)
    return Estimate(bounds)


def report(counts, *, threads, resources=None, dynamic_shared=0, dram_bytes=None, gpus=GPUS):
    """A table with a column per GPU: occupancy, the bound of each unit in microseconds, and which one binds.

    resources: of compile_facts, for the occupancy; threads, dynamic_shared: of a block
    """
    lines = ["estimate, not a measurement: lower bounds in microseconds, the binding one marked *"]
    lines.append(_row("", [gpu.name for gpu in gpus]))
    if resources:
        found = [occupancy(g, resources.registers, resources.shared + dynamic_shared, threads) for g in gpus]
        lines.append(_row("occupancy", [f"{o.share(g):.0%} {o.limit}" for o, g in zip(found, gpus)]))
        lines.append(f"{resources.registers} registers, {resources.shared + dynamic_shared} bytes of shared memory, ")
        lines[-1] += f"{resources.spills} bytes spilled"
    estimates = [estimate(counts, gpu, dram_bytes) for gpu in gpus]
    for unit in estimates[0].bounds:
        if any(e.bounds[unit] for e in estimates):
            marks = ["*" if e.binding == unit else " " for e in estimates]
            lines.append(_row(unit, [f"{1e6 * e.bounds[unit]:.3g}{mark}" for e, mark in zip(estimates, marks)]))
    return "\n".join(lines)


def _row(name, cells):
    return f"{name:<15}" + "".join(f"{cell:>18}" for cell in cells)


def hot_lines(counts, count=10):
    """The PTX instructions that were issued most, with what they cost in shared and global memory, as text."""
    lines = ["   issued  PTX line  wavefronts / minimum  sectors / minimum  instruction"]
    for line in sorted(counts["lines"], key=lambda line: -line["issued"])[:count]:
        shared, memory = line.get("shared"), line.get("global")
        wavefronts = f"{shared['wavefronts']} / {shared['minimum']}" if shared else ""
        sectors = f"{memory['sectors']} / {memory['minimum']}" if memory else ""
        lines.append(f"{line['issued']:>9} {line['line']:>9} {wavefronts:>21} {sectors:>18}  {line['instruction']}")
    return "\n".join(lines)
