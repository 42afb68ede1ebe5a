// The one door between Python and the kernels. pybind11's headers take longer to compile than a kernel, so they stand
// here alone; a kernel is bound as it is, and runs without the GIL.
#include <pybind11/pybind11.h>

#include "dlpack.h"
#include "kernels.h"
#include "parallel.h"

namespace pybind11::detail {

// Straight through Python's C interface: a call has up to eight tuples, and pybind11's own conversions would take longer
// than a small kernel.
inline bool read_integer(PyObject* from, int64_t& to) {
  to = PyLong_AsLongLong(from);
  if (to != -1 || !PyErr_Occurred()) return true;
  PyErr_Clear();
  return false;
}

// A tuple of integers; None is an empty one.
template <>
struct type_caster<fastmem::Integers> {
  PYBIND11_TYPE_CASTER(fastmem::Integers, const_name("tuple[int, ...] | None"));
  bool load(handle from, bool) {
    if (from.is_none()) return true;
    if (!PyTuple_Check(from.ptr())) return false;
    const Py_ssize_t count = PyTuple_GET_SIZE(from.ptr());
    if (count > static_cast<Py_ssize_t>(value.values.size())) return false;
    for (Py_ssize_t i = 0; i < count; ++i)
      if (!read_integer(PyTuple_GET_ITEM(from.ptr(), i), value.values[i])) return false;
    return true;
  }
};

// (address, shape, strides) of a tensor, or None; a dimension of size 1 is shared.
template <>
struct type_caster<fastmem::View> {
  PYBIND11_TYPE_CASTER(fastmem::View, const_name("tuple[int, tuple, tuple] | None"));
  bool load(handle from, bool) {
    if (from.is_none()) return true;
    PyObject* fields = from.ptr();
    if (!PyTuple_Check(fields) || PyTuple_GET_SIZE(fields) != 3) return false;
    PyObject *shape = PyTuple_GET_ITEM(fields, 1), *strides = PyTuple_GET_ITEM(fields, 2);
    if (!PyTuple_Check(shape) || !PyTuple_Check(strides) || PyTuple_GET_SIZE(shape) != PyTuple_GET_SIZE(strides))
      return false;
    int64_t address, size;
    if (!read_integer(PyTuple_GET_ITEM(fields, 0), address)) return false;
    value.data = reinterpret_cast<void*>(address);
    int64_t* to[] = {&value.b, &value.h, &value.r};
    for (Py_ssize_t i = 0; i < 3 && i < PyTuple_GET_SIZE(shape); ++i) {
      if (!read_integer(PyTuple_GET_ITEM(shape, i), size)) return false;
      if (size > 1 && !read_integer(PyTuple_GET_ITEM(strides, i), *to[i])) return false;
    }
    return true;
  }
};

// (view, batches, heads), or None.
template <>
struct type_caster<fastmem::Target> {
  PYBIND11_TYPE_CASTER(fastmem::Target, const_name("tuple[tuple, int, int] | None"));
  bool load(handle from, bool convert) {
    if (from.is_none()) return true;
    if (!PyTuple_Check(from.ptr()) || PyTuple_GET_SIZE(from.ptr()) != 3) return false;
    type_caster<fastmem::View> view;
    if (!view.load(PyTuple_GET_ITEM(from.ptr(), 0), convert)) return false;
    value.grad = view;
    return read_integer(PyTuple_GET_ITEM(from.ptr(), 1), value.B) && read_integer(PyTuple_GET_ITEM(from.ptr(), 2), value.H);
  }
};

// A tensor of the framework whose exchange table was given, or None. One that the table cannot read (a sparse one, say)
// has a shape that no kernel takes.
template <>
struct type_caster<fastmem::Tensor> {
  PYBIND11_TYPE_CASTER(fastmem::Tensor, const_name("Tensor | None"));
  bool load(handle from, bool) {
    if (from.is_none()) return true;
    fastmem::DLTensor x;
    if (!fastmem::exchange) return false;
    if (fastmem::exchange->tensor_of(from.ptr(), &x) != 0) {
      PyErr_Clear();
      value.ndim = fastmem::kUnreadable;
      return true;
    }
    value = {static_cast<char*>(x.data) + x.byte_offset, x.ndim, x.shape, x.strides, fastmem::dtype_of(x),
             x.device_type == fastmem::kDeviceCpu};
    return true;
  }
};

template <size_t N, class T, class F>
inline bool read_array(handle from, std::array<T, N>& to, F&& read) {
  if (!PyTuple_Check(from.ptr()) || PyTuple_GET_SIZE(from.ptr()) != static_cast<Py_ssize_t>(N)) return false;
  for (size_t i = 0; i < N; ++i)
    if (!read(PyTuple_GET_ITEM(from.ptr(), i), to[i])) return false;
  return true;
}

template <>
struct type_caster<fastmem::Streams> {
  PYBIND11_TYPE_CASTER(fastmem::Streams, const_name("tuple[tuple[int, ...] | None, ...]"));
  bool load(handle from, bool convert) {
    return read_array(from, value, [&](PyObject* item, fastmem::Integers& to) {
      type_caster<fastmem::Integers> stream;
      if (!stream.load(item, convert)) return false;
      to = stream;
      return true;
    });
  }
};

template <>
struct type_caster<std::array<double, 14>> {
  using Rule = std::array<double, 14>;
  PYBIND11_TYPE_CASTER(Rule, const_name("tuple[float, ...]"));
  bool load(handle from, bool) {
    return read_array(from, value, [](PyObject* item, double& to) {
      to = PyFloat_AsDouble(item);
      if (to != -1 || !PyErr_Occurred()) return true;
      PyErr_Clear();
      return false;
    });
  }
};

}  // namespace pybind11::detail

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

bool use_exchange(const pybind11::capsule& table) {
  fastmem::exchange = fastmem::usable(static_cast<const fastmem::Exchange*>(table.get_pointer()));
  return fastmem::exchange != nullptr;
}

}  // namespace

PYBIND11_MODULE(FASTMEM_MODULE, m) {
  m.doc() = "fastmem's CPU kernels for one instruction set.";
  m.def("best_isa", &best_isa, "The fastest instruction set of this CPU that fastmem has kernels for.");
  m.def("use_exchange", &use_exchange,
        "Read tensors of the framework whose DLPack exchange table this is; False where it cannot be used.");
  m.def("borrow_threads", &fastmem::borrow_threads,
        "Compute on the threads of the OpenMP runtime that this loaded library is linked with; False where it has none.");
  const auto kernel = [&](const char* name, auto* run) {
    m.def(name, run, pybind11::call_guard<pybind11::gil_scoped_release>());
  };
  kernel("topk_attention_forward", &fastmem::topk_attention_forward);
  kernel("topk_attention_backward", &fastmem::topk_attention_backward);
  kernel("dense_attention_forward", &fastmem::dense_attention_forward);
  kernel("dense_attention_backward", &fastmem::dense_attention_backward);
  kernel("gated_write", &fastmem::gated_write);
  kernel("gated_write_linear", &fastmem::gated_write_linear);
  kernel("causal_conv1d", &fastmem::causal_conv1d);
  kernel("causal_conv1d_backward", &fastmem::causal_conv1d_backward);
  kernel("causal_conv1d_step", &fastmem::causal_conv1d_step);
  kernel("selective_scan_forward", &fastmem::selective_scan_forward);
  kernel("selective_scan_backward", &fastmem::selective_scan_backward);
  kernel("selective_scan_tangent", &fastmem::selective_scan_tangent);
  kernel("selective_scan_step", &fastmem::selective_scan_step);
  kernel("exponentials", &fastmem::exponentials);
}
