// preprocess.cu on the CPU: blocks and threads as loops, one thread after another. For tests only.
// Right because no kernel there waits for another thread or reads what another has written.
#include <cstddef>
#include <cstring>
#include <utility>

namespace {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};
Dim3 blockDim, blockIdx, threadIdx;

bool flushing = false;

// Subnormal numbers are zero while this lives, if `flushing`.
class SubnormalMode {
#if defined(__x86_64__)
 public:
  SubnormalMode() : before_(__builtin_ia32_stmxcsr()) {
    constexpr unsigned kFlushToZero = 0x8000, kDenormalsAreZero = 0x0040;
    if (flushing) __builtin_ia32_ldmxcsr(before_ | kFlushToZero | kDenormalsAreZero);
  }
  ~SubnormalMode() { __builtin_ia32_ldmxcsr(before_); }

 private:
  unsigned before_;
#endif
};

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
  [[maybe_unused]] const SubnormalMode mode;
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

// Whether launches from now on compute as if compiled with -ftz=true, as CuPy compiles (x86-64).
extern "C" void pe_flush_subnormals(bool flush) { flushing = flush; }
