// Tensors of the stable libtorch ABI, as the CPU operators use them: dense in one of two layouts.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <cstdint>
#include <exception>
#include <optional>
#include <vector>

#include "common.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline const float* floats(const Tensor& t) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, "expected a float32 tensor, got ",
                  torch::headeronly::toString(t.scalar_type()));
  return static_cast<const float*>(t.const_data_ptr());
}
inline const float* floats(const MaybeTensor& t) { return t ? floats(*t) : nullptr; }
template <typename T = float>
T* writable(const Tensor& t) {
  return t.numel() ? static_cast<T*>(t.mutable_data_ptr()) : nullptr;
}

// Calls f(T*), a null pointer that names the type of x's elements: float, double, BFloat16Bits or HalfBits.
template <typename F>
void with_type(const char* op, const Tensor& x, const F& f) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return f(static_cast<float*>(nullptr));
    case ScalarType::Double: return f(static_cast<double*>(nullptr));
    case ScalarType::BFloat16: return f(static_cast<BFloat16Bits*>(nullptr));
    case ScalarType::Half: return f(static_cast<HalfBits*>(nullptr));
    default:
      STD_TORCH_CHECK(false, op, ": x must be float32, float64, bfloat16 or float16, got ",
                      torch::headeronly::toString(x.scalar_type()));
  }
}

// to = n elements of x from element `at` on; n elements of y from `at` on = from.
inline void widen(const Tensor& x, int64_t at, int64_t n, float* __restrict to) {
  with_type("widen", x, [&]<typename T>(T*) {
    const T* const from = static_cast<const T*>(x.const_data_ptr()) + at;
    for (int64_t i = 0; i < n; ++i) to[i] = load<std::conditional_t<std::is_same_v<T, double>, double, float>>(from[i]);
  });
}
inline void narrow(const float* __restrict from, int64_t n, const Tensor& y, int64_t at) {
  with_type("narrow", y, [&]<typename T>(T*) {
    T* const to = writable<T>(y) + at;
    for (int64_t i = 0; i < n; ++i) store(to + i, from[i]);
  });
}

// Elements of a tensor, read as floats: `at` gives n of them from the first on, where they are of 16 bits widened into `scratch`.
class Floats {
 public:
  Floats(const float* data) : data(data) {}
  Floats(const MaybeTensor& t) : data(t && t->scalar_type() == ScalarType::Float ? floats(*t) : nullptr) {
    STD_TORCH_CHECK(!t || t->scalar_type() != ScalarType::Double, "x must be float32, bfloat16 or float16");
    if (!data) tensor = t;
  }
  explicit operator bool() const { return data || tensor; }
  bool are_narrow() const { return tensor.has_value(); }
  const float* at(int64_t first, int64_t n, Buffer<float>& scratch) const {
    if (!tensor) return data + first;
    scratch.resize(n);
    widen(*tensor, first, n, scratch.data());
    return scratch.data();
  }

 private:
  const float* data;
  MaybeTensor tensor;
};

// The same for results of T: n elements are written to `at`, and `keep` rounds those that are of 16 bits. Empty tensors are absent ones.
template <typename T = float>
class Results {
 public:
  Results(T* data = nullptr) : data(data) {}
  Results(const Tensor& t) : data(writable<T>(t)) {
    if (std::is_same_v<T, float> && t.scalar_type() != ScalarType::Float) tensor = t;
  }
  explicit operator bool() const { return data; }
  T* at(int64_t first, int64_t n, Buffer<T>& scratch) const {
    if (!tensor) return data + first;
    scratch.resize(n);
    return scratch.data();
  }
  void keep(int64_t first, int64_t n, const T* from) const {
    if constexpr (std::is_same_v<T, float>)
      if (tensor) narrow(from, n, *tensor, first);
  }

 private:
  T* data;
  MaybeTensor tensor;
};

// torch::stable::parallel_for, out of which the first exception of a thread comes as it is.
template <typename F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  std::atomic<bool> failed = false;
  std::exception_ptr error;
  torch::stable::parallel_for(begin, end, grain, [&](int64_t from, int64_t to) {
    try {
      f(from, to);
    } catch (...) {
      if (!failed.exchange(true)) error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

// The one element of a tensor of any floating type, or 1.
inline double value_or_one(const MaybeTensor& t) {
  double value = 1;
  if (t) {
    with_type("a factor", *t, [&]<typename T>(T*) {
      value = load<std::conditional_t<std::is_same_v<T, double>, double, float>>(
          *static_cast<const T*>(t->const_data_ptr()));
    });
  }
  return value;
}

// Uninitialised, on x's device, of x's dtype or another.
inline Tensor empty_strided(const Tensor& x, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                            std::optional<int32_t> other_dtype = {}) {
  int32_t dtype, device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  dtype = other_dtype.value_or(dtype);
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device_type));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), dtype, device_type,
                                                  x.get_device_index(), &handle));
  return Tensor(handle);
}

inline Tensor empty(const Tensor& x, const std::vector<int64_t>& sizes, std::optional<int32_t> dtype = {}) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * sizes[i];
  return empty_strided(x, sizes, strides, dtype);
}

inline Tensor absent(const Tensor& x) { return empty(x, {0}); }

// Whether x [B, C, H, W] is dense with its dimensions in this order, the last one contiguous.
inline bool has_order(const Tensor& x, const std::vector<int64_t>& order) {
  int64_t expected = 1;
  for (size_t i = order.size(); i-- > 0;) {
    const int64_t d = order[i];
    if (x.size(d) != 1 && x.stride(d) != expected) return false;
    expected *= x.size(d);
  }
  return true;
}
inline bool has_layout(const Tensor& x, bool channels_last) {
  return has_order(x, channels_last ? std::vector<int64_t>{0, 2, 3, 1} : std::vector<int64_t>{0, 1, 2, 3});
}
inline bool is_channels_last(const Tensor& x) { return has_layout(x, true); }

inline Tensor empty_like(const Tensor& x, bool channels_last) {
  const int64_t B = x.size(0), C = x.size(1), H = x.size(2), W = x.size(3);
  if (channels_last) return empty_strided(x, {B, C, H, W}, {H * W * C, 1, W * C, C});
  return empty(x, {B, C, H, W});
}

// x itself where it has this layout, or where it is dense in either; else a copy.
inline Tensor with_layout(const Tensor& x, bool channels_last) {
  if (has_layout(x, channels_last)) return x;
  Tensor copy = empty_like(x, channels_last);
  return torch::stable::copy_(copy, x);
}
inline Tensor dense(const Tensor& x) { return is_channels_last(x) ? x : with_layout(x, false); }
