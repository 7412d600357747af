// What step_native (step.cpp) hands to the kernels of the two kinds of goodness.
#pragma once

#include "epilogue.h"
#include "loss.h"

struct StepCall {
  const spec::Step& given;
  const Loss& loss;
  const Epilogue* epilogue;  // null, or what makes the goodness's input of x
  float* epilogue_sums;      // [2, C]: its sums over the batch are added to them
  double* grad_tau;          // one summand for each loss
  spec::StepResult& result;  // loss, goodness, grad_x (dL/dh with an epilogue) and normalized are allocated
};

void projection_step(const StepCall& call);  // goodness.cpp
void groups_step(const StepCall& call);      // group_goodness.cpp

int64_t count_of_groups(const Tensor& x, const spec::Groups& groups);  // goodnesses of a sample
