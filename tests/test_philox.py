"""The generator behind dropout: published test vectors, the layout of its decisions, and their statistics."""

import pytest
import torch

from fastlayers.reference.philox import dropout_keep, dropout_scale, dropout_threshold, philox4x32_10

# Random123's kat_vectors for philox4x32, 10 rounds: counter, key, result.
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize("counter, key, result", KNOWN)
def test_known_answers(counter, key, result):
    words = philox4x32_10(*(torch.tensor([word]) for word in (*counter, *key)))
    assert [word.item() for word in words] == result


def philox_in_integers(counter, key):
    """The same ten rounds with Python's integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & 0xFFFFFFFF, (p0 >> 32) ^ c3 ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def test_decisions_stand_where_the_layout_says():
    """As csrc/common/philox.h describes it, one entry at a time."""
    seed, offset, batch, heads, seqlen_q, seqlen_k = -(2**63) + 5, 2**33 + 17, 2, 3, 5, 150
    keep = dropout_keep(torch.tensor([seed, offset]), 0.4, batch, heads, seqlen_q, seqlen_k)
    key = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    for b, h, i, j in [
        (0, 0, 0, 0),
        (0, 1, 4, 7),
        (1, 2, 3, 8),
        (1, 0, 2, 63),
        (0, 2, 1, 64),
        (1, 1, 0, 77),
        (1, 2, 4, 149),
    ]:
        words = philox_in_integers(((j // 64) * 8 + j % 8, i, b * heads + h, offset & 0xFFFFFFFF), key)
        slot = (j // 8) % 8
        bits = (words[slot // 2] >> (16 * (slot % 2))) & 0xFFFF
        assert keep[b, h, i, j].item() == (bits >= round(0.4 * 65536)), (b, h, i, j)


def test_a_larger_mask_begins_with_the_smaller_one():
    rng = torch.tensor([3, 4])
    large = dropout_keep(rng, 0.5, 2, 3, 40, 200)
    assert torch.equal(dropout_keep(rng, 0.5, 2, 3, 17, 65), large[:, :, :17, :65])
    assert torch.equal(dropout_keep(rng, 0.5, 1, 3, 40, 200), large[:1])


@pytest.mark.parametrize("p", [0.0, 1 / 65536, 0.1, 0.5, 0.9, 1.0])
def test_share_and_scale(p):
    """Each entry is kept with probability 1 - p, and scaled so that the mean stays; six standard deviations."""
    keep = dropout_keep(torch.tensor([1, 2]), p, 2, 4, 256, 256)
    rounded = dropout_threshold(p) / 65536
    assert abs(rounded - p) <= 0.5 / 65536
    deviation = (rounded * (1 - rounded) / keep.numel()) ** 0.5
    assert abs(keep.double().mean().item() - (1 - rounded)) <= 6 * deviation
    assert dropout_scale(p) * (1 - rounded) == pytest.approx(1.0 if p < 1 else 0.0)


def test_entries_are_independent_of_seed_offset_and_neighbours():
    """Masks that differ in one coordinate agree in half of their entries at p = 1/2; six standard deviations."""
    masks = [dropout_keep(torch.tensor(rng), 0.5, 1, 2, 128, 512) for rng in ([1, 0], [2, 0], [1, 1], [2**32 + 1, 0])]
    pairs = [(masks[0], other) for other in masks[1:]]
    pairs += [(masks[0][:, :, 1:], masks[0][:, :, :-1]), (masks[0][:, :1], masks[0][:, 1:])]
    pairs += [(masks[0][..., step:], masks[0][..., :-step]) for step in (1, 8, 64)]
    for a, b in pairs:
        agreement = (a == b).double().mean().item()
        assert abs(agreement - 0.5) <= 6 * 0.5 / a.numel() ** 0.5
