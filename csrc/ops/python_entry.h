// Python entry points without pybind11's argument parsing, which costs about 0.2 us: positional arguments alone.
#pragma once
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include "common.h"

namespace fastnn::ops {

// An argument from Python; what does not fit raises TypeError, on which the functional calls torch's own function.
template <class T>
T from_python(PyObject* o) {
  pybind11::detail::make_caster<T> caster;
  if (!caster.load(o, true)) throw torch::TypeError("an argument of another type");
  return pybind11::detail::cast_op<T>(std::move(caster));
}
template <>
inline pybind11::handle from_python(PyObject* o) {
  return o;
}
template <>
inline const Tensor& from_python<const Tensor&>(PyObject* o) {
  if (!THPVariable_Check(o)) throw torch::TypeError("not a tensor");
  return THPVariable_Unpack(o);
}
template <>
inline OptTensor from_python<OptTensor>(PyObject* o) {
  return o == Py_None ? std::nullopt : OptTensor(from_python<const Tensor&>(o));
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
    if constexpr ((std::is_same_v<Args, pybind11::handle> || ...)) {  // reads Python objects itself
      return F{}(std::get<I>(held)...);
    } else {
      const pybind11::gil_scoped_release release;
      return F{}(std::get<I>(held)...);
    }
  }
  static PyObject* call(PyObject*, PyObject* const* args, Py_ssize_t count) {
    HANDLE_TH_ERRORS
    if (count != Py_ssize_t(sizeof...(Args))) throw torch::TypeError("another number of arguments");
    try {
      if (exports_onnx()) throw torch::TypeError("torch.onnx.export takes torch's own operators");
      R result = run(args, std::index_sequence_for<Args...>());
      if constexpr (std::is_same_v<R, Tensor>) return THPVariable_Wrap(std::move(result));
      else return pybind11::cast(std::move(result)).release().ptr();
    } catch (const pybind11::builtin_exception& e) {
      e.set_error();
      return nullptr;
    }
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
