"""The masks that reach ops.attention from Hugging Face models: as little as says the same."""

import copy
from typing import NamedTuple

import pytest
import torch

import fastlayers
from tests.hf_models import inputs, pair
from tests.modules import assert_same_module
from tests.numerics import assert_accurate


class Call(NamedTuple):
    mask: torch.Tensor | None
    is_causal: bool
    window: tuple | None
    alignment: str


@pytest.fixture
def calls(monkeypatch):
    """The calls of ops.attention, one per layer."""
    found = []
    real = fastlayers.ops.attention

    def spy(*args, **options):
        found.append(Call(args[3], args[5], options["window"], options["causal_alignment"]))
        return real(*args, **options)

    monkeypatch.setattr(fastlayers.ops, "attention", spy)
    return found


def test_padding_stays_small(calls):
    _, swapped, _ = pair("bert")
    swapped(**inputs("bert", True))
    mask = calls[0].mask
    assert mask.shape == (3, 1, 1, 11) and mask.dtype == torch.bool and not calls[0].is_causal
    assert torch.equal(mask[:, 0, 0], inputs("bert", True)["attention_mask"].bool())


def test_nothing_padded_is_no_mask(calls):
    _, swapped, _ = pair("bert")
    tokens = inputs("bert", True)["input_ids"]
    swapped(input_ids=tokens, attention_mask=torch.ones_like(tokens))
    assert calls[0][:2] == (None, False)


def test_causal_without_padding_is_the_flag(calls):
    _, swapped, _ = pair("llama")
    swapped(**inputs("llama", False))
    assert calls[0][:2] == (None, True)


def test_causal_with_padding_is_both(calls):
    _, swapped, _ = pair("llama")
    swapped(**inputs("llama", True))
    assert calls[0].mask.shape == (3, 1, 1, 11)
    assert calls[0][1:] == (True, (None, None), "top_left")


def test_sliding_window(calls):
    _, swapped, _ = pair("mistral")
    swapped(**inputs("mistral", False))
    assert calls[0] == (None, True, (4, None), "top_left")


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_prefill_in_two_steps(name, calls):
    original, swapped, _ = pair(name)
    found = {}
    for key, model in (("exact", copy.deepcopy(original).double()), ("eager", original), ("ours", swapped)):
        tokens, mask = inputs(name, True, "left").values()
        calls.clear()
        with torch.no_grad():
            cache = model(input_ids=tokens[:, :7], attention_mask=mask[:, :7], use_cache=True).past_key_values
            found[key] = model(input_ids=tokens[:, 7:], attention_mask=mask, past_key_values=cache).logits
    assert_accurate(**found)
    assert [call.alignment for call in calls] == ["top_left"] * 2 + ["bottom_right"] * 2
    assert all(call.is_causal for call in calls)


def test_a_mask_that_the_model_changed_counts_itself(calls, monkeypatch):
    from transformers.models.llama import modeling_llama

    original, swapped, _ = pair("llama")
    real = modeling_llama.create_causal_mask

    def changed(*args, **kwargs):
        mask = real(*args, **kwargs)
        mask = mask.clone()
        mask[..., 3:5] = False
        return mask

    monkeypatch.setattr(modeling_llama, "create_causal_mask", changed)
    assert_same_module(original, swapped, use_cache=False, **inputs("llama", True))
    assert calls[0].mask.shape == (3, 1, 11, 11) and not calls[0].is_causal


def test_a_four_dimensional_mask_of_the_user_is_taken_as_it_is(calls):
    original, swapped, _ = pair("llama")
    tokens = inputs("llama", False)["input_ids"]
    mask = torch.ones(3, 1, 11, 11, dtype=torch.bool).tril()
    mask[:, :, :, 2:4] &= torch.rand(3, 1, 11, 2) < 0.5
    assert_same_module(original, swapped, input_ids=tokens, attention_mask=mask, use_cache=False)
    assert calls[0].mask is not None and not calls[0].is_causal
