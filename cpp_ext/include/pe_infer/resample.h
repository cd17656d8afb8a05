// In-plane resampling of one slice to the patient grid.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace pe_infer {

// How the samples of one output axis are made from one input axis, both centred on the same point.
class AxisWeights {
 public:
  // Hat filter of half-width max(in_spacing, out_spacing), weights normalised to sum 1. An output
  // sample outside the input's extent (in_size * in_spacing, centred) has no weights: it is air.
  // Throws std::invalid_argument if a size is < 1 or a spacing is not positive and finite.
  AxisWeights(int in_size, double in_spacing, int out_size, double out_spacing);

  int taps() const { return taps_; }
  int first() const { return first_; }  // first output sample inside the input's extent
  int last() const { return last_; }    // one past the last
  int in_first() const {
    return in_first_;
  }  // input samples outside [in_first, in_last) have no weight
  int in_last() const { return in_last_; }
  std::int32_t start(int out) const { return start_[static_cast<std::size_t>(out)]; }
  const std::int32_t* starts() const { return start_.data(); }
  // Weight of tap t for every output sample: taps() rows of out_size values.
  const float* weights(int tap) const {
    return weight_.data() + static_cast<std::ptrdiff_t>(tap) * out_size_;
  }

 private:
  int out_size_;
  int taps_ = 0;
  int first_ = 0;
  int last_ = 0;
  int in_first_ = 0;
  int in_last_ = 0;
  std::vector<std::int32_t> start_;
  std::vector<float> weight_;
};

// How stored pixels become HU. Values in [padding_low, padding_high] become air; low > high means
// no padding.
struct Rescale {
  float slope = 1.0f;
  float intercept = 0.0f;
  std::int32_t padding_low = 1;
  std::int32_t padding_high = 0;
};

// Exact reorientation before filtering. The source is transposed first, then flipped.
struct Orientation {
  bool transpose = false;
  bool flip_rows = false;
  bool flip_cols = false;
};

// Resamples slices of one size, spacing and orientation. Immutable after construction but for its
// scratch memory: use one per thread. No allocation per slice.
class SliceResampler {
 public:
  // Sizes and spacings of the source as stored; rows and cols are swapped here if the orientation
  // transposes.
  SliceResampler(int rows, int cols, double row_spacing, double col_spacing,
                 Orientation orientation, int out_rows, int out_cols, double out_spacing);

  int rows() const { return rows_; }
  int cols() const { return cols_; }
  int out_rows() const { return out_rows_; }
  int out_cols() const { return out_cols_; }

  // pixels: rows*cols stored values, row-major. out: out_rows*out_cols values in 1/8 HU.
  // Throws std::invalid_argument if sizes differ.
  void run(std::span<const std::int16_t> pixels, const Rescale& rescale,
           std::span<std::int16_t> out);
  void run(std::span<const std::uint16_t> pixels, const Rescale& rescale,
           std::span<std::int16_t> out);

 private:
  template <typename Stored>
  void run_any(std::span<const Stored> pixels, const Rescale& rescale, std::span<std::int16_t> out);

  int rows_, cols_, out_rows_, out_cols_;
  Orientation orientation_;
  AxisWeights row_weights_, col_weights_;
  std::vector<float> hu_;        // source in patient orientation, HU
  std::vector<float> filtered_;  // one row after the vertical pass
  std::vector<float> sums_;      // one row after the horizontal pass
};

}  // namespace pe_infer
