// optimizer.step() without Python work per parameter: reads param_groups and state as torch.optim keeps them, then
// calls the step ops. Nothing outlives the call, so no change of parameters, gradients, state or options can go stale.
#include <ATen/ops/empty_like.h>
#include <ATen/record_function.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <unordered_map>

#include "optim.h"

namespace fastnn::ops {
namespace {

namespace py = pybind11;

// What step() returns to Python: null when the step is done, else the reason why nothing was changed.
using Reason = const char*;
constexpr Reason kNoState = "no state";  // the caller lets torch's _init_group create it and calls again
constexpr Reason kOptions = "arguments";
constexpr Reason kDisabled = "disabled";  // not counted as a fallback

// ---- reading torch.optim's dictionaries ----------------------------------------------------------------------------

// An interned string, for dictionaries that are searched once per parameter.
class Key {
 public:
  explicit Key(const char* text) : object_(PyUnicode_InternFromString(text)) {}
  PyObject* operator()() const { return object_; }

 private:
  PyObject* object_;
};

// A borrowed reference, null when the key is absent. `dict` is a dict (a defaultdict's default is not created).
PyObject* find(PyObject* dict, PyObject* key) {
  PyObject* item = PyDict_GetItemWithError(dict, key);
  if (!item && PyErr_Occurred()) throw py::error_already_set();
  return item;
}

// A plain torch.Tensor or Parameter; null for anything else, subclasses included.
const Tensor* as_tensor(PyObject* object) {
  return object && THPVariable_CheckExact(object) ? &THPVariable_Unpack(object) : nullptr;
}

// One param_group's options. A value the kernels cannot use makes ok() false.
class Options {
 public:
  explicit Options(py::object group) : group_(std::move(group)), ok_(PyDict_Check(group_.ptr())) {}
  bool ok() const { return ok_; }

  template <OpName Name>
  double number() {
    return number(find<Name>());
  }
  // A learning rate: a number, or a CPU tensor of one element.
  template <OpName Name>
  double rate() {
    PyObject* value = find<Name>();
    const Tensor* t = as_tensor(value);
    if (!t) return number(value);
    const bool usable = t->is_cpu() && t->layout() == at::kStrided && t->numel() == 1 && !t->requires_grad() &&
                        at::isFloatingType(t->scalar_type());
    return usable ? t->item<double>() : fail();
  }
  template <OpName Name>
  std::pair<double, double> pair() {
    PyObject* value = find<Name>();
    if (!value || !PyTuple_Check(value) || PyTuple_GET_SIZE(value) != 2) return {fail(), 0};
    return {number(PyTuple_GET_ITEM(value, 0)), number(PyTuple_GET_ITEM(value, 1))};
  }
  template <OpName Name>
  bool flag() {
    PyObject* value = find<Name>();
    if (!value || value == Py_None || value == Py_False) return false;
    if (value == Py_True) return true;
    const int truth = PyObject_IsTrue(value);
    if (truth < 0) throw py::error_already_set();
    return truth;
  }
  template <OpName Name>
  bool is_tensor() {
    PyObject* value = find<Name>();
    return value && THPVariable_Check(value);
  }
  // Options that only torch's own step implements.
  template <OpName Name>
  void refuse() {
    if (flag<Name>()) ok_ = false;
  }
  py::object params() {
    PyObject* list = find<"params">();
    if (list && PyList_Check(list)) return py::reinterpret_borrow<py::object>(list);
    ok_ = false;
    return {};
  }

 private:
  template <OpName Name>
  PyObject* find() {
    static const Key key(Name.text);
    return ok_ ? ops::find(group_.ptr(), key()) : nullptr;
  }
  double number(PyObject* value) {
    if (!value || PyBool_Check(value) || !(PyFloat_Check(value) || PyLong_Check(value))) return fail();
    const double x = PyFloat_AsDouble(value);
    if (x == -1 && PyErr_Occurred()) throw py::error_already_set();
    return x;
  }
  double fail() {
    ok_ = false;
    return 0;
  }

  py::object group_;
  bool ok_;
};

// Tensors that Python keeps alive as long as the GIL is held. To count references to a tensor that has a Python object
// takes that object and the GIL, twice per tensor: 30 % of a step of 160 small parameters.
class Borrowed {
  using Traits = c10::MaybeOwnedTraits<Tensor>;

