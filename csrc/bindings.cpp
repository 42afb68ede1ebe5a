// The one door between Python and the kernels: addresses, sizes and strides, no tensor type of anybody's.
#include <pybind11/pybind11.h>

namespace py = pybind11;

void bind_causal_conv1d(py::module_& m);
void bind_topk_attention(py::module_& m);
void bind_gated_write(py::module_& m);
void bind_selective_scan(py::module_& m);

namespace {

const char* best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return "avx512";
  if (avx2) return "avx2";
#endif
  return "generic";
}

}  // namespace

PYBIND11_MODULE(FASTMEM_MODULE, m) {
  m.doc() = "fastmem's CPU kernels for one instruction set.";
  m.def("best_isa", &best_isa, "The fastest instruction set of this CPU that fastmem has kernels for.");
  bind_causal_conv1d(m);
  bind_topk_attention(m);
  bind_gated_write(m);
  bind_selective_scan(m);
}
