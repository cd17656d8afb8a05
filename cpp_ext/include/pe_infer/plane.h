// Planes of the patient grid: gathered from resampled slices, judged by the gate, windowed into
// slabs.
#pragma once

#include <cstdint>
#include <span>

namespace pe_infer {

// out[i] = HU of sum over slices of weight * value, slices in the order given (ascending position).
// slices: pointers to out.size() values in 1/8 HU; weights: one per slice, summing to 1.
// Throws std::invalid_argument if there is no slice or the counts differ.
void gather_plane(std::span<const std::int16_t* const> slices, std::span<const float> weights,
                  std::span<float> out);

// out[i] = (hu[i] - low_hu) / (high_hu - low_hu), clamped to [0, 1].
// Throws std::invalid_argument if sizes differ or the window is empty.
void window_plane(std::span<const float> hu, float low_hu, float high_hu, std::span<float> out);

// Share of the pixels of a rows x cols plane that lie within [low_hu, high_hu] and inside the body.
// The body is the largest edge-connected component of pixels of at least tissue_hu; a pixel is
// inside it when parts of the body lie on both sides of it in its row and in its column. So lungs
// count, air around the patient and the table's foam do not. Throws std::invalid_argument if sizes
// differ.
double gate_fraction(std::span<const float> hu, int rows, int cols, float low_hu, float high_hu,
                     float tissue_hu);

}  // namespace pe_infer
