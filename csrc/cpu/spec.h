// Arguments of the operators, as structs that mirror fastff/spec.py: one line a field, from which an operator's schema is made too.
//
// A field is initialised by reading the next argument, in the order of declaration. Here, and nowhere else, small tensors are made contiguous,
// x dense, and what has x's shape is given x's layout. Names and orders are those of spec.py (tests/test_step_native.py).
#pragma once

#include <torch/csrc/stable/library.h>

#include <string>

#include "tensors.h"

namespace spec {

enum class Activation { none, relu, relu6, hardswish, silu, gelu };
enum class NormalizationName { none, layer_norm, group_norm, l2, rms, layer_norm_channels, l2_channels, rms_channels };

// Takes the arguments of an operator off its stack, or without a stack writes down their schema.
struct Reader {
  StableIValue* stack = nullptr;
  std::string schema;
  MaybeTensor x;  // the first tensor

  template <typename T>
  T next(const char* type, const char* prefix, const char* name) {
    if (stack) return torch::stable::detail::to<T>(*stack++);
    for (const char* text : {schema.empty() ? "" : ", ", type, " ", prefix, name}) schema += text;
    return T();
  }
};

// Some neighbouring arguments, whose names begin with `prefix`.
class Part {
 public:
  explicit Part(Reader& in, const char* prefix = "") : in(in), prefix(prefix) {}

 protected:
  Reader& in;  // read from while the fields are initialised

  bool flag(const char* name) { return in.next<bool>("bool", prefix, name); }
  int64_t integer(const char* name) { return in.next<int64_t>("int", prefix, name); }
  double number(const char* name) { return in.next<double>("float", prefix, name); }
  std::vector<int64_t> pair(const char* name) { return in.next<std::vector<int64_t>>("int[2]", prefix, name); }
  template <typename Enum>
  Enum choice(const char* name) {
    return static_cast<Enum>(integer(name));
  }
  MaybeTensor tensor(const char* name) {
    MaybeTensor t = in.next<MaybeTensor>("Tensor?", prefix, name);
    return t && !t->is_contiguous() ? torch::stable::contiguous(*t) : t;
  }
  MaybeTensor tensor_like_x(const char* name) {
    MaybeTensor t = in.next<MaybeTensor>("Tensor?", prefix, name);
    return t ? with_layout(*t, is_channels_last(*in.x)) : t;
  }
  Tensor input(const char* name) {
    const Tensor x = in.next<Tensor>("Tensor", prefix, name);
    if (!in.stack) return x;
    in.x = x.dim() == 4 ? dense(x) : torch::stable::contiguous(x);
    return *in.x;
  }

 private:
  const char* prefix;
};

struct Epilogue : Part {
  using Part::Part;
  MaybeTensor weight = tensor("weight");  // [C]
  MaybeTensor bias = tensor("bias");      // [C]
  double eps = number("eps");
  MaybeTensor residual = tensor_like_x("residual");
  bool need_grad_residual = flag("need_grad_residual");
  Activation activation = choice<Activation>("activation");
};

struct Projection : Part {
  using Part::Part;
  MaybeTensor weight = tensor("weight");                // [K, C, 1, 1]
  MaybeTensor bias = tensor("bias");                    // [K]
  MaybeTensor grid_weight = tensor("grid_weight");      // [K, C, GH, GW]
  std::vector<int64_t> padding = pair("padding");       // 0, 0
  MaybeTensor hidden_weight = tensor("hidden_weight");  // [M, C]: grid_weight is [K, M, GH, GW] then
  MaybeTensor hidden_bn_weight = tensor("hidden_bn_weight"), hidden_bn_bias = tensor("hidden_bn_bias");  // [M]
  double hidden_eps = number("hidden_eps");
  MaybeTensor hidden_mean = tensor("hidden_mean"), hidden_var = tensor("hidden_var");  // [M], or none: the batch's
};

struct Groups : Part {
  using Part::Part;
  int64_t count = integer("count");
  int64_t power = integer("power");
  bool mean = flag("mean");
  bool positions = flag("positions");
};

struct Normalization : Part {
  using Part::Part;
  NormalizationName name = choice<NormalizationName>("name");
  int64_t groups = integer("groups");
  double eps = number("eps");
};

// A boxed kernel that reads Arguments and calls function(const Arguments&) -> std::vector<Tensor>.
template <typename Arguments, auto function>
void boxed(StableIValue* stack, uint64_t, uint64_t num_outputs) {
  Reader in{stack, {}, {}};
  const Arguments arguments(in);
  const std::vector<Tensor> results = function(arguments);
  for (uint64_t i = 0; i < num_outputs; ++i) stack[i] = torch::stable::detail::from(results.at(i));  // new references
}

// "name(arguments) -> results"
template <typename Arguments>
std::string schema(const std::string& name, const std::string& results) {
  Reader in;
  const Arguments arguments(in);
  return name + "(" + in.schema + ") -> " + results;
}

}  // namespace spec
