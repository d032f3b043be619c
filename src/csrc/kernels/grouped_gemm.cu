// Products of rows sorted by slot with their slots' matrices, in bfloat16 on compute capability 9.0, and the activation
// between two of them in the same pass.
//
// One block a multiprocessor stays for many tiles of 128 x 256. One thread fetches blocks of depth 64 of both factors into
// four stages of shared memory; two warpgroups multiply them, each 64 rows of the tile, and write the result row by row, so
// that rows of other slots stay untouched. A warpgroup whose rows all lie behind the slot's last one does not multiply.
// Counts are read on the device.
#include <cuda.h>
#include <cuda_runtime.h>

#include "act.cuh"
#include "hopper.cuh"
#include "launch.h"

namespace smartmoe {
namespace {

constexpr int kTileRows = 128, kTileColumns = 256, kDepth = 64, kStages = 4;
constexpr int kBox = 64;  // bf16 in a row of 128 bytes, as wide as the swizzle
[[maybe_unused]] constexpr int kBoxBytes = kBox * kDepth * 2;  // 64 rows of 128 bytes
constexpr int kABytes = kTileRows * kDepth * 2, kBBytes = kTileColumns * kDepth * 2;
constexpr int kWarpgroups = 2, kThreads = 128 * (1 + kWarpgroups);
constexpr int kPitch = kBox * 2 + 16;  // a warp's 16 rows of 64 columns on their way out, and no bank twice in 8 rows
constexpr int kStagingBytes = 16 * kPitch;
constexpr int kSharedBytes = kStages * (kABytes + kBBytes) + 4 * kWarpgroups * kStagingBytes + 2 * kStages * 8;

// What is multiplied. Rows: out[r] = rows[r] matrix of r's slot; the matrix is [depth, columns], or with RowsTransposed
// [columns, depth]. Weights: out[slot] = sum over the slot's rows r of a[r]^T b[r].
enum Kind { kRows, kRowsTransposed, kWeights };

struct Sizes {
  int num_slots, rows, columns, depth;  // of a slot's result and matrix; rows counts for Weights, depth for the others
};

struct Pointers {
  __nv_bfloat16* out;
  __nv_bfloat16* act;           // the activation of out, or of hidden
  const __nv_bfloat16* hidden;  // what out is the gradient of; may be out itself
};

// Code for another GPU is an empty kernel.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define SMARTMOE_MULTIPLIES
#endif

#ifdef SMARTMOE_MULTIPLIES

struct Tile {
  int slot, begin, end;  // the slot's rows
  int row, column;       // of the slot's result
};

// Tiles in order, slots ascending; inside a slot those with the same columns follow each other.
template <Kind KIND>
struct Walk {
  const int* end_L;
  Sizes size;
  int slot = -1, first = 0, num_tiles = 0, begin = 0, end = 0, down = 0;

  __device__ __forceinline__ Walk(const int* end_L, const Sizes& size) : end_L(end_L), size(size) {}

  __device__ __forceinline__ bool seek(int index, Tile& tile) {
    while (index >= first + num_tiles) {
      if (++slot >= size.num_slots) return false;
      first += num_tiles;
      begin = end;
      end = end_L[slot];
      down = ((KIND == kWeights ? size.rows : end - begin) + kTileRows - 1) / kTileRows;
      num_tiles = down * ((size.columns + kTileColumns - 1) / kTileColumns);
    }
    const int local = index - first;
    tile = {slot, begin, end, local % down * kTileRows, local / down * kTileColumns};
    return true;
  }

