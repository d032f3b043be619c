// Rows sorted by slot, cut into pieces of one slot each, so that a block needs one bias and sums rows of one slot only.
//
// Piece i of slot l, of P rows, has the rows start_l + i * P ..., and the number start_l / P + l + i: numbers of different
// pieces differ, ascend with the rows and are less than R / P + L, whatever the counts. A number between two slots may
// belong to no piece. The pieces of a slot, and so the order of any sum over them, depend on its own rows only, not on
// where they lie.
#pragma once

#include "common.cuh"

namespace smartmoe {

// Rows of a piece where nothing is summed: less work for a block at a time fills the GPU more evenly.
constexpr int kShortPieceRows = 32;

struct RowRange {
  int64_t begin, end;
  int slot;
};

__device__ __forceinline__ int64_t slot_start(const int* end_L, int slot) { return slot ? end_L[slot - 1] : 0; }

template <int P>
__device__ __forceinline__ int64_t first_piece(const int* end_L, int slot) {
  return slot_start(end_L, slot) / P + slot;
}

// The rows of a piece, empty for a number that belongs to none. For all threads of a block, x along whole warps: the lanes of a
// warp ask for as many slots at once, since one after the other takes as long as reading the rows.
template <int P>
__device__ __forceinline__ RowRange rows_of_piece(const int* end_L, int num_slots, int64_t num_rows, int64_t piece) {
  int low = -1;
  for (int slot = threadIdx.x % 32; slot - static_cast<int>(threadIdx.x % 32) < num_slots; slot += 32) {
    low += __popc(__ballot_sync(0xffffffffu, slot < num_slots && first_piece<P>(end_L, slot) <= piece));
  }
  const int64_t begin = slot_start(end_L, low) + (piece - first_piece<P>(end_L, low)) * P;
  const int64_t slot_end = min(int64_t(end_L[low]), num_rows);
  return {begin, min(begin + P, slot_end), low};
}

// Blocks of 256 threads, x along `num_packs` columns: the widest x that leaves the fewest threads without a column.
inline dim3 piece_threads(int num_packs) {
  int best = 128;
  for (int along = 64; along >= 32; along /= 2) {
    if (ceil_div(num_packs, along) * along < ceil_div(num_packs, best) * best) best = along;
  }
  return dim3(best, 256 / best);
}

// sum[n] over the threads of equal x, y ascending, into partial[n] from thread y = 0. All threads of the block call it.
template <int N>
__device__ __forceinline__ void add_over_y(const float (&sum)[N], float* shared, float* partial, bool valid) {
  for (int n = 0; n < N; ++n) shared[(threadIdx.y * N + n) * blockDim.x + threadIdx.x] = sum[n];
  __syncthreads();
  if (valid && threadIdx.y == 0) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      float total = 0.f;
      for (int y = 0; y < blockDim.y; ++y) total += shared[(y * N + n) * blockDim.x + threadIdx.x];
      partial[n] = total;
    }
  }
  __syncthreads();
}

}  // namespace smartmoe
