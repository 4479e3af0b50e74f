"""Counts that are known beforehand: instructions, sectors, and the bank conflicts of well-known layouts."""

import pytest
import torch

from tests.simulator.cuda import compile_cuda

SOURCE = r"""
template <int kPad>
__device__ void transpose(const float* from, float* to) {
  __shared__ float tile[32][32 + kPad];
  const int x = threadIdx.x, y = threadIdx.y;
  for (int i = y; i < 32; i += 8) tile[i][x] = from[i * 32 + x];
  __syncthreads();
  for (int i = y; i < 32; i += 8) to[i * 32 + x] = tile[x][i];
}
extern "C" __global__ void padded(const float* from, float* to) { transpose<1>(from, to); }
extern "C" __global__ void unpadded(const float* from, float* to) { transpose<0>(from, to); }

template <class T>
__device__ void strided(const T* from, T* to, int stride) {
  to[threadIdx.x * stride] = from[threadIdx.x * stride];
}
extern "C" __global__ void strided4(const float* f, float* t, int s) { strided(f, t, s); }
extern "C" __global__ void strided8(const float2* f, float2* t, int s) { strided(f, t, s); }
extern "C" __global__ void strided16(const float4* f, float4* t, int s) { strided(f, t, s); }

extern "C" __global__ void shared_strided(float* out, int stride, int offset) {
  extern __shared__ float s[];
  for (int i = threadIdx.x; i < 32 * stride + 32; i += 32) s[i] = i;
  __syncwarp();
  out[threadIdx.x] = s[threadIdx.x * stride + offset];
}
extern "C" __global__ void shared_wide(float* out, int stride) {
  extern __shared__ float4 wide[];
  wide[threadIdx.x * stride] = make_float4(threadIdx.x, 1, 2, 3);
  __syncwarp();
  out[threadIdx.x] = wide[threadIdx.x * stride].x;
}
extern "C" __global__ void one_word(float* out) {
  __shared__ float s[32];
  s[threadIdx.x] = threadIdx.x;
  __syncwarp();
  out[threadIdx.x] = s[7];
}
extern "C" __global__ void uneven(float* out) {
  #pragma unroll 1
  for (int i = 0; i < 100 * (blockIdx.x == 2); ++i) out[threadIdx.x] += 1;
}
extern "C" __global__ void chain(float* out, int n) {
  float x = out[threadIdx.x];
  #pragma unroll 1
  for (int i = 0; i < n; ++i) {
    #pragma unroll
    for (int j = 0; j < 16; ++j) x = fmaf(x, 0.5f, 1.0f);
  }
  out[threadIdx.x] = x;
}
"""


def launch(name, block, args, **options):
    return compile_cuda(SOURCE).launch(name, 1, block, args, **options)


def loads(counts, space):
    return [line for line in counts["lines"] if line["instruction"].startswith("ld." + space)]


@pytest.mark.parametrize("name, conflicts", [("padded", 1), ("unpadded", 32)])
def test_transpose(name, conflicts):
    x, y = torch.randn(32, 32), torch.zeros(32, 32)
    counts = launch(name, (32, 8), [x, y])
    assert torch.equal(y, x.T)
    # 32 rows are written without conflict, 32 columns are read.
    assert counts["shared"] == {"accesses": 64, "wavefronts": 32 + 32 * conflicts, "minimum": 64, "bytes": 8192}
    assert counts["global"] == {"accesses": 64, "sectors": 256, "minimum": 256, "bytes": 8192}
    assert counts["barriers"] == 8


@pytest.mark.parametrize("width, name", [(1, "strided4"), (2, "strided8"), (4, "strided16")])
@pytest.mark.parametrize("stride", [1, 2, 3, 8, 9])
def test_sectors(width, name, stride):
    x = torch.randn(32 * 9 * width + 8)
    x = x[-x.data_ptr() // 4 % 8 :]  # begins with a sector
    y = torch.zeros(32 * 9 * width + 8)
    y = y[-y.data_ptr() // 4 % 8 :]
    counts = launch(name, 32, [x, y, stride])
    touched = {(lane * stride * width + word) // 8 for lane in range(32) for word in range(width)}
    assert counts["global"]["sectors"] == 2 * len(touched)
    assert counts["global"]["minimum"] == 2 * 4 * width
    assert counts["global"]["bytes"] == 2 * 32 * 4 * width


@pytest.mark.parametrize("stride, wavefronts", [(0, 1), (1, 1), (2, 2), (3, 1), (4, 4), (8, 8), (16, 16), (32, 32)])
def test_bank_conflicts(stride, wavefronts):
    counts = launch("shared_strided", 32, [torch.zeros(32), stride, 0], shared=4 * (32 * 32 + 32))
    (line,) = loads(counts, "shared")
    assert line["shared"] == {"accesses": 1, "wavefronts": wavefronts, "minimum": 1, "bytes": 128}


@pytest.mark.parametrize("stride, wavefronts", [(1, 4), (2, 8), (3, 4), (8, 32), (9, 4)])
def test_bank_conflicts_of_16_byte_accesses(stride, wavefronts):
    counts = launch("shared_wide", 32, [torch.zeros(32), stride], shared=16 * 32 * 9)
    store = next(line for line in counts["lines"] if line["instruction"].startswith("st.shared"))
    assert store["shared"] == {"accesses": 1, "wavefronts": wavefronts, "minimum": 4, "bytes": 512}


def test_one_word_for_all_lanes_is_one_wavefront():
    (line,) = loads(launch("one_word", 32, [torch.zeros(32)]), "shared")
    assert line["shared"]["wavefronts"] == 1


def test_instructions():
    x = torch.zeros(64)
    counts = launch("chain", 64, [x, 10])
    assert counts["classes"]["fp32"] == 2 * 10 * 16
    assert counts["classes"]["global"] == 2 * 2
    loads = [line["issued"] for line in counts["lines"] if line["instruction"].startswith(("ld.param", "mov", "cvta"))]
    assert counts["classes"]["move"] == sum(loads) > 0
    assert counts["total"] == sum(counts["classes"].values()) == sum(line["issued"] for line in counts["lines"])
    longer = launch("chain", 64, [x, 20])
    assert longer["classes"]["fp32"] == 2 * 20 * 16


def test_the_largest_block():
    one, four = (compile_cuda(SOURCE).launch("uneven", blocks, 64, [torch.zeros(64)]) for blocks in (1, 4))
    assert one["largest_block"] == one["total"]
    assert four["largest_block"] == four["total"] - 3 * one["total"] > 100


def test_counts_do_not_depend_on_the_workers():
    x = torch.randn(4096)
    module = compile_cuda(SOURCE)
    one, four = (module.launch("chain", 64, 64, [x, 5], threads=threads) for threads in (1, 4))
    assert one == four


def test_speed():
    """At least 10 million warp instructions a second on one core, of plain arithmetic."""
    import time

    x = torch.zeros(256)
    start = time.perf_counter()
    counts = compile_cuda(SOURCE).launch("chain", 1, 256, [x, 20_000], threads=1)
    assert counts["total"] / (time.perf_counter() - start) > 1e7
