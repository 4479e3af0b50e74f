"""torch.nn.MultiheadAttention on ops.attention."""

import torch
import torch.nn.functional as F
from torch import nn

from fastlayers import ops


class FusedMultiheadAttention(nn.MultiheadAttention):
    """Drop-in for torch.nn.MultiheadAttention: same arguments, same state_dict, same results.

    Only rows that may attend to nothing differ: they give 0 (and weights 0) where torch gives NaN.
    need_weights=True has to return the (S, S) weights and computes them in plain torch; pass need_weights=False
    for the fused op. Nested tensors run on torch's own fast path.
    """

    def forward(
        self,
        query,
        key,
        value,
        key_padding_mask=None,
        need_weights=True,
        attn_mask=None,
        average_attn_weights=True,
        is_causal=False,
    ):
        if query.is_nested or key.is_nested or value.is_nested:
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint")
        is_batched = F._mha_shape_check(query, key, value, key_padding_mask, attn_mask, self.num_heads)
        if not is_batched:
            query, key, value = _together(lambda x: x[None], query, key, value)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif not self.batch_first:
            query, key, value = _together(lambda x: x.transpose(0, 1), query, key, value)

        q, k, v = (self._split_heads(x) for x in self._project(query, key, value))
        k, v, extra_keys = self._append_keys(k, v)
        mask, is_causal = self._mask(q, k, attn_mask, key_padding_mask, is_causal, extra_keys, need_weights)
        dropout_p = self.dropout if self.training else 0.0
        if need_weights:
            output, weights = attention_with_weights(q, k, v, mask, dropout_p)
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            output, weights = ops.attention(q, k, v, mask, dropout_p, is_causal), None

        output = output.transpose(1, 2).flatten(2)  # (B, Sq, E)
        output = ops.linear_act(output, self.out_proj.weight, self.out_proj.bias, "identity")
        if not is_batched:
            return output[0], None if weights is None else weights[0]
        return output if self.batch_first else output.transpose(0, 1), weights

    def _project(self, query, key, value):
        """(B, S, E) each; one product where all three inputs are the same, two where key and value are."""
        embed_dim, bias = self.embed_dim, self.in_proj_bias
        if self.in_proj_weight is None:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        elif key is not value:
            weights = self.in_proj_weight.chunk(3)
        elif query is key:
            return ops.linear_act(query, self.in_proj_weight, bias, "identity").chunk(3, -1)
        else:
            q_weight, kv_weight = self.in_proj_weight.split((embed_dim, 2 * embed_dim))
            q_bias, kv_bias = (None, None) if bias is None else bias.split((embed_dim, 2 * embed_dim))
            q = ops.linear_act(query, q_weight, q_bias, "identity")
            return q, *ops.linear_act(key, kv_weight, kv_bias, "identity").chunk(2, -1)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        inputs = (query, key, value)
        return tuple(ops.linear_act(x, w, b, "identity") for x, w, b in zip(inputs, weights, biases))

    def _split_heads(self, x):
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)  # (B, S, E) -> (B, H, S, D)

    def _append_keys(self, k, v):
        """k and v with the keys of add_bias_kv and add_zero_attn behind them, and how many those are."""
        extra = []
        if self.bias_k is not None:
            extra.append(tuple(self._split_heads(b.to(k.dtype)) for b in (self.bias_k, self.bias_v)))
        if self.add_zero_attn:
            zero = k.new_zeros(1, self.num_heads, 1, self.head_dim)
            extra.append((zero, zero))
        for extra_k, extra_v in extra:
            k = torch.cat((k, extra_k.expand(k.shape[0], -1, -1, -1)), 2)
            v = torch.cat((v, extra_v.expand(v.shape[0], -1, -1, -1)), 2)
        return k, v, len(extra)

    def _mask(self, q, k, attn_mask, key_padding_mask, is_causal, extra_keys, need_weights):
        """(mask, is_causal) for ops.attention; mask is None, bool (True attends) or additive, broadcast (B, H, Sq, Sk).

        The is_causal hint replaces attn_mask where torch lets it, and beside a padding mask where that is the same.
        """
        if is_causal and not need_weights and (key_padding_mask is None or not extra_keys):
            attn_mask = None
        else:
            is_causal = False
        if attn_mask is not None:
            batch, heads = q.shape[:2]
            wanted = (q.shape[2], k.shape[2] - extra_keys)
            if attn_mask.shape[-2:] != wanted:
                raise ValueError(f"attn_mask has to be (..., {wanted[0]}, {wanted[1]}), got {tuple(attn_mask.shape)}")
            attn_mask = attn_mask.unflatten(0, (batch, heads)) if attn_mask.dim() == 3 else attn_mask[None, None]
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask[:, None, None, :]
        masks = [m for m in (attn_mask, key_padding_mask) if m is not None]
        if not masks:
            return None, is_causal
        if all(m.dtype == torch.bool for m in masks):
            mask = ~masks[0] if len(masks) == 1 else ~(masks[0] | masks[1])
            return F.pad(mask, (0, extra_keys), value=True) if extra_keys else mask, is_causal
        mask = sum(_additive(m, q.dtype) for m in masks)
        return F.pad(mask, (0, extra_keys)) if extra_keys else mask, is_causal


def attention_with_weights(query, key, value, mask, dropout_p, scale=None):
    """Attention in plain torch: (output, weights (B, H, Sq, Sk) after dropout).

    mask: None, bool (True attends) or additive, broadcastable to (B, H, Sq, Sk); a row that attends to nothing gives 0
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (query * scale) @ key.transpose(-2, -1)
    if mask is not None:
        scores = (
            scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask.to(scores.dtype)
        )
        is_empty = (scores == float("-inf")).all(-1, keepdim=True)
        weights = torch.softmax(scores.masked_fill(is_empty, 0.0), -1).masked_fill(is_empty, 0.0)
    else:
        weights = torch.softmax(scores, -1)
    if dropout_p > 0:
        weights = F.dropout(weights, dropout_p)
    return weights @ value, weights


def _together(view, query, key, value):
    """A view of each; tensors that were the same object stay so."""
    q = view(query)
    k = q if key is query else view(key)
    v = k if value is key else view(value)
    return q, k, v


def _additive(mask, dtype):
    """torch's masks (bool: True is masked out; float: added) as additive ones."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))
