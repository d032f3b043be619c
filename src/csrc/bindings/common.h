// Checks and conversions that the bindings share.
#pragma once

#include <ATen/cuda/CUDAContext.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGuard.h>

#include "../kernels/launch.h"
#include "bindings.h"

namespace smartmoe::bindings {

inline int dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return kFloat32;
    case at::kHalf:
      return kFloat16;
    case at::kBFloat16:
      return kBFloat16;
    default:
      TORCH_CHECK(false, "smartmoe._C takes float32, float16 and bfloat16, not ", tensor.scalar_type());
  }
}

inline int activation_of(const std::string& name) {
  if (name == "gelu") return kGelu;
  if (name == "relu") return kRelu;
  if (name == "swiglu") return kSwiglu;
  if (name == "identity") return kIdentity;
  TORCH_CHECK(false, "activation = \"", name, "\" is not one of gelu, relu, swiglu, identity");
}

inline void check(const Tensor& tensor, const char* name, int64_t dims, at::ScalarType type) {
  TORCH_CHECK(tensor.is_cuda() && tensor.is_contiguous(), name, ": expected a contiguous CUDA tensor");
  TORCH_CHECK(tensor.dim() == dims, name, ": expected ", dims, " dimensions, got ", tensor.dim());
  TORCH_CHECK(tensor.scalar_type() == type, name, ": expected ", type, ", got ", tensor.scalar_type());
}

inline void check_size(const Tensor& tensor, const char* name, at::IntArrayRef sizes) {
  TORCH_CHECK(tensor.sizes() == sizes, name, ": expected shape ", sizes, ", got ", tensor.sizes());
}

inline cudaStream_t stream() { return at::cuda::getCurrentCUDAStream(); }

inline void checked(cudaError_t error, const char* what) {
  TORCH_CHECK(error == cudaSuccess, "smartmoe._C.", what, ": ", cudaGetErrorString(error));
}

// Room for a sum of each piece of the rows, and the sums of each slot's pieces in the dtype of the rows.
Tensor empty_pieces(const Tensor& rows, const Tensor& end_L);
Tensor sum_of_pieces(const Tensor& partial, const Tensor& rows, const Tensor& end_L,
                     const OptionalTensor& total_LD = std::nullopt, bool is_first = false);

}  // namespace smartmoe::bindings