 public:
  Borrowed() = default;
  Borrowed(Borrowed&& other) noexcept { *this = std::move(other); }
  Borrowed& operator=(Borrowed&& other) noexcept {
    std::swap(list_, other.list_), std::swap(owned_, other.owned_);
    return *this;
  }
  ~Borrowed() {
    if (!owned_)
      for (Tensor& t : list_) Traits::destroyBorrow(t);
  }
  void reserve(size_t count) { list_.reserve(count); }
  void push_back(const Tensor& t) {
    if (owned_) list_.push_back(t);
    else list_.push_back(Traits::createBorrow(t));
  }
  void own() {
    if (owned_) return;
    for (Tensor& t : list_) {
      Tensor counted = t;
      Traits::destroyBorrow(t);
      t = std::move(counted);
    }
    owned_ = true;
  }
  const Tensor& operator[](size_t i) const { return list_[i]; }
  operator TensorList() const { return list_; }

 private:
  std::vector<Tensor> list_;
  bool owned_ = false;
};

// The tensors of one group: every parameter that has a gradient, and its state under `names` (null: left empty).
struct Tensors {
  Borrowed params, state[4];
  std::vector<Tensor> grads;  // counted: a backward pass in another thread may replace them without the GIL
  int64_t elements = 0;       // of the parameters
  bool owned = false;

  void own() {
    params.own();
    for (Borrowed& s : state) s.own();
    owned = true;
  }
};

// Whether Python may run before a step of so many elements is done: short ones, 0.1 ms, keep the GIL. Then the tensors
// of every group have to be owned, also those of a short one that waits for a long one.
bool lets_python_run(int64_t elements) {
  return elements >= 1 << 19 || c10::impl::TorchDispatchModeTLS::any_modes_set();
}

using Names = std::array<const Key*, 4>;

// Looks parameters up in the order in which torch put them into `state`, the others by address: to hash a tensor is a
// call of a Python function, and Python must not run while tensors are borrowed.
class StateReader {
 public:
  explicit StateReader(PyObject* state) : state_(state) { advance(); }

  // The parameter's state, or null.
  PyObject* of(PyObject* param) {
    if (param == key_) {
      PyObject* const found = value_;
      advance();
      return found;
    }
    if (by_address_.empty()) {
      PyObject *key, *value;
      for (Py_ssize_t at = 0; PyDict_Next(state_, &at, &key, &value);) by_address_.emplace(key, value);
    }
    const auto found = by_address_.find(param);
    return found == by_address_.end() ? nullptr : found->second;
  }
  void pass(PyObject* param) {
    if (param == key_) advance();
  }

 private:
  void advance() {
    if (!PyDict_Next(state_, &position_, &key_, &value_)) key_ = nullptr;
  }

