// The patient grid on the GPU (preprocessing version 1): slices resampled in their plane, planes
// gathered from them and windowed into slabs. Arithmetic and order of operations are those of
// src/resample.cpp and src/plane.cpp, so the bits are too, provided that nothing is contracted to
// fused multiply-adds: compile with --fmad=false.
//
// One thread makes one output sample from global memory alone: no shared memory, no barriers, no
// order between threads, and any block size is right (32 x 8 suits slices, 256 x 1 planes). So a
// CPU can run this file as loops (host_launch.cpp), and that is how it is tested. It includes
// nothing that NVRTC lacks: FP16 is written as bits, without cuda_fp16.h.
//
// Not here: the gate. It labels the connected tissue of one plane per slab, which the CPU does
// while the GPU is busy: pe_gather_hu makes that plane, gate_fraction() of plane.h judges it.
#include "pe_infer/pixel.h"

namespace pe_infer {
namespace {

struct Place {
  int row, col;
};

// blockDim.x threads along columns, blockDim.y along rows; a warp reads neighbouring columns.
__device__ inline Place place_of_thread() {
  return {static_cast<int>(blockIdx.y * blockDim.y + threadIdx.y),
          static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x)};
}

// How output samples along one axis are made: the members of AxisWeights (resample.h).
struct Axis {
  const std::int32_t* start;  // (size): first input sample
  const float* weight;        // (taps, size)
  int taps, first, last;      // outputs outside [first, last) lie outside the image: air
  int size;

  __device__ bool covers(int out) const { return out >= first && out < last; }
};

// Stored values in [padding_low, padding_high] are air; low > high means no padding.
struct StoredToHu {
  float slope, intercept;
  std::int32_t padding_low, padding_high;

  __device__ float operator()(std::int32_t stored) const {
    if (stored >= padding_low && stored <= padding_high) return kAirHu;
    return to_hu(static_cast<float>(stored), slope, intercept);
  }
};

// The vertical pass for one column, then the horizontal pass over the columns, as on the CPU. The
// vertical sums are made again for every output column that needs them: a few multiplications more
// instead of a second kernel and its memory.
template <typename Stored>
__device__ inline std::int16_t resample(const Stored* pixels, std::int64_t row_stride,
                                        std::int64_t col_stride, const StoredToHu& hu,
                                        const Axis& rows, const Axis& cols, Place place) {
  if (!rows.covers(place.row) || !cols.covers(place.col)) return kAirSteps;
  const Stored* corner =
      pixels + rows.start[place.row] * row_stride + cols.start[place.col] * col_stride;
  float sum = 0.0f;  // 0 + x is x, so sums need no first term of their own
  for (int c = 0; c < cols.taps; ++c) {
    const Stored* column = corner + c * col_stride;
    float filtered = 0.0f;
    for (int r = 0; r < rows.taps; ++r) {
      const float weight = rows.weight[static_cast<std::int64_t>(r) * rows.size + place.row];
      filtered += weight * hu(column[r * row_stride]);
    }
    sum += cols.weight[static_cast<std::int64_t>(c) * cols.size + place.col] * filtered;
  }
  return to_steps(clamp(sum, kAirHu, kMaxHu));
}

// HU of one pixel of one plane: the weighted sum over slices [first, last), in ascending position.
__device__ inline float gather(const std::int16_t* const* slices, const float* weights, int first,
                               int last, std::int64_t pixel) {
  float sum = 0.0f;
  for (int s = first; s < last; ++s) sum += weights[s] * static_cast<float>(slices[s][pixel]);
  return sum * kHuPerStep;
}

__device__ inline void store(float value, float* out) { *out = value; }
__device__ inline void store(float value, std::uint16_t* out) { *out = to_half_bits(value); }

template <typename Value>
__device__ inline void gather_slab(const std::int16_t* const* slices, const float* weights,
                                   const std::int32_t* first_of_plane, int planes, int pixels,
                                   const float* low_hu, const float* per_hu, int windows,
                                   Value* out) {
  const auto [plane, pixel] = place_of_thread();
  if (plane >= planes || pixel >= pixels) return;
  const float hu = gather(slices, weights, first_of_plane[plane], first_of_plane[plane + 1], pixel);
  Value* value = out + static_cast<std::int64_t>(plane) * windows * pixels + pixel;
  for (int window = 0; window < windows; ++window, value += pixels) {
    store(apply_window(hu, low_hu[window], per_hu[window]), value);
  }
}

}  // namespace
}  // namespace pe_infer

