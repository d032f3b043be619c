// Products of rows sorted by slot with their slots' matrices, in bfloat16 on compute capability 9.0, and the activation
// between two of them in the same pass.
//
// One block a multiprocessor stays for many tiles of 128 x 256. One thread fetches blocks of depth 64 of both factors into
// stages of shared memory; two warpgroups multiply them, each 64 rows of the tile, and leave the result in shared memory,
// from where three warps write it row by row, so that rows of other slots stay untouched, while the next tile is multiplied.
// A warpgroup whose rows all lie behind the slot's last one does not multiply. Counts are read on the device.
#include <cuda.h>
#include <cuda_runtime.h>

#include "act.cuh"
#include "hopper.cuh"
#include "launch.h"

namespace smartmoe {
namespace {

constexpr int kTileRows = 128, kTileColumns = 256, kDepth = 64, kStages = 3;
constexpr int kBox = 64;  // bf16 in a row of 128 bytes, as wide as the swizzle
[[maybe_unused]] constexpr int kBoxBytes = kBox * kDepth * 2;  // 64 rows of 128 bytes
constexpr int kABytes = kTileRows * kDepth * 2, kBBytes = kTileColumns * kDepth * 2;
constexpr int kWarpgroups = 2, kThreads = 128 * (1 + kWarpgroups);
constexpr int kRowBytes = kTileColumns * 2, kHalfBytes = 64 * kRowBytes;  // what a warpgroup leaves of a tile
constexpr int kWriters = 3;                                               // warps
constexpr int kSumBytes = (kWriters - 1) * 2 * kRowBytes * 2;             // of two packs of columns in float32, for a half
constexpr int kSharedBytes =
    kStages * (kABytes + kBBytes) + kWarpgroups * kHalfBytes + 2 * kSumBytes + 2 * (kStages + kWarpgroups) * 8;

// What is multiplied. Rows: out[r] = rows[r] matrix of r's slot; the matrix is [depth, columns], or with RowsTransposed
// [columns, depth]. Weights: out[slot] = sum over the slot's rows r of a[r]^T b[r].
enum Kind { kRows, kRowsTransposed, kWeights };

struct Sizes {
  int num_slots, rows, columns, depth;  // of a slot's result and matrix; rows counts for Weights, depth for the others
};

struct Pointers {
  __nv_bfloat16* out;
  const __nv_bfloat16* bias;    // added before the activation, or to out where there is none; or null
  __nv_bfloat16* act;           // the activation of out, or of hidden
  const __nv_bfloat16* hidden;  // what out is the gradient of; may be out itself
  float* partial;               // sums of those gradients over each piece, or null
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
  int tile_columns;
  int slot = -1, first = 0, num_tiles = 0, begin = 0, end = 0, down = 0;

  __device__ __forceinline__ Walk(const int* end_L, const Sizes& size, int tile_columns)
      : end_L(end_L), size(size), tile_columns(tile_columns) {}

  __device__ __forceinline__ bool seek(int index, Tile& tile) {
    while (index >= first + num_tiles) {
      if (++slot >= size.num_slots) return false;
      first += num_tiles;
      begin = end;
      end = end_L[slot];
      down = ((KIND == kWeights ? size.rows : end - begin) + kTileRows - 1) / kTileRows;
      num_tiles = down * ((size.columns + tile_columns - 1) / tile_columns);
    }
    const int local = index - first;
    tile = {slot, begin, end, local % down * kTileRows, local / down * tile_columns};
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
  uint32_t a, b, result, sums, full, empty, done, written;
  __device__ __forceinline__ explicit Shared(uint32_t base)
      : a(base),
        b(a + kStages * kABytes),
        result(b + kStages * kBBytes),
        sums(result + kWarpgroups * kHalfBytes),
        full(sums + 2 * kSumBytes),
        empty(full + kStages * 8),
        done(empty + kStages * 8),
        written(done + kWarpgroups * 8) {}

  // 16 bytes of a row of a half, in an order that spares the banks
  __device__ __forceinline__ uint32_t piece(int half, int row, int column16) const {
    return result + half * kHalfBytes + row * kRowBytes + ((column16 ^ (row & 7)) << 4);
  }
};

// The fetching thread's part.
template <Kind KIND, int ACT>
__device__ __forceinline__ void fetch(const CUtensorMap* map_a, const CUtensorMap* map_b, Walk<KIND> walk, const Shared& at) {
  [[maybe_unused]] constexpr bool kGated = KIND == kRows && ACT == kSwiglu;
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
          // gated: as many columns of the second half beside those of the first
          const int x = kGated && box >= 2 ? walk.size.columns + (box - 2) * kBox : box * kBox;
          load_box(b + box * kBoxBytes, map_b, full, tile.column + x, y, z);
        }
      }
    }
  }
}

