// Token copies to rows. A block takes a token and writes its copies: the token is read once, however many copies it has.
#include "common.cuh"

namespace smartmoe {
namespace {

template <typename T, int N>
__global__ void __launch_bounds__(256) permute_kernel(const T* __restrict__ x_TD, const int64_t* __restrict__ row_of_copy_TK,
                                                      T* __restrict__ rows_RD, int64_t num_tokens, int top_k,
                                                      int64_t num_rows, int width) {
  const int64_t token = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (token >= num_tokens) return;
  const int64_t* row_of_copy_K = row_of_copy_TK + token * top_k;
  for (int d = threadIdx.x * N; d < width; d += blockDim.x * N) {
    const Pack<T, N> pack = load<T, N>(x_TD + token * width + d);
#pragma unroll 4
    for (int k = 0; k < top_k; ++k) {
      const int64_t row = row_of_copy_K[k];
      if (row < num_rows) store<T, N>(rows_RD + row * width + d, pack);
    }
  }
}

template <typename T, int N>
__global__ void __launch_bounds__(256) clear_kernel(const int64_t* copy_of_row_R, T* rows_RD, int64_t num_rows, int width) {
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= num_rows || copy_of_row_R[row] >= 0) return;
  Pack<T, N> zeros;
  for (int n = 0; n < N; ++n) zeros.value[n] = from_float<T>(0.f);
  for (int d = threadIdx.x * N; d < width; d += blockDim.x * N) store<T, N>(rows_RD + row * width + d, zeros);
}

}  // namespace

cudaError_t permute(const void* x_TD, const int64_t* row_of_copy_TK, void* rows_RD, int64_t num_tokens, int top_k,
                    int64_t num_rows, int width, int dtype, cudaStream_t stream) {
  if (num_tokens == 0 || num_rows == 0 || width == 0) return cudaSuccess;
  return with_type(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int kWide = 16 / sizeof(T);
    const bool wide = aligned16(int64_t(width) * sizeof(T), x_TD, rows_RD);
    const dim3 threads = row_threads(wide ? width / kWide : width);
    const auto kernel = wide ? permute_kernel<T, kWide> : permute_kernel<T, 1>;
    kernel<<<ceil_div(num_tokens, threads.y), threads, 0, stream>>>(static_cast<const T*>(x_TD), row_of_copy_TK,
                                                                    static_cast<T*>(rows_RD), num_tokens, top_k, num_rows,
                                                                    width);
    return cudaGetLastError();
  });
}

cudaError_t clear_filling(const int64_t* copy_of_row_R, void* rows_RD, int64_t num_rows, int width, int dtype,
                          cudaStream_t stream) {
  if (num_rows == 0 || width == 0) return cudaSuccess;
  return with_type(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int kWide = 16 / sizeof(T);
    const bool wide = aligned16(int64_t(width) * sizeof(T), rows_RD);
    const dim3 threads = row_threads(wide ? width / kWide : width);
    const auto kernel = wide ? clear_kernel<T, kWide> : clear_kernel<T, 1>;
    kernel<<<ceil_div(num_rows, threads.y), threads, 0, stream>>>(copy_of_row_R, static_cast<T*>(rows_RD), num_rows, width);
    return cudaGetLastError();
  });
}

}  // namespace smartmoe
