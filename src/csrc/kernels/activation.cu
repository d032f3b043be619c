// Bias and activation of rows sorted by slot, forward and backward, in one pass each.
#include "act.cuh"
#include "pieces.cuh"

namespace smartmoe {
namespace {

// Rows of a thread that are under way together. Behind the last row the last is loaded again, so that no branch stands
// between the loads.
constexpr int kTurns = 4;

// Kept as it is stored: half the registers of float32.
template <typename T, int N>
__device__ __forceinline__ Pack<T, N> load_bias(const T* bias_F, int column, bool valid) {
  if (bias_F && valid) return load<T, N>(bias_F + column);
  Pack<T, N> zeros;
#pragma unroll
  for (int n = 0; n < N; ++n) zeros.value[n] = from_float<T>(0.f);
  return zeros;
}

// hidden and out may be the same memory, hence no __restrict__ on them.
template <typename T, int N, int ACT>
__global__ void __launch_bounds__(256) activate_kernel(const T* hidden_RF, const T* __restrict__ bias_LF,
                                                       const int* __restrict__ end_L, int num_slots, T* out_RF,
                                                       int64_t num_rows, int width, int num_chunks) {
  constexpr bool kGated = ACT == kSwiglu, kFast = sizeof(T) == 2;
  const RowRange rows = rows_of_piece<kShortPieceRows>(end_L, num_slots, num_rows, blockIdx.x / num_chunks);
  const int column = (blockIdx.x % num_chunks * blockDim.x + threadIdx.x) * N, hidden_width = kGated ? 2 * width : width;
  if (column >= width || rows.begin >= rows.end) return;
  const T* bias_F = bias_LF ? bias_LF + int64_t(rows.slot) * hidden_width : nullptr;
  const Pack<T, N> bias = load_bias<T, N>(bias_F, column, true);
  const Pack<T, N> value_bias = load_bias<T, N>(bias_F, column + width, kGated);
  for (int64_t row0 = rows.begin + threadIdx.y; row0 < rows.end; row0 += kTurns * blockDim.y) {
    Pack<T, N> pack[kTurns], value[kGated ? kTurns : 1];
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      const int64_t row = min(row0 + i * blockDim.y, rows.end - 1);
      pack[i] = load<T, N>(hidden_RF + row * hidden_width + column);
      if constexpr (kGated) value[i] = load<T, N>(hidden_RF + row * hidden_width + width + column);
    }
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      const int64_t row = row0 + i * blockDim.y;
      if (row >= rows.end) break;
      Pack<T, N> out;
#pragma unroll
      for (int n = 0; n < N; ++n) {
        float y = act<ACT, kFast>(to_float(pack[i].value[n]) + to_float(bias.value[n]), nullptr);
        if constexpr (kGated) y *= to_float(value[i].value[n]) + to_float(value_bias.value[n]);
        out.value[n] = from_float<T>(y);
      }
      store<T, N>(out_RF + row * width + column, out);
    }
  }
}

// grad_out and grad_hidden may be the same memory, and so may hidden and out, hence no __restrict__ on them. A row behind
// the last one is read as the last again, perhaps after that was overwritten, and not used.
template <typename T, int N, int ACT>
__global__ void __launch_bounds__(256, 3)
    activate_backward_kernel(const T* hidden_RF, const T* __restrict__ bias_LF, const T* grad_out_RF,
                             const int* __restrict__ end_L, int num_slots, T* grad_hidden_RF, T* out_RF,
                             float* __restrict__ partial_PF, int64_t num_rows, int width, int num_chunks) {
  constexpr bool kGated = ACT == kSwiglu, kFast = sizeof(T) == 2;
  constexpr int kLoads = kGated ? 2 : kTurns;
  __shared__ float shared[256 * N];
  const int64_t piece = blockIdx.x / num_chunks;
  const RowRange rows = rows_of_piece<kPieceRows>(end_L, num_slots, num_rows, piece);
  if (rows.begin >= rows.end) return;
  const int column = (blockIdx.x % num_chunks * blockDim.x + threadIdx.x) * N, hidden_width = kGated ? 2 * width : width;
  const bool valid = column < width;
  float sum[N] = {}, value_sum[N] = {};
  const T* bias_F = bias_LF ? bias_LF + int64_t(rows.slot) * hidden_width : nullptr;
  const Pack<T, N> bias = load_bias<T, N>(bias_F, column, valid);
  const Pack<T, N> value_bias = load_bias<T, N>(bias_F, column + width, valid && kGated);
  for (int64_t row0 = valid ? rows.begin + threadIdx.y : rows.end; row0 < rows.end; row0 += kLoads * blockDim.y) {
    Pack<T, N> pack[kLoads], value[kGated ? kLoads : 1], grad[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int64_t row = min(row0 + i * blockDim.y, rows.end - 1);
      pack[i] = load<T, N>(hidden_RF + row * hidden_width + column);
      if constexpr (kGated) value[i] = load<T, N>(hidden_RF + row * hidden_width + width + column);
      grad[i] = load<T, N>(grad_out_RF + row * width + column);
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int64_t row = row0 + i * blockDim.y;
      if (row >= rows.end) break;
      Pack<T, N> out, grad_hidden, grad_value;
#pragma unroll
      for (int n = 0; n < N; ++n) {
        float slope;
        const float y = act<ACT, kFast>(to_float(pack[i].value[n]) + to_float(bias.value[n]), &slope);
        const float g = to_float(grad[i].value[n]);
        if constexpr (kGated) {
          const float v = to_float(value[i].value[n]) + to_float(value_bias.value[n]);
          out.value[n] = from_float<T>(y * v);
          sum[n] += g * v * slope;
          value_sum[n] += g * y;
          grad_hidden.value[n] = from_float<T>(g * v * slope);
          grad_value.value[n] = from_float<T>(g * y);
        } else {
          out.value[n] = from_float<T>(y);
          sum[n] += g * slope;
          grad_hidden.value[n] = from_float<T>(g * slope);
        }
      }
      store<T, N>(out_RF + row * width + column, out);
      store<T, N>(grad_hidden_RF + row * hidden_width + column, grad_hidden);
      if constexpr (kGated) store<T, N>(grad_hidden_RF + row * hidden_width + width + column, grad_value);
    }
  }
  if (!partial_PF) return;
  float* partial_F = partial_PF + piece * hidden_width + column;
  add_over_y<N>(sum, shared, partial_F, valid);
  if constexpr (kGated) add_over_y<N>(value_sum, shared, partial_F + width, valid);
}