// Zero the values of k from `from` on of a stage, for one warpgroup: in rows of 128 bytes of its box of a and the boxes of b,
// whatever the swizzle inside a row. That the other writes the same zeros into b needs no order between them.
__device__ __forceinline__ void clear_depth(uint32_t a, uint32_t b, int from, int thread) {
  const int pieces = (kDepth - from) * 8;
  for (int i = thread % 128; i < (1 + kTileColumns / kBox) * pieces; i += 128) {
    const int box = i / pieces;
    const uint32_t start = box ? b + (box - 1) * kBoxBytes : a;
    asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(start + from * 128 + i % pieces * 16), "r"(0) : "memory");
  }
  fence_shared();
  threads_sync(1 + thread / 128, 128);
}

template <Kind KIND>
__device__ __forceinline__ void multiply_block(float (&sum)[128], uint32_t a, uint32_t b, bool keep) {
  // 16 of k further: 16 rows of 128 bytes, or 32 bytes along each row
  constexpr int kStepA = (KIND == kWeights ? 16 * 128 : 32) >> 4, kStepB = (KIND == kRowsTransposed ? 32 : 16 * 128) >> 4;
  const uint64_t matrix_a = matrix_at(a, kBoxBytes), matrix_b = matrix_at(b, kBoxBytes);
  products_begin();
#pragma unroll
  for (int k = 0; k < kDepth / 16; ++k) {
    multiply<KIND == kWeights, KIND != kRowsTransposed>(sum, matrix_a + k * kStepA, matrix_b + k * kStepB, keep || k);
  }
  products_commit();
}

// A multiplying warpgroup's part.
template <Kind KIND>
__device__ __forceinline__ void consume(Walk<KIND> walk, const Shared& at) {
  const int thread = threadIdx.x - 128, warpgroup = thread / 128, lane = thread % 32;
  // each warp for itself: nothing keeps the warps of a warpgroup together
  const auto release = [&](int stage) {
    if (lane == 0) barrier_arrive(at.empty + stage * 8);
  };
  float sum[128];
  Ring ring;
  Tile tile;
  int written_parity = 1;
  for (int index = blockIdx.x; walk.seek(index, tile); index += gridDim.x) {
    const int count = tile.end - tile.begin, blocks = walk.blocks_deep();
    const int rows_left = (KIND == kWeights ? walk.size.rows : count) - tile.row;
    if (rows_left <= warpgroup * 64) {
      for (int i = 0; i < blocks; ++i, ring.step()) {
        barrier_wait(at.full + ring.stage * 8, ring.parity);
        release(ring.stage);
      }
      continue;
    }
    int last = -1;
    for (int i = 0; i < blocks; ++i, ring.step()) {
      const uint32_t a = at.a + ring.stage * kABytes + warpgroup * kBoxBytes, b = at.b + ring.stage * kBBytes;
      barrier_wait(at.full + ring.stage * 8, ring.parity);
      if (KIND == kWeights && count - i * kDepth < kDepth) clear_depth(a, b, count - i * kDepth, thread);
      multiply_block<KIND>(sum, a, b, i > 0);
      products_wait<1>();
      if (last >= 0) release(last);
      last = ring.stage;
    }
    products_wait<0>();
    release(last);
    barrier_wait(at.written + warpgroup * 8, written_parity);
    written_parity ^= 1;
    // A thread has, in sums 4 j to 4 j + 3, columns 8 j + 2 (lane % 4) + {0, 1} of row lane / 4 and then of row lane / 4 + 8;
    // its lane names a row of one of four 8 x 8 matrices.
    const int row = thread % 128 / 32 * 16 + lane / 8 % 2 * 8 + lane % 8;
#pragma unroll
    for (int i = 0; i < 128; i += 8) {
      store_matrices(at.piece(warpgroup, row, i / 4 + lane / 16), pack_bf16(sum[i], sum[i + 1]),
                     pack_bf16(sum[i + 2], sum[i + 3]), pack_bf16(sum[i + 4], sum[i + 5]), pack_bf16(sum[i + 6], sum[i + 7]));
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(at.done + warpgroup * 8);
  }
}

static_assert(kPieceRows == 64, "a half of a tile is a piece of the bias gradient");

__device__ __forceinline__ float low_of(const uint4& piece, int i) { return low_bf16((&piece.x)[i]); }
__device__ __forceinline__ float high_of(const uint4& piece, int i) { return high_bf16((&piece.x)[i]); }

// Sixteen bytes of each of the two halves of a gated row; elsewhere the second is not used.
struct Pair {
  uint4 first, second;
};

__device__ __forceinline__ uint4 add(const uint4& a, const uint4& b) {
  uint4 out;
#pragma unroll
  for (int i = 0; i < 4; ++i) (&out.x)[i] = pack_bf16(low_of(a, i) + low_of(b, i), high_of(a, i) + high_of(b, i));
  return out;
}

// Eight values of the activation of hidden + bias.
template <int ACT>
__device__ __forceinline__ uint4 activation_of(const Pair& hidden, const Pair& bias) {
  const auto one = [](float x, float bias, float value, float value_bias) {
    const float y = act<ACT, true>(x + bias, nullptr);
    return ACT == kSwiglu ? y * (value + value_bias) : y;
  };
  uint4 out;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    (&out.x)[i] = pack_bf16(
        one(low_of(hidden.first, i), low_of(bias.first, i), low_of(hidden.second, i), low_of(bias.second, i)),
        one(high_of(hidden.first, i), high_of(bias.first, i), high_of(hidden.second, i), high_of(bias.second, i)));
  }
  return out;
}

