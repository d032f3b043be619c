// The order of token copies by slot: a counting sort that keeps the order of copies, without atomics on the result.
#include "common.cuh"

namespace smartmoe {
namespace {

constexpr int kCountThreads = 512;
constexpr int kTargetBlocks = 128;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ int slot_at(const int64_t* slot_N, int64_t i, int64_t end, int num_slots) {
  const int64_t slot = i < end ? slot_N[i] : -1;
  return slot >= 0 && slot < num_slots ? static_cast<int>(slot) : -1;
}

// Copies of each slot among the block's copies. Atomics on integers: their order changes nothing.
__device__ void count_chunk(const int64_t* slot_N, int64_t begin, int64_t end, int num_slots, int* count_S) {
  for (int s = threadIdx.x; s < num_slots; s += blockDim.x) count_S[s] = 0;
  __syncthreads();
  for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
    const int slot = slot_at(slot_N, i, end, num_slots);
    if (slot >= 0) atomicAdd(&count_S[slot], 1);
  }
  __syncthreads();
}

__global__ void count_slots_kernel(const int64_t* slot_N, int64_t num_copies, int64_t chunk, int num_slots,
                                   unsigned long long* total_S) {
  extern __shared__ int count_S[];
  const int64_t begin = blockIdx.x * chunk;
  count_chunk(slot_N, begin, min(begin + chunk, num_copies), num_slots, count_S);
  for (int s = threadIdx.x; s < num_slots; s += blockDim.x) {
    if (count_S[s]) atomicAdd(&total_S[s], static_cast<unsigned long long>(count_S[s]));
  }
}

// Of a kernel that `launch` may begin early: let the next begin, too, and wait for the one before. Nothing when it did not.
__device__ __forceinline__ void follow() {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
  cudaGridDependencySynchronize();
#endif
}

__global__ void count_chunks_kernel(const int64_t* slot_N, int64_t num_copies, int64_t chunk, int num_slots, int* count_BS) {
  extern __shared__ int count_S[];
  follow();
  const int64_t begin = blockIdx.x * chunk;
  count_chunk(slot_N, begin, min(begin + chunk, num_copies), num_slots, count_S);
  for (int s = threadIdx.x; s < num_slots; s += blockDim.x) count_BS[int64_t(blockIdx.x) * num_slots + s] = count_S[s];
}

// Exclusive running sums of total_S by one warp; returns the sum of all.
__device__ int scan_by_warp(const int* total_S, int* start_S, int num_slots) {
  const int lane = threadIdx.x % 32;
  int carry = 0;
  for (int s0 = 0; s0 < num_slots; s0 += 32) {
    const int value = s0 + lane < num_slots ? total_S[s0 + lane] : 0;
    int sum = value;
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(kAllLanes, sum, step);
      if (lane >= step) sum += other;
    }
    if (s0 + lane < num_slots) start_S[s0 + lane] = carry + sum - value;
    carry += __shfl_sync(kAllLanes, sum, 31);
  }
  return carry;
}

// Inclusive ones by one warp.
__global__ void ends_kernel(const int64_t* count_S, int num_slots, int* end_S) {
  const int lane = threadIdx.x;
  int carry = 0;
  for (int s0 = 0; s0 < num_slots; s0 += 32) {
    int sum = s0 + lane < num_slots ? static_cast<int>(count_S[s0 + lane]) : 0;
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(kAllLanes, sum, step);
      if (lane >= step) sum += other;
    }
    if (s0 + lane < num_slots) end_S[s0 + lane] = carry + sum;
    carry += __shfl_sync(kAllLanes, sum, 31);
  }
}

struct PlanSizes {
  int64_t num_copies, chunk, capacity, num_rows;
  int num_slots;
};

