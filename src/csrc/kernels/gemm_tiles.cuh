// Tiles of grouped products: their sizes, who takes which, and where their parts lie in shared memory.
#pragma once

#include <climits>

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
constexpr int kLeastNarrow = 40;   // tiles at the end that come in halves, if any
constexpr int kAhead = 2;          // tiles that are known before they are begun
constexpr int kMostSorted = 1024;  // slots that are put in order of size
constexpr int kMostBand = 24;      // tiles that follow each other down a column: 132 at a time read least with 12 to 24
constexpr int kSharedBytes = kStages * (kABytes + kBBytes) + kWarpgroups * kHalfBytes + kSumBytes +
                             2 * (kStages + kWarpgroups + kAhead) * 8 + (kAhead + 3 + kMostSorted) * 4;

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
  bool is_narrow;        // half as many columns as others
};

// Whether a slot's sum of products is wanted, where it is one of so many.
__device__ __forceinline__ bool is_wanted(const Sizes& size, const int* held, int slot, int num_rows) {
  if (!num_rows && slot < size.num_added) return false;  // nothing to add
  return !(held && slot >= size.num_sure && held[slot - size.num_sure] < 0);
}

// Find a tile by its number among those of its slot. They follow each other down the columns of a band of rows, band after
// band, so that those that are multiplied at one time share rows and columns: all read them from the cache about then.
__device__ __forceinline__ void place_tile(Tile& tile, int number, int down, int across, int tile_columns) {
  const int num_bands = (down + kMostBand - 1) / kMostBand, most = (down + num_bands - 1) / num_bands;
  const int band = number / (most * across), inside = number - band * most * across;
  const int high = min(most, down - band * most);
  tile.row = (band * most + inside % high) * kTileRows;
  tile.column = inside / high * tile_columns;
}

// Tiles of products of rows in order, slots ascending. From `first_narrow` on they are halves: the last ones, where whole
// ones would leave half of the device idle or more.
template <Kind KIND>
struct Walk {
  const int* end_L;
  Sizes size;
  int tile_columns, first_narrow;
  int slot, first = 0, num_tiles = 0, begin = 0, end = 0, down = 0;

  __device__ __forceinline__ Walk(const int* end_L, const Sizes& size, int tile_columns, int first_narrow)
      : end_L(end_L), size(size), tile_columns(tile_columns), first_narrow(first_narrow), slot(size.first_slot - 1) {}

  __device__ __forceinline__ bool seek(int index, Tile& tile) {
    const bool is_narrow = index >= first_narrow;
    const int part = is_narrow ? (index - first_narrow) % 2 : 0;
    if (is_narrow) index = first_narrow + (index - first_narrow) / 2;
    const int across = (size.columns + tile_columns - 1) / tile_columns;
    while (index >= first + num_tiles) {
      if (++slot >= size.num_slots) return false;
      first += num_tiles;
      begin = slot ? end_L[slot - 1] : 0;
      end = end_L[slot];
      down = (end - begin + kTileRows - 1) / kTileRows;
      num_tiles = down * across;
    }
    tile.slot = slot, tile.begin = begin, tile.end = end, tile.is_narrow = is_narrow;
    place_tile(tile, index - first, down, across, tile_columns);
    tile.column += part * (tile_columns / 2);
    return true;
  }

  __device__ __forceinline__ bool is_total(const Tile&) const { return false; }
  __device__ __forceinline__ int blocks_deep(const Tile&) const { return (size.depth + kDepth - 1) / kDepth; }
};

// Tiles of weights, slots as sort_slots leaves them at `order`, in shared memory. Those from first_narrow to before last_narrow
// are halves.
template <>
struct Walk<kWeights> {
  const int* end_L;
  Sizes size;
  uint32_t order;
  int first_narrow, last_narrow;

  __device__ __forceinline__ Walk(const int* end_L, const Sizes& size, uint32_t order, uint32_t narrow)
      : end_L(end_L), size(size), order(order), first_narrow(load_int(narrow)), last_narrow(load_int(narrow + 4)) {}

  __device__ __forceinline__ bool seek(int index, Tile& tile) const {
    const int down = (size.rows + kTileRows - 1) / kTileRows, across = (size.columns + kTileColumns - 1) / kTileColumns;
    const int num_tiles = down * across, num_halves = 2 * (last_narrow - first_narrow);
    const int inside = index - first_narrow;
    tile.is_narrow = inside >= 0 && inside < num_halves;
    if (inside >= 0) index = tile.is_narrow ? first_narrow + inside / 2 : index - num_halves / 2;
    const int place = index / num_tiles;
    if (place >= load_int(order)) return false;
    tile.slot = size.num_slots > kMostSorted ? place : load_int(order + 4 + 4 * place);
    tile.begin = tile.slot ? end_L[tile.slot - 1] : 0;
    tile.end = end_L[tile.slot];
    place_tile(tile, index - place * num_tiles, down, across, kTileColumns);
    if (tile.is_narrow && inside % 2) tile.column += kTileColumns / 2;
    return true;
  }

  __device__ __forceinline__ bool is_total(const Tile& tile) const { return tile.slot < size.num_totals; }

  // At least one, so that the result of an empty slot is written.
  __device__ __forceinline__ int blocks_deep(const Tile& tile) const {
    return max(1, (tile.end - tile.begin + kDepth - 1) / kDepth);
  }
};

