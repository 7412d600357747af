// The CUDA step on a CPU: csrc/cuda/step.cpp with its kernels in fibres in place of csrc/cuda/goodness.cu, as the operator
// fastff_cuda_host::step. To be compiled with -include warp.h.

#include "../../csrc/cuda/goodness.h"
#include "../../csrc/cuda/step.cpp"

namespace {

Device device{4, 227 << 10, true};
unsigned seed = 0;

template <typename T, int KT>
void run_step(const StepArguments& s) {
  host::run(s.division.grid, s.division.blocks, THREADS, s.at.bytes, seed, [&] { GoodnessStep<T, KT>(s).run(); });
}

template <typename T>
void run_for(const StepArguments& s) {
  switch (s.at.classes) {
    case 16: return run_step<T, 1>(s);
    case 32: return run_step<T, 2>(s);
    case 64: return run_step<T, 4>(s);
    default: return run_step<T, 8>(s);
  }
}

}  // namespace

Device device_of(int) { return device; }

const char* launch(const StepArguments& step, int) {
  step.half ? run_for<Float16>(step) : run_for<BFloat16>(step);
  host::run(step.K * step.width / WARP + 1, 1, THREADS, THREADS * sizeof(float), seed, [&] { add_partial(step); });
  return nullptr;
}

extern "C" __attribute__((visibility("default"))) void pretend(int multiprocessors, int shared, int clusters,
                                                               unsigned order) {
  device = {multiprocessors, shared, clusters != 0}, seed = order;
}

// How samples would be divided: blocks, samples, tiles, grid, and the bytes of shared memory of a block.
extern "C" __attribute__((visibility("default"))) void division(int B, int P, int C, int K, int bias, int* found) {
  const Division d = division_of(B, P, C, K, bias != 0, device);
  const int values[] = {d.blocks, d.samples, d.tiles, d.grid, layout_of(d.samples, d.tiles, C, K, bias != 0).bytes};
  std::copy(std::begin(values), std::end(values), found);
}

STABLE_TORCH_LIBRARY(fastff_cuda_host, m) {
  std::string results = "(Tensor";
  for (int i = 1; i < 18; ++i) results += ", Tensor";
  m.def(spec::schema<spec::Step>("step", results + ")").c_str());
}
STABLE_TORCH_LIBRARY_IMPL(fastff_cuda_host, CPU, m) { m.impl("step", &spec::boxed<spec::Step, goodness_step>); }
