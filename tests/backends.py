"""The backends each op is tested on. A new backend joins every test of an op by being listed here."""

import os

BACKENDS = {
    "attention": ["cpu"],
    "varlen_attention": ["cpu"],
    "decode_attention": ["cpu"],
    "linear_act": ["cpu"],
    "gated_linear_act": ["cpu"],
    "adam": ["cpu"],
}

if os.environ.get("TRITON_INTERPRET") == "1":  # set before triton is imported, by tests/test_adam_triton.py
    BACKENDS["adam"] = ["triton"]
