"""cp.async, mbarrier and bulk copies: pipelines that are right, and each of them with one thing missing."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.simulator import SimulatorError
from tests.simulator.cuda import compile_cuda

KERNELS = Path(__file__).parent / "kernels"


def numbers(n):
    return torch.arange(n, dtype=torch.float32) + 1


def launch(name, block, *args):
    return compile_cuda(KERNELS / "copy_async.cu").launch(name, 1, block, list(args))


def wrong(kind, run, *args):
    with pytest.raises(SimulatorError) as caught:
        run(*args)
    assert caught.value.kind == kind, caught.value
    return str(caught.value)


def test_copies_need_a_wait_and_a_barrier():
    x, y = numbers(64), torch.zeros(64)
    counts = launch("reverse", 64, x, y, 1, 1)
    assert torch.equal(y, x.flip(0))
    assert counts["classes"]["async"] == 2 * 3
    assert counts["global"] == {"accesses": 4, "sectors": 16, "minimum": 16, "bytes": 512}
    assert "not waited for" in wrong("async", launch, "reverse", 64, x, y, 0, 1)
    wrong("uninitialised", launch, "reverse", 64, x, y, 1, 0)  # the other warp has not come to its copy


@pytest.mark.parametrize("rows", [1, 2, 3, 7])
def test_a_ring_of_groups(rows):
    x, y = numbers(64 * rows), torch.zeros(rows, 64)
    launch("ring_right", 64, x, y, rows)
    assert torch.equal(y, x.view(rows, 64).flip(1))
    assert "not waited for" in wrong("async", launch, "ring_too_early", 64, x, y, rows)


def test_a_copy_may_not_overwrite_what_is_still_read():
    x, y = numbers(192), torch.zeros(3, 64)
    launch("overwrite", 64, x, y, 1)
    assert torch.equal(y, x.view(3, 64).flip(1))
    # The reader of a row finds what the other warp's next copy wrote.
    assert "a cp.async of warp 1" in wrong("async", launch, "overwrite", 64, x, y, 0)


@pytest.mark.parametrize("size", [0, 4, 20, 508, 512])
def test_the_rest_of_a_copy_is_zero_and_not_read(size):
    x, y = numbers(size // 4), torch.full((128,), 7.0)
    launch("tail", 32, x if size else numbers(1), y, size)
    assert torch.equal(y[: size // 4], x) and not y[size // 4 :].any()
    if size:
        assert "reads" in wrong("out_of_bounds", launch, "tail", 32, x[:-1].clone(), y, size)


def test_an_ignored_source_gives_zero():
    x, y = numbers(32), torch.zeros(32)
    launch("ignored", 32, x, y, 1)
    assert torch.equal(y, torch.where(torch.arange(32) % 2 == 1, 0.0, x))


def test_misaligned_copy():
    wrong("misaligned", launch, "unaligned", 32, numbers(132), torch.zeros(32))


def hopper(name, block, *args):
    return compile_cuda(KERNELS / "mbarrier.cu", "90a").launch(name, 1, block, list(args), limit=50_000_000)


@pytest.mark.parametrize("rows", [1, 2, 3, 9])
def test_producer_and_consumer(rows):
    x, y = numbers(32 * rows), torch.zeros(rows, 32)
    counts = hopper("pipeline", 64, x, y, rows, 0)
    assert torch.equal(y, x.view(rows, 32).flip(1))
    loads = [line for line in counts["lines"] if line["instruction"].startswith("cp.async.bulk")]
    assert sum(line["global"]["bytes"] for line in loads) == 128 * rows


@pytest.mark.parametrize("missing, kind", [(1, "uninitialised"), (2, "async"), (3, "async"), (4, "deadlock")])
def test_a_pipeline_with_something_missing(missing, kind):
    x, y = numbers(32 * 9), torch.zeros(9, 32)
    wrong(kind, hopper, "pipeline", 64, x, y, 9, missing)


def test_bulk_stores():
    x = numbers(256)
    hopper("doubled", 64, x, 4, 0)
    assert torch.equal(x, 2 * numbers(256))
    assert "without fence.proxy.async" in wrong("async", hopper, "doubled", 64, x, 4, 1)
    wrong("uninitialised", hopper, "doubled", 64, x, 4, 2)
    assert "a bulk copy of warp 0 reads" in wrong("async", hopper, "doubled", 64, x, 4, 3)


def test_bulk_sums():
    x = numbers(64)
    hopper("summed", 64, x, 3)
    assert torch.equal(x, numbers(64) + 3 * torch.arange(64))


def test_bulk_sizes_and_places():
    x, y = numbers(64), torch.zeros(1)
    hopper("bulk", 32, x, y, 256, 0)
    assert y[0] == 1
    wrong("misaligned", hopper, "bulk", 32, x, y, 248, 0)
    wrong("misaligned", hopper, "bulk", 32, x[1:], y, 128, 0)
    wrong("misaligned", hopper, "bulk", 32, x, y, 128, 8)
    wrong("out_of_bounds", hopper, "bulk", 32, x, y, 272, 0)
    wrong("out_of_bounds", hopper, "bulk", 32, x, y, 256, 1024)


def test_arrivals():
    out = torch.zeros(64)
    hopper("arrivals", 64, out, 0)
    assert torch.equal(out, torch.arange(63, -1, -1).float())
    wrong("deadlock", hopper, "arrivals", 64, out, 1)
    wrong("barrier", hopper, "arrivals", 64, out, 2)
    wrong("uninitialised", hopper, "arrivals", 64, out, 3)
    wrong("race", hopper, "arrivals", 64, out, 4)


def test_copies_counted_by_an_mbarrier():
    x, y = numbers(64), torch.zeros(64)
    hopper("counted", 64, x, y, 1)
    assert torch.equal(y, x.flip(0))
    wrong("async", hopper, "counted", 64, x, y, 0)


F32 = 7


def tensor_map(tensor, box, swizzle=0, fill=0):
    """The bytes of a map of a dense float32 tensor, as core/tensor_map.h lays them out; sizes come innermost first."""
    sizes, strides = list(tensor.shape)[::-1], [4 * s for s in tensor.stride()][::-1]
    words = np.zeros(128, np.uint8)
    words[:6] = F32, tensor.dim() - 1, 0, swizzle, fill, 0
    words[8:16].view(np.uint64)[0] = tensor.data_ptr()
    for at, values in ((16, sizes), (36, box[::-1]), (56, [1] * len(sizes))):
        words[at : at + 4 * len(values)].view(np.uint32)[:] = values
    words[80 : 80 + 8 * (len(strides) - 1)].view(np.uint64)[:] = strides[1:]
    return words.tobytes()


def swizzled(rows, mode):
    """What lies where: (rows, words) with the 16-byte chunks of each 128-byte line XORed with the line's number."""
    flat = rows.reshape(-1, 4)
    chunk = torch.arange(len(flat))
    return flat[chunk ^ (chunk // 8 & 2**mode - 1)].reshape(-1)


def box_of(tensor, start, box, fill=0.0):
    out = torch.full(box, fill)
    for place in np.ndindex(*box):
        index = tuple(s + p for s, p in zip(start, place))
        if all(0 <= i < n for i, n in zip(index, tensor.shape)):
            out[place] = tensor[index]
    return out


def copy_box(tensor, start, box, target=None, **layout):
    out = torch.zeros(int(np.prod(box)))
    x, y, z = (*reversed(start), 0, 0)[:3]
    maps = [tensor_map(t, box, **layout) for t in (tensor, tensor if target is None else target)]
    args = [*maps, out, x & 0xFFFFFFFF, y & 0xFFFFFFFF, z & 0xFFFFFFFF, out.numel()]
    buffers = [t for t in (tensor, target) if t is not None]
    shared = 4 * out.numel()
    compile_cuda(KERNELS / "tensor_box.cu", "90a").launch(f"box{len(box)}", 1, 32, args, shared=shared, buffers=buffers)
    return out


@pytest.mark.parametrize("start", [(0,), (4,), (-3,), (97,), (200,)])
def test_boxes_of_a_vector(start):
    x = numbers(100)
    assert torch.equal(copy_box(x, start, (16,)), box_of(x, start, (16,)))


@pytest.mark.parametrize("swizzle, width", [(0, 12), (0, 32), (1, 8), (2, 16), (3, 32)])
@pytest.mark.parametrize("start", [(0, 0), (5, 8), (-2, -4), (18, 36), (7, 100)])
def test_boxes_of_a_matrix(swizzle, width, start):
    x, y = numbers(20 * 40).view(20, 40), torch.zeros(20, 40)
    found = copy_box(x, start, (16, width), y, swizzle=swizzle)
    box = box_of(x, start, (16, width))
    assert torch.equal(found, swizzled(box, swizzle))
    wanted = torch.zeros(20, 40)
    rows, columns = (slice(max(s, 0), max(s + n, 0)) for s, n in zip(start, (16, width)))
    wanted[rows, columns] = x[rows, columns]
    assert torch.equal(y, wanted)


def test_boxes_of_three_dimensions():
    x = numbers(6 * 10 * 16).view(6, 10, 16)
    for start in ((0, 0, 0), (4, 7, 8), (-1, -1, -8)):
        assert torch.equal(copy_box(x, start, (3, 4, 8)), box_of(x, start, (3, 4, 8)).view(-1))


def test_nan_outside_the_tensor():
    x = numbers(64).view(8, 8)
    found = copy_box(x, (4, 4), (8, 8), fill=1).view(8, 8)
    assert torch.equal(found[:4, :4], x[4:, 4:])
    assert found[4:].isnan().all() and found[:, 4:].isnan().all()


def test_wrong_tensor_maps():
    wrong("misaligned", copy_box, numbers(80).view(8, 10)[:, :8], (0, 0), (8, 8))  # rows of 40 bytes
    x = numbers(64).view(8, 8)
    wrong("misaligned", copy_box, x, (0, 0), (8, 6))
    with pytest.raises(SimulatorError, match="a box of 64 bytes in a swizzle of 32"):
        copy_box(numbers(1024).view(16, 64), (0, 0), (4, 16), swizzle=1)


def test_a_tensor_map_of_more_than_there_is():
    x, out = numbers(64).view(8, 8), torch.zeros(64)
    map_of_16_rows = bytearray(tensor_map(x, (8, 8)))
    map_of_16_rows[20] = 16
    args = [bytes(map_of_16_rows), tensor_map(x, (8, 8)), out, 0, 4, 0, 64]
    launch = compile_cuda(KERNELS / "tensor_box.cu", "90a").launch
    with pytest.raises(SimulatorError) as caught:
        launch("box2", 1, 32, args, shared=256, buffers=[x])
    assert caught.value.kind == "out_of_bounds"
