// How a tile of a grouped product leaves shared memory: with a bias, an activation or its slope applied.
#pragma once

#include <cuda.h>

#include "act.cuh"
#include "gemm_tiles.cuh"

namespace smartmoe {
namespace {

#ifdef SMARTMOE_MULTIPLIES

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

// The number of this warp among those that write a half: that do nothing else, or (OWN) of the warpgroup whose half it is.
__device__ __forceinline__ int writing_warp() { return threadIdx.x / 32 % 4; }

// Add the writing warps' sums of a half, in the order of the warps, and store them from the first.
template <int PARTS>
__device__ __forceinline__ void store_sums(const float (&sum)[2][8], uint32_t shared, float* to, int64_t step, bool valid) {
  const int warp = writing_warp(), lane = threadIdx.x % 32, barrier = 1 + threadIdx.x / 128;
  const auto place = [&](int other, int part) { return shared + (((other - 1) * PARTS + part) * 32 + lane) * 32; };
  for (int part = 0; warp && part < PARTS; ++part) {
#pragma unroll
    for (int i = 0; i < 8; i += 4) store_shared(place(warp, part) + i * 4, &sum[part][i]);
  }
  threads_sync(barrier, 32 * kWriters);
#pragma unroll
  for (int part = 0; part < PARTS && !warp && valid; ++part) {
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
  threads_sync(barrier, 32 * kWriters);  // before the next sums are left there
}

__device__ __forceinline__ void wait_half(const Shared& at, int half, int& parity) {
  barrier_wait(at.done + half * 8, parity >> half & 1);
  parity ^= 1 << half;
}

// A writing warp is done with a half.
__device__ __forceinline__ void give_back(const Shared& at, int half) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) barrier_arrive(at.written + half * 8);
}

// A writing warp's part of a tile in float32: the columns come in two parts.
__device__ __forceinline__ void write_total(float* total, int pitch, int num_columns, int rows_left, bool is_first,
                                            const Shared& at, int& parity) {
  const int lane = threadIdx.x % 32, warp = writing_warp();
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    const int column = part * (kTileColumns / 2) + lane * 4;
#pragma unroll
    for (int half = 0; half < kWarpgroups; ++half) {
      const int num_rows = min(64, rows_left - half * 64);
      if (num_rows <= 0) break;
      wait_half(at, half, parity);
#pragma unroll 8
      for (int row = warp; row < num_rows && column < num_columns; row += kWriters) {
        const uint4 four = load_shared(at.piece(half, row, lane));
        float* to = total + int64_t(half * 64 + row) * pitch + column;
        if (is_first) {
          *reinterpret_cast<uint4*>(to) = four;
        } else {
          add_global(to, four);
        }
      }
      give_back(at, half);
    }
  }
}

// A writing warp's part of a tile of weights in bfloat16: one of them has the copy engine store a half.
__device__ __forceinline__ void write_boxes(const CUtensorMap* map, int num_columns, const Tile& tile, int num_totals,
                                            int rows_left, const Shared& at, int& parity) {
  static_assert(kWarpgroups <= kWriters, "a warp for each half");
  const int lane = threadIdx.x % 32, warp = writing_warp();
#pragma unroll
  for (int half = 0; half < kWarpgroups && half * 64 < rows_left; ++half) {
    wait_half(at, half, parity);
    if (warp == half && lane == 0) {
      for (int box = 0; box < kTileColumns / kBox && box * kBox < num_columns; ++box) {
        store_box(at.box(half, box), map, tile.column + box * kBox, tile.row + half * 64, tile.slot - num_totals);
      }
      boxes_read();
    }
    give_back(at, half);
  }
}

template <bool GATED>
__device__ __forceinline__ Pair get(const __nv_bfloat16* from, int columns) {
  Pair pair{*reinterpret_cast<const uint4*>(from), {}};
  if constexpr (GATED) pair.second = *reinterpret_cast<const uint4*>(from + columns);
  return pair;
}

template <bool GATED>
__device__ __forceinline__ void put(__nv_bfloat16* to, int columns, const Pair& pair) {
  *reinterpret_cast<uint4*>(to) = pair.first;
  if constexpr (GATED) *reinterpret_cast<uint4*>(to + columns) = pair.second;
}

// A writing warp's part of a tile of gradients of an activation, every third row of it: written are those of the
// activation's argument, and the activation. A group of rows is on its way from memory while the one before is written: the
// few counters of loads make a wait for one a wait for all that are under way, so none may have begun shortly before.
template <int ACT, bool OWN>
__device__ __forceinline__ void write_slopes(const Pointers& pointers, const Tile& tile, int columns, const Shared& at,
                                             int& parity) {
  constexpr bool kGated = ACT == kSwiglu;
  // OWN: with 3 some registers would be spilled
  constexpr int kGroup = kGated ? (OWN ? 2 : 3) : 4, kStep = kGroup * kWriters;
  const int lane = threadIdx.x % 32, warp = writing_warp();
  const int first_half = OWN ? threadIdx.x / 128 : 0, end_half = OWN ? first_half + 1 : kWarpgroups;
  const int column = tile.column + lane * 8, pitch = kGated ? 2 * columns : columns;
  const bool valid = column < columns && !(tile.is_narrow && lane >= kTileColumns / 16);
  const int num_rows = min(kTileRows, tile.end - tile.begin - tile.row);
  const int64_t above = tile.begin + tile.row, first = above * pitch + column;
  Pair bias{};
  if (pointers.bias && valid) bias = get<kGated>(pointers.bias + int64_t(tile.slot) * pitch + column, columns);
  const auto load_group = [&](Pair (&to)[kGroup], int row0, int end) {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const int row = row0 + i * kWriters;
      if (row < end && valid) to[i] = get<kGated>(pointers.hidden + first + row * pitch, columns);
    }
  };
  Pair hidden[kGroup];
  load_group(hidden, first_half * 64 + warp, min(first_half * 64 + 64, num_rows));