// From eight gradients of the activation of hidden + bias: hidden becomes its own gradient, which is added to sum as well;
// returned is the activation.
template <int ACT>
__device__ __forceinline__ uint4 slopes_of(const uint4& grad, Pair& hidden, const Pair& bias, float (&sum)[2][8]) {
  const auto one = [](float grad, float x, float value, float& grad_x, float& grad_value) {
    float slope;
    const float y = act<ACT, true>(x, &slope);
    if constexpr (ACT != kSwiglu) {
      grad_x = grad * slope;
      return y;
    }
    grad_x = grad * value * slope;
    grad_value = grad * y;
    return y * value;
  };
  uint4 out;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float grads[2][2] = {};  // of the half, at the place
    const float low = one(low_of(grad, i), low_of(hidden.first, i) + low_of(bias.first, i),
                          low_of(hidden.second, i) + low_of(bias.second, i), grads[0][0], grads[1][0]);
    const float high = one(high_of(grad, i), high_of(hidden.first, i) + high_of(bias.first, i),
                           high_of(hidden.second, i) + high_of(bias.second, i), grads[0][1], grads[1][1]);
    (&out.x)[i] = pack_bf16(low, high);
    (&hidden.first.x)[i] = pack_bf16(grads[0][0], grads[0][1]);
    if constexpr (ACT == kSwiglu) (&hidden.second.x)[i] = pack_bf16(grads[1][0], grads[1][1]);
#pragma unroll
    for (int part = 0; part < (ACT == kSwiglu ? 2 : 1); ++part) {
      sum[part][2 * i] += grads[part][0];
      sum[part][2 * i + 1] += grads[part][1];
    }
  }
  return out;
}

