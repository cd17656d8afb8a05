// The arithmetic of one pixel, shared by every implementation of the kernel (preprocessing version
// 1). No standard library beyond <cstdint>, no state: a CUDA kernel can include this file. Bits
// must match everywhere, so nothing here may be contracted to a fused multiply-add.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define PE_INFER_PIXEL __host__ __device__ inline
#else
#define PE_INFER_PIXEL inline
#endif

namespace pe_infer {

inline constexpr float kAirHu = -1024.0f;
inline constexpr float kMaxHu = 4095.0f;
inline constexpr float kStepsPerHu = 8.0f;  // a resampled slice is kept as int16 in 1/8 HU
inline constexpr float kHuPerStep = 0.125f;
inline constexpr std::int16_t kAirSteps = -8192;

PE_INFER_PIXEL float clamp(float value, float low, float high) {
  value = value < low ? low : value;
  return value > high ? high : value;
}

// Stored value to HU, clamped to [-1024, 4095] before any filtering.
PE_INFER_PIXEL float to_hu(float stored, float slope, float intercept) {
  const float scaled = stored * slope;
  return clamp(scaled + intercept, kAirHu, kMaxHu);
}

// Nearest integer, ties to even, for |value| < 2^22: plain additions, so that any compiler
// vectorises it.
PE_INFER_PIXEL float round_to_even(float value) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23
  const float shifted = value + kMagic;
  return shifted - kMagic;
}

// HU in [-1024, 4095] to 1/8 HU.
PE_INFER_PIXEL std::int16_t to_steps(float hu) {
  return static_cast<std::int16_t>(static_cast<std::int32_t>(round_to_even(hu * kStepsPerHu)));
}

// HU to [0, 1].
PE_INFER_PIXEL float apply_window(float hu, float low_hu, float per_hu) {
  return clamp((hu - low_hu) * per_hu, 0.0f, 1.0f);
}

// Weight of a sample at `distance` under a hat of half-width `half_width`.
PE_INFER_PIXEL double hat(double distance, double half_width) {
  const double magnitude = distance < 0 ? -distance : distance;
  return magnitude < half_width ? 1.0 - magnitude / half_width : 0.0;
}

}  // namespace pe_infer
