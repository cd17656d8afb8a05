// The C++ core on its own, built with sanitizers. What the numbers should be is tested from Python
// against the NumPy twin; here: sizes at their edges, refusals, and that nothing is read or written
// outside its span.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <stdexcept>
#include <vector>

#include "pe_infer/pixel.h"
#include "pe_infer/plane.h"
#include "pe_infer/resample.h"

namespace {

int failures = 0;
long allocations = 0;

void expect(bool condition, const char* what, int line) {
  if (condition) return;
  std::fprintf(stderr, "core_test.cpp:%d: %s\n", line, what);
  ++failures;
}
#define EXPECT(condition) expect((condition), #condition, __LINE__)

template <typename Function>
bool refuses(Function function) {
  try {
    function();
  } catch (const std::invalid_argument&) {
    return true;
  }
  return false;
}

void rounding_is_to_even() {
  for (float value = -8192.0f; value <= 32760.0f; value += 0.25f) {
    if (pe_infer::round_to_even(value) != std::nearbyint(value)) {
      EXPECT(!"round_to_even differs from nearbyint");
      return;
    }
  }
  EXPECT(pe_infer::to_steps(pe_infer::kAirHu) == pe_infer::kAirSteps);
  EXPECT(pe_infer::to_steps(pe_infer::kMaxHu) == 32760);
}

void weights_sum_to_one() {
  for (int in = 1; in < 40; ++in) {
    for (const double ratio : {0.1, 0.37, 0.5, 0.99, 1.0, 1.01, 2.0, 3.3, 11.0}) {
      const pe_infer::AxisWeights axis(in, ratio, 13, 1.0);
      EXPECT(axis.first() < axis.last());  // the middle sample lies inside any image
      for (int out = axis.first(); out < axis.last(); ++out) {
        float sum = 0.0f;
        for (int tap = 0; tap < axis.taps(); ++tap) sum += axis.weights(tap)[out];
        EXPECT(std::abs(sum - 1.0f) < 1e-5f);
        EXPECT(axis.start(out) >= 0 && axis.start(out) + axis.taps() <= in);
      }
    }
  }
}

void a_constant_stays_constant_in_every_orientation_and_size() {
  for (int rows = 1; rows < 20; rows += 3) {
    for (int cols = 1; cols < 20; cols += 3) {
      for (int turn = 0; turn < 8; ++turn) {
        const pe_infer::Orientation orientation{(turn & 4) != 0, (turn & 2) != 0, (turn & 1) != 0};
        pe_infer::SliceResampler resampler(rows, cols, 0.9, 1.7, orientation, 7, 9, 0.25);
        const std::vector<std::uint16_t> pixels(static_cast<std::size_t>(rows * cols), 1064);
        std::vector<std::int16_t> out(7 * 9);
        resampler.run(pixels, {1.0f, -1024.0f, 1, 0}, out);
        for (const std::int16_t value : out) EXPECT(value == 320 || value == pe_infer::kAirSteps);
        EXPECT(out[3 * 9 + 4] == 320);
      }
    }
  }
}

void a_slice_allocates_nothing() {
  for (const bool transpose : {false, true}) {
    pe_infer::SliceResampler resampler(31, 17, 0.7, 0.7, {transpose, true, true}, 24, 20, 0.9);
    const std::vector<std::int16_t> pixels(31 * 17, 40);
    std::vector<std::int16_t> out(24 * 20);
    const long before = allocations;
    resampler.run(pixels, {1.0f, 0.0f, 1, 0}, out);
    EXPECT(allocations == before);
  }
}

void bad_sizes_are_refused() {
  EXPECT(refuses([] { pe_infer::AxisWeights(0, 1.0, 1, 1.0); }));
  EXPECT(refuses([] { pe_infer::AxisWeights(1, 0.0, 1, 1.0); }));
  EXPECT(refuses([] { pe_infer::AxisWeights(1, 1.0, 1, std::nan("")); }));
  pe_infer::SliceResampler resampler(4, 4, 1.0, 1.0, {}, 4, 4, 1.0);
  std::vector<std::int16_t> small(15), right(16);
  EXPECT(refuses([&] { resampler.run(std::span<const std::int16_t>(small), {}, right); }));
  EXPECT(refuses([&] { resampler.run(std::span<const std::int16_t>(right), {}, small); }));
  std::vector<float> plane(16), other(15);
  EXPECT(refuses([&] { pe_infer::gather_plane({}, {}, plane); }));
  EXPECT(refuses([&] { pe_infer::window_plane(plane, 0.0f, 1.0f, other); }));
  EXPECT(refuses([&] { pe_infer::window_plane(plane, 1.0f, 1.0f, plane); }));
  EXPECT(refuses([&] { pe_infer::gate_fraction(plane, 3, 5, 0.0f, 1.0f, 0.0f); }));
}

void planes_are_weighted_sums() {
  const std::vector<std::int16_t> low(10000, 800), high(10000, 1600);
  const std::vector<const std::int16_t*> slices{low.data(), high.data()};
  const std::vector<float> weights{0.25f, 0.75f};
  std::vector<float> out(10000);
  pe_infer::gather_plane(slices, weights, out);
  for (const float hu : out) EXPECT(hu == 175.0f);
  pe_infer::window_plane(out, -25.0f, 375.0f, out);
  for (const float value : out) EXPECT(value == 0.5f);
}

void the_gate_sees_what_the_body_encloses() {
  std::vector<float> plane(100, -1000.0f);
  EXPECT(pe_infer::gate_fraction(plane, 10, 10, -1100.0f, -500.0f, -200.0f) ==
         0.0);  // no body at all
  for (const std::size_t i : {22u, 23u, 24u, 32u, 34u, 42u, 43u, 44u}) plane[i] = 40.0f;
  plane[33] = -800.0f;
  EXPECT(pe_infer::gate_fraction(plane, 10, 10, -950.0f, -500.0f, -200.0f) == 0.01);
}

}  // namespace

void* operator new(std::size_t size) {
  ++allocations;
  if (void* memory = std::malloc(size)) return memory;
  throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

int main() {
  rounding_is_to_even();
  weights_sum_to_one();
  a_constant_stays_constant_in_every_orientation_and_size();
  a_slice_allocates_nothing();
  bad_sizes_are_refused();
  planes_are_weighted_sums();
  the_gate_sees_what_the_body_encloses();
  std::printf("%s\n", failures == 0 ? "all core tests passed" : "FAILED");
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
