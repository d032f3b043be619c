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

// Add the writing warps' sums of a half, in the order of the warps, and store them from the first.
template <int PARTS>
__device__ __forceinline__ void store_sums(const float (&sum)[2][8], uint32_t shared, float* to, int64_t step, bool valid) {
  const int warp = (threadIdx.x / 32 - 4 * kWarpgroups), lane = threadIdx.x % 32;
  const auto place = [&](int other, int part) { return shared + (((other - 1) * PARTS + part) * 32 + lane) * 32; };
  for (int part = 0; warp && part < PARTS; ++part) {
#pragma unroll
    for (int i = 0; i < 8; i += 4) store_shared(place(warp, part) + i * 4, &sum[part][i]);
  }
  threads_sync(3, 32 * kWriters);
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
  threads_sync(3, 32 * kWriters);  // before the next sums are left there
}

// A writing warp's part of a tile in float32: the columns come in two parts.
__device__ __forceinline__ void write_total(float* total, int pitch, int num_columns, int rows_left, bool is_first,
                                            const Shared& at, int (&parity)[kWarpgroups]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 - 4 * kWarpgroups;
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    const int column = part * (kTileColumns / 2) + lane * 4;
#pragma unroll
    for (int half = 0; half < kWarpgroups; ++half) {
      const int num_rows = min(64, rows_left - half * 64);
      if (num_rows <= 0) break;
      barrier_wait(at.done + half * 8, parity[half]);
      parity[half] ^= 1;
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
      __syncwarp();
      if (lane == 0) barrier_arrive(at.written + half * 8);
    }
  }
}

// A writing warp's part of a tile of weights in bfloat16: one of them has the copy engine store a half.
__device__ __forceinline__ void write_boxes(const CUtensorMap* map, int num_columns, const Tile& tile, int num_totals,
                                            int rows_left, const Shared& at, int (&parity)[kWarpgroups]) {
  static_assert(kWarpgroups <= kWriters, "a warp for each half");
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 - 4 * kWarpgroups;
#pragma unroll
  for (int half = 0; half < kWarpgroups && half * 64 < rows_left; ++half) {
    barrier_wait(at.done + half * 8, parity[half]);
    parity[half] ^= 1;
    if (warp == half && lane == 0) {
      for (int box = 0; box < kTileColumns / kBox && box * kBox < num_columns; ++box) {
        store_box(at.box(half, box), map, tile.column + box * kBox, tile.row + half * 64, tile.slot - num_totals);
      }
      boxes_read();
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(at.written + half * 8);
  }
}

// A writing warp's part: every third row of each half of a tile, 16 bytes a thread and row. ACT kIdentity: the products, and
// the bias. kRows: the products, and the activation of them and the bias. kRowsTransposed: the products are gradients of the
// activation; written are those of its argument, and it.
template <Kind KIND, int ACT>
__device__ __forceinline__ void write(const Pointers& pointers, const CUtensorMap* map_out, Walk<KIND> walk, const Shared& at) {
  constexpr bool kGated = ACT == kSwiglu, kForward = KIND == kRows && ACT != kIdentity;
  constexpr bool kBack = KIND == kRowsTransposed && ACT != kIdentity;
  // the two halves of a gated product lie 16 pieces apart: half a warp has a row
  constexpr int kLanes = kForward && kGated ? 16 : 32, kTurns = kGated ? 4 : 8, kStep = kWriters * 32 / kLanes;
  const int lane = threadIdx.x % 32, piece = lane % kLanes;
  const int first_row = (threadIdx.x / 32 - 4 * kWarpgroups) * (32 / kLanes) + lane / kLanes;
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
  Turns turns;
  int parity[kWarpgroups] = {};
  for (int index = turns.hear(at); index >= 0; index = turns.hear(at)) {
    walk.seek(index, tile);
    const int rows_left = (KIND == kWeights ? walk.size.rows : tile.end - tile.begin) - tile.row;
    if (walk.is_total(tile)) {
      float* total = pointers.total + (int64_t(tile.slot) * walk.size.rows + tile.row) * columns + tile.column;
      write_total(total, columns, columns - tile.column, rows_left, tile.slot >= walk.size.num_added, at, parity);
      continue;
    }
    if constexpr (KIND == kWeights) {
      write_boxes(map_out, columns - tile.column, tile, walk.size.num_totals, rows_left, at, parity);
      continue;
    }
    const int column = tile.column + piece * 8;
    const bool valid = column < columns && !(tile.is_narrow && piece >= kTileColumns / 16);
    Pair bias{};
    if (KIND != kWeights && pointers.bias && valid) bias = get(pointers.bias + tile.slot * pitch + column);
#pragma unroll
    for (int half = 0; half < kWarpgroups; ++half) {
      const int num_rows = min(64, rows_left - half * 64);
      if (num_rows <= 0) break;
      const int64_t above =
          (KIND == kWeights ? int64_t(tile.slot - walk.size.num_totals) * walk.size.rows : tile.begin) + tile.row + half * 64;
      // what is kTurns rows ahead of the one that is written is under way
      Pair hidden[kTurns];
      const auto load_hidden = [&](int row, int i) {
        if (kBack && row < num_rows && valid) hidden[i] = get(pointers.hidden + (above + row) * pitch + column);
      };
#pragma unroll
      for (int i = 0; i < kTurns; ++i) load_hidden(first_row + i * kStep, i);
      float sum[2][8] = {};
      barrier_wait(at.done + half * 8, parity[half]);
      parity[half] ^= 1;
      for (int row0 = first_row; row0 < num_rows; row0 += kTurns * kStep) {
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
            load_hidden(row + kTurns * kStep, i);
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
          store_sums<kGated ? 2 : 1>(sum, at.sums, pointers.partial + number * pitch + column, columns,
                                     valid);
        }
      }
    }
  }
}

#endif

}  // namespace
}  // namespace smartmoe
