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

void run_rows(const Tensor& rows, const Tensor& weight, const Tensor& end_L, const Tensor& out, const Tensor* act,
              const Tensor* hidden, bool transposed, const std::string& activation) {
  checked(smartmoe::multiply_rows(rows.const_data_ptr(), weight.const_data_ptr(), end_L.const_data_ptr<int>(), end_L.size(0),
                                  out.mutable_data_ptr(), act ? act->mutable_data_ptr() : nullptr,
                                  hidden ? hidden->const_data_ptr() : nullptr, rows.size(0), rows.size(1), out.size(1),
                                  transposed, activation_of(activation), stream()),
          "multiply_rows");
}

}  // namespace

Tensor can_multiply(const Tensor& like) {
  const c10::cuda::CUDAGuard guard(like.device());
  return at::scalar_tensor(smartmoe::can_multiply(), at::kBool);
}

Tensor multiply_rows(const Tensor& rows_RX, const Tensor& weight_LXY, const Tensor& end_L, bool transposed) {
  check_products(rows_RX, weight_LXY, end_L, transposed ? 2 : 1);
  const c10::cuda::CUDAGuard guard(rows_RX.device());
  Tensor out = at::empty({rows_RX.size(0), weight_LXY.size(transposed ? 1 : 2)}, rows_RX.options());
  run_rows(rows_RX, weight_LXY, end_L, out, nullptr, nullptr, transposed, "identity");
  return out;
}

std::tuple<Tensor, Tensor> multiply_activate(const Tensor& rows_RD, const Tensor& weight_LDF, const Tensor& end_L,
                                             const std::string& activation) {
  check_products(rows_RD, weight_LDF, end_L, 1);
  const c10::cuda::CUDAGuard guard(rows_RD.device());
  Tensor hidden = at::empty({rows_RD.size(0), weight_LDF.size(2)}, rows_RD.options()), act = at::empty_like(hidden);
  run_rows(rows_RD, weight_LDF, end_L, hidden, &act, nullptr, false, activation);
  return {hidden, act};
}

std::tuple<Tensor, Tensor> multiply_slope(const Tensor& grad_RD, const Tensor& weight_LFD, const Tensor& end_L,
                                          const Tensor& hidden_RF, const std::string& activation, bool reuse) {
  check_products(grad_RD, weight_LFD, end_L, 2);
  check(hidden_RF, "hidden_RF", 2, at::kBFloat16);
  check_size(hidden_RF, "hidden_RF", {grad_RD.size(0), weight_LFD.size(1)});
  const c10::cuda::CUDAGuard guard(grad_RD.device());
  Tensor grad_hidden = reuse ? hidden_RF : at::empty_like(hidden_RF), act = at::empty_like(hidden_RF);
  run_rows(grad_RD, weight_LFD, end_L, grad_hidden, &act, &hidden_RF, true, activation);
  return {grad_hidden, act};
}

Tensor multiply_slots(const Tensor& rows_RX, const Tensor& grad_RY, const Tensor& end_L) {
  check(rows_RX, "rows_RX", 2, at::kBFloat16);
  check(grad_RY, "grad_RY", 2, at::kBFloat16);
  check(end_L, "end_L", 1, at::kInt);
  TORCH_CHECK(rows_RX.size(0) == grad_RY.size(0) && rows_RX.size(0) > 0, "rows_RX and grad_RY: expected as many rows");
  const c10::cuda::CUDAGuard guard(rows_RX.device());
  Tensor out = at::empty({end_L.size(0), rows_RX.size(1), grad_RY.size(1)}, rows_RX.options());
  checked(smartmoe::multiply_slots(rows_RX.const_data_ptr(), grad_RY.const_data_ptr(), end_L.const_data_ptr<int>(),
                                   end_L.size(0), out.mutable_data_ptr(), rows_RX.size(0), rows_RX.size(1), grad_RY.size(1),
                                   stream()),
          "multiply_slots");
  return out;
}

}  // namespace smartmoe::bindings
