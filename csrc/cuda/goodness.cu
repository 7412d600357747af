// The launches of a goodness step: goodness.h for each number of classes and each type.

#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include "goodness.h"

namespace {

template <typename T, int KT>
__global__ void __launch_bounds__(THREADS, 2) goodness_step(const __grid_constant__ StepArguments s) {
  GoodnessStep<T, KT>(s).run();
}

__global__ void __launch_bounds__(THREADS) gradients_of_parameters(const __grid_constant__ StepArguments s) {
  add_partial(s);
}

using Kernel = void (*)(StepArguments);

template <typename T>
Kernel kernel_for(int classes) {
  switch (classes) {
    case 16: return goodness_step<T, 1>;
    case 32: return goodness_step<T, 2>;
    case 64: return goodness_step<T, 4>;
    default: return goodness_step<T, 8>;
  }
}

// Finds PyTorch's stream. The function is in a library that only a PyTorch with CUDA has, so that it is looked up and not linked.
bool current_stream(int device, cudaStream_t* stream) {
  using Function = int32_t (*)(int32_t, void**);
  static const auto function = reinterpret_cast<Function>(
      dlsym(dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD), "aoti_torch_get_current_cuda_stream"));
  return function && function(device, reinterpret_cast<void**>(stream)) == 0;
}

cudaError_t launch_here(StepArguments s, cudaStream_t stream) {
  const Kernel kernel = s.half ? kernel_for<Float16>(s.at.classes) : kernel_for<BFloat16>(s.at.classes);
  if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, s.at.bytes))
    return error;
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = s.division.blocks, cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = s.division.grid, config.blockDim = THREADS, config.dynamicSmemBytes = s.at.bytes,
  config.stream = stream;
  config.attrs = &cluster, config.numAttrs = s.division.blocks > 1;
  if (s.division.blocks > 1) {
    // a cluster's multiprocessors are of one group, which may leave some over: clusters beyond these would run by themselves at the end
    int active = 0;
    if (const cudaError_t error = cudaOccupancyMaxActiveClusters(&active, kernel, &config)) return error;
    const int most = active * s.division.blocks;
    if (0 < most && most < s.division.grid) config.gridDim = s.division.grid = most;
  }
  if (const cudaError_t error = cudaLaunchKernelEx(&config, kernel, s)) return error;
  gradients_of_parameters<<<s.K * s.width / WARP + 1, THREADS, THREADS * sizeof(float), stream>>>(s);
  return cudaGetLastError();
}

}  // namespace

Device device_of(int index) {
  const auto attribute = [&](cudaDeviceAttr name) {
    int value = 0;
    cudaDeviceGetAttribute(&value, name, index);
    return value;
  };
  return {attribute(cudaDevAttrMultiProcessorCount), attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
          attribute(cudaDevAttrComputeCapabilityMajor) >= 9};
}

const char* launch(const StepArguments& step, int device) {
  cudaStream_t stream;
  if (!current_stream(device, &stream)) return "libtorch_cuda.so does not tell the current stream";
  int before = device;
  cudaGetDevice(&before);
  cudaError_t error = before == device ? cudaSuccess : cudaSetDevice(device);
  if (error == cudaSuccess) error = launch_here(step, stream);
  if (before != device) cudaSetDevice(before);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
