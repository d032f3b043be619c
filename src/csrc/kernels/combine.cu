// Rows back to tokens: the sum over a token's copies in the order of k, and its gradients in one pass over the rows.
#include <type_traits>

#include "common.cuh"

namespace smartmoe {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;

// Where C copies from k0 on stand. A copy without a row gets the start of row 0: all loads can then go out together, without
// a branch between them, and what a dropped copy loads is not used.
template <int C>
struct Copies {
  int64_t start[C];
  bool kept[C];
};

template <int C>
__device__ __forceinline__ Copies<C> copies_of(const int64_t* __restrict__ row_of_copy_K, int k0, int top_k, int64_t num_rows,
                                               int width) {
  int64_t row[C];
#pragma unroll
  for (int c = 0; c < C; ++c) row[c] = row_of_copy_K[min(k0 + c, top_k - 1)];
  Copies<C> copies;
#pragma unroll
  for (int c = 0; c < C; ++c) {
    copies.kept[c] = k0 + c < top_k && row[c] < num_rows;
    copies.start[c] = copies.kept[c] ? row[c] * width : 0;
  }
  return copies;
}

// C copies at a time: their loads are all under way before the first is used.
template <typename T, int N, int C, bool WEIGHTED>
__global__ void __launch_bounds__(256)
    gather_sum_kernel(const T* __restrict__ rows_RD, const int64_t* __restrict__ row_of_copy_TK,
                      const float* __restrict__ weight_TK, T* __restrict__ out_TD, int64_t num_tokens, int top_k,
                      int64_t num_rows, int width) {
  const int64_t token = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (token >= num_tokens) return;
  for (int d = threadIdx.x * N; d < width; d += blockDim.x * N) {
    float sum[N] = {};
    for (int k0 = 0; k0 < top_k; k0 += C) {
      const Copies<C> copies = copies_of<C>(row_of_copy_TK + token * top_k, k0, top_k, num_rows, width);
      Pack<T, N> pack[C];
#pragma unroll
      for (int c = 0; c < C; ++c) pack[c] = load<T, N>(rows_RD + copies.start[c] + d);
      float weight[C];
#pragma unroll
      for (int c = 0; c < C; ++c) weight[c] = WEIGHTED ? weight_TK[token * top_k + min(k0 + c, top_k - 1)] : 1.f;
#pragma unroll
      for (int c = 0; c < C; ++c) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
          const float next = fmaf(weight[c], to_float(pack[c].value[n]), sum[n]);
          sum[n] = copies.kept[c] ? next : sum[n];
        }
      }
    }
    Pack<T, N> out;
#pragma unroll
    for (int n = 0; n < N; ++n) out.value[n] = from_float<T>(sum[n]);
    store<T, N>(out_TD + token * width + d, out);
  }
}

// The sums over a token's threads of dot[c], for C copies from k0 on, into grad_weight. All threads of the block call it.
template <int C>
__device__ void store_dots(const float (&dot)[C], const bool (&kept)[C], float (*partial)[C], float* grad_weight_K, int k0,
                           int top_k, bool valid) {
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32, warp = threadIdx.y * warps + threadIdx.x / 32;
#pragma unroll
  for (int c = 0; c < C; ++c) {
    float sum = dot[c];
#pragma unroll
    for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
    if (lane == 0) partial[warp][c] = sum;
  }
  __syncthreads();
  if (valid && threadIdx.x == 0) {
#pragma unroll
    for (int c = 0; c < C; ++c) {
      float sum = 0.f;
      for (int w = 0; w < warps; ++w) sum += partial[threadIdx.y * warps + w][c];
      if (k0 + c < top_k) grad_weight_K[k0 + c] = kept[c] ? sum : 0.f;
    }
  }
  __syncthreads();
}

