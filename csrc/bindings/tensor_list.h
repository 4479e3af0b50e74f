// TensorList: a Tensor[] argument read in place. std::vector<torch::stable::Tensor> costs one
// shared pointer per tensor, which an optimizer step over thousands of small parameters would feel.
#pragma once

#include <torch/csrc/stable/library.h>

#include <vector>

#include "bindings/tensor.h"

namespace fl {

inline void check_call(AOTITorchError error) { FL_CHECK(error == 0, "a call into Torch failed"); }

// A borrowed tensor.
class TensorRef {
 public:
  explicit TensorRef(AtenTensorHandle handle) : handle_(handle) {}

  void* data() const { return get<void*>(aoti_torch_get_data_ptr); }
  int64_t dims() const { return get<int64_t>(aoti_torch_get_dim); }
  int64_t numel() const { return get<int64_t>(aoti_torch_get_numel); }
  const int64_t* sizes() const { return get<int64_t*>(aoti_torch_get_sizes); }
  const int64_t* strides() const { return get<int64_t*>(aoti_torch_get_strides); }
  int32_t device_type() const { return get<int32_t>(aoti_torch_get_device_type); }
  int32_t device_index() const { return get<int32_t>(aoti_torch_get_device_index); }
  int32_t scalar_type() const { return get<int32_t>(aoti_torch_get_dtype); }

 private:
  template <class T>
  T get(AOTITorchError (*read)(AtenTensorHandle, T*)) const {
    T value;
    check_call(read(handle_, &value));
    return value;
  }

  AtenTensorHandle handle_;
};

class TensorList {
 public:
  explicit TensorList(StableListHandle list) {
    size_t size;
    check_call(torch_list_size(list, &size));
    handles_.resize(size);
    for (size_t i = 0; i < size; ++i) {
      StableIValue item;
      check_call(torch_list_get_item(list, i, &item));
      handles_[i] = torch::stable::detail::to<AtenTensorHandle>(item);
    }
    check_call(torch_delete_list(list));
  }
  TensorList(TensorList&& other) noexcept { handles_.swap(other.handles_); }
  TensorList(const TensorList&) = delete;
  ~TensorList() {
    for (AtenTensorHandle handle : handles_) aoti_torch_delete_tensor_object(handle);
  }

  size_t size() const { return handles_.size(); }
  bool empty() const { return handles_.empty(); }
  TensorRef operator[](size_t i) const { return TensorRef(handles_[i]); }

 private:
  std::vector<AtenTensorHandle> handles_;
};

}  // namespace fl

namespace torch::stable::detail {

template <>
struct ToImpl<fl::TensorList> {
  static fl::TensorList call(StableIValue value, uint64_t, bool) {
    return fl::TensorList(to<StableListHandle>(value));
  }
};

}  // namespace torch::stable::detail