// pe_resample_i16, pe_resample_u16: one slice onto the grid. x: columns, y: rows of the output.
//   pixels      the stored value of the first row and column in patient orientation; the strides,
//               in values, lead to the next row to the back and column to the left, and are
//               negative where the slice is stored the other way round
//   row_*       AxisWeights of the rows: start (out_rows), weight (row_taps, out_rows); the same
//   col_*       for the columns
//   out         (out_rows, out_cols) in 1/8 HU
#define PE_INFER_RESAMPLE(name, Stored)                                                         \
  extern "C" __global__ void name(                                                              \
      const Stored* pixels, std::int64_t row_stride, std::int64_t col_stride, float slope,      \
      float intercept, std::int32_t padding_low, std::int32_t padding_high,                     \
      const std::int32_t* row_start, const float* row_weight, int row_taps, int row_first,      \
      int row_last, const std::int32_t* col_start, const float* col_weight, int col_taps,       \
      int col_first, int col_last, int out_rows, int out_cols, std::int16_t* out) {             \
    using namespace pe_infer;                                                                   \
    const Place place = place_of_thread();                                                      \
    if (place.row >= out_rows || place.col >= out_cols) return;                                 \
    const Axis rows{row_start, row_weight, row_taps, row_first, row_last, out_rows};            \
    const Axis cols{col_start, col_weight, col_taps, col_first, col_last, out_cols};            \
    out[static_cast<std::int64_t>(place.row) * out_cols + place.col] =                          \
        resample(pixels, row_stride, col_stride, {slope, intercept, padding_low, padding_high}, \
                 rows, cols, place);                                                            \
  }

PE_INFER_RESAMPLE(pe_resample_i16, std::int16_t)
PE_INFER_RESAMPLE(pe_resample_u16, std::uint16_t)

// pe_gather_slab_f32, pe_gather_slab_f16: windowed planes, of one slab or of several that follow
// each other. x: pixels of a plane, y: planes.
//   slices          addresses of resampled slices (pixels values each), plane after plane; those of
//                   one plane in ascending position
//   weights         one per entry of slices
//   first_of_plane  (planes + 1): plane p is made of entries [first_of_plane[p], ...[p + 1])
//   low_hu, per_hu  (windows): lower edge, and 1 / width in single precision
//   out             (planes, windows, pixels) in [0, 1]; f16: the bits
extern "C" __global__ void pe_gather_slab_f32(const std::int16_t* const* slices,
                                              const float* weights,
                                              const std::int32_t* first_of_plane, int planes,
                                              int pixels, const float* low_hu, const float* per_hu,
                                              int windows, float* out) {
  pe_infer::gather_slab(slices, weights, first_of_plane, planes, pixels, low_hu, per_hu, windows,
                        out);
}

extern "C" __global__ void pe_gather_slab_f16(const std::int16_t* const* slices,
                                              const float* weights,
                                              const std::int32_t* first_of_plane, int planes,
                                              int pixels, const float* low_hu, const float* per_hu,
                                              int windows, std::uint16_t* out) {
  pe_infer::gather_slab(slices, weights, first_of_plane, planes, pixels, low_hu, per_hu, windows,
                        out);
}

// One plane in HU, for the gate. x: its pixels. out: (pixels).
extern "C" __global__ void pe_gather_hu(const std::int16_t* const* slices, const float* weights,
                                        int slice_count, int pixels, float* out) {
  const int pixel = pe_infer::place_of_thread().col;
  if (pixel < pixels) out[pixel] = pe_infer::gather(slices, weights, 0, slice_count, pixel);
}
