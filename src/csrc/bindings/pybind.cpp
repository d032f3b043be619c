// The table of smartmoe._C. Arguments and results: bindings.h; what they compute: ../kernels/launch.h.
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "bindings.h"

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  namespace b = smartmoe::bindings;
  m.def("slots_of", &b::slots_of);
  m.def("count_slots", &b::count_slots);
  m.def("ends_of", &b::ends_of);
  m.def("plan_rows", &b::plan_rows);
  m.def("permute", &b::permute);
  m.def("gather_sum", &b::gather_sum);
  m.def("combine_backward", &b::combine_backward);
  m.def("activate", &b::activate);
  m.def("activate_backward", &b::activate_backward);
  m.def("add_bias_", &b::add_bias_);
  m.def("sum_slots", &b::sum_slots);
  m.def("can_multiply", &b::can_multiply);
  m.def("multiply_rows", &b::multiply_rows);
  m.def("multiply_activate", &b::multiply_activate);
  m.def("multiply_slope", &b::multiply_slope);
  m.def("multiply_activate_into", &b::multiply_activate_into);
  m.def("multiply_slots", &b::multiply_slots);
  m.def("replace_memsets", &b::replace_memsets);
}
