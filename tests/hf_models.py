"""Small Hugging Face models with random weights, one per family, and inputs for them."""

import copy

import torch
import transformers

import fastlayers

VOCABULARY = 99
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = {**SMALL, "vocab_size": VOCABULARY}
CLASSIFIER = {**TEXT, "num_labels": 40}
DECODER = {**TEXT, "num_key_value_heads": 2, "max_position_embeddings": 64}
VISION = {**SMALL, "image_size": 16, "patch_size": 4}

# model class, configuration class, its options, how many modules are not Linear but run on an op
MODELS = {
    "bert": ("BertForSequenceClassification", "BertConfig", CLASSIFIER, 5),
    "bert-mlm": ("BertForMaskedLM", "BertConfig", TEXT, 5),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", CLASSIFIER, 4),
    "distilbert": (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "vocab_size": VOCABULARY, "num_labels": 40},
        4,
    ),
    "vit": ("ViTModel", "ViTConfig", VISION, 5),
    "clip": (
        "CLIPModel",
        "CLIPConfig",
        {"text_config": {**TEXT, "bos_token_id": 1, "eos_token_id": 2}, "vision_config": VISION},
        8,
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": VOCABULARY}
        | {"decoder_start_token_id": 0},
        6,
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 64},
        4,
    ),
    "llama": ("LlamaForCausalLM", "LlamaConfig", DECODER, 4),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**DECODER, "sliding_window": 5}, 4),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", DECODER, 4),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {**DECODER, "head_dim": 8, "sliding_window": 5, "attn_logit_softcapping": 3.0, "attn_implementation": "eager"},
        4,
    ),
    "gpt-oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {**DECODER, "head_dim": 8, "num_local_experts": 4, "sliding_window": 5, "experts_implementation": "eager"},
        2,
    ),
}
GENERATORS = ["t5", "gpt2", "llama", "mistral", "qwen2", "gemma2", "gpt-oss"]


def build(name):
    torch.manual_seed(0)
    model_class, config_class, options, _ = MODELS[name]
    options = {k: copy.deepcopy(v) for k, v in options.items()}
    extra = {key: options.pop(key) for key in list(options) if key.endswith("_implementation")}
    config = getattr(transformers, config_class)(**options)
    for key in list(vars(config)):  # dropout is tested by itself
        if "dropout" in key or key.endswith("pdrop"):
            setattr(config, key, 0.0)
    model = getattr(transformers, model_class)._from_config(config, **extra)
    for parameter in model.parameters():  # large enough for attention to be far from uniform
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def pair(name):
    original = build(name)
    swapped = copy.deepcopy(original)
    return original, swapped, fastlayers.swap_(swapped)


def inputs(name, padded, side="right"):
    """Keyword arguments of the model; generation pads on the left."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, VOCABULARY, (3, 11), generator=generator)
    images = torch.randn(3, 3, 16, 16, generator=generator)
    if name == "vit":
        return {"pixel_values": images}
    found = {"input_ids": tokens}
    if padded:
        found["attention_mask"] = torch.ones_like(tokens)
        for row, count in ((1, 4), (2, 1)):
            hidden = slice(-count, None) if side == "right" else slice(count)
            found["attention_mask"][row, hidden] = 0
    if name == "clip":
        found |= {"pixel_values": images}
    if name == "t5":
        found |= {"decoder_input_ids": tokens[:, :7]}
    return found
