// What a memset of a few bytes does, as a kernel.
#include "launch.h"

namespace smartmoe {
namespace {

__global__ void fill_kernel(char* to, unsigned value, unsigned element_size, unsigned num_elements) {
  for (unsigned i = threadIdx.x; i < num_elements; i += blockDim.x) {
    if (element_size == 4) {
      reinterpret_cast<unsigned*>(to)[i] = value;
    } else if (element_size == 2) {
      reinterpret_cast<unsigned short*>(to)[i] = static_cast<unsigned short>(value);
    } else {
      to[i] = static_cast<char>(value);
    }
  }
}

}  // namespace

void* fill_function() { return reinterpret_cast<void*>(fill_kernel); }

}  // namespace smartmoe
