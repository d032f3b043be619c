// Products of rows sorted by slot with their slots' matrices, in bfloat16 on compute capability 9.0, and the activation
// between two of them in the same pass.
//
// One block a multiprocessor stays for many tiles of 128 x 256. One thread fetches blocks of depth 64 of both factors into
// stages of shared memory; two warpgroups multiply them, each 64 rows of the tile, and leave the result in shared memory,
// from where three warps write it row by row, so that rows of other slots stay untouched, while the next tile is multiplied;
// of a block's last tile of rows each warpgroup writes its half itself. Weights in bfloat16 are stored by the copy engine,
// which takes them out of shared memory sooner than they reach memory. A warpgroup whose rows all lie behind the slot's last
// one does not multiply. Counts are read on the device; a block takes its next tile by a counter when it nears the end of
// one, as tiles take different times; of weights the longest come first.
// Those come in halves that would leave much of the device idle, if whole: the last ones of rows, and of weights the last deep
// ones of a slot that has most of the rows.
#include <cuda.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "gemm_write.cuh"
#include "hopper.cuh"

namespace smartmoe {
namespace {

#ifdef SMARTMOE_MULTIPLIES

// The fetching thread's part.
template <Kind KIND, int ACT>
__device__ __forceinline__ void fetch(const CUtensorMap* map_a, const CUtensorMap* map_b, Walk<KIND> walk, const Shared& at,
                                      int* counter) {
  [[maybe_unused]] constexpr bool kGated = KIND == kRows && ACT == kSwiglu;
  Ring ring;
  Tile tile;
  Turns turns;
  int index = blockIdx.x;
  while (walk.seek(index, tile)) {
    turns.tell(at, index);
    const int blocks = walk.blocks_deep(tile);
    for (int i = 0; i < blocks; ++i, ring.step()) {
      // early enough that the answer is there when it is needed
      if (i == max(0, blocks - kStages)) index = gridDim.x + atomicAdd(counter, 1);
      const int depth = i * kDepth;
      const uint32_t a = at.a + ring.stage * kABytes, b = at.b + ring.stage * kBBytes, full = at.full + ring.stage * 8;
      barrier_wait(at.empty + ring.stage * 8, ring.parity ^ 1);
      const int num_columns = tile.is_narrow ? kTileColumns / 2 : kTileColumns;
      barrier_expect(full, kABytes + num_columns * kDepth * 2);
      if constexpr (KIND == kWeights) {
        for (int box = 0; box < kTileRows / kBox; ++box) {
          load_box(a + box * kBoxBytes, map_a, full, tile.row + box * kBox, tile.begin + depth, 0);
        }
      } else {
        load_box(a, map_a, full, depth, tile.begin + tile.row, 0);
      }
      if constexpr (KIND == kRowsTransposed) {
        for (int column = 0; column < num_columns; column += kTileColumns / 2) {
          load_box(b + column * kDepth * 2, map_b, full, depth, tile.column + column, tile.slot);
        }
      } else {
        for (int box = 0; box < num_columns / kBox; ++box) {
          const int y = KIND == kWeights ? tile.begin + depth : depth, z = KIND == kWeights ? 0 : tile.slot;
          // gated: as many columns of the second half beside those of the first
          const int x = kGated && box >= 2 ? walk.size.columns + (box - 2) * kBox : box * kBox;
          load_box(b + box * kBoxBytes, map_b, full, tile.column + x, y, z);
        }
      }
    }
  }
  turns.tell(at, -1);
}

// Zero the values of k in [from, end) of a stage, for one warpgroup: in rows of 128 bytes of its box of a and the boxes of b,
// whatever the swizzle inside a row. That the other writes the same zeros into b needs no order between them.
__device__ __forceinline__ void clear_depth(uint32_t a, uint32_t b, int from, int end, int thread) {
  const int pieces = (end - from) * 8;
  for (int i = thread % 128; i < (1 + kTileColumns / kBox) * pieces; i += 128) {
    const int box = i / pieces;
    const uint32_t start = box ? b + (box - 1) * kBoxBytes : a;
    asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(start + from * 128 + i % pieces * 16), "r"(0) : "memory");
  }
  fence_shared();
  threads_sync(1 + thread / 128, 128);
}

// Add the products of STEPS times 16 of k.
template <Kind KIND, bool NARROW, int STEPS = kDepth / 16>
__device__ __forceinline__ void multiply_block(float (&sum)[128], uint32_t a, uint32_t b, bool keep) {
  // 16 of k further: 16 rows of 128 bytes, or 32 bytes along each row
  constexpr int kStepA = (KIND == kWeights ? 16 * 128 : 32) >> 4, kStepB = (KIND == kRowsTransposed ? 32 : 16 * 128) >> 4;
  const uint64_t matrix_a = matrix_at(a, kBoxBytes), matrix_b = matrix_at(b, kBoxBytes);
  products_begin();
#pragma unroll
  for (int k = 0; k < STEPS; ++k) {
    if constexpr (NARROW) {
      multiply_narrow<KIND == kWeights, KIND != kRowsTransposed>(sum, matrix_a + k * kStepA, matrix_b + k * kStepB, keep || k);
    } else {
      multiply<KIND == kWeights, KIND != kRowsTransposed>(sum, matrix_a + k * kStepA, matrix_b + k * kStepB, keep || k);
    }
  }
  products_commit();
}

// A multiplying warpgroup's part.
template <Kind KIND, int ACT>
__device__ __forceinline__ void consume(const Pointers& pointers, Walk<KIND> walk, const Shared& at) {
  const int thread = threadIdx.x, warpgroup = thread / 128, lane = thread % 32;
  // each warp for itself: nothing keeps the warps of a warpgroup together
  const auto release = [&](int stage) {
    if (lane == 0) barrier_arrive(at.empty + stage * 8);
  };
  float sum[128];
  Ring ring;
  Tile tile{};  // without rows, for a block that gets none
  Turns turns;
  int written_parity = 1;
  for (int index = turns.hear(at); index >= 0; index = turns.hear(at)) {
    walk.seek(index, tile);
    const int count = tile.end - tile.begin, blocks = walk.blocks_deep(tile);
    const int rows_left = (KIND == kWeights ? walk.size.rows : count) - tile.row;
    if (rows_left <= warpgroup * 64) {
      for (int i = 0; i < blocks; ++i, ring.step()) {
        barrier_wait(at.full + ring.stage * 8, ring.parity);
        release(ring.stage);
      }
      continue;
    }
    const auto multiply_all = [&](auto narrow) {
      constexpr bool kNarrow = decltype(narrow)::value;
      // the last block of weights' depth may be a part: as many steps of 16 as that takes, of an empty slot one. By the shuffle
      // the compiler learns that a warp agrees.
      const int left = KIND == kWeights ? __shfl_sync(0xffffffff, count - (blocks - 1) * kDepth, 0) : kDepth;
      const int num_whole = left < kDepth ? blocks - 1 : blocks;
      int last = -1;
      const auto multiply_next = [&](auto multiply_stage) {
        const uint32_t a = at.a + ring.stage * kABytes + warpgroup * kBoxBytes, b = at.b + ring.stage * kBBytes;
        barrier_wait(at.full + ring.stage * 8, ring.parity);
        multiply_stage(a, b);
        products_wait<1>();
        if (last >= 0) release(last);
        last = ring.stage;
        ring.step();
      };
      for (int i = 0; i < num_whole; ++i) {
        multiply_next([&](uint32_t a, uint32_t b) { multiply_block<KIND, kNarrow>(sum, a, b, i > 0); });
      }
      if (KIND == kWeights && left < kDepth) {
        multiply_next([&](uint32_t a, uint32_t b) {
          constexpr int kStepBytes = 16 * 128;
          const int steps = max(1, (left + 15) / 16);
          if (left < steps * 16) clear_depth(a, b, left, steps * 16, thread);
          for (int k = 0; k < steps; ++k) {
            multiply_block<KIND, kNarrow, 1>(sum, a + k * kStepBytes, b + k * kStepBytes, num_whole > 0 || k > 0);
          }
        });
      }
      products_wait<0>();
      release(last);
    };
    if (tile.is_narrow) {
      multiply_all(std::true_type());
    } else {
      multiply_all(std::false_type());
    }
    const auto begin_writing = [&] {
      barrier_wait(at.written + warpgroup * 8, written_parity);
      written_parity ^= 1;
    };
    const auto end_writing = [&] {
      __syncwarp();
      if (lane == 0) barrier_arrive(at.done + warpgroup * 8);
    };
    // A thread has, in sums 4 j to 4 j + 3, columns 8 j + 2 (lane % 4) + {0, 1} of row lane / 4 and then of row lane / 4 + 8.
    const int first_row = thread % 128 / 32 * 16;
    if (walk.is_total(tile)) {
      // in float32 there is room for half of the columns
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        begin_writing();
#pragma unroll
        for (int i = 0; i < 64; i += 2) {
          const int row = first_row + i / 2 % 2 * 8 + lane / 4, piece = i / 4 * 2 + lane % 4 / 2;
          store_shared(at.piece(warpgroup, row, piece) + lane % 2 * 8, sum[part * 64 + i], sum[part * 64 + i + 1]);
        }
        end_writing();
      }
      continue;
    }
    begin_writing();
    // its lane names a row of one of four 8 x 8 matrices
    const int row = first_row + lane / 8 % 2 * 8 + lane % 8;
#pragma unroll
    for (int i = 0; i < 128; i += 8) {
      if (i == 64 && tile.is_narrow) break;
      const int column16 = i / 4 + lane / 16;
      store_matrices(KIND == kWeights ? at.boxed(warpgroup, row, column16) : at.piece(warpgroup, row, column16),
                     pack_bf16(sum[i], sum[i + 1]), pack_bf16(sum[i + 2], sum[i + 3]), pack_bf16(sum[i + 4], sum[i + 5]),
                     pack_bf16(sum[i + 6], sum[i + 7]));
    }
    if (KIND == kWeights) fence_shared();
    end_writing();
  }
  if constexpr (KIND != kWeights) {
    threads_sync(1 + warpgroup, 128);
    int parity = 0;  // of no use here: a warpgroup does not wait for its own half
    // as many warps as elsewhere, so that a sum has the same bits whoever adds it
    if (thread % 128 < 32 * kWriters) write_rows<KIND, ACT, true>(pointers, walk.size, tile, at, parity);
  }
}

