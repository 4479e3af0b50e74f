"""The backends each op is tested on. A new backend joins every test of an op by being listed here."""

BACKENDS = {
    "attention": ["cpu"],
    "varlen_attention": ["cpu"],
    "decode_attention": ["cpu"],
    "linear_act": ["cpu"],
    "gated_linear_act": ["cpu"],
    "adam": ["cpu"],
}
