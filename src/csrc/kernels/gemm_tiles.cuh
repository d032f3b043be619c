// Tiles of grouped products: their sizes, who takes which, and where their parts lie in shared memory.
#pragma once

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
constexpr int kSumBytes = (kWriters - 1) * 2 * kRowBytes * 2;             // of two packs of columns in float32
constexpr int kAhead = 2;          // tiles that are known before they are begun
constexpr int kMostSorted = 1024;  // slots that are put in order of size
constexpr int kSharedBytes = kStages * (kABytes + kBBytes) + kWarpgroups * kHalfBytes + kSumBytes +
                             2 * (kStages + kWarpgroups + kAhead) * 8 + (kAhead + kMostSorted) * 4;

// What is multiplied. Rows: out[r] = rows[r] matrix of r's slot; the matrix is [depth, columns], or with RowsTransposed
// [columns, depth]. Weights: out[slot] = sum over the slot's rows r of a[r]^T b[r].
enum Kind { kRows, kRowsTransposed, kWeights };

struct Sizes {
  int num_slots, rows, columns, depth;  // of a slot's result and matrix; rows counts for Weights, depth for the others
  int num_totals, num_added;            // Weights: the first slots that go into totals, and those of them that are added
  int first_slot;                       // Rows: the slots before are left alone
  int num_sure;                         // Weights: the slots behind are in use where `held` says so
};

struct Pointers {
  __nv_bfloat16* out;
  const __nv_bfloat16* bias;    // added before the activation, or to out where there is none; or null
  __nv_bfloat16* act;           // the activation of out, or of hidden
  const __nv_bfloat16* hidden;  // what out is the gradient of; may be out itself
  float* partial;               // sums of those gradients over each piece, or null
  float* total;                 // Weights: of the first slots, out has those behind
  const int* held;              // Weights: negative for slots behind num_sure that are not in use; or null
  int* counter;                 // tiles given away, 0 at first
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

// Tiles in order, slots ascending, or as `order` has them; inside a slot those with the same columns follow each other.
template <Kind KIND>
struct Walk {
  const int* end_L;
  Sizes size;
  int tile_columns;
  uint32_t order;  // in shared memory, or 0
  const int* held;
  int place, slot = 0, first = 0, num_tiles = 0, begin = 0, end = 0, down = 0;

  __device__ __forceinline__ Walk(const int* end_L, const Sizes& size, int tile_columns, uint32_t order, const int* held)
      : end_L(end_L), size(size), tile_columns(tile_columns), order(order), held(held), place(size.first_slot - 1) {}

  __device__ __forceinline__ bool seek(int index, Tile& tile) {
    while (index >= first + num_tiles) {
      if (++place >= size.num_slots) return false;
      first += num_tiles;
      slot = KIND == kWeights && order ? load_int(order + 4 * place) : place;
      begin = slot ? end_L[slot - 1] : 0;
      end = end_L[slot];
      down = ((KIND == kWeights ? size.rows : end - begin) + kTileRows - 1) / kTileRows;
      if (KIND == kWeights && begin == end && slot < size.num_added) down = 0;  // nothing to add
      if (KIND == kWeights && held && slot >= size.num_sure && held[slot - size.num_sure] < 0) down = 0;
      num_tiles = down * ((size.columns + tile_columns - 1) / tile_columns);
    }
    const int local = index - first;
    tile = {slot, begin, end, local % down * kTileRows, local / down * tile_columns};
    return true;
  }

  __device__ __forceinline__ bool is_total(const Tile& tile) const {
    return KIND == kWeights && tile.slot < size.num_totals;
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
  uint32_t a, b, result, sums, full, empty, done, written, told, heard, tile, order;
  __device__ __forceinline__ explicit Shared(uint32_t base)
      : a(base),
        b(a + kStages * kABytes),
        result(b + kStages * kBBytes),
        sums(result + kWarpgroups * kHalfBytes),
        full(sums + kSumBytes),
        empty(full + kStages * 8),
        done(empty + kStages * 8),
        written(done + kWarpgroups * 8),
        told(written + kWarpgroups * 8),
        heard(told + kAhead * 8),
        tile(heard + kAhead * 8),
        order(tile + kAhead * 4) {}

  // 16 bytes of a row of a half, in an order that spares the banks
  __device__ __forceinline__ uint32_t piece(int half, int row, int column16) const {
    return result + half * kHalfBytes + row * kRowBytes + ((column16 ^ (row & 7)) << 4);
  }
};

// The tiles of a block, one after another, as its fetching thread takes them; -1 ends them.
struct Turns {
  int place = 0, parity = 0;

  __device__ __forceinline__ void tell(const Shared& at, int index) {
    barrier_wait(at.heard + place * 8, parity ^ 1);
    store_int(at.tile + place * 4, index);
    barrier_arrive(at.told + place * 8);
    step();
  }

  __device__ __forceinline__ int hear(const Shared& at) {
    barrier_wait(at.told + place * 8, parity);
    const int index = load_int(at.tile + place * 4);
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(at.heard + place * 8);
    step();
    return index;
  }

 private:
  __device__ __forceinline__ void step() {
    if (++place == kAhead) place = 0, parity ^= 1;
  }
};

// Put slots in order of the number of their rows, most first. For all threads of a block.
__device__ __forceinline__ void sort_slots(const int* end_L, int num_slots, uint32_t order, uint32_t counts) {
  for (int slot = threadIdx.x; slot < num_slots; slot += kThreads) {
    store_int(counts + 4 * slot, end_L[slot] - (slot ? end_L[slot - 1] : 0));
  }
  __syncthreads();
  for (int slot = threadIdx.x; slot < num_slots; slot += kThreads) {
    const int mine = load_int(counts + 4 * slot);
    int place = 0;
    for (int other = 0; other < num_slots; ++other) {
      const int count = load_int(counts + 4 * other);
      place += count > mine || (count == mine && other < slot);
    }
    store_int(order + 4 * place, slot);
  }
}

#endif

}  // namespace
}  // namespace smartmoe
