"""torch.ops.fastlayers_triton: the operators in Triton, with the fakes and gradients of the native ones."""

from fastlayers.ops._autograd import attach_autograd, attach_fake
from fastlayers.triton import attention, attention_decode, linear_act

for _operator in (
    attention.attention_forward,
    attention.attention_backward,
    attention_decode.attention_decode,
    linear_act.linear_act_forward,
    linear_act.linear_act_backward,
    linear_act.gated_linear_act_forward,
    linear_act.gated_linear_act_backward,
):
    _name = _operator._qualname.partition("::")[2]
    attach_fake(_name, "fastlayers_triton")
    attach_autograd(_name, "fastlayers_triton")
