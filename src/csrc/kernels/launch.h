// Host entry points of the kernels: raw pointers, sizes and a stream in, an error code out.
//
// Shape letters are those of smartmoe.ops: T tokens, K experts per token, N = T * K copies, R rows, D model width, F ffn
// width, S slots of all ranks, L slots of this rank. `dtype` is one of DType. Every size may be 0. Nothing here waits
// for the device, allocates, or reads device memory on the host.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace smartmoe {

enum DType { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };
enum Activation { kGelu = 0, kRelu = 1, kSwiglu = 2, kIdentity = 3 };

// Slots that plan_rows can hold in shared memory.
constexpr int kMaxSlots = 3008;  // four tables of them are 47 KB; the rest of 48 is of fixed size
// Rows of one slot that bias gradients are summed over first.
constexpr int kPieceRows = 64;

// count_S [S] int64 += copies of each slot; slot_N [N] int64, anything outside [0, S) counts nowhere.
cudaError_t count_slots(const int64_t* slot_N, int64_t num_copies, int num_slots, int64_t* count_S, cudaStream_t stream);

// end_S [S] int32: running sums of count_S [S] int64.
cudaError_t ends_of(const int64_t* count_S, int num_slots, int* end_S, cudaStream_t stream);

// slot_N [N] int64 = table_EB[expert, bucket of (token id, k)], -1 where expert_N is negative. The bucket is SplitMix64's
// finaliser of token_id_T[t] + (k + 1) * golden ratio, modulo num_buckets (a power of two); with 1, no id is read.
cudaError_t slots_of(const int64_t* expert_N, const int64_t* table_EB, const int64_t* token_id_T, int64_t num_copies,
                     int top_k, int num_buckets, int64_t* slot_N, cudaStream_t stream);

// Blocks that plan_rows uses; its workspace is plan_blocks * S int32.
int plan_blocks(int64_t num_copies, int num_slots);

// Stable counting sort of the copies by slot: copy_of_row_R [R] int64 (-1 in a row without a copy), row_of_copy_N [N]
// int64 (R or more for a copy without a row), count_S [S] int64. capacity 0: rows lie close, slot after slot; else slot s
// has the rows from s * capacity on, and R = S * capacity. Two launches; early (from compute capability 9.0 on): each may
// begin while the kernel before it runs, waits for it before it touches anything, and lets the next begin at once.
cudaError_t plan_rows(const int64_t* slot_N, int64_t num_copies, int num_slots, int64_t capacity, int64_t num_rows,
                      int* workspace, int64_t* count_S, int64_t* copy_of_row_R, int64_t* row_of_copy_N, bool early,
                      cudaStream_t stream);

// rows[row_of_copy[t, k]] = x[t], each token read once; rows without a copy are not touched.
cudaError_t permute(const void* x_TD, const int64_t* row_of_copy_TK, void* rows_RD, int64_t num_tokens, int top_k,
                    int64_t num_rows, int width, int dtype, cudaStream_t stream);

// rows[r] = 0 where copy_of_row[r] < 0.
cudaError_t clear_filling(const int64_t* copy_of_row_R, void* rows_RD, int64_t num_rows, int width, int dtype,
                          cudaStream_t stream);

// out[t] = sum over k, ascending, of weight[t, k] * rows[row_of_copy[t, k]] in float32; weight null = all 1. A copy without
// a row adds nothing.
cudaError_t gather_sum(const void* rows_RD, const int64_t* row_of_copy_TK, const float* weight_TK, void* out_TD,
                       int64_t num_tokens, int top_k, int64_t num_rows, int width, int dtype, cudaStream_t stream);

// grad_rows[row(t, k)] = weight[t, k] * grad[t]; grad_weight[t, k] = rows[row(t, k)] . grad[t], 0 without a row. With
// grad_weight null the rows are not read.
cudaError_t combine_backward(const void* grad_TD, const void* rows_RD, const float* weight_TK,
                             const int64_t* row_of_copy_TK, void* grad_rows_RD, float* grad_weight_TK, int64_t num_tokens,
                             int top_k, int64_t num_rows, int width, int dtype, cudaStream_t stream);

