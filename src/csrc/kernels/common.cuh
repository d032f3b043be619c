// What all kernels share: 16-byte packs, conversions, and the choice of element type and width of access.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "launch.h"

namespace smartmoe {

template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
  T value[N];
};

template <typename T, int N>
__device__ __forceinline__ Pack<T, N> load(const T* address) {
  return *reinterpret_cast<const Pack<T, N>*>(address);
}

template <typename T, int N>
__device__ __forceinline__ void store(T* address, const Pack<T, N>& pack) {
  *reinterpret_cast<Pack<T, N>*>(address) = pack;
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16(x);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether rows of `row_bytes` that start at all these addresses can be read 16 bytes at a time.
template <typename... P>
bool aligned16(int64_t row_bytes, P... pointers) {
  return row_bytes % 16 == 0 && ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

template <typename T>
struct Type {
  using type = T;
};

// Calls launch(Type<T>{}) with the element type that `dtype` names.
template <typename Launch>
cudaError_t with_type(int dtype, Launch&& launch) {
  switch (dtype) {
    case kFloat32:
      return launch(Type<float>{});
    case kFloat16:
      return launch(Type<__half>{});
    case kBFloat16:
      return launch(Type<__nv_bfloat16>{});
  }
  return cudaErrorInvalidValue;
}

// Threads for rows of `num_packs`: x runs along a row (whole warps), y over rows.
inline dim3 row_threads(int num_packs) {
  const int64_t turns = ceil_div(num_packs, 256);
  const int along = static_cast<int>(ceil_div(ceil_div(num_packs, turns), 32) * 32);
  return dim3(along, along >= 256 ? 1 : 256 / along);
}

}  // namespace smartmoe