  // At least one, so that the result of an empty slot is written.
  __device__ __forceinline__ int blocks_deep() const {
    return max(1, ((KIND == kWeights ? end - begin : size.depth) + kDepth - 1) / kDepth);
  }
};

struct Ring {
  int stage = 0, parity = 0;
  __device__ __forceinline__ void step() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

struct Shared {
  uint32_t a, b, staging, full, empty;
  __device__ __forceinline__ explicit Shared(uint32_t base)
      : a(base),
        b(a + kStages * kABytes),
        staging(b + kStages * kBBytes),
        full(staging + 4 * kWarpgroups * kStagingBytes),
        empty(full + kStages * 8) {}
};

// The fetching thread's part.
template <Kind KIND>
__device__ __forceinline__ void fetch(const CUtensorMap* map_a, const CUtensorMap* map_b, Walk<KIND> walk, const Shared& at) {
  Ring ring;
  Tile tile;
  for (int index = blockIdx.x; walk.seek(index, tile); index += gridDim.x) {
    const int blocks = walk.blocks_deep();
    for (int i = 0; i < blocks; ++i, ring.step()) {
      const int depth = i * kDepth;
      const uint32_t a = at.a + ring.stage * kABytes, b = at.b + ring.stage * kBBytes, full = at.full + ring.stage * 8;
      barrier_wait(at.empty + ring.stage * 8, ring.parity ^ 1);
      barrier_expect(full, kABytes + kBBytes);
      if constexpr (KIND == kWeights) {
        for (int box = 0; box < kTileRows / kBox; ++box) {
          load_box(a + box * kBoxBytes, map_a, full, tile.row + box * kBox, tile.begin + depth, 0);
        }
      } else {
        load_box(a, map_a, full, depth, tile.begin + tile.row, 0);
      }
      if constexpr (KIND == kRowsTransposed) {
        load_box(b, map_b, full, depth, tile.column, tile.slot);
      } else {
        for (int box = 0; box < kTileColumns / kBox; ++box) {
          const int y = KIND == kWeights ? tile.begin + depth : depth, z = KIND == kWeights ? 0 : tile.slot;
          load_box(b + box * kBoxBytes, map_b, full, tile.column + box * kBox, y, z);
        }
      }
    }
  }
}

// Zero the values of k in [from, to) of a stage: rows of 128 bytes of each box, whatever the swizzle inside a row.
__device__ __forceinline__ void clear_depth(uint32_t a, uint32_t b, int from, int to, int thread) {
  constexpr int kBoxesA = kTileRows / kBox, kBoxes = kBoxesA + kTileColumns / kBox;
  const int pieces = (to - from) * 8;
  for (int i = thread; i < kBoxes * pieces; i += 128 * kWarpgroups) {
    const int box = i / pieces;
    const uint32_t start = box < kBoxesA ? a + box * kBoxBytes : b + (box - kBoxesA) * kBoxBytes;
    asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(start + from * 128 + i % pieces * 16), "r"(0) : "memory");
  }
  fence_shared();
  threads_sync(1, 128 * kWarpgroups);
}

template <Kind KIND>
__device__ __forceinline__ void multiply_steps(float (&sum)[128], uint32_t a, uint32_t b, bool keep, int steps) {
  // 16 of k further: 16 rows of 128 bytes, or 32 bytes along each row
  constexpr int kStepA = (KIND == kWeights ? 16 * 128 : 32) >> 4, kStepB = (KIND == kRowsTransposed ? 32 : 16 * 128) >> 4;
  const uint64_t matrix_a = matrix_at(a, kBoxBytes), matrix_b = matrix_at(b, kBoxBytes);
  products_begin();
#pragma unroll
  for (int k = 0; k < kDepth / 16; ++k) {
    if (k < steps) {
      multiply<KIND == kWeights, KIND != kRowsTransposed>(sum, matrix_a + k * kStepA, matrix_b + k * kStepB, keep || k);
    }
  }
  products_commit();
}

// A warp's 16 rows of a tile. A thread has, in registers 4 j to 4 j + 3, columns 8 j + 2 (lane % 4) + {0, 1} of row
// lane / 4 and then of row lane / 4 + 8.
struct WarpRows {
  __nv_bfloat16* first;  // row 0, column 0
  int64_t width;
  int num_rows, num_columns;  // that belong to the result

