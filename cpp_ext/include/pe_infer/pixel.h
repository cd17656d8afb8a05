// The arithmetic of one pixel, shared by every implementation of the kernel (preprocessing version
// 1). No standard library beyond <cstdint>, no state: the CUDA kernels include this file. Bits
// must match everywhere, so nothing here may be contracted to a fused multiply-add.
#pragma once

#if defined(__CUDACC_RTC__)
namespace std {  // NVRTC compiles without a standard library
using int16_t = short;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long long;
}  // namespace std
#else
#include <cstdint>
#endif

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

PE_INFER_PIXEL std::uint32_t bits_of(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);  // NVRTC before 12.8 knows no other way
#else
  return __builtin_bit_cast(std::uint32_t, value);
#endif
}

// Bits of the FP16 number nearest to a value in [0, 1], ties to even.
PE_INFER_PIXEL std::uint16_t to_half_bits(float value) {
  constexpr float kSmallestNormal = 0x1p-14f;
  if (value < kSmallestNormal) {  // a multiple of 2^-24
    return static_cast<std::uint16_t>(static_cast<std::int32_t>(round_to_even(value * 0x1p24f)));
  }
  // 13 of 23 mantissa bits go; adding just under half of the last kept one, or half if that is odd,
  // rounds, and a carry into the exponent is right as it is. Its bias goes from 127 to 15.
  const std::uint32_t bits = bits_of(value);
  const std::uint32_t rounded = bits + 0x0fffu + ((bits >> 13) & 1u);
  return static_cast<std::uint16_t>((rounded >> 13) - ((127u - 15u) << 10));
}

// Weight of a sample at `distance` under a hat of half-width `half_width`.
PE_INFER_PIXEL double hat(double distance, double half_width) {
  const double magnitude = distance < 0 ? -distance : distance;
  return magnitude < half_width ? 1.0 - magnitude / half_width : 0.0;
}

}  // namespace pe_infer
