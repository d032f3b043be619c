#include "common.h"

namespace smartmoe::bindings {
namespace {

void clear_filling(const Tensor& copy_of_row_R, const Tensor& rows_RD) {
  checked(smartmoe::clear_filling(copy_of_row_R.const_data_ptr<int64_t>(), rows_RD.mutable_data_ptr(), rows_RD.size(0),
                                  rows_RD.size(1), dtype_of(rows_RD), stream()),
          "clear_filling");
}

}  // namespace

Tensor permute(const Tensor& x_TD, const Tensor& copy_of_row_R, const Tensor& row_of_copy_TK, bool padded) {
  check(x_TD, "x_TD", 2, x_TD.scalar_type());
  check(copy_of_row_R, "copy_of_row_R", 1, at::kLong);
  check(row_of_copy_TK, "row_of_copy_TK", 2, at::kLong);
  check_size(row_of_copy_TK, "row_of_copy_TK", {x_TD.size(0), row_of_copy_TK.size(1)});
  const c10::cuda::CUDAGuard guard(x_TD.device());
  Tensor rows_RD = at::empty({copy_of_row_R.size(0), x_TD.size(1)}, x_TD.options());
  if (padded) clear_filling(copy_of_row_R, rows_RD);
  checked(smartmoe::permute(x_TD.const_data_ptr(), row_of_copy_TK.const_data_ptr<int64_t>(), rows_RD.mutable_data_ptr(),
                            x_TD.size(0), row_of_copy_TK.size(1), rows_RD.size(0), x_TD.size(1), dtype_of(x_TD), stream()),
          "permute");
  return rows_RD;
}

Tensor gather_sum(const Tensor& rows_RD, const Tensor& row_of_copy_TK, const OptionalTensor& weight_TK) {
  check(rows_RD, "rows_RD", 2, rows_RD.scalar_type());
  check(row_of_copy_TK, "row_of_copy_TK", 2, at::kLong);
  if (weight_TK) {
    check(*weight_TK, "weight_TK", 2, at::kFloat);
    check_size(*weight_TK, "weight_TK", row_of_copy_TK.sizes());
  }
  const c10::cuda::CUDAGuard guard(rows_RD.device());
  Tensor out_TD = at::empty({row_of_copy_TK.size(0), rows_RD.size(1)}, rows_RD.options());
  checked(smartmoe::gather_sum(rows_RD.const_data_ptr(), row_of_copy_TK.const_data_ptr<int64_t>(),
                               weight_TK ? weight_TK->const_data_ptr<float>() : nullptr, out_TD.mutable_data_ptr(),
                               out_TD.size(0), row_of_copy_TK.size(1), rows_RD.size(0), rows_RD.size(1), dtype_of(rows_RD),
                               stream()),
          "gather_sum");
  return out_TD;
}

std::tuple<Tensor, Tensor> combine_backward(const Tensor& grad_TD, const Tensor& rows_RD, const Tensor& weight_TK,
                                            const Tensor& copy_of_row_R, const Tensor& row_of_copy_TK, bool padded,
                                            bool need_weight) {
  check(rows_RD, "rows_RD", 2, rows_RD.scalar_type());
  check(grad_TD, "grad_TD", 2, rows_RD.scalar_type());
  check(weight_TK, "weight_TK", 2, at::kFloat);
  check(copy_of_row_R, "copy_of_row_R", 1, at::kLong);
  check(row_of_copy_TK, "row_of_copy_TK", 2, at::kLong);
  check_size(weight_TK, "weight_TK", row_of_copy_TK.sizes());
  check_size(grad_TD, "grad_TD", {row_of_copy_TK.size(0), rows_RD.size(1)});
  const c10::cuda::CUDAGuard guard(rows_RD.device());
  Tensor grad_rows_RD = at::empty(rows_RD.sizes(), rows_RD.options());
  Tensor grad_weight_TK =
      need_weight ? at::empty(weight_TK.sizes(), weight_TK.options()) : at::empty({0}, weight_TK.options());
  if (padded) clear_filling(copy_of_row_R, grad_rows_RD);
  checked(smartmoe::combine_backward(grad_TD.const_data_ptr(), rows_RD.const_data_ptr(), weight_TK.const_data_ptr<float>(),
                                     row_of_copy_TK.const_data_ptr<int64_t>(), grad_rows_RD.mutable_data_ptr(),
                                     need_weight ? grad_weight_TK.mutable_data_ptr<float>() : nullptr, grad_TD.size(0),
                                     weight_TK.size(1), rows_RD.size(0), rows_RD.size(1), dtype_of(rows_RD), stream()),
          "combine_backward");
  return {grad_rows_RD, grad_weight_TK};
}

}  // namespace smartmoe::bindings