// Pieces of at most kPieceRows rows, none across slots, that cover any counts of num_slots slots with that many rows.
int64_t num_pieces(int64_t num_rows, int num_slots);

// out[r] = activation(hidden[r] + bias[slot of r]) for the rows before end_L[L - 1]; end_L [L] int32 running sums of the
// counts. width: of out; hidden and bias are twice as wide for swiglu. bias may be null. identity: out may be hidden.
cudaError_t activate(const void* hidden_RF, const void* bias_LF, const int* end_L, int num_slots, void* out_RF,
                     int64_t num_rows, int width, int activation, int dtype, cudaStream_t stream);

// From the gradient of out: grad_hidden (may be grad_out itself but for swiglu), out once more (may be hidden itself but for
// swiglu), and partial sums of grad_hidden over each piece, [pieces, width of hidden] float32 (null = not wanted).
cudaError_t activate_backward(const void* hidden_RF, const void* bias_LF, const void* grad_out_RF, const int* end_L,
                              int num_slots, void* grad_hidden_RF, void* out_RF, float* partial_PF, int64_t num_rows,
                              int width, int activation, int dtype, cudaStream_t stream);

// Partial sums of the rows of each piece, [pieces, width] float32.
cudaError_t sum_pieces(const void* rows_RD, const int* end_L, int num_slots, float* partial_PD, int64_t num_rows, int width,
                       int dtype, cudaStream_t stream);

// The sum of slot l's pieces in a fixed order, 0 for an empty slot, [width]. Of the first num_totals slots it becomes total[l]
// (float32) or, unless is_first, is added to it; of the others sum[l - num_totals], of dtype.
cudaError_t sum_slots(const float* partial_PD, const int* end_L, int num_slots, void* sum_LD, float* total_LD, int num_totals,
                      bool is_first, int64_t num_rows, int width, int dtype, cudaStream_t stream);

// Whether the products below run on the current device: compute capability 9.0, and compiled for sm_90a.
bool can_multiply();

// out[r] = rows[r] times the matrix of r's slot, for the rows before end_L[L - 1]; all bfloat16 and 16-byte aligned, depth
// and columns multiples of 8. weight: [L, depth, width], or [L, width, depth] when transposed; bias [L, width], or null.
// identity: out is the product plus the bias; width = columns. Not transposed with an activation: out is the product, act
// [R, columns] the activation of out + bias; width is twice columns for swiglu. Transposed with an activation: the products
// [R, columns] are gradients of activation(hidden + bias); out becomes that of hidden (and may be hidden itself), act the
// activation, partial (null = not wanted) the sums of out over each piece, [pieces, width of hidden] float32.
// counter: one int32 of workspace. Rows of slots before first_slot are left alone.
cudaError_t multiply_rows(const void* rows_RX, const void* weight_LXY, const void* bias_LY, const int* end_L, int first_slot,
                          int num_slots, void* out_RY, void* act_RY, const void* hidden_RY, float* partial_PY, int* counter,
                          int64_t num_rows, int depth, int columns, bool transposed, int activation, cudaStream_t stream);

// The sum over slot l's rows r of rows[r]^T grad[r], 0 for an empty slot, [rows, columns]; as above. Of the first num_totals
// slots it becomes total[l] (float32, 16-byte aligned) or, unless is_first, is added to it; of the others out[l - num_totals].
// held_G: where it is negative, the slot, one of the last num_held, is empty and nothing is written for it (zeros where
// there are more than 1,024 slots); null for 0.
cudaError_t multiply_slots(const void* rows_RX, const void* grad_RY, const int* end_L, int num_slots, void* out_LXY,
                           float* total_LXY, int num_totals, bool is_first, const int* held_G, int num_held, int* counter,
                           int64_t num_rows, int rows, int columns, cudaStream_t stream);

// The kernel (char* to, unsigned value, unsigned element_size, unsigned num_elements) that writes num_elements times the lowest
// element_size (1, 2, 4) bytes of value, by one block: for a node of a graph.
void* fill_function();

}  // namespace smartmoe
