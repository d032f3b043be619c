#include "common.h"

namespace smartmoe::bindings {
namespace {

int64_t width_of(const Tensor& hidden_RF, int activation) {
  return activation == kSwiglu ? hidden_RF.size(1) / 2 : hidden_RF.size(1);
}

const void* data_or_null(const OptionalTensor& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }

void check_slots(const Tensor& rows, const OptionalTensor& bias, const Tensor& end_L) {
  check(rows, "rows", 2, rows.scalar_type());
  check(end_L, "end_L", 1, at::kInt);
  if (bias) {
    check(*bias, "bias", 2, rows.scalar_type());
    check_size(*bias, "bias", {end_L.size(0), rows.size(1)});
  }
}

}  // namespace

Tensor empty_pieces(const Tensor& rows, const Tensor& end_L) {
  return at::empty({smartmoe::num_pieces(rows.size(0), end_L.size(0)), rows.size(1)}, rows.options().dtype(at::kFloat));
}

Tensor sum_of_pieces(const Tensor& partial, const Tensor& rows, const Tensor& end_L, const OptionalTensor& total_LD,
                     bool is_first) {
  const int64_t num_slots = end_L.size(0), num_totals = total_LD ? total_LD->size(0) : 0;
  if (total_LD) {
    check(*total_LD, "total_LD", 2, at::kFloat);
    TORCH_CHECK(num_totals <= num_slots, "total_LD: expected at most ", num_slots, " slots, got ", num_totals);
    check_size(*total_LD, "total_LD", {num_totals, rows.size(1)});
  }
  Tensor sum = at::empty({num_slots - num_totals, rows.size(1)}, rows.options());
  checked(smartmoe::sum_slots(partial.const_data_ptr<float>(), end_L.const_data_ptr<int>(), num_slots, sum.mutable_data_ptr(),
                              total_LD ? total_LD->mutable_data_ptr<float>() : nullptr, num_totals, is_first, rows.size(0),
                              rows.size(1), dtype_of(rows), stream()),
          "sum_slots");
  return sum;
}

Tensor activate(const Tensor& hidden_RF, const OptionalTensor& bias_LF, const Tensor& end_L, const std::string& activation) {
  check_slots(hidden_RF, bias_LF, end_L);
  const c10::cuda::CUDAGuard guard(hidden_RF.device());
  const int kind = activation_of(activation);
  Tensor out_RF = at::empty({hidden_RF.size(0), width_of(hidden_RF, kind)}, hidden_RF.options());
  checked(smartmoe::activate(hidden_RF.const_data_ptr(), data_or_null(bias_LF), end_L.const_data_ptr<int>(), end_L.size(0),
                             out_RF.mutable_data_ptr(), out_RF.size(0), out_RF.size(1), kind, dtype_of(hidden_RF), stream()),
          "activate");
  return out_RF;
}

std::tuple<Tensor, Tensor, Tensor> activate_backward(const Tensor& hidden_RF, const OptionalTensor& bias_LF,
                                                     const Tensor& grad_out_RF, const Tensor& end_L,
                                                     const std::string& activation, bool reuse) {
  check_slots(hidden_RF, bias_LF, end_L);
  check(grad_out_RF, "grad_out_RF", 2, hidden_RF.scalar_type());
  const c10::cuda::CUDAGuard guard(hidden_RF.device());
  const int kind = activation_of(activation);
  check_size(grad_out_RF, "grad_out_RF", {hidden_RF.size(0), width_of(hidden_RF, kind)});
  TORCH_CHECK(!reuse || kind != kSwiglu, "reuse: the activation is narrower than hidden for swiglu");
  Tensor out_RF = reuse ? hidden_RF : at::empty(grad_out_RF.sizes(), hidden_RF.options());
  Tensor grad_hidden_RF = kind == kSwiglu ? at::empty(hidden_RF.sizes(), hidden_RF.options()) : grad_out_RF;
  Tensor partial = bias_LF ? empty_pieces(hidden_RF, end_L) : at::empty({0}, hidden_RF.options().dtype(at::kFloat));
  checked(smartmoe::activate_backward(hidden_RF.const_data_ptr(), data_or_null(bias_LF), grad_out_RF.const_data_ptr(),
                                      end_L.const_data_ptr<int>(), end_L.size(0), grad_hidden_RF.mutable_data_ptr(),
                                      out_RF.mutable_data_ptr(), bias_LF ? partial.mutable_data_ptr<float>() : nullptr,
                                      out_RF.size(0), out_RF.size(1), kind, dtype_of(hidden_RF), stream()),
          "activate_backward");
  return {grad_hidden_RF, out_RF, bias_LF ? sum_of_pieces(partial, hidden_RF, end_L) : at::empty({0}, hidden_RF.options())};
}

void add_bias_(const Tensor& rows_RD, const Tensor& bias_LD, const Tensor& end_L) {
  check_slots(rows_RD, bias_LD, end_L);
  const c10::cuda::CUDAGuard guard(rows_RD.device());
  checked(smartmoe::activate(rows_RD.const_data_ptr(), bias_LD.const_data_ptr(), end_L.const_data_ptr<int>(), end_L.size(0),
                             rows_RD.mutable_data_ptr(), rows_RD.size(0), rows_RD.size(1), kIdentity, dtype_of(rows_RD),
                             stream()),
          "add_bias_");
}

Tensor sum_slots(const Tensor& rows_RD, const Tensor& end_L, const OptionalTensor& total_LD, bool is_first) {
  check_slots(rows_RD, std::nullopt, end_L);
  const c10::cuda::CUDAGuard guard(rows_RD.device());
  Tensor partial = empty_pieces(rows_RD, end_L);
  checked(smartmoe::sum_pieces(rows_RD.const_data_ptr(), end_L.const_data_ptr<int>(), end_L.size(0),
                               partial.mutable_data_ptr<float>(), rows_RD.size(0), rows_RD.size(1), dtype_of(rows_RD),
                               stream()),
          "sum_slots");
  return sum_of_pieces(partial, rows_RD, end_L, total_LD, is_first);
}

}  // namespace smartmoe::bindings