// Add the writing warps' sums of a half, in the order of the warps, and store them from the first.
template <int PARTS>
__device__ __forceinline__ void store_sums(const float (&sum)[2][8], uint32_t shared, float* to, int64_t step, bool valid) {
  const int warp = threadIdx.x / 32 - 1, lane = threadIdx.x % 32;
  const auto place = [&](int other, int part) { return shared + (((other - 1) * PARTS + part) * 32 + lane) * 32; };
  for (int part = 0; warp && part < PARTS; ++part) {
#pragma unroll
    for (int i = 0; i < 8; i += 4) store_shared(place(warp, part) + i * 4, &sum[part][i]);
  }
  threads_sync(3, 32 * kWriters);
  if (warp || !valid) return;
#pragma unroll
  for (int part = 0; part < PARTS; ++part) {
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      float4 total = {sum[part][i], sum[part][i + 1], sum[part][i + 2], sum[part][i + 3]};
      for (int other = 1; other < kWriters; ++other) {
        const uint4 more = load_shared(place(other, part) + i * 4);
        total.x += __uint_as_float(more.x), total.y += __uint_as_float(more.y);
        total.z += __uint_as_float(more.z), total.w += __uint_as_float(more.w);
      }
      *reinterpret_cast<float4*>(to + part * step + i) = total;
    }
  }
}

