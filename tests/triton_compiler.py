"""Triton's compiler for GPUs that are not here."""

import re
import subprocess
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastlayers.triton import tiles


def compile_kernel(kernel, arch, signature, constants, tile):
    """The kernel with this tile's warps and stages, for pointers and integers that are multiples of 16, but for those
    that it is not specialised for.

    signature: function from the name of an argument to its type
    """
    types, attributes = {}, {}
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        types[name] = "constexpr" if name in constants else signature(name)
        if types[name] not in ("constexpr", "fp32") and not parameter.do_not_specialize:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, types, {name: x for name, x in constants.items() if name in types}, attributes)
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    return triton.compile(source, GPUTarget("cuda", arch, 32), options)


def stack(kernel):
    """Bytes per thread that ptxas keeps in local memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", text)[1])


def assert_fits(kernel, arch, tile, wide):
    """No spills, no more shared memory than there is, and the tensor cores of the architecture; the TMA unit, and warps
    that only load, where the tile wants them.

    wide: whether a product has the rows that a tensor core's widest instruction takes
    """
    assert stack(kernel) == 0, tile
    assert kernel.metadata.shared <= tiles.SHARED[arch], tile
    widest = "wgmma.mma_async" if arch == 90 else "tcgen05.mma" if arch == 100 else "mma.sync"
    instruction = widest if wide else "mma.sync"
    assert arch == 75 or instruction in kernel.asm["ptx"], tile
    assert tile.descriptors == ("cp.async.bulk.tensor" in kernel.asm["ptx"]), tile
    assert tile.specialised == (kernel.metadata.num_warps > tile.warps), tile
