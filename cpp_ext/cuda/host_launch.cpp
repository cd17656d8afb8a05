// preprocess.cu on the CPU: blocks and threads as loops, one thread after another. For tests only.
// Right because no kernel there waits for another thread or reads what another has written.
#include <algorithm>
#include <cstddef>
#include <cstring>
#include <utility>

#include "pe_infer/resample.h"

namespace {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};
Dim3 blockDim, blockIdx, threadIdx;

}  // namespace

#define __global__
#define __device__
#include "preprocess.cu"

namespace {

template <typename... Args, std::size_t... I>
void call(void (*kernel)(Args...), void** args, std::index_sequence<I...>) {
  kernel(*static_cast<Args*>(args[I])...);
}

// args: the address of every argument, as cuLaunchKernel takes them.
template <typename... Args>
void launch(void (*kernel)(Args...), Dim3 grid, Dim3 block, void** args) {
  blockDim = block;
  for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
    for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
      for (threadIdx.y = 0; threadIdx.y < block.y; ++threadIdx.y) {
        for (threadIdx.x = 0; threadIdx.x < block.x; ++threadIdx.x) {
          call(kernel, args, std::index_sequence_for<Args...>());
        }
      }
    }
  }
}

}  // namespace

// Runs a kernel over a grid in x and y. Returns false if no kernel of that name takes that many
// arguments. Not for several threads at once.
extern "C" bool pe_launch_on_host(const char* kernel, unsigned grid_x, unsigned grid_y,
                                  unsigned block_x, unsigned block_y, void** args, int arg_count) {
  bool launched = false;
  const auto try_launch = [&]<typename... Args>(const char* name, void (*function)(Args...)) {
    if (std::strcmp(name, kernel) != 0 || sizeof...(Args) != static_cast<std::size_t>(arg_count)) {
      return;
    }
    launch(function, {grid_x, grid_y}, {block_x, block_y}, args);
    launched = true;
  };
  try_launch("pe_resample_i16", pe_resample_i16);
  try_launch("pe_resample_u16", pe_resample_u16);
  try_launch("pe_gather_slab_f32", pe_gather_slab_f32);
  try_launch("pe_gather_slab_f16", pe_gather_slab_f16);
  try_launch("pe_gather_hu", pe_gather_hu);
  return launched;
}

// The weights that pe_resample_* take, in memory for out_size and out_size * in_size values.
// Returns the number of taps: weight then holds (taps, out_size) values.
extern "C" int pe_axis_weights(int in_size, double in_spacing, int out_size, double out_spacing,
                               int* first, int* last, std::int32_t* start, float* weight) {
  const pe_infer::AxisWeights axis(in_size, in_spacing, out_size, out_spacing);
  *first = axis.first();
  *last = axis.last();
  std::copy_n(axis.starts(), out_size, start);
  std::copy_n(axis.weights(0), static_cast<std::ptrdiff_t>(axis.taps()) * out_size, weight);
  return axis.taps();
}
