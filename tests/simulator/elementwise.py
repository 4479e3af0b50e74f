"""One instruction, applied to arrays: what each thread's registers hold comes from memory and goes back there."""

import numpy as np

from tests.simulator.module import Module

_HEADER = """
.version 8.7
.target {target}
.address_size 64
.visible .entry f({params}, .param .u32 count) {{
  .reg .pred %p, %q;
  .reg .b32 %i, %n, %t;
  .reg .b64 %at<{pointers}>, %o;
{registers}
  mov.u32 %i, %ctaid.x;
  mov.u32 %t, %ntid.x;
  mad.lo.u32 %i, %i, %t, 0;
  mov.u32 %t, %tid.x;
  add.u32 %i, %i, %t;
  ld.param.u32 %n, [count];
  setp.ge.u32 %p, %i, %n;
  @%p ret;
"""


def _bits(dtype):
    return 8 * np.dtype(dtype).itemsize


def run(instruction, inputs, out_type, target="sm_90a"):
    """[out_type] of instruction, which reads %s0, %s1, ... and writes %d; inputs: arrays of one length, 16 to 64 bits.

    The instruction may use the predicates %p and %q and the 32-bit register %t besides.
    """
    inputs = [np.ascontiguousarray(x) for x in inputs]
    out = np.zeros(len(inputs[0]), out_type)
    arrays = [*inputs, out]
    names = [f"%s{i}" for i in range(len(inputs))] + ["%d"]
    registers = "".join(f"  .reg .b{_bits(a.dtype)} {name};\n" for name, a in zip(names, arrays))
    params = ", ".join(f".param .u64 a{i}" for i in range(len(arrays)))
    text = _HEADER.format(target=target, params=params, pointers=len(arrays), registers=registers)
    for i, array in enumerate(arrays):
        text += f"  ld.param.u64 %at{i}, [a{i}];\n  mul.wide.u32 %o, %i, {array.dtype.itemsize};\n"
        text += f"  add.u64 %at{i}, %at{i}, %o;\n"
        if array is not out:
            text += f"  ld.global.b{_bits(array.dtype)} {names[i]}, [%at{i}];\n"
    text += f"  {instruction}\n  st.global.b{_bits(out.dtype)} [%at{len(inputs)}], %d;\n  ret;\n}}\n"
    Module(text).launch("f", -(-len(out) // 256), 256, [*arrays, len(out)])
    return out


def edges(dtype, count=4096, seed=0):
    """Bit patterns of a type: special values and their neighbours, then random ones."""
    rng = np.random.default_rng(seed)
    unsigned = np.dtype(f"u{np.dtype(dtype).itemsize}")
    bits = rng.integers(0, 2 ** _bits(dtype), count, dtype=np.uint64).astype(unsigned)
    if np.dtype(dtype).kind == "f":
        info = np.finfo(dtype)
        special = [0.0, info.tiny, info.smallest_subnormal, 1.0, 0.5, 1.5, 2.5, 3.5, info.max, np.inf, 1e-3, 3.0, 65504]
        special += [
            2.0**e for e in (-26, -25, -24, -15, -14, -10, 7, 8, 15, 16, 31, 32, 63, 64, 100) if e < info.maxexp
        ]
        special = np.array(special, dtype)
        special = np.concatenate([special, np.nextafter(special, dtype(np.inf)), np.nextafter(special, dtype(0))])
        special = np.concatenate([special, -special, np.array([np.nan], dtype)]).view(unsigned)
        # Numbers of moderate size, which random bit patterns hardly ever are.
        moderate = (rng.standard_normal(count) * 2.0 ** rng.integers(-12, 12, count)).astype(dtype).view(unsigned)
        return np.concatenate([special, moderate, bits]).view(dtype)
    info = np.iinfo(dtype)
    special = [0, 1, 2, 3, 31, 32, 33, 127, 128, 255, info.max, info.max - 1, info.min, info.min + 1]
    special = np.array([x for x in special if info.min <= x <= info.max], dtype)
    small = rng.integers(0, 100, count // 4).astype(dtype)
    return np.concatenate([special, small, bits.view(dtype)])


def pairs(dtype, seed=0):
    """Two arrays: all pairs of special values, and random ones."""
    head = edges(dtype, 0)
    head = np.concatenate([head[:24], -head[:24], head[-1:]])
    a, b = (x.ravel() for x in np.meshgrid(head, head))
    first, second = edges(dtype, 4096, seed), edges(dtype, 4096, seed + 1)
    mixed = np.random.default_rng(seed).permutation(len(second))
    return np.concatenate([a, first]), np.concatenate([b, second[mixed]])


def same(found, wanted):
    """Bit for bit, but any NaN for a NaN."""
    unsigned = np.dtype(f"u{found.dtype.itemsize}")
    equal = found.view(unsigned) == wanted.astype(found.dtype, copy=False).view(unsigned)
    if found.dtype.kind == "f":
        equal |= np.isnan(found) & np.isnan(wanted)
    return equal
