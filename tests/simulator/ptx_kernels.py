"""PTX text of small kernels: threads load words into registers, run a few instructions, store words."""

from dataclasses import dataclass

import numpy as np

from tests.simulator import Module

_HEADER = """.version 8.7
.target {target}
.address_size 64
.visible .entry kernel({params})
{{
  .reg .pred %p<8>;
  .reg .b32 %tid, %smem;
  .reg .b32 %a<160>, %b<160>, %c<160>, %d<160>, %r<32>;
  .reg .b64 %base<{count}>, %x<32>;
  {shared}
  mov.u32 %tid, %tid.x;
"""


def kernel(body, target="sm_80", params=2, shared=0):
    """The entry "kernel" of `params` pointers; %base<i> is parameter i + 4 * thread, %smem the shared memory."""
    names = [f".param .u64 p{i}" for i in range(params)]
    memory = f".shared .align 1024 .b8 memory[{shared}];" if shared else ""
    text = _HEADER.format(target=target, params=", ".join(names), count=params, shared=memory)
    for i in range(params):
        text += f"  ld.param.u64 %base{i}, [p{i}];\n  mad.wide.u32 %base{i}, %tid, 4, %base{i};\n"
    if shared:
        text += "  mov.u32 %smem, memory;\n"
    return text + body + "\n  ret;\n}\n"


def load(registers, count, base=0, threads=32, first=0):
    """registers<i> of thread t = word [first + i, t] of parameter `base`."""
    at = 4 * threads
    return "".join(f"  ld.global.b32 {registers}{i}, [%base{base} + {at * (first + i)}];\n" for i in range(count))


def store(registers, count, base=1, threads=32):
    at = 4 * threads
    return "".join(f"  st.global.b32 [%base{base} + {at * i}], {registers}{i};\n" for i in range(count))


def fill_shared(size, base=0, threads=32, at=0):
    """Copies `size` bytes of parameter `base` to %smem + at; the caller places the barrier."""
    text = f"  mad.lo.u32 %r31, %tid, 4, %smem;\n  add.u32 %r31, %r31, {at};\n"
    for word in range(0, size, 4 * threads):
        text += f"  ld.global.b32 %r30, [%base{base} + {word}];\n  st.shared.b32 [%r31 + {word}], %r30;\n"
    return text


def vector(registers, count):
    return "{" + ", ".join(f"{registers}{i}" for i in range(count)) + "}"


def run(text, *arrays, threads=32, **options):
    """Launches the entry on one block and returns the counts."""
    return Module(text).launch("kernel", 1, threads, list(arrays), **options)


def words(*shape):
    return np.zeros(shape, np.uint32)


# Formats of matrix elements: {name: (bytes of one, value of every bit pattern)} for those of 8 and 16 bits.


def _small_float(exponent_bits, mantissa_bits, has_infinity=True):
    width = exponent_bits + mantissa_bits
    code = np.arange(2 ** (width + 1))
    exponent = (code >> mantissa_bits) & (2**exponent_bits - 1)
    mantissa = code & (2**mantissa_bits - 1)
    bias = 2 ** (exponent_bits - 1) - 1
    fraction = mantissa / 2.0**mantissa_bits
    value = np.where(exponent == 0, fraction * 2.0 ** (1 - bias), (1 + fraction) * 2.0 ** (exponent - bias))
    top = exponent == 2**exponent_bits - 1
    if has_infinity:
        value = np.where(top, np.where(mantissa == 0, np.inf, np.nan), value)
    else:
        value = np.where(top & (mantissa == 2**mantissa_bits - 1), np.nan, value)
    return np.where(code >> width, -value, value)


VALUES = {
    "f16": _small_float(5, 10),
    "bf16": _small_float(8, 7),
    "e4m3": _small_float(4, 3, has_infinity=False),
    "e5m2": _small_float(5, 2),
    "s8": np.arange(256, dtype=np.uint8).view(np.int8).astype(float),
    "u8": np.arange(256, dtype=float),
}
BYTES = {"f16": 2, "bf16": 2, "tf32": 4, "e4m3": 1, "e5m2": 1, "s8": 1, "u8": 1}


def values(codes, form):
    """The numbers behind bit patterns; the low 13 bits of a tf32 do not count."""
    if form == "tf32":
        return (codes & np.uint32(0xFFFFE000)).view(np.float32).astype(float)
    return VALUES[form][codes]


def random_codes(rng, form, shape, integers):
    """Bit patterns of small integers, or of any numbers of moderate size."""
    if form == "tf32":
        if integers:
            return rng.integers(-8, 9, shape).astype(np.float32).view(np.uint32)
        return rng.standard_normal(shape).astype(np.float32).view(np.uint32)
    table = VALUES[form]
    whole = (np.abs(table) <= 8) & (table == np.round(table))
    moderate = (np.abs(table) > 2**-6) & (np.abs(table) < 16)
    return rng.choice(np.flatnonzero(whole if integers else moderate), shape).astype(
        {1: np.uint8, 2: np.uint16}[BYTES[form]]
    )