struct Ring {
  int stage = 0, parity = 0;
  __device__ __forceinline__ void step() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

struct Shared {
  uint32_t a, b, result, sums, full, empty, done, written, told, heard, tile, narrow, order;
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
        narrow(tile + kAhead * 4),
        order(narrow + 8) {}

  // 16 bytes of a row of a half, in an order that spares the banks
  __device__ __forceinline__ uint32_t piece(int half, int row, int column16) const {
    return result + half * kHalfBytes + row * kRowBytes + ((column16 ^ (row & 7)) << 4);
  }

  // The same as the copy engine stores it, in boxes of 64 columns.
  __device__ __forceinline__ uint32_t boxed(int half, int row, int column16) const {
    return box(half, column16 / 8) + row * 128 + ((column16 % 8 ^ (row & 7)) << 4);
  }
  __device__ __forceinline__ uint32_t box(int half, int number) const {
    return result + half * kHalfBytes + number * kBoxBytes;
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

// The first tile of products of rows that comes in halves: the last round's are, where that is half empty or more, and so many
// that a few processors which others have taken cost no round more. For all threads of a block; `sum`: an int in shared memory.
__device__ __forceinline__ int find_narrow(const int* end_L, const Sizes& size, uint32_t sum) {
  if (threadIdx.x == 0) store_int(sum, 0);
  __syncthreads();
  int down = 0;
  for (int slot = size.first_slot + threadIdx.x; slot < size.num_slots; slot += kThreads) {
    down += (end_L[slot] - (slot ? end_L[slot - 1] : 0) + kTileRows - 1) / kTileRows;
  }
  if (down) add_int(sum, down);
  __syncthreads();
  const int num_tiles = load_int(sum) * ((size.columns + kTileColumns - 1) / kTileColumns), last = num_tiles % gridDim.x;
  return 2 * last <= gridDim.x ? num_tiles - max(last, min(kLeastNarrow, num_tiles)) : INT_MAX;
}

// What a tile of a slot with so many rows costs, in blocks of depth: a short one is waited for by memory.
__device__ __forceinline__ int cost_of(int num_rows) { return max(4, (num_rows + kDepth - 1) / kDepth + 1); }

// Leave at `order` how many slots are wanted, and their numbers in order of their rows, most first; more than kMostSorted stay
// as they are, all are wanted, and none come in halves. At `narrow`, first and last + 1 of the tiles that do: of a round, in
// which each block takes a tile, those that would end after all else, if whole; of the first round where these are half of
// it or less. For all threads of a block.
__device__ __forceinline__ void sort_slots(const int* end_L, const Sizes& size, const int* held, uint32_t order,
                                           uint32_t narrow, uint32_t counts) {
  const int num_slots = size.num_slots;
  if (threadIdx.x < 2) store_int(narrow + 4 * threadIdx.x, INT_MAX);
  if (num_slots > kMostSorted) {
    if (threadIdx.x == 0) store_int(order, num_slots);
    return;
  }
  int num_wanted = 0;
  for (int base = 0; base < num_slots; base += kThreads) {
    const int slot = base + threadIdx.x;
    int count = -1;
    if (slot < num_slots) {
      count = end_L[slot] - (slot ? end_L[slot - 1] : 0);
      if (!is_wanted(size, held, slot, count)) count = -1;
      store_int(counts + 4 * slot, count);
    }
    num_wanted += __syncthreads_count(count >= 0);
  }
  const int down = (size.rows + kTileRows - 1) / kTileRows, across = (size.columns + kTileColumns - 1) / kTileColumns;
  const int num_tiles = down * across, num_blocks = gridDim.x;
  int first_narrow = INT_MAX, last_narrow = INT_MAX;
  for (int slot = threadIdx.x; slot < num_slots; slot += kThreads) {
    const int mine = load_int(counts + 4 * slot);
    int place = 0, next = -1, before = 0, all = 0;
    for (int other = 0; other < num_slots; ++other) {
      const int count = load_int(counts + 4 * other), cost = count < 0 ? 0 : cost_of(count) * num_tiles;
      const bool is_before = count > mine || (count == mine && other < slot);
      place += is_before;
      before += is_before ? cost : 0;
      all += cost;
      if (!is_before && other != slot) next = max(next, count);
    }
    store_int(order + 4 + 4 * place, slot);
    // of a round that begins in this slot
    const int first = place * num_tiles, end = first + num_tiles;
    for (int begin = (first + num_blocks - 1) / num_blocks * num_blocks; mine >= 0 && begin < end; begin += num_blocks) {
      const int done = before + (begin - first) * cost_of(mine);
      const auto is_late = [&](int count) { return count >= 0 && done + num_blocks * cost_of(count) > all; };
      const int last = min(begin + num_blocks, is_late(next) ? num_wanted * num_tiles : end);
      if (is_late(mine) && 2 * (last - begin) <= num_blocks && begin < first_narrow) first_narrow = begin, last_narrow = last;
    }
  }
  if (first_narrow != INT_MAX) min_int(narrow, first_narrow);
  __syncthreads();
  if (first_narrow != INT_MAX && load_int(narrow) == first_narrow) store_int(narrow + 4, last_narrow);
  if (threadIdx.x == 0) store_int(order, num_wanted);
}

#endif

}  // namespace
}  // namespace smartmoe