// For all threads of a block, which go on together.
template <Kind KIND, bool GATED>
__device__ __forceinline__ Walk<KIND> start_walk(const int* end_L, const Sizes& size, const int* held, const Shared& at) {
  if constexpr (KIND == kWeights) {
    sort_slots(end_L, size, held, at.order, at.narrow, at.result);  // the counts lie where the first products will
    __syncthreads();
    return Walk<KIND>(end_L, size, at.order, at.narrow);
  } else {
    const int first_narrow = GATED ? INT_MAX : find_narrow(end_L, size, at.order);
    __syncthreads();
    return Walk<KIND>(end_L, size, GATED ? kTileColumns / 2 : kTileColumns, first_narrow);
  }
}

#endif

template <Kind KIND, int ACT>
__global__ void __launch_bounds__(kThreads, 1)
    grouped_gemm_kernel(const __grid_constant__ CUtensorMap map_a, const __grid_constant__ CUtensorMap map_b,
                        const __grid_constant__ CUtensorMap map_out, const int* __restrict__ end_L, const Pointers pointers,
                        const Sizes size) {
#ifdef SMARTMOE_MULTIPLIES
  extern __shared__ __align__(1024) uint8_t shared[];
  const Shared at(shared_address(shared));
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(at.full + stage * 8, 1);
      barrier_init(at.empty + stage * 8, 4 * kWarpgroups);
    }
    for (int place = 0; place < kAhead; ++place) {
      barrier_init(at.told + place * 8, 1);
      barrier_init(at.heard + place * 8, 4 * kWarpgroups + kWriters);
    }
    for (int half = 0; half < kWarpgroups; ++half) {
      barrier_init(at.done + half * 8, 4);
      barrier_init(at.written + half * 8, kWriters);
    }
    fence_barriers();
  }
  const Walk<KIND> walk = start_walk<KIND, KIND == kRows && ACT == kSwiglu>(end_L, size, pointers.held, at);
  constexpr int kMultiply = 128 * kWarpgroups, kWrite = kMultiply + 32 * kWriters;
  if (threadIdx.x < kMultiply) {
    take_registers<176>();
    consume<KIND, ACT>(pointers, walk, at);
  } else {
    give_registers<152>();
    if (threadIdx.x < kWrite) {
      write<KIND, ACT>(pointers, &map_out, walk, at);
    } else if (threadIdx.x == kWrite) {
      fetch<KIND, ACT>(&map_a, &map_b, walk, at, pointers.counter);
    }
  }
