// Sums of each slot's rows in two steps, pieces first, without atomics: the same bits in every run.
#include "pieces.cuh"

namespace smartmoe {
namespace {

constexpr int kTurns = 8;  // rows of a thread that are under way together, as in activation.cu
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 750
constexpr int kLeastBlocks = 4;  // of 256 threads on a processor: more have no room
#else
constexpr int kLeastBlocks = 6;
#endif

template <typename T, int N>
__global__ void __launch_bounds__(256, kLeastBlocks)
    sum_pieces_kernel(const T* __restrict__ rows_RD, const int* __restrict__ end_L, int num_slots,
                      float* __restrict__ partial_PD, int64_t num_rows, int width, int num_chunks) {
  __shared__ float shared[256 * N];
  const int64_t piece = blockIdx.x / num_chunks;
  const RowRange rows = rows_of_piece<kPieceRows>(end_L, num_slots, num_rows, piece);
  if (rows.begin >= rows.end) return;
  const int column = (blockIdx.x % num_chunks * blockDim.x + threadIdx.x) * N;
  const bool valid = column < width;
  float sum[N] = {};
  for (int64_t row0 = valid ? rows.begin + threadIdx.y : rows.end; row0 < rows.end; row0 += kTurns * blockDim.y) {
    Pack<T, N> pack[kTurns];
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      pack[i] = load<T, N>(rows_RD + min(row0 + i * blockDim.y, rows.end - 1) * width + column);
    }
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      if (row0 + i * blockDim.y >= rows.end) break;
#pragma unroll
      for (int n = 0; n < N; ++n) sum[n] += to_float(pack[i].value[n]);
    }
  }
  add_over_y<N>(sum, shared, partial_PD + piece * width + column, valid);
}

constexpr int kSumColumns = 32, kSumLanes = 8;

// A block sums the pieces of one slot for 32 columns; lane y takes pieces y, y + 8, ... The first num_totals slots go to total.
template <typename T>
__global__ void __launch_bounds__(kSumColumns * kSumLanes)
    sum_slots_kernel(const float* __restrict__ partial_PD, const int* __restrict__ end_L, T* __restrict__ sum_LD,
                     float* __restrict__ total_LD, int num_totals, bool is_first, int64_t num_rows, int width) {
  __shared__ float shared[kSumLanes][kSumColumns];
  const int slot = blockIdx.y, column = blockIdx.x * kSumColumns + threadIdx.x;
  const int64_t count = max(min(int64_t(end_L[slot]), num_rows) - slot_start(end_L, slot), int64_t(0));
  const int64_t num_pieces = (count + kPieceRows - 1) / kPieceRows;
  const float* partial_D = partial_PD + first_piece<kPieceRows>(end_L, slot) * width + column;
  float sum = 0.f;
  if (column < width) {
#pragma unroll 4
    for (int64_t i = threadIdx.y; i < num_pieces; i += kSumLanes) sum += partial_D[i * width];
  }
  shared[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y == 0 && column < width) {
    float total = 0.f;
    for (int y = 0; y < kSumLanes; ++y) total += shared[y][threadIdx.x];
    if (slot < num_totals) {
      float* place = total_LD + int64_t(slot) * width + column;
      *place = is_first ? total : *place + total;
    } else {
      sum_LD[int64_t(slot - num_totals) * width + column] = from_float<T>(total);
    }
  }
}

}  // namespace

int64_t num_pieces(int64_t num_rows, int num_slots) { return num_rows / kPieceRows + num_slots; }

cudaError_t sum_pieces(const void* rows_RD, const int* end_L, int num_slots, float* partial_PD, int64_t num_rows, int width,
                       int dtype, cudaStream_t stream) {
  if (num_rows == 0 || num_slots == 0 || width == 0) return cudaSuccess;
  return with_type(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int kWide = 16 / sizeof(T);
    const bool wide = aligned16(int64_t(width) * sizeof(T), rows_RD);
    const int num_packs = wide ? width / kWide : width;
    const dim3 threads = piece_threads(num_packs);
    const int num_chunks = static_cast<int>(ceil_div(num_packs, threads.x));
    const auto kernel = wide ? sum_pieces_kernel<T, kWide> : sum_pieces_kernel<T, 1>;
    kernel<<<num_pieces(num_rows, num_slots) * num_chunks, threads, 0, stream>>>(
        static_cast<const T*>(rows_RD), end_L, num_slots, partial_PD, num_rows, width, num_chunks);
    return cudaGetLastError();
  });
}

cudaError_t sum_slots(const float* partial_PD, const int* end_L, int num_slots, void* sum_LD, float* total_LD, int num_totals,
                      bool is_first, int64_t num_rows, int width, int dtype, cudaStream_t stream) {
  if (num_slots == 0 || width == 0) return cudaSuccess;
  return with_type(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const dim3 threads(kSumColumns, kSumLanes), blocks(ceil_div(width, kSumColumns), num_slots);
    sum_slots_kernel<T><<<blocks, threads, 0, stream>>>(partial_PD, end_L, static_cast<T*>(sum_LD), total_LD, num_totals,
                                                        is_first, num_rows, width);
    return cudaGetLastError();
  });
}

}  // namespace smartmoe