// Every block takes a run of copies, every warp of it a part of that run. A warp knows how many copies of each slot stand
// before its own (other blocks: count_BS; warps before it: counted here), and ranks 32 copies at a time by matching lanes.
__global__ void place_kernel(const int64_t* slot_N, const int* count_BS, PlanSizes size, int64_t* count_S,
                             int64_t* copy_of_row_R, int64_t* row_of_copy_N) {
  extern __shared__ int shared[];
  const int num_slots = size.num_slots, num_warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int *total_S = shared, *before_S = total_S + num_slots, *start_S = before_S + num_slots, *next_WS = start_S + num_slots;
  __shared__ int num_kept;
  follow();
  for (int s = threadIdx.x; s < num_slots; s += blockDim.x) {
    int total = 0, before = 0;
#pragma unroll 8
    for (int b = 0; b < gridDim.x; ++b) {
      const int count = count_BS[int64_t(b) * num_slots + s];
      total += count;
      before += b < blockIdx.x ? count : 0;
    }
    total_S[s] = total;
    before_S[s] = before;
    if (blockIdx.x == 0) count_S[s] = total;
  }
  for (int i = threadIdx.x; i < num_warps * num_slots; i += blockDim.x) next_WS[i] = 0;
  __syncthreads();
  if (warp == 0) {
    const int kept = scan_by_warp(total_S, start_S, num_slots);
    if (lane == 0) num_kept = kept;
  }

  const int64_t part = size.chunk / num_warps, block_end = min((blockIdx.x + 1) * size.chunk, size.num_copies);
  const int64_t begin = blockIdx.x * size.chunk + warp * part, end = min(begin + part, block_end);
  int* next_S = next_WS + warp * num_slots;
  for (int64_t i0 = begin; i0 < end; i0 += 32) {
    const int slot = slot_at(slot_N, i0 + lane, end, num_slots);
    const unsigned same = __match_any_sync(kAllLanes, slot);
    if (slot >= 0 && lane == __ffs(same) - 1) next_S[slot] += __popc(same);
    __syncwarp();
  }
  __syncthreads();
  for (int s = threadIdx.x; s < num_slots; s += blockDim.x) {
    int next = before_S[s] + (size.capacity ? 0 : start_S[s]);
    for (int w = 0; w < num_warps; ++w) {
      const int count = next_WS[w * num_slots + s];
      next_WS[w * num_slots + s] = next;
      next += count;
    }
  }
  __syncthreads();

  for (int64_t i0 = begin; i0 < end; i0 += 32) {
    const int64_t i = i0 + lane;
    const int slot = slot_at(slot_N, i, end, num_slots);
    const unsigned same = __match_any_sync(kAllLanes, slot);
    const int place = slot >= 0 ? next_S[slot] + __popc(same & ((1u << lane) - 1)) : 0;
    __syncwarp();
    if (slot >= 0 && lane == __ffs(same) - 1) next_S[slot] += __popc(same);
    __syncwarp();
    const bool fits = slot >= 0 && (size.capacity == 0 || place < size.capacity);
    const int64_t row = fits ? slot * size.capacity + place : size.num_rows;
    if (i < end) row_of_copy_N[i] = row;
    if (row < size.num_rows) copy_of_row_R[row] = i;
  }
  const int64_t first = size.capacity ? 0 : num_kept, stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t row = first + int64_t(blockIdx.x) * blockDim.x + threadIdx.x; row < size.num_rows; row += stride) {
    if (size.capacity == 0 || row % size.capacity >= total_S[row / size.capacity]) copy_of_row_R[row] = -1;
  }
}

__device__ __forceinline__ uint64_t mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

__global__ void slots_kernel(const int64_t* expert_N, const int64_t* table_EB, const int64_t* token_id_T, int64_t num_copies,
                             int top_k, int num_buckets, int64_t* slot_N) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= num_copies) return;
  const int64_t expert = expert_N[i], t = i / top_k;
  uint64_t bucket = 0;
  if (num_buckets > 1) {
    const uint64_t column = static_cast<uint64_t>(i - t * top_k + 1) * 0x9E3779B97F4A7C15ull;
    bucket = mix(static_cast<uint64_t>(token_id_T[t]) + column) & (num_buckets - 1);
  }
  slot_N[i] = expert < 0 ? -1 : table_EB[expert * num_buckets + bucket];
}