#endif
}

// A memset in a CUDA graph takes 4 us with the gaps on both sides, a kernel 2.
__global__ void clear_kernel(int* counter) { *counter = 0; }

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

// For maps, which the driver makes: a thread that has used no device through the runtime yet, as autograd's may, has no context.
bool enter_context() {
  int device = 0;
  return cudaGetDevice(&device) == cudaSuccess && cudaSetDevice(device) == cudaSuccess;
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
cudaError_t launch(const CUtensorMap& map_a, const CUtensorMap& map_b, const CUtensorMap& map_out, const int* end_L,
                   const Pointers& pointers, const Sizes& size, cudaStream_t stream) {
  const auto kernel = grouped_gemm_kernel<KIND, ACT>;
  int device = 0, num_sms = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return error;
  clear_kernel<<<1, 1, 0, stream>>>(pointers.counter);
  if ((error = cudaGetLastError()) != cudaSuccess) return error;
  kernel<<<num_sms, kThreads, kSharedBytes, stream>>>(map_a, map_b, map_out, end_L, pointers, size);
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

cudaError_t multiply_rows(const void* rows_RX, const void* weight_LXY, const void* bias_LY, const int* end_L, int first_slot,
                          int num_slots, void* out_RY, void* act_RY, const void* hidden_RY, float* partial_PY, int* counter,
                          int64_t num_rows, int depth, int columns, bool transposed, int activation, cudaStream_t stream) {
  if (num_rows == 0 || num_slots <= first_slot) return cudaSuccess;
  const int width = activation == kSwiglu && !transposed ? 2 * columns : columns;  // of the product
  CUtensorMap map_a, map_b;
  const bool made = enter_context() && make_map(&map_a, rows_RX, depth, num_rows, 1, kTileRows) &&
                    (transposed ? make_map(&map_b, weight_LXY, depth, width, num_slots, kTileColumns / 2)
                                : make_map(&map_b, weight_LXY, width, depth, num_slots, kDepth));
  if (!made) return cudaErrorInvalidValue;
  const Sizes size{num_slots, 0, columns, depth, 0, 0, first_slot, 0};
  const Pointers pointers{static_cast<__nv_bfloat16*>(out_RY), static_cast<const __nv_bfloat16*>(bias_LY),
                          static_cast<__nv_bfloat16*>(act_RY), static_cast<const __nv_bfloat16*>(hidden_RY), partial_PY,
                          nullptr, nullptr, counter};
  const auto run = [&](auto kernel) { return kernel(map_a, map_b, map_a, end_L, pointers, size, stream); };
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
                           float* total_LXY, int num_totals, bool is_first, const int* held_G, int num_held, int* counter,
                           int64_t num_rows, int rows, int columns, cudaStream_t stream) {
  if (num_slots == 0) return cudaSuccess;
  CUtensorMap map_a, map_b, map_out;
  const bool made = enter_context() && make_map(&map_a, rows_RX, rows, num_rows, 1, kDepth) &&
                    make_map(&map_b, grad_RY, columns, num_rows, 1, kDepth) &&
                    (num_slots == num_totals || make_map(&map_out, out_LXY, columns, rows, num_slots - num_totals, 64));
  if (!made) return cudaErrorInvalidValue;
  Pointers pointers{};
  pointers.out = static_cast<__nv_bfloat16*>(out_LXY);
  pointers.total = total_LXY;
  pointers.held = held_G;
  pointers.counter = counter;
  const Sizes size{num_slots, rows, columns, 0, num_totals, is_first ? 0 : num_totals, 0, num_slots - num_held};
  return launch<kWeights, kIdentity>(map_a, map_b, map_out, end_L, pointers, size, stream);
}

}  // namespace smartmoe
