// One sample's layer normalisation, for the operators that have it in their cache (layer_norm.cpp).
#pragma once

#include <cstdint>

void normalize_sample(const float* x, float* y, int64_t n, double eps);