// Whether `follow` waits: in code that was compiled for an older target it is empty, also on a GPU that could.
bool can_follow() {
  static const bool can = [] {
    cudaFuncAttributes attributes;
    return cudaFuncGetAttributes(&attributes, place_kernel) == cudaSuccess && attributes.ptxVersion >= 90;
  }();
  return can;
}

template <typename... Parameters>
cudaError_t launch(bool early, cudaStream_t stream, int blocks, int threads, size_t shared_bytes, void (*kernel)(Parameters...),
                   Parameters... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = early;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// As many warps as the tables of all of them leave room for in 48 KB.
int plan_warps(int num_slots) {
  int warps = 16;
  while (warps > 1 && (3 + warps) * num_slots * 4 > 47 * 1024) warps /= 2;
  return warps;
}

int64_t plan_chunk(int64_t num_copies, int num_slots) {
  const int64_t step = 32 * plan_warps(num_slots);
  return max(step, ceil_div(ceil_div(num_copies, kTargetBlocks), step) * step);
}

}  // namespace

int plan_blocks(int64_t num_copies, int num_slots) {
  const int64_t blocks = ceil_div(num_copies, plan_chunk(num_copies, num_slots));
  return static_cast<int>(blocks > 0 ? blocks : 1);
}

cudaError_t count_slots(const int64_t* slot_N, int64_t num_copies, int num_slots, int64_t* count_S, cudaStream_t stream) {
  if (num_slots > kMaxSlots) return cudaErrorInvalidValue;
  if (num_copies == 0 || num_slots == 0) return cudaSuccess;
  const int64_t chunk = plan_chunk(num_copies, num_slots);
  count_slots_kernel<<<plan_blocks(num_copies, num_slots), kCountThreads, num_slots * sizeof(int), stream>>>(
      slot_N, num_copies, chunk, num_slots, reinterpret_cast<unsigned long long*>(count_S));
  return cudaGetLastError();
}

cudaError_t ends_of(const int64_t* count_S, int num_slots, int* end_S, cudaStream_t stream) {
  if (num_slots == 0) return cudaSuccess;
  ends_kernel<<<1, 32, 0, stream>>>(count_S, num_slots, end_S);
  return cudaGetLastError();
}

cudaError_t slots_of(const int64_t* expert_N, const int64_t* table_EB, const int64_t* token_id_T, int64_t num_copies,
                     int top_k, int num_buckets, int64_t* slot_N, cudaStream_t stream) {
  if (num_copies == 0) return cudaSuccess;
  slots_kernel<<<ceil_div(num_copies, 256), 256, 0, stream>>>(expert_N, table_EB, token_id_T, num_copies, top_k, num_buckets,
                                                              slot_N);
  return cudaGetLastError();
}

cudaError_t plan_rows(const int64_t* slot_N, int64_t num_copies, int num_slots, int64_t capacity, int64_t num_rows,
                      int* workspace, int64_t* count_S, int64_t* copy_of_row_R, int64_t* row_of_copy_N, bool early,
                      cudaStream_t stream) {
  if (num_slots > kMaxSlots) return cudaErrorInvalidValue;
  if (num_slots == 0) return cudaSuccess;
  const int blocks = plan_blocks(num_copies, num_slots), warps = plan_warps(num_slots);
  const PlanSizes size{num_copies, plan_chunk(num_copies, num_slots), capacity, num_rows, num_slots};
  early = early && can_follow();
  const cudaError_t error = launch(early, stream, blocks, kCountThreads, num_slots * sizeof(int), count_chunks_kernel, slot_N,
                                   num_copies, size.chunk, num_slots, workspace);
  if (error != cudaSuccess) return error;
  return launch(early, stream, blocks, 32 * warps, (3 + warps) * num_slots * sizeof(int), place_kernel, slot_N,
                static_cast<const int*>(workspace), size, count_S, copy_of_row_R, row_of_copy_N);
}

}  // namespace smartmoe
