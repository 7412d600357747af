// The arguments and results of step_native (step.cpp), and what it hands to the kernels of the two kinds of goodness.
#pragma once

#include <deque>

#include "epilogue.h"
#include "loss.h"

namespace spec {

struct Step : Part {
  using Part::Part;
  Tensor x = input("x");
  bool has_epilogue = flag("has_epilogue");
  Epilogue epilogue{in, "epilogue_"};
  bool has_projection = flag("has_projection");
  Projection projection{in, "projection_"};
  bool has_groups = flag("has_groups");
  Groups groups{in, "groups_"};
  Loss loss{in, "loss_"};
  Normalization normalization{in, "normalization_"};
  bool need_grad_x = flag("need_grad_x");
  bool second_moment = flag("second_moment");
};

// Results of a step in the order of fastff/spec.py, empty where absent. loss: reduced, or [B], or [B / 2] of pairs; grad_tau: one element, the sum
// over the batch.
class StepResult {
  Tensor none;
  std::deque<Tensor> results;
  std::vector<const char*> names;

  Tensor& result(const char* name) {
    names.push_back(name);
    return results.emplace_back(none);
  }

 public:
  explicit StepResult(const Tensor& none = Tensor()) : none(none) {}

  Tensor &loss = result("loss"), &goodness = result("goodness");
  Tensor &grad_x = result("grad_x"), &grad_weight = result("grad_weight"), &grad_bias = result("grad_bias");
  Tensor &grad_grid_weight = result("grad_grid_weight"), &grad_tau = result("grad_tau");
  Tensor &normalized = result("normalized"), &grad_residual = result("grad_residual");
  Tensor &grad_bn_weight = result("grad_bn_weight"), &grad_bn_bias = result("grad_bn_bias");
  Tensor &mean = result("mean"), &var = result("var"), &grad_hidden_weight = result("grad_hidden_weight");
  Tensor &grad_hidden_bn_weight = result("grad_hidden_bn_weight"), &grad_hidden_bn_bias = result("grad_hidden_bn_bias");
  Tensor &hidden_mean = result("hidden_mean"), &hidden_var = result("hidden_var");

  std::vector<Tensor> all() const { return {results.begin(), results.end()}; }
  std::string schema() const {
    std::string text;
    for (const char* name : names) text += (text.empty() ? "(Tensor " : ", Tensor ") + std::string(name);
    return text + ")";
  }
};

}  // namespace spec

struct StepCall {
  const spec::Step& given;
  const Loss& loss;
  const Epilogue* epilogue;  // null, or what makes the goodness's input of x
  double* epilogue_sums;     // [2, C]: its sums over the batch are added to them
  double* grad_tau;          // one summand for each loss
  spec::StepResult& result;  // loss, goodness, grad_x (dL/dh with an epilogue) and normalized are allocated
};

void projection_step(const StepCall& call);  // goodness.cpp
void groups_step(const StepCall& call);      // group_goodness.cpp

int64_t count_of_groups(const Tensor& x, const spec::Groups& groups);  // goodnesses of a sample