template <int ACT>
struct Act {
  static constexpr int value = ACT;
};

template <typename Launch>
cudaError_t with_activation(int activation, Launch&& launch) {
  switch (activation) {
    case kGelu:
      return launch(Act<kGelu>{});
    case kRelu:
      return launch(Act<kRelu>{});
    case kSwiglu:
      return launch(Act<kSwiglu>{});
    case kIdentity:
      return launch(Act<kIdentity>{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t activate(const void* hidden_RF, const void* bias_LF, const int* end_L, int num_slots, void* out_RF,
                     int64_t num_rows, int width, int activation, int dtype, cudaStream_t stream) {
  if (num_rows == 0 || num_slots == 0 || width == 0) return cudaSuccess;
  return with_type(dtype, [&](auto type) {
    return with_activation(activation, [&](auto act) {
      using T = typename decltype(type)::type;
      constexpr int kWide = 16 / sizeof(T), kAct = decltype(act)::value;
      const bool wide = aligned16(int64_t(width) * sizeof(T), hidden_RF, bias_LF, out_RF);
      const int num_packs = wide ? width / kWide : width;
      const dim3 threads = piece_threads(num_packs);
      const int num_chunks = static_cast<int>(ceil_div(num_packs, threads.x));
      const auto kernel = wide ? activate_kernel<T, kWide, kAct> : activate_kernel<T, 1, kAct>;
      const int64_t num_short_pieces = num_rows / kShortPieceRows + num_slots;
      kernel<<<num_short_pieces * num_chunks, threads, 0, stream>>>(
          static_cast<const T*>(hidden_RF), static_cast<const T*>(bias_LF), end_L, num_slots, static_cast<T*>(out_RF),
          num_rows, width, num_chunks);
      return cudaGetLastError();
    });
  });
}

cudaError_t activate_backward(const void* hidden_RF, const void* bias_LF, const void* grad_out_RF, const int* end_L,
                              int num_slots, void* grad_hidden_RF, void* out_RF, float* partial_PF, int64_t num_rows,
                              int width, int activation, int dtype, cudaStream_t stream) {
  if (num_rows == 0 || num_slots == 0 || width == 0) return cudaSuccess;
  return with_type(dtype, [&](auto type) {
    return with_activation(activation, [&](auto act) {
      using T = typename decltype(type)::type;
      constexpr int kWide = 16 / sizeof(T), kAct = decltype(act)::value;
      const bool wide = aligned16(int64_t(width) * sizeof(T), hidden_RF, bias_LF, grad_out_RF, grad_hidden_RF, out_RF);
      const int num_packs = wide ? width / kWide : width;
      const dim3 threads = piece_threads(num_packs);
      const int num_chunks = static_cast<int>(ceil_div(num_packs, threads.x));
      const auto kernel = wide ? activate_backward_kernel<T, kWide, kAct> : activate_backward_kernel<T, 1, kAct>;
      kernel<<<num_pieces(num_rows, num_slots) * num_chunks, threads, 0, stream>>>(
          static_cast<const T*>(hidden_RF), static_cast<const T*>(bias_LF), static_cast<const T*>(grad_out_RF), end_L,
          num_slots, static_cast<T*>(grad_hidden_RF), static_cast<T*>(out_RF), partial_PF, num_rows, width, num_chunks);
      return cudaGetLastError();
    });
  });
}

}  // namespace smartmoe
