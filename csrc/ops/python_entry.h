// Python entry points without pybind11's argument parsing, which costs about 0.2 us: positional arguments alone.
#pragma once
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/csrc/utils/tensor_numpy.h>

#include "common.h"

namespace fastnn::ops {

// Whether fastnn's operators have a kernel for the tensor, or torch traces it. Others (sparse, nested, quantised, on
// another device, of a class with a __torch_dispatch__ of its own: a DTensor) know torch's operators alone.
inline bool known(const Tensor& t) {
  using Key = c10::DispatchKey;
  constexpr c10::DispatchKeySet kOthers(
      {Key::Sparse, Key::SparseCsr, Key::NestedTensor, Key::Quantized, Key::MkldnnCPU, Key::Python});
  if ((t.key_set() & kOthers).empty()) return t.is_cpu() || t.is_cuda();
  if (!t.key_set().has(Key::Python)) return false;
  const auto tracing = [&](const char* module, const char* name) {
    return pybind11::isinstance(pybind11::cast(t), pybind11::module_::import(module).attr(name));
  };
  return tracing("torch._subclasses.fake_tensor", "FakeTensor") ||
         tracing("torch._subclasses.functional_tensor", "FunctionalTensor");
}

// An argument from Python, as strictly as torch takes it: no bool for an int, no number for a bool. What does not fit
// raises TypeError, on which the functional calls torch's own function.
template <class T>
T from_python(PyObject* o);
template <>
inline const Tensor& from_python<const Tensor&>(PyObject* o) {
  if (!THPVariable_Check(o) || !known(THPVariable_Unpack(o))) throw torch::TypeError("not a tensor of the operators");
  return THPVariable_Unpack(o);
}
template <>
inline OptTensor from_python<OptTensor>(PyObject* o) {
  return o == Py_None ? std::nullopt : OptTensor(from_python<const Tensor&>(o));
}
template <>
inline bool from_python<bool>(PyObject* o) {
  if (!PyBool_Check(o)) throw torch::TypeError("not a bool");
  return o == Py_True;
}
template <>
inline int64_t from_python<int64_t>(PyObject* o) {
  int overflow = 0;
  const bool integer = PyLong_Check(o) ? !PyBool_Check(o) : torch::utils::is_numpy_int(o);
  const int64_t value = integer ? PyLong_AsLongLongAndOverflow(o, &overflow) : (overflow = 1);
  if (overflow) throw torch::TypeError("not an int of 64 bits");
  return value;
}
template <>
inline std::optional<int64_t> from_python<std::optional<int64_t>>(PyObject* o) {
  return o == Py_None ? std::nullopt : std::optional(from_python<int64_t>(o));
}
template <>
inline double from_python<double>(PyObject* o) {
  return PyFloat_Check(o) ? PyFloat_AS_DOUBLE(o) : double(from_python<int64_t>(o));
}
template <>
inline at::Scalar from_python<at::Scalar>(PyObject* o) {
  return PyFloat_Check(o) ? at::Scalar(PyFloat_AS_DOUBLE(o)) : at::Scalar(from_python<int64_t>(o));
}
using IntPair = std::array<int64_t, 2>;
template <>
inline IntPair from_python<IntPair>(PyObject* o) {  // one int, or one or two in a tuple or a list
  if (!PyTuple_Check(o) && !PyList_Check(o)) {
    const int64_t value = from_python<int64_t>(o);
    return {value, value};
  }
  const Py_ssize_t length = PySequence_Fast_GET_SIZE(o);
  if (length < 1 || length > 2) throw torch::TypeError("one int or two");
  PyObject* const* items = PySequence_Fast_ITEMS(o);
  return {from_python<int64_t>(items[0]), from_python<int64_t>(items[length - 1])};
}
template <>
inline std::optional<IntPair> from_python<std::optional<IntPair>>(PyObject* o) {
  return o == Py_None ? std::nullopt : std::optional(from_python<IntPair>(o));
}

// Whether torch.onnx.export records this call: it knows torch's operators alone. Outside of tracers one read of a word.
inline bool exports_onnx() {
  constexpr c10::DispatchKeySet kTracers({c10::DispatchKey::Tracer, c10::DispatchKey::Python,
                                          c10::DispatchKey::PreDispatch, c10::DispatchKey::PythonDispatcher});
  if ((c10::impl::tls_local_dispatch_key_set().included_ & kTracers).empty()) return false;
  return pybind11::module_::import("torch.onnx").attr("is_in_onnx_export")().cast<bool>();
}

template <class F, class Signature>
struct PythonEntry;

template <class F, class R, class... Args>
struct PythonEntry<F, R (*)(Args...)> {
  // A reference to a tensor is kept by Python meanwhile; any other argument is held by value.
  template <class A>
  using Held = std::conditional_t<std::is_same_v<A, const Tensor&>, const Tensor&, std::decay_t<A>>;

  template <size_t... I>
  static R run(PyObject* const* args, std::index_sequence<I...>) {
    std::tuple<Held<Args>...> held{from_python<Held<Args>>(args[I])...};
    const pybind11::gil_scoped_release release;
    return F{}(std::get<I>(held)...);
  }
  static PyObject* call(PyObject*, PyObject* const* args, Py_ssize_t count) {
    HANDLE_TH_ERRORS
    if (count != Py_ssize_t(sizeof...(Args))) throw torch::TypeError("another number of arguments");
    if (exports_onnx()) throw torch::TypeError("torch.onnx.export takes torch's own operators");
    R result = run(args, std::index_sequence_for<Args...>());
    if constexpr (std::is_same_v<R, Tensor>) return THPVariable_Wrap(std::move(result));
    else return pybind11::cast(std::move(result)).release().ptr();
    END_HANDLE_TH_ERRORS
  }
};

// Binds a lambda without captures.
template <class F>
void def(pybind11::module_& m, const char* name, F function) {
  static PyMethodDef method{};
  method.ml_name = name;
  method.ml_meth = reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&PythonEntry<F, decltype(+function)>::call));
  method.ml_flags = METH_FASTCALL;
  m.add_object(name, pybind11::reinterpret_steal<pybind11::object>(PyCFunction_NewEx(&method, nullptr, nullptr)));
}

}  // namespace fastnn::ops