  __device__ __forceinline__ bool any(int quarter) const { return num_rows > 0 && quarter * kBox < num_columns; }

  // The thread's values of 64 columns as pairs, from rows that exist (their values are not used where they do not count).
  __device__ __forceinline__ void load(uint32_t (&pair)[16], int quarter) const {
    const int lane = threadIdx.x % 32, column = quarter * kBox + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int row = min(lane / 4 + i % 2 * 8, num_rows - 1), at = column + i / 2 * 8;
      pair[i] = any(quarter) && at < num_columns ? *reinterpret_cast<const uint32_t*>(first + row * width + at) : 0u;
    }
  }

  // Write them, through shared memory of the warp's own, 16 bytes a thread.
  __device__ __forceinline__ void store(const uint32_t (&pair)[16], int quarter, uint32_t staging) const {
    const int lane = threadIdx.x % 32, matrix = lane / 8, column = quarter * kBox + lane % 8 * 8;
    const uint32_t to = staging + (matrix % 2 * 8 + lane % 8) * kPitch + matrix / 2 * 16;
    const uint32_t from = staging + lane / 8 * kPitch + lane % 8 * 16;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 16; i += 4) store_matrices(to + i * 8, pair[i], pair[i + 1], pair[i + 2], pair[i + 3]);
    __syncwarp();
    uint4 piece[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) piece[i] = load_shared(from + i * 4 * kPitch);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = i * 4 + lane / 8;
      if (row < num_rows && column < num_columns) *reinterpret_cast<uint4*>(first + row * width + column) = piece[i];
    }
  }
};

// Write a warp's part of a tile. ACT kIdentity: the sums. kRows: the sums, and their activation, computed from them as they
// are written. kRowsTransposed: the sums are gradients of the activation; written are those of its argument, and it.
template <Kind KIND, int ACT>
__device__ __forceinline__ void finish(const float (&sum)[128], uint32_t (&hidden)[16], const WarpRows& out,
                                       const WarpRows& act_out, const WarpRows& hidden_in, uint32_t staging) {
#pragma unroll
  for (int quarter = 0; quarter < 4; ++quarter) {
    uint32_t first[16], second[16], next[16];
    if constexpr (KIND == kRowsTransposed && ACT != kIdentity) {
      if (quarter < 3) hidden_in.load(next, quarter + 1);
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const float low = sum[quarter * 32 + 2 * i], high = sum[quarter * 32 + 2 * i + 1];
      if constexpr (ACT == kIdentity) {
        first[i] = pack_bf16(low, high);
      } else if constexpr (KIND == kRows) {
        first[i] = pack_bf16(low, high);
        second[i] = pack_bf16(act<ACT, true>(low_bf16(first[i]), nullptr), act<ACT, true>(high_bf16(first[i]), nullptr));
      } else {
        float slope_low, slope_high;
        second[i] = pack_bf16(act<ACT, true>(low_bf16(hidden[i]), &slope_low), act<ACT, true>(high_bf16(hidden[i]), &slope_high));
        first[i] = pack_bf16(low * slope_low, high * slope_high);
      }
    }
    out.store(first, quarter, staging);
    if constexpr (ACT != kIdentity) {
      act_out.store(second, quarter, staging);
      if constexpr (KIND == kRowsTransposed) {
#pragma unroll
        for (int i = 0; i < 16; ++i) hidden[i] = next[i];
      }
    }
  }
}

