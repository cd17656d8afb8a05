#include "pe_infer/resample.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "pe_infer/dispatch.h"
#include "pe_infer/pixel.h"

namespace pe_infer {
namespace {

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

template <typename Stored>
inline void row_to_hu(const Stored* source, int count, const Rescale& rescale, float* hu) {
  const float slope = rescale.slope, intercept = rescale.intercept;
  const std::int32_t low = rescale.padding_low, high = rescale.padding_high;
  for (int i = 0; i < count; ++i) {
    const std::int32_t stored = source[i];
    const float value = to_hu(static_cast<float>(stored), slope, intercept);
    hu[i] = (stored >= low && stored <= high) ? kAirHu : value;
  }
}

PE_INFER_DISPATCH void convert_row(const std::int16_t* source, int count, const Rescale& rescale,
                                   float* hu) {
  row_to_hu(source, count, rescale, hu);
}

PE_INFER_DISPATCH void convert_row(const std::uint16_t* source, int count, const Rescale& rescale,
                                   float* hu) {
  row_to_hu(source, count, rescale, hu);
}

// sums[i] = 0 + w0 * row0[i] + w1 * row1[i] + ..., taps in ascending order.
PE_INFER_DISPATCH void filter_rows(const float* first_row, std::ptrdiff_t stride,
                                   const float* weights, std::ptrdiff_t weight_stride, int taps,
                                   int count, float* sums) {
  const float weight = weights[0];
  for (int i = 0; i < count; ++i) sums[i] = weight * first_row[i];
  for (int tap = 1; tap < taps; ++tap) {
    const float* row = first_row + tap * stride;
    const float tap_weight = weights[tap * weight_stride];
    for (int i = 0; i < count; ++i) sums[i] += tap_weight * row[i];
  }
}

PE_INFER_DISPATCH void filter_cols(const float* row, const AxisWeights& axis, int first, int last,
                                   float* sums, std::int16_t* out) {
  const std::int32_t* start = axis.starts();
  const float* weight = axis.weights(0);
  for (int j = first; j < last; ++j) sums[j] = weight[j] * row[start[j]];
  for (int tap = 1; tap < axis.taps(); ++tap) {
    const float* tap_weight = axis.weights(tap);
    const float* shifted = row + tap;
    for (int j = first; j < last; ++j) sums[j] += tap_weight[j] * shifted[start[j]];
  }
  for (int j = first; j < last; ++j) out[j] = to_steps(clamp(sums[j], kAirHu, kMaxHu));
}

void transpose(const float* source, int rows, int cols, float* out) {
  constexpr int kBlock = 16;
  for (int r0 = 0; r0 < rows; r0 += kBlock) {
    for (int c0 = 0; c0 < cols; c0 += kBlock) {
      const int r1 = std::min(r0 + kBlock, rows), c1 = std::min(c0 + kBlock, cols);
      for (int c = c0; c < c1; ++c) {
        for (int r = r0; r < r1; ++r) {
          out[static_cast<std::ptrdiff_t>(c) * rows + r] =
              source[static_cast<std::ptrdiff_t>(r) * cols + c];
        }
      }
    }
  }
}

}  // namespace

AxisWeights::AxisWeights(int in_size, double in_spacing, int out_size, double out_spacing)
    : out_size_(out_size) {
  require(in_size >= 1 && out_size >= 1, "axis sizes must be at least 1");
  require(
      std::isfinite(in_spacing) && in_spacing > 0 && std::isfinite(out_spacing) && out_spacing > 0,
      "axis spacings must be positive and finite");
  const double half_width = std::max(in_spacing, out_spacing);
  const double in_centre = (in_size - 1) / 2.0, out_centre = (out_size - 1) / 2.0;
  const double half_extent = in_size * in_spacing / 2.0;

  // Input samples strictly within half_width of an output sample; never more than fit.
  const double most = std::floor(2.0 * half_width / in_spacing) + 1.0;
  taps_ = static_cast<int>(std::min(most, static_cast<double>(in_size)));
  start_.assign(static_cast<std::size_t>(out_size), 0);
  weight_.assign(static_cast<std::size_t>(out_size) * static_cast<std::size_t>(taps_), 0.0f);
  first_ = out_size;
  last_ = 0;
  in_first_ = in_size;
  in_last_ = 0;

  std::vector<double> weights(static_cast<std::size_t>(taps_));
  for (int out = 0; out < out_size; ++out) {
    const double position = (out - out_centre) * out_spacing;
    if (std::abs(position) > half_extent) continue;
    const double lowest = std::floor((position - half_width) / in_spacing + in_centre) + 1.0;
    const int start =
        static_cast<int>(std::clamp(lowest, 0.0, static_cast<double>(in_size - taps_)));
    double sum = 0.0;
    for (int tap = 0; tap < taps_; ++tap) {
      const double weight = hat((start + tap - in_centre) * in_spacing - position, half_width);
      weights[static_cast<std::size_t>(tap)] = weight;
      sum += weight;
    }
    for (int tap = 0; tap < taps_; ++tap) {
      const std::size_t index = static_cast<std::size_t>(tap) * static_cast<std::size_t>(out_size) +
                                static_cast<std::size_t>(out);
      weight_[index] = static_cast<float>(weights[static_cast<std::size_t>(tap)] / sum);
    }
    start_[static_cast<std::size_t>(out)] = start;
    first_ = std::min(first_, out);
    last_ = out + 1;
    in_first_ = std::min(in_first_, start);
    in_last_ = std::max(in_last_, start + taps_);
  }
}

SliceResampler::SliceResampler(int rows, int cols, double row_spacing, double col_spacing,
                               Orientation orientation, int out_rows, int out_cols,
                               double out_spacing)
    : rows_(rows),
      cols_(cols),
      out_rows_(out_rows),
      out_cols_(out_cols),
      orientation_(orientation),
      row_weights_(orientation.transpose ? cols : rows,
                   orientation.transpose ? col_spacing : row_spacing, out_rows, out_spacing),
      col_weights_(orientation.transpose ? rows : cols,
                   orientation.transpose ? row_spacing : col_spacing, out_cols, out_spacing) {
  const std::size_t pixels = static_cast<std::size_t>(rows) * static_cast<std::size_t>(cols);
  hu_.resize(orientation.transpose ? 2 * pixels : pixels);
  filtered_.resize(static_cast<std::size_t>(std::max(rows, cols)));
  sums_.resize(static_cast<std::size_t>(out_cols));
}

template <typename Stored>
void SliceResampler::run_any(std::span<const Stored> pixels, const Rescale& rescale,
                             std::span<std::int16_t> out) {
  const std::size_t in_count = static_cast<std::size_t>(rows_) * static_cast<std::size_t>(cols_);
  const std::size_t out_count =
      static_cast<std::size_t>(out_rows_) * static_cast<std::size_t>(out_cols_);
  require(pixels.size() == in_count, "pixels do not have the size the resampler was made for");
  require(out.size() == out_count, "output does not have the size of the grid");

  // Source rows in patient orientation. A flipped row order is undone while copying, a flipped
  // column order after.
  float* hu = hu_.data();
  int height = rows_, width = cols_;
  if (orientation_.transpose) {
    float* upright = hu + in_count;
    for (int r = 0; r < rows_; ++r) {
      convert_row(pixels.data() + static_cast<std::ptrdiff_t>(r) * cols_, cols_, rescale,
                  upright + static_cast<std::ptrdiff_t>(r) * cols_);
    }
    transpose(upright, rows_, cols_, hu);
    std::swap(height, width);
  } else {
    for (int r = 0; r < rows_; ++r) {
      convert_row(pixels.data() + static_cast<std::ptrdiff_t>(r) * cols_, cols_, rescale,
                  hu + static_cast<std::ptrdiff_t>(r) * cols_);
    }
  }
  // The weights are symmetric about the centre, so a flip of the rows is a walk from the last row
  // with stride -width.
  const std::ptrdiff_t stride = orientation_.flip_rows ? -width : width;
  const float* origin =
      orientation_.flip_rows ? hu + static_cast<std::ptrdiff_t>(height - 1) * width : hu;

  for (int i = 0; i < out_rows_; ++i) {
    std::int16_t* out_row = out.data() + static_cast<std::ptrdiff_t>(i) * out_cols_;
    if (i < row_weights_.first() || i >= row_weights_.last()) {
      std::fill_n(out_row, out_cols_, kAirSteps);
      continue;
    }
    const int left =
        orientation_.flip_cols ? width - col_weights_.in_last() : col_weights_.in_first();
    const int count = col_weights_.in_last() - col_weights_.in_first();
    filter_rows(origin + row_weights_.start(i) * stride + left, stride, row_weights_.weights(0) + i,
                out_rows_, row_weights_.taps(), count, filtered_.data() + left);
    if (orientation_.flip_cols) std::reverse(filtered_.data(), filtered_.data() + width);
    std::fill_n(out_row, col_weights_.first(), kAirSteps);
    std::fill(out_row + col_weights_.last(), out_row + out_cols_, kAirSteps);
    filter_cols(filtered_.data(), col_weights_, col_weights_.first(), col_weights_.last(),
                sums_.data(), out_row);
  }
}

void SliceResampler::run(std::span<const std::int16_t> pixels, const Rescale& rescale,
                         std::span<std::int16_t> out) {
  run_any(pixels, rescale, out);
}

void SliceResampler::run(std::span<const std::uint16_t> pixels, const Rescale& rescale,
                         std::span<std::int16_t> out) {
  run_any(pixels, rescale, out);
}

}  // namespace pe_infer
