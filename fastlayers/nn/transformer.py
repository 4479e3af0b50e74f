"""torch.nn.TransformerEncoderLayer on the fused ops."""

from torch import nn

from fastlayers.nn.attention import FusedMultiheadAttention
from fastlayers.nn.fuse import linear_then
from fastlayers.nn.linear import FusedLinear


class FusedTransformerEncoderLayer(nn.TransformerEncoderLayer):
    """Drop-in for torch.nn.TransformerEncoderLayer: same arguments, same state_dict, same results.

    Nested tensors (torch.nn.TransformerEncoder makes them in eval mode where there is padding) run on torch's own
    fast path.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.self_attn.__class__ = FusedMultiheadAttention
        self.linear1.__class__ = FusedLinear
        self.linear2.__class__ = FusedLinear

    def forward(self, src, src_mask=None, src_key_padding_mask=None, is_causal=False):
        if src.is_nested:
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        x = src
        if self.norm_first:
            x = x + self._sa_block(self.norm1(x), src_mask, src_key_padding_mask, is_causal=is_causal)
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(x + self._sa_block(x, src_mask, src_key_padding_mask, is_causal=is_causal))
        return self.norm2(x + self._ff_block(x))

    def _ff_block(self, x):
        x = self.linear2(self.dropout(linear_then(self.linear1, self.activation, x)))
        return self.dropout2(x)