// A multiplying warpgroup's part.
template <Kind KIND, int ACT>
__device__ __forceinline__ void consume(const Pointers& pointers, Walk<KIND> walk, const Shared& at) {
  const int thread = threadIdx.x - 128, warpgroup = thread / 128, warp = thread / 32;
  // each warp for itself: nothing keeps the warps of a warpgroup together
  const auto release = [&](int stage) {
    if (thread % 32 == 0) barrier_arrive(at.empty + stage * 8);
  };
  const auto a_of = [&](int stage) { return at.a + stage * kABytes + warpgroup * kBoxBytes; };
  const auto b_of = [&](int stage) { return at.b + stage * kBBytes; };
  float sum[128];
  Ring ring;
  Tile tile;
  for (int index = blockIdx.x; walk.seek(index, tile); index += gridDim.x) {
    const int count = tile.end - tile.begin, blocks = walk.blocks_deep();
    const int rows_left = (KIND == kWeights ? walk.size.rows : count) - tile.row - warpgroup * 64;
    if (KIND != kWeights && rows_left <= 0) {
      for (int i = 0; i < blocks; ++i, ring.step()) {
        barrier_wait(at.full + ring.stage * 8, ring.parity);
        release(ring.stage);
      }
      continue;
    }
    const int whole = KIND == kWeights ? count / kDepth : blocks;
    int last = -1;
    for (int i = 0; i < whole; ++i, ring.step()) {
      barrier_wait(at.full + ring.stage * 8, ring.parity);
      multiply_steps<KIND>(sum, a_of(ring.stage), b_of(ring.stage), i > 0, kDepth / 16);
      products_wait<1>();
      if (last >= 0) release(last);
      last = ring.stage;
    }
    if (KIND == kWeights && whole < blocks) {
      const int used = count % kDepth, steps = max(1, (used + 15) / 16);
      barrier_wait(at.full + ring.stage * 8, ring.parity);
      clear_depth(at.a + ring.stage * kABytes, b_of(ring.stage), used, steps * 16, thread);
      multiply_steps<KIND>(sum, a_of(ring.stage), b_of(ring.stage), whole > 0, steps);
      products_wait<1>();
      if (last >= 0) release(last);
      last = ring.stage;
      ring.step();
    }
    const int64_t width = walk.size.columns, offset = tile.column +
        width * ((KIND == kWeights ? int64_t(tile.slot) * walk.size.rows : tile.begin) + tile.row + warp * 16);
    const int num_rows = rows_left - warp % 4 * 16, num_columns = walk.size.columns - tile.column;
    const WarpRows out{pointers.out + offset, width, num_rows, num_columns};
    const WarpRows act_out{pointers.act + offset, width, num_rows, num_columns};
    const WarpRows hidden_in{const_cast<__nv_bfloat16*>(pointers.hidden) + offset, width, num_rows, num_columns};
    uint32_t hidden[16];
    if constexpr (KIND == kRowsTransposed && ACT != kIdentity) hidden_in.load(hidden, 0);
    products_wait<0>();
    release(last);
    finish<KIND, ACT>(sum, hidden, out, act_out, hidden_in, at.staging + warp * kStagingBytes);
  }
}

#endif

template <Kind KIND, int ACT>
__global__ void __launch_bounds__(kThreads, 1)
    grouped_gemm_kernel(const __grid_constant__ CUtensorMap map_a, const __grid_constant__ CUtensorMap map_b,
                        const int* __restrict__ end_L, const Pointers pointers, const Sizes size) {
#ifdef SMARTMOE_MULTIPLIES
  extern __shared__ __align__(1024) uint8_t shared[];
  const Shared at(shared_address(shared));
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(at.full + stage * 8, 1);
      barrier_init(at.empty + stage * 8, 4 * kWarpgroups);
    }
    fence_barriers();
  }
  __syncthreads();
  const Walk<KIND> walk(end_L, size);
  if (threadIdx.x < 128) {
    give_registers<40>();
    if (threadIdx.x == 0) fetch<KIND>(&map_a, &map_b, walk, at);
  } else {
    take_registers<232>();
    consume<KIND, ACT>(pointers, walk, at);
  }
#endif
}

using Encode = decltype(&cuTensorMapEncodeTiled);

Encode encoder() {
  static const Encode found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    const auto error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function) : nullptr;
  }();
  return found;
}

