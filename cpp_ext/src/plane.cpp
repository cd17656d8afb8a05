#include "pe_infer/plane.h"

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "pe_infer/dispatch.h"
#include "pe_infer/pixel.h"

namespace pe_infer {
namespace {

PE_INFER_DISPATCH void gather_block(const std::int16_t* const* slices, const float* weights,
                                    std::size_t slice_count, std::size_t offset, std::size_t count,
                                    float* out) {
  const std::int16_t* first = slices[0] + offset;
  for (std::size_t i = 0; i < count; ++i) out[i] = weights[0] * static_cast<float>(first[i]);
  for (std::size_t s = 1; s < slice_count; ++s) {
    const std::int16_t* slice = slices[s] + offset;
    const float weight = weights[s];
    for (std::size_t i = 0; i < count; ++i) out[i] += weight * static_cast<float>(slice[i]);
  }
  for (std::size_t i = 0; i < count; ++i) out[i] *= kHuPerStep;
}

PE_INFER_DISPATCH void window_block(const float* hu, std::size_t count, float low_hu, float per_hu,
                                    float* out) {
  for (std::size_t i = 0; i < count; ++i) out[i] = apply_window(hu[i], low_hu, per_hu);
}

// A horizontal run of tissue: columns [begin, end) of a row.
struct Run {
  std::size_t row, begin, end;
  std::size_t parent;  // index of another run of the same component, or of itself
};

std::size_t root_of(std::vector<Run>& runs, std::size_t index) {
  while (runs[index].parent != index) {
    runs[index].parent = runs[runs[index].parent].parent;
    index = runs[index].parent;
  }
  return index;
}

// Runs of pixels of at least tissue_hu in raster order, those that share an edge joined under their
// first run.
std::vector<Run> tissue_runs(std::span<const float> hu, std::size_t height, std::size_t width,
                             float tissue_hu) {
  std::vector<Run> runs;
  std::size_t above = 0, above_end = 0;  // the runs of the row before
  for (std::size_t r = 0; r < height; ++r) {
    const float* row = hu.data() + r * width;
    const std::size_t row_begin = runs.size();
    for (std::size_t c = 0; c < width;) {
      while (c < width && row[c] < tissue_hu) ++c;
      const std::size_t begin = c;
      while (c < width && row[c] >= tissue_hu) ++c;
      if (begin == c) continue;
      const std::size_t index = runs.size();
      runs.push_back({r, begin, c, index});
      while (above < above_end && runs[above].end <= begin) ++above;
      for (std::size_t i = above; i < above_end && runs[i].begin < c; ++i) {
        const std::size_t a = root_of(runs, i), b = root_of(runs, index);
        runs[std::max(a, b)].parent = std::min(a, b);
      }
    }
    above = row_begin;
    above_end = runs.size();
  }
  return runs;
}

// The runs of the component with most pixels, the first in raster order among equals.
std::vector<Run> largest_component(std::vector<Run> runs) {
  std::vector<std::size_t> size(runs.size(), 0);
  for (std::size_t i = 0; i < runs.size(); ++i)
    size[root_of(runs, i)] += runs[i].end - runs[i].begin;
  const auto largest =
      static_cast<std::size_t>(std::max_element(size.begin(), size.end()) - size.begin());
  std::vector<Run> kept;
  for (std::size_t i = 0; i < runs.size(); ++i) {
    if (root_of(runs, i) == largest) kept.push_back(runs[i]);
  }
  return kept;
}

}  // namespace

void gather_plane(std::span<const std::int16_t* const> slices, std::span<const float> weights,
                  std::span<float> out) {
  if (slices.empty() || slices.size() != weights.size()) {
    throw std::invalid_argument("a plane needs at least one slice and one weight per slice");
  }
  constexpr std::size_t kBlock = 4096;  // floats: the sums of a block stay in the first-level cache
  for (std::size_t offset = 0; offset < out.size(); offset += kBlock) {
    const std::size_t count = std::min(kBlock, out.size() - offset);
    gather_block(slices.data(), weights.data(), slices.size(), offset, count, out.data() + offset);
  }
}

void window_plane(std::span<const float> hu, float low_hu, float high_hu, std::span<float> out) {
  if (hu.size() != out.size())
    throw std::invalid_argument("window input and output differ in size");
  if (!(low_hu < high_hu)) throw std::invalid_argument("window is empty");
  window_block(hu.data(), hu.size(), low_hu, 1.0f / (high_hu - low_hu), out.data());
}

double gate_fraction(std::span<const float> hu, int rows, int cols, float low_hu, float high_hu,
                     float tissue_hu) {
  const auto height = static_cast<std::size_t>(rows), width = static_cast<std::size_t>(cols);
  if (rows < 1 || cols < 1 || hu.size() != height * width) {
    throw std::invalid_argument("gate plane does not have rows * cols values");
  }
  const std::vector<Run> body = largest_component(tissue_runs(hu, height, width, tissue_hu));

  std::vector<std::size_t> top(width, height),
      bottom(width, 0);  // first and last body row of every column
  std::vector<std::size_t> left(height, width), right(height, 0);
  for (const Run& run : body) {
    left[run.row] = std::min(left[run.row], run.begin);
    right[run.row] = std::max(right[run.row], run.end);
    for (std::size_t c = run.begin; c < run.end; ++c) {
      top[c] = std::min(top[c], run.row);
      bottom[c] = std::max(bottom[c], run.row);
    }
  }
  std::size_t inside = 0;
  for (std::size_t r = 0; r < height; ++r) {
    const float* row = hu.data() + r * width;
    for (std::size_t c = left[r]; c < right[r]; ++c) {
      inside += static_cast<std::size_t>(row[c] >= low_hu && row[c] <= high_hu && top[c] < r &&
                                         r < bottom[c]);
    }
  }
  return static_cast<double>(inside) / static_cast<double>(hu.size());
}

}  // namespace pe_infer
