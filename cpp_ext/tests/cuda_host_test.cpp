// The CUDA kernels run on the CPU under sanitizers: they give the bits of the C++ core, and read
// and write nothing outside their arrays, whatever the sizes, orientations and blocks. More numbers
// are compared in tests/unit/test_cuda_kernels.py.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "pe_infer/plane.h"
#include "pe_infer/resample.h"

extern "C" bool pe_launch_on_host(const char* kernel, unsigned grid_x, unsigned grid_y,
                                  unsigned block_x, unsigned block_y, void** args, int arg_count);

namespace {

int failures = 0;

void expect(bool condition, const char* what, int line) {
  if (condition) return;
  std::fprintf(stderr, "cuda_host_test.cpp:%d: %s\n", line, what);
  ++failures;
}
#define EXPECT(condition) expect((condition), #condition, __LINE__)

// Enough blocks for width x height threads. Arguments must have exactly the kernel's types.
template <typename... Args>
bool launch(const char* kernel, int width, int height, unsigned block_x, unsigned block_y,
            Args... args) {
  void* addresses[] = {&args...};
  const auto x = static_cast<unsigned>(width), y = static_cast<unsigned>(height);
  return pe_launch_on_host(kernel, (x + block_x - 1) / block_x, (y + block_y - 1) / block_y,
                           block_x, block_y, addresses, static_cast<int>(sizeof...(Args)));
}

std::vector<std::int16_t> noise(std::size_t count, unsigned seed) {
  std::vector<std::int16_t> values(count);
  for (auto& value : values) {
    seed = seed * 1664525u + 1013904223u;
    value = static_cast<std::int16_t>(static_cast<int>(seed >> 20) - 1024);
  }
  return values;
}

void a_slice_is_resampled_as_by_the_core(int rows, int cols, int turn) {
  constexpr int kOutRows = 13, kOutCols = 11;
  const double row_spacing = 0.9, col_spacing = 1.7, out_spacing = 1.1;
  const pe_infer::Orientation turned{(turn & 4) != 0, (turn & 2) != 0, (turn & 1) != 0};
  const std::vector<std::int16_t> pixels =
      noise(static_cast<std::size_t>(rows * cols), static_cast<unsigned>(turn));
  std::vector<std::int16_t> expected(kOutRows * kOutCols), found(kOutRows * kOutCols);
  pe_infer::SliceResampler(rows, cols, row_spacing, col_spacing, turned, kOutRows, kOutCols,
                           out_spacing)
      .run(pixels, {0.75f, -20.0f, 30, 60}, expected);

  // The upright slice: height x width samples, `down` and `left` values apart.
  const int height = turned.transpose ? cols : rows, width = turned.transpose ? rows : cols;
  std::int64_t down = turned.transpose ? 1 : cols, left = turned.transpose ? cols : 1;
  const std::int16_t* first = pixels.data();
  if (turned.flip_rows) first += (height - 1) * down, down = -down;
  if (turned.flip_cols) first += (width - 1) * left, left = -left;
  const pe_infer::AxisWeights r(height, turned.transpose ? col_spacing : row_spacing, kOutRows,
                                out_spacing);
  const pe_infer::AxisWeights c(width, turned.transpose ? row_spacing : col_spacing, kOutCols,
                                out_spacing);
  for (const unsigned block : {1u, 4u, 32u}) {
    found.assign(found.size(), 1);
    EXPECT(launch("pe_resample_i16", kOutCols, kOutRows, block, 3, first, down, left, 0.75f, -20.0f,
                  std::int32_t{30}, std::int32_t{60}, r.starts(), r.weights(0), r.taps(), r.first(),
                  r.last(), c.starts(), c.weights(0), c.taps(), c.first(), c.last(), kOutRows,
                  kOutCols, found.data()));
    EXPECT(found == expected);
  }
}

void slabs_are_gathered_as_by_the_core() {
  constexpr int kPixels = 77, kPlanes = 2, kWindows = 3;
  const auto a = noise(kPixels, 1), b = noise(kPixels, 2), c = noise(kPixels, 3);
  const std::vector<const std::int16_t*> slices{a.data(), b.data(), c.data()};
  const std::vector<float> weights{1.0f, 0.3f, 0.7f};
  const std::vector<std::int32_t> first_of_plane{0, 1, 3};
  const std::vector<float> low_hu{-1024.0f, -160.0f, 0.0f}, high_hu{500.0f, 240.0f, 80.0f};
  std::vector<float> per_hu;
  for (std::size_t w = 0; w < kWindows; ++w) per_hu.push_back(1.0f / (high_hu[w] - low_hu[w]));

  std::vector<float> slab(kPixels * kPlanes * kWindows, -1.0f), hu(kPixels), expected(kPixels);
  std::vector<std::uint16_t> half(slab.size(), 0xffffu);
  EXPECT(launch("pe_gather_slab_f32", kPixels, kPlanes, 32, 4, slices.data(), weights.data(),
                first_of_plane.data(), kPlanes, kPixels, low_hu.data(), per_hu.data(), kWindows,
                slab.data()));
  EXPECT(launch("pe_gather_slab_f16", kPixels, kPlanes, 32, 4, slices.data(), weights.data(),
                first_of_plane.data(), kPlanes, kPixels, low_hu.data(), per_hu.data(), kWindows,
                half.data()));
  for (std::size_t plane = 0; plane < kPlanes; ++plane) {
    const auto begin = static_cast<std::size_t>(first_of_plane[plane]);
    const auto count = static_cast<std::size_t>(first_of_plane[plane + 1]) - begin;
    const std::span<const std::int16_t* const> part(slices.data() + begin, count);
    const std::span<const float> weight(weights.data() + begin, count);
    pe_infer::gather_plane(part, weight, expected);
    EXPECT(launch("pe_gather_hu", kPixels, 1, 32, 1, part.data(), weight.data(),
                  static_cast<int>(count), kPixels, hu.data()));
    EXPECT(hu == expected);
    for (std::size_t w = 0; w < kWindows; ++w) {
      pe_infer::window_plane(hu, low_hu[w], high_hu[w], expected);
      const std::size_t channel = (plane * kWindows + w) * kPixels;
      for (std::size_t i = 0; i < kPixels; ++i) EXPECT(slab[channel + i] == expected[i]);
    }
  }
  for (std::size_t i = 0; i < half.size(); ++i) {
    const int exponent = half[i] >> 10, mantissa = half[i] & 0x3ff;
    const double value = exponent > 0 ? std::ldexp(1024 + mantissa, exponent - 25)  //
                                      : std::ldexp(mantissa, -24);
    EXPECT(std::abs(value - static_cast<double>(slab[i])) <= 0x1p-12);
  }
}

void wrong_calls_are_refused() {
  EXPECT(!launch("pe_no_such_kernel", 1, 1, 1, 1, 0));
  EXPECT(!launch("pe_gather_hu", 1, 1, 1, 1, 0));
}

}  // namespace

int main() {
  for (int turn = 0; turn < 8; ++turn) {
    for (const int rows : {1, 6, 17}) {
      for (const int cols : {1, 9, 14}) a_slice_is_resampled_as_by_the_core(rows, cols, turn);
    }
  }
  slabs_are_gathered_as_by_the_core();
  wrong_calls_are_refused();
  std::printf("%s\n", failures == 0 ? "all CUDA kernels agree with the core" : "FAILED");
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
