#include "bindings/adam_tables.h"

#include "adam/plan.h"

namespace fl {
namespace {

constexpr const char* kOperandNames[kAdamOperands] = {
    "params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "master_params"};

DType dtype_of(const TensorRef& tensor, const char* what) {
  static const int32_t float32 = aoti_torch_dtype_float32(), float16 = aoti_torch_dtype_float16(),
                       bfloat16 = aoti_torch_dtype_bfloat16();
  const int32_t dtype = tensor.scalar_type();
  if (dtype == float32) return DType::kFloat32;
  if (dtype == float16) return DType::kFloat16;
  if (dtype == bfloat16) return DType::kBFloat16;
  fail("adam_step: ", what, " have to be float32, float16 or bfloat16");
}

bool same_place(const TensorRef& a, const TensorRef& b) {
  return a.device_type() == b.device_type() && a.device_index() == b.device_index();
}

// Adds operand `o` of tensor number `i`, shaped like `param`.
void add_operand(int o, size_t i, const TensorRef& tensor, const TensorRef& param, AdamShape* shape,
                 AdamTensor* entry) {
  const int64_t* sizes = tensor.sizes();
  bool same = tensor.dims() == shape->dims;
  for (int64_t d = 0; same && d < shape->dims; ++d) same = sizes[d] == shape->sizes[d];
  FL_CHECK(same, "adam_step: ", kOperandNames[o], "[", i, "] and its parameter differ in shape");
  FL_CHECK(same_place(tensor, param), "adam_step: ", kOperandNames[o], "[", i,
           "] and its parameter are on different devices");
  entry->data[o] = tensor.data();
  entry->dtype[o] = dtype_of(tensor, kOperandNames[o]);
  shape->strides[o] = tensor.strides();
}

}  // namespace

AdamTables build_adam_tables(const std::array<const TensorList*, kAdamOperands>& given) {
  std::array<const TensorList*, kAdamOperands> lists = given;
  for (int o : {kMaxExpAvgSq, kMaster}) {
    if (lists[o] && lists[o]->empty()) lists[o] = nullptr;
  }
  const TensorList& params = lists[kParam] ? *lists[kParam] : *lists[kGrad];
  for (int o = 0; o < kAdamOperands; ++o) {
    FL_CHECK(!lists[o] || lists[o]->size() == params.size(), "adam_step: ", params.size(),
             " params, but ", lists[o] ? lists[o]->size() : 0, " ", kOperandNames[o]);
  }
  AdamTables tables;
  tables.tensors.resize(params.size());
  tables.layouts.resize(params.size());
  tables.starts.assign(params.size() + 1, 0);
  for (size_t i = 0; i < params.size(); ++i) {
    const TensorRef param = params[i];
    AdamTensor& entry = tables.tensors[i];
    AdamShape shape{param.dims(), param.sizes(), {}, lists[kParam] != nullptr};
    for (int o = 0; o < kAdamOperands; ++o) {
      if (lists[o]) add_operand(o, i, (*lists[o])[i], param, &shape, &entry);
    }
    FL_CHECK(!lists[kMaster] || (entry.dtype[kParam] != DType::kFloat32 &&
                                 entry.dtype[kMaster] == DType::kFloat32),
             "adam_step: master_params have to be float32 copies of 16-bit params");
    if (!lists[kParam]) shape.strides[kParam] = shape.strides[kGrad];
    entry.numel = param.numel();
    if (entry.numel != 0 && plan_layout(shape, &tables.layouts[i])) {
      entry.layout = &tables.layouts[i];
    }
    const int64_t padded = (entry.numel + kAdamAlign - 1) / kAdamAlign * kAdamAlign;
    tables.starts[i + 1] = tables.starts[i] + padded;
  }
  return tables;
}

double value_on_cpu(const Tensor& tensor, const char* what) {
  using torch::headeronly::ScalarType;
  FL_CHECK(tensor.is_cpu() && tensor.numel() == 1, "adam_step: ", what,
           " has to be one number on the CPU");
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return *static_cast<const float*>(tensor.data_ptr());
    case ScalarType::Double:
      return *static_cast<const double*>(tensor.data_ptr());
    default:
      fail("adam_step: ", what, " has to be float32 or float64");
  }
}

void set_rounding_rng(const OptionalTensor& rng, AdamStep* step) {
  step->stochastic_rounding = rng.has_value();
  if (!rng) return;
  FL_CHECK(rng->is_cpu() && rng->numel() == 2 && rng->is_contiguous() &&
               rng->scalar_type() == torch::headeronly::ScalarType::Long,
           "adam_step: rng has to be two int64, seed and offset, on the CPU");
  const int64_t* words = static_cast<const int64_t*>(rng->data_ptr());
  step->seed = static_cast<uint64_t>(words[0]);
  step->offset = static_cast<uint32_t>(words[1]);
}

}  // namespace fl
