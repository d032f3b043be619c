// Activations and their slopes, one value at a time.
#pragma once

#include <cuda_runtime.h>

#include "launch.h"

namespace smartmoe {

// Exponents are powers of 2 where FAST.
template <bool FAST>
constexpr float kExponent = FAST ? -1.4426950408889634f : -1.f;

// The sigmoid of x / kExponent. In 16-bit types the error of the fast functions is far below the rounding of the result.
template <bool FAST>
__device__ __forceinline__ float sigmoid(float x) {
  if constexpr (!FAST) return 1.f / (1.f + expf(x));
  float power, inverse;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(1.f + power));
  return inverse;
}

constexpr float kGeluScale = 1.5957691216057308f;  // 2 * sqrt(2 / pi)
constexpr float kGeluCube = kGeluScale * 0.044715f;

// The value and, unless null, the slope. Gelu in its tanh form is x * sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)).
template <int ACT, bool FAST>
__device__ __forceinline__ float act(float x, float* slope) {
  if constexpr (ACT == kRelu) {
    // as max(x, 0) does, let NaN through
    if (slope) *slope = x > 0.f ? 1.f : 0.f;
    return x < 0.f ? 0.f : x;
  } else if constexpr (ACT == kGelu) {
    const float square = x * x;
    const float gate = sigmoid<FAST>(x * fmaf(kExponent<FAST> * kGeluCube, square, kExponent<FAST> * kGeluScale)), y = x * gate;
    if (slope) *slope = fmaf(fmaf(-y, gate, y), fmaf(3.f * kGeluCube, square, kGeluScale), gate);
    return y;
  } else if constexpr (ACT == kSwiglu) {
    const float gate = sigmoid<FAST>(kExponent<FAST> * x), y = x * gate;
    if (slope) *slope = fmaf(-y, gate, y) + gate;
    return y;
  } else {
    if (slope) *slope = 1.f;
    return x;
  }
}

}  // namespace smartmoe
