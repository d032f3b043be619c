#include <ATen/ops/empty_like.h>
#include <ATen/ops/scalar_tensor.h>

#include "common.h"

namespace smartmoe::bindings {
namespace {

void check_products(const Tensor& rows, const Tensor& weight, const Tensor& end_L, int64_t depth_dim) {
  check(rows, "rows", 2, at::kBFloat16);
  check(weight, "weight", 3, at::kBFloat16);
  check(end_L, "end_L", 1, at::kInt);
  check_size(end_L, "end_L", {weight.size(0)});
  TORCH_CHECK(weight.size(depth_dim) == rows.size(1), "weight: expected ", rows.size(1), " in dimension ", depth_dim);
}

const void* data_or_null(const OptionalTensor& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }

void check_bias(const OptionalTensor& bias, int64_t num_slots, int64_t width) {
  if (!bias) return;
  check(*bias, "bias", 2, at::kBFloat16);
  check_size(*bias, "bias", {num_slots, width});
}

Tensor empty_counter(const Tensor& like) { return at::empty({1}, like.options().dtype(at::kInt)); }

}  // namespace

Tensor can_multiply(const Tensor& like) {
  const c10::cuda::CUDAGuard guard(like.device());
  return at::scalar_tensor(smartmoe::can_multiply(), at::kBool);
}

Tensor multiply_rows(const Tensor& rows_RX, const Tensor& weight_LXY, const OptionalTensor& bias_LY, const Tensor& end_L,
                     bool transposed) {
  check_products(rows_RX, weight_LXY, end_L, transposed ? 2 : 1);
  const int64_t num_slots = end_L.size(0), width = weight_LXY.size(transposed ? 1 : 2);
  check_bias(bias_LY, num_slots, width);
  const c10::cuda::CUDAGuard guard(rows_RX.device());
  Tensor out = at::empty({rows_RX.size(0), width}, rows_RX.options());
  checked(smartmoe::multiply_rows(rows_RX.const_data_ptr(), weight_LXY.const_data_ptr(), data_or_null(bias_LY),
                                  end_L.const_data_ptr<int>(), 0, num_slots, out.mutable_data_ptr(), nullptr, nullptr,
                                  nullptr, empty_counter(rows_RX).mutable_data_ptr<int>(), rows_RX.size(0), rows_RX.size(1),
                                  width, transposed, kIdentity, stream()),
          "multiply_rows");
  return out;
}

void multiply_activate_into(const Tensor& rows_RD, const Tensor& weight_LDF, const OptionalTensor& bias_LF,
                            const Tensor& end_L, const std::string& activation, int64_t first_slot, int64_t last_slot,
                            const Tensor& hidden_RF, const Tensor& act_RF) {
  check_products(rows_RD, weight_LDF, end_L, 1);
  const int kind = activation_of(activation);
  const int64_t num_slots = end_L.size(0), wide = weight_LDF.size(2), width = kind == kSwiglu ? wide / 2 : wide;
  TORCH_CHECK(width % 8 == 0, "weight_LDF: expected a multiple of 8 columns for each half, got ", width);
  check_bias(bias_LF, num_slots, wide);
  TORCH_CHECK(0 <= first_slot && first_slot <= last_slot && last_slot <= num_slots, "slots ", first_slot, " .. ",
              last_slot - 1, ": there are ", num_slots);
  for (const auto& [out, columns] : {std::pair(&hidden_RF, wide), std::pair(&act_RF, width)}) {
    check(*out, "hidden_RF and act_RF", 2, at::kBFloat16);
    check_size(*out, "hidden_RF and act_RF", {rows_RD.size(0), columns});
  }
  const c10::cuda::CUDAGuard guard(rows_RD.device());
  checked(smartmoe::multiply_rows(rows_RD.const_data_ptr(), weight_LDF.const_data_ptr(), data_or_null(bias_LF),
                                  end_L.const_data_ptr<int>(), first_slot, last_slot, hidden_RF.mutable_data_ptr(),
                                  act_RF.mutable_data_ptr(), nullptr, nullptr,
                                  empty_counter(rows_RD).mutable_data_ptr<int>(), rows_RD.size(0), rows_RD.size(1), width,
                                  false, kind, stream()),
          "multiply_activate");
}

std::tuple<Tensor, Tensor> multiply_activate(const Tensor& rows_RD, const Tensor& weight_LDF, const OptionalTensor& bias_LF,
                                             const Tensor& end_L, const std::string& activation) {
  check_products(rows_RD, weight_LDF, end_L, 1);
  const int64_t wide = weight_LDF.size(2), width = activation_of(activation) == kSwiglu ? wide / 2 : wide;
  Tensor hidden = at::empty({rows_RD.size(0), wide}, rows_RD.options());
  Tensor act = at::empty({rows_RD.size(0), width}, rows_RD.options());
  multiply_activate_into(rows_RD, weight_LDF, bias_LF, end_L, activation, 0, end_L.size(0), hidden, act);
  return {hidden, act};
}

std::tuple<Tensor, Tensor, Tensor> multiply_slope(const Tensor& grad_RD, const Tensor& weight_LFD,
                                                  const OptionalTensor& bias_LF, const Tensor& end_L, const Tensor& hidden_RF,
                                                  const std::string& activation, bool reuse, const OptionalTensor& total_LF,
                                                  bool is_first) {
  check_products(grad_RD, weight_LFD, end_L, 2);
  const int kind = activation_of(activation);
  const int64_t num_slots = end_L.size(0), num_rows = grad_RD.size(0), width = weight_LFD.size(1);
  const int64_t wide = kind == kSwiglu ? 2 * width : width;
  check(hidden_RF, "hidden_RF", 2, at::kBFloat16);
  check_size(hidden_RF, "hidden_RF", {num_rows, wide});
  check_bias(bias_LF, num_slots, wide);
  const c10::cuda::CUDAGuard guard(grad_RD.device());
  Tensor grad_hidden = reuse ? hidden_RF : at::empty_like(hidden_RF);
  Tensor act = at::empty({num_rows, width}, hidden_RF.options());
  Tensor partial = bias_LF ? empty_pieces(hidden_RF, end_L) : at::empty({0}, hidden_RF.options().dtype(at::kFloat));
  checked(smartmoe::multiply_rows(grad_RD.const_data_ptr(), weight_LFD.const_data_ptr(), data_or_null(bias_LF),
                                  end_L.const_data_ptr<int>(), 0, num_slots, grad_hidden.mutable_data_ptr(),
                                  act.mutable_data_ptr(), hidden_RF.const_data_ptr(),
                                  bias_LF ? partial.mutable_data_ptr<float>() : nullptr,
                                  empty_counter(grad_RD).mutable_data_ptr<int>(), num_rows, grad_RD.size(1), width,
                                  true, kind, stream()),
          "multiply_slope");
  return {grad_hidden, act, bias_LF ? sum_of_pieces(partial, hidden_RF, end_L, total_LF, is_first)
                                    : at::empty({0}, hidden_RF.options())};
}

Tensor multiply_slots(const Tensor& rows_RX, const Tensor& grad_RY, const Tensor& end_L, const OptionalTensor& total_LXY,
                      bool is_first, const OptionalTensor& held_G) {
  check(rows_RX, "rows_RX", 2, at::kBFloat16);
  check(grad_RY, "grad_RY", 2, at::kBFloat16);
  check(end_L, "end_L", 1, at::kInt);
  TORCH_CHECK(rows_RX.size(0) == grad_RY.size(0) && rows_RX.size(0) > 0, "rows_RX and grad_RY: expected as many rows");
  const int64_t num_slots = end_L.size(0), num_totals = total_LXY ? total_LXY->size(0) : 0;
  if (total_LXY) {
    check(*total_LXY, "total_LXY", 3, at::kFloat);
    TORCH_CHECK(num_totals <= num_slots, "total_LXY: expected at most ", num_slots, " slots, got ", num_totals);
    check_size(*total_LXY, "total_LXY", {num_totals, rows_RX.size(1), grad_RY.size(1)});
    TORCH_CHECK(reinterpret_cast<uintptr_t>(total_LXY->const_data_ptr()) % 16 == 0, "total_LXY: expected 16-byte alignment");
  }
  if (held_G) {
    check(*held_G, "held_G", 1, at::kInt);
    TORCH_CHECK(held_G->size(0) <= num_slots, "held_G: expected at most ", num_slots, " slots, got ", held_G->size(0));
  }
  const c10::cuda::CUDAGuard guard(rows_RX.device());
  Tensor out = at::empty({num_slots - num_totals, rows_RX.size(1), grad_RY.size(1)}, rows_RX.options());
  checked(smartmoe::multiply_slots(rows_RX.const_data_ptr(), grad_RY.const_data_ptr(), end_L.const_data_ptr<int>(),
                                   num_slots, out.mutable_data_ptr(),
                                   total_LXY ? total_LXY->mutable_data_ptr<float>() : nullptr, num_totals, is_first,
                                   held_G ? held_G->const_data_ptr<int>() : nullptr, held_G ? held_G->size(0) : 0,
                                   empty_counter(rows_RX).mutable_data_ptr<int>(), rows_RX.size(0), rows_RX.size(1),
                                   grad_RY.size(1), stream()),
          "multiply_slots");
  return out;
}

}  // namespace smartmoe::bindings
