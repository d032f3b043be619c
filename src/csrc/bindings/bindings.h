// Tensors in and out: every function checks its arguments, allocates its results and launches on the current stream.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>

namespace smartmoe::bindings {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

Tensor slots_of(const Tensor& expert_idx_TK, const Tensor& table_EB, const OptionalTensor& token_id_T);
Tensor count_slots(const Tensor& slot_TK, int64_t num_slots);
Tensor ends_of(const Tensor& count_S);
std::tuple<Tensor, Tensor, Tensor> plan_rows(const Tensor& slot_TK, int64_t num_slots, int64_t capacity, int64_t num_rows,
                                             bool early);

Tensor permute(const Tensor& x_TD, const Tensor& copy_of_row_R, const Tensor& row_of_copy_TK, bool padded);
Tensor gather_sum(const Tensor& rows_RD, const Tensor& row_of_copy_TK, const OptionalTensor& weight_TK);
std::tuple<Tensor, Tensor> combine_backward(const Tensor& grad_TD, const Tensor& rows_RD, const Tensor& weight_TK,
                                            const Tensor& copy_of_row_R, const Tensor& row_of_copy_TK, bool padded,
                                            bool need_weight);

Tensor activate(const Tensor& hidden_RF, const OptionalTensor& bias_LF, const Tensor& end_L, const std::string& activation);
// Returns grad_hidden (in the memory of grad_out but for swiglu), out (in that of hidden with `reuse`, not for swiglu) and
// the gradient of the bias (empty without one).
std::tuple<Tensor, Tensor, Tensor> activate_backward(const Tensor& hidden_RF, const OptionalTensor& bias_LF,
                                                     const Tensor& grad_out_RF, const Tensor& end_L,
                                                     const std::string& activation, bool reuse);
void add_bias_(const Tensor& rows_RD, const Tensor& bias_LD, const Tensor& end_L);
// The sums of the first slots go into total (float32, may be absent), written if is_first, else added; returns the others'.
Tensor sum_slots(const Tensor& rows_RD, const Tensor& end_L, const OptionalTensor& total_LD, bool is_first);

// Products on compute capability 9.0, bfloat16. can_multiply: a bool for the device of `like`, said by the host.
Tensor can_multiply(const Tensor& like);
// The bias is added to the product; it may be absent.
Tensor multiply_rows(const Tensor& rows_RX, const Tensor& weight_LXY, const OptionalTensor& bias_LY, const Tensor& end_L,
                     bool transposed);
// Returns hidden = rows weight and the activation of hidden + bias.
std::tuple<Tensor, Tensor> multiply_activate(const Tensor& rows_RD, const Tensor& weight_LDF, const OptionalTensor& bias_LF,
                                             const Tensor& end_L, const std::string& activation);
// Returns the gradient of hidden (in its memory with `reuse`) from that of the rows behind the second matrix, the activation
// of hidden + bias, and the gradient of the bias (empty without one), but what goes into total, as in sum_slots.
std::tuple<Tensor, Tensor, Tensor> multiply_slope(const Tensor& grad_RD, const Tensor& weight_LFD,
                                                  const OptionalTensor& bias_LF, const Tensor& end_L, const Tensor& hidden_RF,
                                                  const std::string& activation, bool reuse, const OptionalTensor& total_LF,
                                                  bool is_first);
// The same for slots first_slot .. last_slot - 1 alone, into given tensors of all rows.
void multiply_activate_into(const Tensor& rows_RD, const Tensor& weight_LDF, const OptionalTensor& bias_LF,
                            const Tensor& end_L, const std::string& activation, int64_t first_slot, int64_t last_slot,
                            const Tensor& hidden_RF, const Tensor& act_RF);
// The sums of the first slots go into total (float32, may be absent), written if is_first, else added; returns the others'.
// held: [G] int32, of the last slots those that are in use are not negative; the others' results are not written.
Tensor multiply_slots(const Tensor& rows_RX, const Tensor& grad_RY, const Tensor& end_L, const OptionalTensor& total_LXY,
                      bool is_first, const OptionalTensor& held_G);

// Fills of few bytes in a cudaGraph_t that is not instantiated become kernels, of which the device does more than twice as
// many in a time.
void replace_memsets(int64_t graph_address);

}  // namespace smartmoe::bindings