template <typename T, int N, int C, bool DOTS>
__global__ void __launch_bounds__(256)
    combine_backward_kernel(const T* __restrict__ grad_TD, const T* __restrict__ rows_RD,
                            const float* __restrict__ weight_TK, const int64_t* __restrict__ row_of_copy_TK,
                            T* __restrict__ grad_rows_RD, float* __restrict__ grad_weight_TK, int64_t num_tokens, int top_k,
                            int64_t num_rows, int width) {
  __shared__ float partial[8][C];
  const int64_t token = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  const bool valid = token < num_tokens;
  const int64_t first = valid ? token * top_k : 0;
  for (int k0 = 0; k0 < top_k; k0 += C) {
    const Copies<C> copies = copies_of<C>(row_of_copy_TK + first, k0, top_k, num_rows, width);
    float weight[C], dot[C] = {};
#pragma unroll
    for (int c = 0; c < C; ++c) weight[c] = weight_TK[first + min(k0 + c, top_k - 1)];
    for (int d = valid ? threadIdx.x * N : width; d < width; d += blockDim.x * N) {
      const Pack<T, N> grad = load<T, N>(grad_TD + token * width + d);
      Pack<T, N> pack[C];
      if constexpr (DOTS) {
#pragma unroll
        for (int c = 0; c < C; ++c) pack[c] = load<T, N>(rows_RD + copies.start[c] + d);
      }
#pragma unroll
      for (int c = 0; c < C; ++c) {
        Pack<T, N> out;
#pragma unroll
        for (int n = 0; n < N; ++n) {
          const float g = to_float(grad.value[n]);
          out.value[n] = from_float<T>(weight[c] * g);
          if constexpr (DOTS) dot[c] = fmaf(g, to_float(pack[c].value[n]), dot[c]);
        }
        if (copies.kept[c]) store<T, N>(grad_rows_RD + copies.start[c] + d, out);
      }
    }
    if constexpr (DOTS) store_dots<C>(dot, copies.kept, partial, grad_weight_TK + first, k0, top_k, valid);
  }
}

// Calls launch with the width of access and the copies at a time as constants.
template <typename T, typename Launch>
cudaError_t with_shape(bool wide, int top_k, Launch&& launch) {
  constexpr int kWide = 16 / sizeof(T);
  using std::integral_constant;
  if (!wide) return launch(integral_constant<int, 1>{}, integral_constant<int, 4>{});
  if (top_k <= 1) return launch(integral_constant<int, kWide>{}, integral_constant<int, 1>{});
  if (top_k <= 2) return launch(integral_constant<int, kWide>{}, integral_constant<int, 2>{});
  if (top_k <= 4) return launch(integral_constant<int, kWide>{}, integral_constant<int, 4>{});
  return launch(integral_constant<int, kWide>{}, integral_constant<int, 8>{});
}

}  // namespace

cudaError_t gather_sum(const void* rows_RD, const int64_t* row_of_copy_TK, const float* weight_TK, void* out_TD,
                       int64_t num_tokens, int top_k, int64_t num_rows, int width, int dtype, cudaStream_t stream) {
  if (num_tokens == 0 || width == 0) return cudaSuccess;
  return with_type(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (num_rows == 0 || top_k == 0) return cudaMemsetAsync(out_TD, 0, num_tokens * width * sizeof(T), stream);
    const bool wide = aligned16(int64_t(width) * sizeof(T), rows_RD, out_TD);
    return with_shape<T>(wide, top_k, [&](auto pack, auto copies) {
      constexpr int N = decltype(pack)::value, C = decltype(copies)::value;
      const dim3 threads = row_threads(static_cast<int>(ceil_div(width, N)));
      const auto kernel = weight_TK ? gather_sum_kernel<T, N, C, true> : gather_sum_kernel<T, N, C, false>;
      kernel<<<ceil_div(num_tokens, threads.y), threads, 0, stream>>>(
          static_cast<const T*>(rows_RD), row_of_copy_TK, weight_TK, static_cast<T*>(out_TD), num_tokens, top_k, num_rows,
          width);
      return cudaGetLastError();
    });
  });
}

cudaError_t combine_backward(const void* grad_TD, const void* rows_RD, const float* weight_TK,
                             const int64_t* row_of_copy_TK, void* grad_rows_RD, float* grad_weight_TK, int64_t num_tokens,
                             int top_k, int64_t num_rows, int width, int dtype, cudaStream_t stream) {
  if (num_tokens == 0 || width == 0 || top_k == 0) return cudaSuccess;
  if (num_rows == 0) {
    return grad_weight_TK ? cudaMemsetAsync(grad_weight_TK, 0, num_tokens * top_k * sizeof(float), stream) : cudaSuccess;
  }
  return with_type(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const bool wide = aligned16(int64_t(width) * sizeof(T), grad_TD, rows_RD, grad_rows_RD);
    return with_shape<T>(wide, top_k, [&](auto pack, auto copies) {
      constexpr int N = decltype(pack)::value, C = decltype(copies)::value;
      const dim3 threads = row_threads(static_cast<int>(ceil_div(width, N)));
      const auto kernel = grad_weight_TK ? combine_backward_kernel<T, N, C, true> : combine_backward_kernel<T, N, C, false>;
      kernel<<<ceil_div(num_tokens, threads.y), threads, 0, stream>>>(
          static_cast<const T*>(grad_TD), static_cast<const T*>(rows_RD), weight_TK, row_of_copy_TK,
          static_cast<T*>(grad_rows_RD), grad_weight_TK, num_tokens, top_k, num_rows, width);
      return cudaGetLastError();
    });
  });
}

}  // namespace smartmoe