// bf16 values [z, y, x], contiguous, fetched in boxes of [1, box_y, 64]; zeros beyond the edges.
bool make_map(CUtensorMap* map, const void* data, int64_t x, int64_t y, int64_t z, int box_y) {
  const cuuint64_t sizes[] = {cuuint64_t(x), cuuint64_t(y), cuuint64_t(z)};
  const cuuint64_t steps[] = {cuuint64_t(x * 2), cuuint64_t(x * y * 2)};
  const cuuint32_t box[] = {kBox, cuuint32_t(box_y), 1}, ones[] = {1, 1, 1};
  return encoder()(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, const_cast<void*>(data), sizes, steps, box, ones,
                   CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                   CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

template <Kind KIND, int ACT>
cudaError_t launch(const CUtensorMap& map_a, const CUtensorMap& map_b, const int* end_L, const Pointers& pointers,
                   const Sizes& size, cudaStream_t stream) {
  const auto kernel = grouped_gemm_kernel<KIND, ACT>;
  int device = 0, num_sms = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return error;
  kernel<<<num_sms, kThreads, kSharedBytes, stream>>>(map_a, map_b, end_L, pointers, size);
  return cudaGetLastError();
}

}  // namespace

bool can_multiply() {
  cudaFuncAttributes attributes;
  if (cudaFuncGetAttributes(&attributes, grouped_gemm_kernel<kWeights, kIdentity>) != cudaSuccess) {
    cudaGetLastError();
    return false;
  }
  // compiled for another target the kernel is empty
  return attributes.numRegs > 100 && encoder();
}

cudaError_t multiply_rows(const void* rows_RX, const void* weight_LXY, const int* end_L, int num_slots, void* out_RY,
                          void* act_RY, const void* hidden_RY, int64_t num_rows, int depth, int columns, bool transposed,
                          int activation, cudaStream_t stream) {
  if (num_rows == 0 || num_slots == 0) return cudaSuccess;
  CUtensorMap map_a, map_b;
  const bool made = make_map(&map_a, rows_RX, depth, num_rows, 1, kTileRows) &&
                    (transposed ? make_map(&map_b, weight_LXY, depth, columns, num_slots, kTileColumns)
                                : make_map(&map_b, weight_LXY, columns, depth, num_slots, kDepth));
  if (!made) return cudaErrorInvalidValue;
  const Sizes size{num_slots, 0, columns, depth};
  const Pointers pointers{static_cast<__nv_bfloat16*>(out_RY), static_cast<__nv_bfloat16*>(act_RY),
                          static_cast<const __nv_bfloat16*>(hidden_RY)};
  const auto run = [&](auto kernel) { return kernel(map_a, map_b, end_L, pointers, size, stream); };
  switch (activation) {
    case kIdentity:
      return transposed ? run(launch<kRowsTransposed, kIdentity>) : run(launch<kRows, kIdentity>);
    case kGelu:
      return transposed ? run(launch<kRowsTransposed, kGelu>) : run(launch<kRows, kGelu>);
    case kRelu:
      return transposed ? run(launch<kRowsTransposed, kRelu>) : run(launch<kRows, kRelu>);
  }
  return cudaErrorInvalidValue;
}

cudaError_t multiply_slots(const void* rows_RX, const void* grad_RY, const int* end_L, int num_slots, void* out_LXY,
                           int64_t num_rows, int rows, int columns, cudaStream_t stream) {
  if (num_slots == 0) return cudaSuccess;
  CUtensorMap map_a, map_b;
  if (!make_map(&map_a, rows_RX, rows, num_rows, 1, kDepth) || !make_map(&map_b, grad_RY, columns, num_rows, 1, kDepth)) {
    return cudaErrorInvalidValue;
  }
  return launch<kWeights, kIdentity>(map_a, map_b, end_L, {static_cast<__nv_bfloat16*>(out_LXY), nullptr, nullptr},
                                     {num_slots, rows, columns, 0}, stream);
}

}  // namespace smartmoe
