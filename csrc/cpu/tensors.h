// Tensors of the stable libtorch ABI, as the CPU operators use them: float32, dense in one of two layouts.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline const float* floats(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }
inline const float* floats(const MaybeTensor& t) { return t ? floats(*t) : nullptr; }
inline float* writable(const Tensor& t) { return t.numel() ? static_cast<float*>(t.mutable_data_ptr()) : nullptr; }

// Uninitialised, on x's device, of x's dtype or another.
inline Tensor empty_strided(const Tensor& x, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                            std::optional<int32_t> other_dtype = {}) {
  int32_t dtype, device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  dtype = other_dtype.value_or(dtype);
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device_type));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), dtype, device_type, x.get_device_index(), &handle));
  return Tensor(handle);
}

inline Tensor empty(const Tensor& x, const std::vector<int64_t>& sizes, std::optional<int32_t> dtype = {}) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * sizes[i];
  return empty_strided(x, sizes, strides, dtype);
}

inline Tensor absent(const Tensor& x) { return empty(x, {0}); }

// Whether x [B, C, H, W] lies in memory as dense [B, H, W, C], or as dense [B, C, H, W].
inline bool has_strides(const Tensor& x, std::vector<int64_t> order) {
  int64_t expected = 1;
  for (size_t i = order.size(); i-- > 0;) {
    const int64_t d = order[i];
    if (x.size(d) != 1 && x.stride(d) != expected) return false;
    expected *= x.size(d);
  }
  return true;
}
inline bool is_rows(const Tensor& x) { return has_strides(x, {0, 2, 3, 1}); }

inline Tensor empty_like(const Tensor& x, bool rows) {
  const int64_t B = x.size(0), C = x.size(1), H = x.size(2), W = x.size(3);
  if (rows) return empty_strided(x, {B, C, H, W}, {H * W * C, 1, W * C, C});
  return empty(x, {B, C, H, W});
}

// x, or a copy of it where it is dense in neither layout.
inline Tensor dense(const Tensor& x) {
  return is_rows(x) || has_strides(x, {0, 1, 2, 3}) ? x : torch::stable::contiguous(x);
}
inline MaybeTensor packed(const MaybeTensor& t) { return t ? MaybeTensor(torch::stable::contiguous(*t)) : t; }

// t, or a copy of it that lies in memory as y, which is dense, does.
inline MaybeTensor lying_as(const MaybeTensor& t, const Tensor& y) {
  const bool rows = is_rows(y);
  if (!t || has_strides(*t, rows ? std::vector<int64_t>{0, 2, 3, 1} : std::vector<int64_t>{0, 1, 2, 3})) return t;
  Tensor copy = empty_like(y, rows);
  torch::stable::copy_(copy, *t);
  return copy;
}
