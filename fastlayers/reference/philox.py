"""Philox4x32-10 dropout masks in plain torch: the same decisions as csrc/common/philox.h, on any device."""

import torch

_M0, _M1, _W0, _W1 = 0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


def _multiply(a, m):
    """The high and low 32 bits of a * m, for int64 tensors holding 32-bit values (no 64-bit overflow)."""
    low = a * (m & 0xFFFF)
    high = a * (m >> 16)
    middle = (low >> 16) + (high & 0xFFFF)
    return (high >> 16) + (middle >> 16), ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def philox4x32_10(c0, c1, c2, c3, k0, k1):
    """Four 32-bit words (as int64 tensors) for each counter (c0, c1, c2, c3) under the key (k0, k1).

    source  Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"
    """
    for _ in range(10):
        high0, low0 = _multiply(c0, _M0)
        high1, low1 = _multiply(c2, _M1)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return c0, c1, c2, c3


def dropout_threshold(dropout_p):
    """The probability in units of 1/65536, rounded: what the 16-bit decisions can resolve."""
    return int(dropout_p * 65536 + 0.5)


def dropout_scale(dropout_p):
    """What kept values are multiplied by, so that the expectation stays exact for the rounded probability."""
    threshold = dropout_threshold(dropout_p)
    return 0.0 if threshold == 65536 else 65536 / (65536 - threshold)


def dropout_keep(rng, dropout_p, batch, heads, seqlen_q, seqlen_k):
    """The dropout mask: (batch, heads, seqlen_q, seqlen_k), bool, True where the value is kept.

    rng: (2,) int64, seed and offset; the mask lies on its device
    """
    device = rng.device
    seed, offset = rng[0], rng[1]
    blocks = (seqlen_k + 63) // 64
    c0 = torch.arange(blocks * 8, device=device)
    c1 = torch.arange(seqlen_q, device=device).view(-1, 1)
    c2 = torch.arange(batch * heads, device=device).view(-1, 1, 1)
    counters = torch.broadcast_tensors(c0, c1, c2, offset & _LOW)
    words = philox4x32_10(*counters, seed & _LOW, (seed >> 32) & _LOW)
    halves = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=-2)
    # (batch * heads, seqlen_q, 8 slots, blocks * 8 lanes) -> key j = 64 * block + 8 * slot + lane
    halves = halves.unflatten(-1, (blocks, 8)).transpose(-3, -2).flatten(-3)
    keep = halves[..., :seqlen_k] >= dropout_threshold(dropout_p)
    return keep.view(batch, heads, seqlen_q, seqlen_k)