  PyObject *state_, *key_ = nullptr, *value_ = nullptr;
  Py_ssize_t position_ = 0;
  std::unordered_map<PyObject*, PyObject*> by_address_;
};

Reason gather(PyObject* params, StateReader& state, const Names& names, Tensors& out) {
  const Py_ssize_t count = PyList_GET_SIZE(params);
  out.params.reserve(count);
  out.grads.reserve(count);
  for (size_t slot = 0; slot < names.size(); ++slot)
    if (names[slot]) out.state[slot].reserve(count);
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* const object = PyList_GET_ITEM(params, i);
    const Tensor* param = as_tensor(object);
    if (!param) return "tensor subclass";
    const Tensor& grad = param->grad();
    if (!grad.defined()) {
      state.pass(object);
      continue;
    }
    out.params.push_back(*param);
    out.grads.push_back(grad);
    out.elements += param->numel();
    if (!names[0]) continue;
    PyObject* const entry = state.of(object);
    if (!entry || !PyDict_Check(entry) || PyDict_GET_SIZE(entry) == 0) return kNoState;
    for (size_t slot = 0; slot < names.size(); ++slot) {
      if (!names[slot]) continue;
      const Tensor* value = as_tensor(find(entry, (*names[slot])()));
      if (!value) return "state";
      out.state[slot].push_back(*value);
    }
  }
  return nullptr;
}

// Calls a step op below autograd (step() runs without gradients, whatever the caller's grad mode), without the GIL
// where the tensors are owned.
template <class Op, class... Args>
void call(Tensors& t, const Args&... args) {
  if (t.grads.empty()) return;
  std::optional<py::gil_scoped_release> release;
  if (t.owned) release.emplace();
  at::AutoDispatchBelowAutograd guard;
  Op::handle().call(t.params, t.grads, args...);
}

// What all groups have in common: numbers that every optimizer here knows.
struct Group {
  py::object params;
  Names names;
  Tensors tensors;
  double lr, eps, weight_decay;
  bool maximize;
  double a, b;  // betas, momentum, alpha, ...
  bool flag;
};

// Reads all groups before the first is stepped: a reason is given while nothing has changed. Options come before any
// tensor, for to ask one for its truth may run Python. `read` takes those that are not common and returns the names of
// the state, the counter's first.
template <class Read, class Step>
Reason step_groups(const py::list& groups, const py::dict& state, const Read& read, const Step& step) {
  if (!enabled()) return kDisabled;
  std::vector<Group> ready(groups.size());
  for (size_t i = 0; i < ready.size(); ++i) {
    Group& g = ready[i];
    Options options(groups[i]);
    g.lr = options.rate<"lr">();
    g.eps = options.number<"eps">();
    g.weight_decay = options.number<"weight_decay">();
    g.maximize = options.flag<"maximize">();
    options.refuse<"differentiable">();
    options.refuse<"capturable">();
    if (options.is_tensor<"lr">()) options.refuse<"foreach">();
    g.names = read(options, g);
    g.params = options.params();
    if (!options.ok()) return kOptions;
  }
  StateReader reader(state.ptr());
  int64_t elements = 0;
  for (Group& g : ready) {
    Tensors& t = g.tensors;
    if (Reason reason = gather(g.params.ptr(), reader, g.names, t)) return reason;
    if (Reason reason = why_not_steppable(t.params, t.grads, {t.state[1], t.state[2], t.state[3]}, t.state[0]))
      return reason;
    elements += t.elements;
  }
  if (lets_python_run(elements))
    for (Group& g : ready) g.tensors.own();
  for (Group& g : ready) step(g, g.tensors, g.tensors.state);
  return nullptr;
}

const Key& step_key() {
  static const Key key("step");
  return key;
}

// ---- the optimizers ------------------------------------------------------------------------------------------------

Reason adam_step(const py::list& groups, const py::dict& state) {
  static const Key exp_avg("exp_avg"), exp_avg_sq("exp_avg_sq"), max_exp_avg_sq("max_exp_avg_sq");
  return step_groups(
      groups, state,
      [](Options& options, Group& g) {
        std::tie(g.a, g.b) = options.pair<"betas">();
        g.flag = options.flag<"decoupled_weight_decay">();
        return Names{&step_key(), &exp_avg, &exp_avg_sq, options.flag<"amsgrad">() ? &max_exp_avg_sq : nullptr};
      },
      [](const Group& g, Tensors& t, const Borrowed* s) {
        call<AdamStep>(t, s[1], s[2], s[3], s[0], g.lr, g.a, g.b, g.eps, g.weight_decay, g.flag, g.maximize);
      });
}

Reason yogi_step(const py::list& groups, const py::dict& state) {
  static const Key exp_avg("exp_avg"), exp_avg_sq("exp_avg_sq");
  return step_groups(
      groups, state,
      [](Options& options, Group& g) {
        std::tie(g.a, g.b) = options.pair<"betas">();
        return Names{&step_key(), &exp_avg, &exp_avg_sq};
      },
      [](const Group& g, Tensors& t, const Borrowed* s) {
        call<YogiStep>(t, s[1], s[2], s[0], g.lr, g.a, g.b, g.eps, g.weight_decay, g.maximize);
      });
}

Reason adagrad_step(const py::list& groups, const py::dict& state) {
  static const Key sum("sum");
  return step_groups(
      groups, state,
      [](Options& options, Group& g) {
        g.a = options.number<"lr_decay">();
        return Names{&step_key(), &sum};
      },
      [](const Group& g, Tensors& t, const Borrowed* s) {
        call<AdagradStep>(t, s[1], s[0], g.lr, g.a, g.eps, g.weight_decay, g.maximize);
      });
}

Reason rmsprop_step(const py::list& groups, const py::dict& state) {
  static const Key square_avg("square_avg"), momentum_buffer("momentum_buffer"), grad_avg("grad_avg");
  return step_groups(
      groups, state,
      [](Options& options, Group& g) {
        g.a = options.number<"alpha">();
        g.b = options.number<"momentum">();
        return Names{&step_key(), &square_avg, g.b > 0 ? &momentum_buffer : nullptr,
                     options.flag<"centered">() ? &grad_avg : nullptr};
      },
      [](const Group& g, Tensors& t, const Borrowed* s) {
        call<RmspropStep>(t, s[1], s[2], s[3], s[0], g.lr, g.a, g.eps, g.weight_decay, g.b, g.maximize);
      });
}

Reason adadelta_step(const py::list& groups, const py::dict& state) {
  static const Key square_avg("square_avg"), acc_delta("acc_delta");
  return step_groups(
      groups, state,
      [](Options& options, Group& g) {
        g.a = options.number<"rho">();
        return Names{&step_key(), &square_avg, &acc_delta};
      },
      [](const Group& g, Tensors& t, const Borrowed* s) {
        call<AdadeltaStep>(t, s[1], s[2], s[0], g.lr, g.a, g.eps, g.weight_decay, g.maximize);
      });
}

// ---- SGD: its buffers begin as the first gradient ------------------------------------------------------------------

Reason sgd_step(const py::list& groups, const py::dict& state) {
  static const Key momentum_buffer("momentum_buffer");
  struct SgdGroup {
    py::object params;
    Tensors old, first;              // state[0]: momentum buffers; those of `first` are to be filled
    std::vector<py::object> owners;  // the parameters of `first`
    std::vector<Tensor> buffers;     // and their new buffers
    double lr, momentum, dampening, weight_decay;
    bool nesterov, maximize;
  };
  if (!enabled()) return kDisabled;
  std::vector<SgdGroup> ready(groups.size());
  for (size_t i = 0; i < ready.size(); ++i) {
    SgdGroup& g = ready[i];
    Options options(groups[i]);
    g.lr = options.rate<"lr">();
    g.momentum = options.number<"momentum">();
    g.dampening = options.number<"dampening">();
    g.weight_decay = options.number<"weight_decay">();
    g.nesterov = options.flag<"nesterov">();
    g.maximize = options.flag<"maximize">();
    options.refuse<"differentiable">();
    g.params = options.params();
    if (!options.ok()) return kOptions;
  }
  StateReader reader(state.ptr());
  int64_t elements = 0;
  bool begins = false;
  for (SgdGroup& g : ready) {
    PyObject* const params = g.params.ptr();
    Tensors all;
    if (Reason reason = gather(params, reader, Names{}, all)) return reason;
    elements += all.elements;
    if (Reason reason = why_not_steppable(all.params, all.grads, {}, {})) return reason;
    if (g.momentum == 0) {
      g.old = std::move(all);
      continue;
    }
    size_t at = 0;
    for (Py_ssize_t k = 0; k < PyList_GET_SIZE(params); ++k) {
      PyObject* const object = PyList_GET_ITEM(params, k);
      if (!as_tensor(object)->grad().defined()) {
        reader.pass(object);
        continue;
      }
      PyObject* const entry = reader.of(object);
      if (entry && !PyDict_Check(entry)) return "state";
      PyObject* const value = entry ? find(entry, momentum_buffer()) : nullptr;
      const bool first = !value || value == Py_None;
      const Tensor* buffer = as_tensor(value);
      if (!first && !buffer) return "state";
      Tensors& t = first ? g.first : g.old;
      t.params.push_back(all.params[at]);
      t.grads.push_back(all.grads[at]);
      if (first) g.owners.push_back(py::reinterpret_borrow<py::object>(object));
      else t.state[0].push_back(*buffer);
      ++at;
    }
    begins |= !g.owners.empty();
    if (Reason reason = why_not_steppable(g.old.params, g.old.grads, {g.old.state[0]}, {})) return reason;
  }
  if (begins || lets_python_run(elements))  // a new buffer and its place in `state` may run Python, too
    for (SgdGroup& g : ready) g.old.own(), g.first.own();
  for (SgdGroup& g : ready)
    for (const Tensor& grad : g.first.grads) g.first.state[0].push_back(g.buffers.emplace_back(at::empty_like(grad)));
  for (SgdGroup& g : ready) {
    for (Tensors* t : {&g.old, &g.first})
      call<SgdStep>(*t, t->state[0], g.lr, g.momentum, g.dampening, g.weight_decay, g.nesterov, g.maximize,
                    t == &g.first);
    for (size_t k = 0; k < g.owners.size(); ++k) {
      py::object entry = py::reinterpret_borrow<py::object>(state)[g.owners[k]];
      entry[py::handle(momentum_buffer())] = py::reinterpret_steal<py::object>(THPVariable_Wrap(g.buffers[k]));
    }
  }
  return nullptr;
}

void bind(py::module_& m) {
  m.def("is_recorded", [] { return at::hasCallbacks(); });  // a profiler or another observer of ranges
  m.def("adam_step", adam_step);
  m.def("yogi_step", yogi_step);
  m.def("adagrad_step", adagrad_step);
  m.def("rmsprop_step", rmsprop_step);
  m.def("adadelta_step", adadelta_step);
  m.def("sgd_step", sgd_step);
}
const Bindings bindings(bind);

}  // namespace
}  // namespace fastnn::ops