# Fragments of the tensor cores, as the PTX ISA lays them out.

_GROUP, _THREAD = np.arange(32) // 4, np.arange(32) % 4


def _pack(source, row, column, per):
    """[register][lane] words with `per` neighbours in k of source[row(register), column(register) + e]."""
    registers = []
    for r, c in zip(row, column):
        elements = np.stack([source[r, c + e] for e in range(per)], -1)
        registers.append(np.ascontiguousarray(elements).view(np.uint32)[:, 0])
    return np.stack(registers)


def fragments(a, b, per):
    """PTX ISA: a0 (g, t), a1 (g + 8, t), a2 (g, t + half), a3 (g + 8, t + half); b0 (t, g), b1 (t + half, g)."""
    half = 4 * per
    starts = [_THREAD * per + k for k in range(0, a.shape[1], half)]
    rows = [_GROUP, _GROUP + 8] * len(starts)
    columns = [start for start in starts for _ in range(2)]
    return _pack(a, rows, columns, per), _pack(np.ascontiguousarray(b.T), [_GROUP] * len(starts), starts, per)


def accumulators(c, d):
    """(16, 8) float64 to words: c0, c1 (g, 2 t + {0, 1}), c2, c3 (g + 8, 2 t + {0, 1}); f16 in pairs."""
    parts = [c[_GROUP + row, 2 * _THREAD + e] for row in (0, 8) for e in (0, 1)]
    if d == "f16":
        pairs = np.stack(parts, -1).astype(np.float16).reshape(32, 4)
        return np.ascontiguousarray(pairs.view(np.uint32).T)
    return np.stack(parts).astype({"f32": np.float32, "s32": np.int32}[d]).view(np.uint32)


def matrix(registers, d):
    """The inverse of accumulators."""
    if d == "f16":
        parts = np.ascontiguousarray(registers.T).view(np.float16).T
    else:
        parts = registers.view({"f32": np.float32, "s32": np.int32}[d])
    c = np.zeros((16, 8))
    for part, (row, e) in zip(parts, [(0, 0), (0, 1), (8, 0), (8, 1)]):
        c[_GROUP + row, 2 * _THREAD + e] = part
    return c


# Matrices in shared memory as wgmma reads them.

MODES = {0: 0, 128: 1, 64: 2, 32: 3}  # bytes that a swizzle mixes -> its code in a descriptor


def _swizzle(rows, width):
    """Rows of `width` bytes behind one another, 16-byte chunks XORed as the tensor memory accelerator does."""
    chunks = rows.reshape(len(rows), width // 16, 16)
    row = np.arange(len(rows))[:, None] * width // 128 % (width // 16)
    out = np.empty_like(chunks)
    out[np.arange(len(rows))[:, None], np.arange(width // 16)[None] ^ row] = chunks
    return out.reshape(-1)


@dataclass
class Placed:
    """A matrix in shared memory: its bytes, and per step of k where it starts; offsets in bytes."""

    data: np.ndarray
    leading: int
    stride: int
    starts: list
    swizzle: int

    def descriptor(self, at, step):
        fields = at + self.starts[step] >> 4 | self.leading >> 4 << 16 | self.stride >> 4 << 32
        return fields | MODES[self.swizzle] << 62


def place(codes, swizzle, k_major):
    """Lays (mn, k) out; k is that of all steps."""
    size = codes.itemsize
    lines = codes if k_major else np.ascontiguousarray(codes.T)  # along memory, then across
    line = np.ascontiguousarray(lines).view(np.uint8).reshape(len(lines), -1)
    steps = codes.shape[1] * size // 32
    if swizzle == 0:  # 8 x 16 bytes in one piece; the pieces across first, then along
        cores = line.reshape(len(line) // 8, 8, -1, 16).transpose(2, 0, 1, 3)
        along, across = 128 * cores.shape[1], 128
        if k_major:
            return Placed(cores.reshape(-1), along, across, [2 * along * s for s in range(steps)], 0)
        return Placed(cores.reshape(-1), across, along, [2 * across * s for s in range(steps)], 0)
    blocks = -(-line.shape[1] // swizzle)
    padded = np.zeros((len(line), blocks * swizzle), np.uint8)
    padded[:, : line.shape[1]] = line
    parts = [_swizzle(padded[:, swizzle * b : swizzle * (b + 1)], swizzle) for b in range(blocks)]
    if k_major:
        per = swizzle // 32
        starts = [len(parts[0]) * (s // per) + s % per * 32 for s in range(steps)]
        return Placed(np.concatenate(parts), 16, 8 * swizzle, starts, swizzle)
    starts = [16 * swizzle * s for s in range(steps)]
    return Placed(np.concatenate(parts), len(parts[0]), 8 * swizzle, starts, swizzle)