#pragma unroll 1
  for (int half = first_half; half < end_half && half * 64 < num_rows; ++half) {
    const int end = min(half * 64 + 64, num_rows);
    float sum[2][8] = {};
    if (!OWN) wait_half(at, half, parity);
#pragma unroll 1
    for (int row0 = half * 64 + warp; row0 < end; row0 += kStep) {
      const bool is_last = row0 + kStep >= end;
      Pair next[kGroup];
      load_group(next, is_last ? half * 64 + 64 + warp : row0 + kStep, is_last ? (OWN ? 0 : num_rows) : end);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        const int row = row0 + i * kWriters;
        if (row < end && valid) {
          const uint4 product = load_shared(at.piece(half, row % 64, lane));
          const uint4 again = slopes_of<ACT>(product, hidden[i], bias, sum);
          put<kGated>(pointers.out + first + row * pitch, columns, hidden[i]);
          *reinterpret_cast<uint4*>(pointers.act + above * columns + column + row * columns) = again;
        }
        hidden[i] = next[i];
      }
    }
    if (!OWN) give_back(at, half);
    if (pointers.partial) {
      // as pieces.cuh numbers them: a half is a piece
      const int64_t number = tile.begin / kPieceRows + tile.slot + tile.row / kPieceRows + half;
      // a warpgroup has no more use for its part of a stage
      const uint32_t sums = OWN ? at.a + half * kBoxBytes : at.sums;
      store_sums<kGated ? 2 : 1>(sum, sums, pointers.partial + number * pitch + column, columns, valid);
    }
  }
}

// A writing warp's part of a tile of rows: every third row of each half, 16 bytes a thread and row. ACT kIdentity: the
// products, and the bias. kRows: the products, and the activation of them and the bias. kRowsTransposed: see write_slopes.
template <Kind KIND, int ACT, bool OWN>
__device__ __forceinline__ void write_rows(const Pointers& pointers, const Sizes& size, const Tile& tile, const Shared& at,
                                           int& parity) {
  if constexpr (KIND == kRowsTransposed && ACT != kIdentity) {
    write_slopes<ACT, OWN>(pointers, tile, size.columns, at, parity);
    return;
  }
  constexpr bool kGated = ACT == kSwiglu && KIND == kRows, kForward = KIND == kRows && ACT != kIdentity;
  // the two halves of a gated product lie 16 pieces apart: half a warp has a row
  constexpr int kLanes = kGated ? 16 : 32, kStep = kWriters * 32 / kLanes, kTurns = kGated ? 4 : 8;
  const int lane = threadIdx.x % 32, piece = lane % kLanes;
  const int first_row = writing_warp() * (32 / kLanes) + lane / kLanes;
  const int columns = size.columns, column = tile.column + piece * 8;
  const int64_t pitch = kGated ? 2 * columns : columns;  // of the products, the bias
  const bool valid = column < columns && !(tile.is_narrow && piece >= kTileColumns / 16);
  Pair bias{};
  if (pointers.bias && valid) bias = get<kGated>(pointers.bias + tile.slot * pitch + column, columns);
  const int first_half = OWN ? threadIdx.x / 128 : 0, end_half = OWN ? first_half + 1 : kWarpgroups;
#pragma unroll
  for (int half = first_half; half < end_half; ++half) {
    const int num_rows = min(64, tile.end - tile.begin - tile.row - half * 64);
    if (num_rows <= 0) break;
    const int64_t above = tile.begin + tile.row + half * 64;
    if (!OWN) wait_half(at, half, parity);
#pragma unroll kTurns
    for (int row = first_row; row < num_rows && valid; row += kStep) {
      Pair product{load_shared(at.piece(half, row, piece)), {}};
      __nv_bfloat16* out = pointers.out + (above + row) * pitch + column;
      if constexpr (kForward) {
        if constexpr (kGated) product.second = load_shared(at.piece(half, row, piece + 16));
        put<kGated>(out, columns, product);
        *reinterpret_cast<uint4*>(pointers.act + (above + row) * columns + column) = activation_of<ACT>(product, bias);
      } else {
        if (pointers.bias) product.first = add(product.first, bias.first);
        put<kGated>(out, columns, product);
      }
    }
    if (!OWN) give_back(at, half);
  }
}

// The part of a warp that does nothing but write.
template <Kind KIND, int ACT>
__device__ __forceinline__ void write(const Pointers& pointers, const CUtensorMap* map_out, Walk<KIND> walk, const Shared& at) {
  const Sizes& size = walk.size;
  Tile tile;
  Turns turns;
  int parity = 0;
  for (int index = turns.hear(at), next; index >= 0; index = next) {
    next = turns.hear(at);  // told before the last products of this one: no longer a wait
    walk.seek(index, tile);
    if constexpr (KIND == kWeights) {
      const int rows_left = size.rows - tile.row;
      const int columns_left = min(size.columns - tile.column, tile.is_narrow ? kTileColumns / 2 : kTileColumns);
      if (walk.is_total(tile)) {
        float* total = pointers.total + (int64_t(tile.slot) * size.rows + tile.row) * size.columns + tile.column;
        write_total(total, size.columns, columns_left, rows_left, tile.slot >= size.num_added, at, parity);
      } else {
        write_boxes(map_out, columns_left, tile, size.num_totals, rows_left, at, parity);
      }
    } else if (next >= 0) {  // the last tile is not theirs
      write_rows<KIND, ACT, false>(pointers, size, tile, at, parity);
    }
  }
}

#endif

}  // namespace
}  // namespace smartmoe
