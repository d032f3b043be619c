#include "common.h"

namespace smartmoe::bindings {

Tensor slots_of(const Tensor& expert_idx_TK, const Tensor& table_EB, const OptionalTensor& token_id_T) {
  check(expert_idx_TK, "expert_idx_TK", 2, at::kLong);
  check(table_EB, "table_EB", 2, at::kLong);
  const int64_t num_buckets = table_EB.size(1);
  if (num_buckets > 1) {
    TORCH_CHECK((num_buckets & (num_buckets - 1)) == 0, "table_EB: expected a power of two of buckets, got ", num_buckets);
    TORCH_CHECK(token_id_T.has_value(), "token_id_T: needed to choose among ", num_buckets, " buckets");
    check(*token_id_T, "token_id_T", 1, at::kLong);
    check_size(*token_id_T, "token_id_T", {expert_idx_TK.size(0)});
  }
  const c10::cuda::CUDAGuard guard(expert_idx_TK.device());
  Tensor slot_TK = at::empty(expert_idx_TK.sizes(), expert_idx_TK.options());
  checked(smartmoe::slots_of(expert_idx_TK.const_data_ptr<int64_t>(), table_EB.const_data_ptr<int64_t>(),
                             num_buckets > 1 ? token_id_T->const_data_ptr<int64_t>() : nullptr, expert_idx_TK.numel(),
                             expert_idx_TK.size(1), num_buckets, slot_TK.mutable_data_ptr<int64_t>(), stream()),
          "slots_of");
  return slot_TK;
}

Tensor count_slots(const Tensor& slot_TK, int64_t num_slots) {
  TORCH_CHECK(slot_TK.is_cuda() && slot_TK.is_contiguous() && slot_TK.scalar_type() == at::kLong,
              "slot_TK: expected a contiguous int64 CUDA tensor");
  const c10::cuda::CUDAGuard guard(slot_TK.device());
  Tensor count_S = at::zeros({num_slots}, slot_TK.options());
  checked(smartmoe::count_slots(slot_TK.const_data_ptr<int64_t>(), slot_TK.numel(), num_slots,
                                count_S.mutable_data_ptr<int64_t>(), stream()),
          "count_slots");
  return count_S;
}

Tensor ends_of(const Tensor& count_S) {
  check(count_S, "count_S", 1, at::kLong);
  const c10::cuda::CUDAGuard guard(count_S.device());
  Tensor end_S = at::empty(count_S.sizes(), count_S.options().dtype(at::kInt));
  checked(smartmoe::ends_of(count_S.const_data_ptr<int64_t>(), static_cast<int>(count_S.numel()),
                            end_S.mutable_data_ptr<int>(), stream()),
          "ends_of");
  return end_S;
}

std::tuple<Tensor, Tensor, Tensor> plan_rows(const Tensor& slot_TK, int64_t num_slots, int64_t capacity, int64_t num_rows,
                                             bool early) {
  check(slot_TK, "slot_TK", 2, at::kLong);
  TORCH_CHECK(capacity == 0 || num_rows == num_slots * capacity, "num_rows: expected num_slots * capacity");
  const c10::cuda::CUDAGuard guard(slot_TK.device());
  Tensor count_S = at::empty({num_slots}, slot_TK.options()), copy_of_row_R = at::empty({num_rows}, slot_TK.options());
  Tensor row_of_copy_TK = at::empty(slot_TK.sizes(), slot_TK.options());
  Tensor workspace =
      at::empty({smartmoe::plan_blocks(slot_TK.numel(), num_slots) * num_slots}, slot_TK.options().dtype(at::kInt));
  checked(smartmoe::plan_rows(slot_TK.const_data_ptr<int64_t>(), slot_TK.numel(), num_slots, capacity, num_rows,
                              workspace.mutable_data_ptr<int>(), count_S.mutable_data_ptr<int64_t>(),
                              copy_of_row_R.mutable_data_ptr<int64_t>(), row_of_copy_TK.mutable_data_ptr<int64_t>(), early,
                              stream()),
          "plan_rows");
  return {count_S, copy_of_row_R, row_of_copy_TK};
}

}  // namespace smartmoe::bindings
