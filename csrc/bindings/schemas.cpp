// Every operator the library registers. Implementations stand in one file per op beside this one;
// fakes and autograd in fastlayers/ops.
#include "bindings/namespace.h"

FL_TORCH_LIBRARY(m) {
  // The instruction set the CPU kernels run with: none, avx2, avx512, avx512_bf16 or amx.
  m.def("cpu_isa() -> str");

  // One step of Adam, in place, on lists of one entry per parameter (max_exp_avg_sqs,
  // master_params: or none). grads change only with grad_scale. rng: seed and offset of stochastic
  // rounding.
  m.def(
      "adam_step(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] exp_avgs, "
      "Tensor(d!)[] exp_avg_sqs, Tensor(e!)[] max_exp_avg_sqs, Tensor(f!)[] master_params, "
      "Tensor(g!)[] steps, Tensor? lr_tensor, Tensor? grad_scale, Tensor? found_inf, "
      "Tensor? grad_norm, Tensor? rng, float lr, float beta1, float beta2, float weight_decay, "
      "float eps, float max_grad_norm, bool decoupled_weight_decay, bool maximize) -> ()");
  // The 2-norm of all gradients together, divided by grad_scale: float32, 0-dimensional.
  m.def("grad_norm(Tensor[] grads, Tensor? grad_scale) -> Tensor");

  // (B, H, S, D), or with cu_seqlens (T, H, D). Windows of -1 are unlimited; max_seqlen is read
  // with cu_seqlens only. lse is float32, (B, Hq, Sq) or (Hq, Tq).
  m.def(
      "attention_forward(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, "
      "Tensor? alibi_slopes, Tensor? sinks, Tensor? dropout_rng, Tensor? cu_seqlens_q, "
      "Tensor? cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, float dropout_p, "
      "bool is_causal, bool bottom_right, float scale, SymInt window_left, SymInt window_right, "
      "float softcap, bool deterministic) -> (Tensor out, Tensor lse)");
  // query (B, Hq, Sq, D), the newest tokens, over the cache_seqlens[b] first keys of (B, Hk, S, D),
  // or, with page_table (B, pages of a sequence), of (pages, Hk, page_size, D).
  m.def(
      "attention_decode(Tensor query, Tensor key_cache, Tensor value_cache, Tensor cache_seqlens, "
      "Tensor? page_table, Tensor? alibi_slopes, Tensor? sinks, bool is_causal, float scale, "
      "SymInt window_left, SymInt window_right, float softcap) -> (Tensor out, Tensor lse)");
  // dmask (float32, of attn_mask's shape) and dsinks are empty where their gradient is not wanted.
  m.def(
      "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, "
      "Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? alibi_slopes, "
      "Tensor? sinks, Tensor? dropout_rng, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
      "SymInt max_seqlen_q, SymInt max_seqlen_k, float dropout_p, bool is_causal, "
      "bool bottom_right, float scale, SymInt window_left, SymInt window_right, float softcap, "
      "bool deterministic, bool mask_gradient, bool sinks_gradient) -> "
      "(Tensor dquery, Tensor dkey, Tensor dvalue, Tensor dmask, Tensor dsinks)");

  // Second result: the pre-activation, empty unless saved. In the backward, what a needs_... flag
  // does not ask for comes back empty; preactivation None: computed again from input and weight.
  // allow_tf32: whether tensor cores may round float32 factors to TF32.
  m.def(
      "linear_act_forward(Tensor input, Tensor weight, Tensor? bias, str activation,"
      " bool save_preactivation, bool allow_tf32) -> (Tensor, Tensor)");
  m.def(
      "linear_act_backward(Tensor grad, Tensor? input, Tensor? weight, Tensor? bias,"
      " Tensor? preactivation, str activation, bool needs_input, bool needs_weight,"
      " bool needs_bias, bool allow_tf32) -> (Tensor, Tensor, Tensor)");
  m.def(
      "gated_linear_act_forward(Tensor input, Tensor weight_gate, Tensor weight_up,"
      " Tensor? bias_gate, Tensor? bias_up, str activation, bool save_preactivation,"
      " bool allow_tf32)"
      " -> (Tensor, Tensor, Tensor)");
  m.def(
      "gated_linear_act_backward(Tensor grad, Tensor? input, Tensor? weight_gate,"
      " Tensor? weight_up, Tensor? bias_gate, Tensor? bias_up, Tensor? gate, Tensor? up,"
      " str activation, bool needs_input, bool needs_weight_gate, bool needs_weight_up,"
      " bool needs_bias_gate, bool needs_bias_up, bool allow_tf32) -> (Tensor, Tensor, Tensor, "
      "Tensor, Tensor)");
  // On CUDA: activation(product), or activation(product) * product_up, biases included: these are
  // arguments for their gradients. The backward's results come in the order of the first four
  // arguments; preactivation is None for identity alone.
  m.def(
      "linear_act_epilogue(Tensor product, Tensor? product_up, Tensor? bias, Tensor? bias_up,"
      " str activation) -> Tensor");
  m.def(
      "linear_act_epilogue_backward(Tensor grad, Tensor? preactivation, Tensor? preactivation_up,"
      " str activation, bool needs_product, bool needs_product_up, bool needs_bias,"
      " bool needs_bias_up) -> (Tensor, Tensor, Tensor, Tensor)");
}