// A writing warp's part: every third row of each half of a tile, 16 bytes a thread and row. ACT kIdentity: the products, and
// the bias. kRows: the products, and the activation of them and the bias. kRowsTransposed: the products are gradients of the
// activation; written are those of its argument, and it.
template <Kind KIND, int ACT>
__device__ __forceinline__ void write(const Pointers& pointers, Walk<KIND> walk, const Shared& at) {
  constexpr bool kGated = ACT == kSwiglu, kForward = KIND == kRows && ACT != kIdentity;
  constexpr bool kBack = KIND == kRowsTransposed && ACT != kIdentity;
  // the two halves of a gated product lie 16 pieces apart: half a warp has a row
  constexpr int kLanes = kForward && kGated ? 16 : 32, kTurns = kBack && kGated ? 2 : 4, kStep = kWriters * 32 / kLanes;
  const int lane = threadIdx.x % 32, piece = lane % kLanes;
  const int first_row = (threadIdx.x / 32 - 1) * (32 / kLanes) + lane / kLanes;
  const int columns = walk.size.columns;
  const int64_t pitch = kGated ? 2 * columns : columns;  // of hidden, its gradient, the bias
  const auto get = [&](const __nv_bfloat16* from) {
    Pair pair{*reinterpret_cast<const uint4*>(from), {}};
    if constexpr (kGated) pair.second = *reinterpret_cast<const uint4*>(from + columns);
    return pair;
  };
  const auto put = [&](__nv_bfloat16* to, const Pair& pair) {
    *reinterpret_cast<uint4*>(to) = pair.first;
    if constexpr (kGated) *reinterpret_cast<uint4*>(to + columns) = pair.second;
  };
  Tile tile;
  int parity[kWarpgroups] = {}, turn = 0;
  for (int index = blockIdx.x; walk.seek(index, tile); index += gridDim.x) {
    const int rows_left = (KIND == kWeights ? walk.size.rows : tile.end - tile.begin) - tile.row;
    const int column = tile.column + piece * 8;
    const bool valid = column < columns;
    Pair bias{};
    if (KIND != kWeights && pointers.bias && valid) bias = get(pointers.bias + tile.slot * pitch + column);
#pragma unroll
    for (int half = 0; half < kWarpgroups; ++half) {
      const int num_rows = min(64, rows_left - half * 64);
      if (num_rows <= 0) break;
      const int64_t above =
          (KIND == kWeights ? int64_t(tile.slot) * walk.size.rows : tile.begin) + tile.row + half * 64;
      Pair hidden[kTurns];
      const auto load_hidden = [&](int row0) {
#pragma unroll
        for (int i = 0; i < kTurns; ++i) {
          const int row = row0 + i * kStep;
          if (row < num_rows && valid) hidden[i] = get(pointers.hidden + (above + row) * pitch + column);
        }
      };
      if constexpr (kBack) load_hidden(first_row);
      float sum[2][8] = {};
      barrier_wait(at.done + half * 8, parity[half]);
      parity[half] ^= 1;
      for (int row0 = first_row; row0 < num_rows; row0 += kTurns * kStep) {
        if (kBack && row0 != first_row) load_hidden(row0);
#pragma unroll
        for (int i = 0; i < kTurns; ++i) {
          const int row = row0 + i * kStep;
          if (row >= num_rows || !valid) break;
          Pair product{load_shared(at.piece(half, row, piece)), {}};
          __nv_bfloat16* out = pointers.out + (above + row) * pitch + column;
          __nv_bfloat16* act_out = pointers.act + (above + row) * columns + column;
          if constexpr (kForward) {
            if constexpr (kGated) product.second = load_shared(at.piece(half, row, piece + 16));
            put(out, product);
            *reinterpret_cast<uint4*>(act_out) = activation_of<ACT>(product, bias);
          } else if constexpr (kBack) {
            const uint4 again = slopes_of<ACT>(product.first, hidden[i], bias, sum);
            put(out, hidden[i]);
            *reinterpret_cast<uint4*>(act_out) = again;
          } else {
            if (KIND != kWeights && pointers.bias) product.first = add(product.first, bias.first);
            put(out, product);
          }
        }
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(at.written + half * 8);
      if constexpr (kBack) {
        if (pointers.partial) {
          // as pieces.cuh numbers them: a half is a piece
          const int64_t number = tile.begin / kPieceRows + tile.slot + tile.row / kPieceRows + half;
          store_sums<kGated ? 2 : 1>(sum, at.sums + turn * kSumBytes, pointers.partial + number * pitch + column, columns,
                                     valid);
          turn ^= 1;  // no warp is two halves ahead of another
        }
      }
    }
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
    for (int half = 0; half < kWarpgroups; ++half) {
      barrier_init(at.done + half * 8, 4);
      barrier_init(at.written + half * 8, kWriters);
    }
    fence_barriers();
  }
  __syncthreads();
  const Walk<KIND> walk(end_L, size, KIND == kRows && ACT == kSwiglu ? kTileColumns / 2 : kTileColumns);
  if (threadIdx.x < 128) {
    give_registers<104>();
    if (threadIdx.x >= 32) {
      write<KIND, ACT>(pointers, walk, at);
    } else if (threadIdx.x == 0) {
      fetch<KIND, ACT>(&map_a, &map_b, walk, at);
    }
  } else {
    take_registers<200>();
    consume<KIND>(walk, at);
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

cudaError_t multiply_rows(const void* rows_RX, const void* weight_LXY, const void* bias_LY, const int* end_L, int num_slots,
                          void* out_RY, void* act_RY, const void* hidden_RY, float* partial_PY, int64_t num_rows, int depth,
                          int columns, bool transposed, int activation, cudaStream_t stream) {
  if (num_rows == 0 || num_slots == 0) return cudaSuccess;
  const int width = activation == kSwiglu && !transposed ? 2 * columns : columns;  // of the product
  CUtensorMap map_a, map_b;
  const bool made = make_map(&map_a, rows_RX, depth, num_rows, 1, kTileRows) &&
                    (transposed ? make_map(&map_b, weight_LXY, depth, width, num_slots, kTileColumns)
                                : make_map(&map_b, weight_LXY, width, depth, num_slots, kDepth));
  if (!made) return cudaErrorInvalidValue;
  const Sizes size{num_slots, 0, columns, depth};
  const Pointers pointers{static_cast<__nv_bfloat16*>(out_RY), static_cast<const __nv_bfloat16*>(bias_LY),
                          static_cast<__nv_bfloat16*>(act_RY), static_cast<const __nv_bfloat16*>(hidden_RY), partial_PY};
  const auto run = [&](auto kernel) { return kernel(map_a, map_b, end_L, pointers, size, stream); };
  switch (activation) {
    case kIdentity:
      return transposed ? run(launch<kRowsTransposed, kIdentity>) : run(launch<kRows, kIdentity>);
    case kGelu:
      return transposed ? run(launch<kRowsTransposed, kGelu>) : run(launch<kRows, kGelu>);
    case kRelu:
      return transposed ? run(launch<kRowsTransposed, kRelu>) : run(launch<kRows, kRelu>);
    case kSwiglu:
      return transposed ? run(launch<kRowsTransposed, kSwiglu>) : run(launch<kRows, kSwiglu>);
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
  Pointers pointers{};
  pointers.out = static_cast<__nv_bfloat16*>(out_LXY);
  return launch<kWeights, kIdentity>(map_a, map_b, end_L, pointers, {num_slots, rows, columns, 0}, stream);
}

}  // namespace smartmoe
