// fastnn::mm, addmm, bmm and matmul: torch's matrix products of any rank, strides and broadcast on one kernel.
#include "gemm.h"

#include <ATen/ExpandUtils.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mm.h>

#include "cuda_choice.h"
#include "grad_node.h"
#include "python_entry.h"
#include "memory.h"

namespace fastnn::ops {

// ---- matrices ------------------------------------------------------------------------------------------------------

namespace {
Matrix normalised(Matrix m) {
  if (m.cols == 1) m.col_stride = 1;
  if (m.rows == 1) m.row_stride = m.col_stride == 1 ? m.cols : 1;
  return m;
}
}  // namespace

Matrix matrix_of(const Tensor& t) {
  return normalised({t.const_data_ptr(), t.size(-2), t.size(-1), t.stride(-2), t.stride(-1)});
}

Matrix rows_of(const Tensor& t, Tensor& keep) {
  const int64_t cols = t.size(-1),
                rows = cols ? t.numel() / cols : c10::multiply_integers(t.sizes().slice(0, t.dim() - 1));
  if (!t.is_contiguous()) {
    if (t.dim() == 2 && (t.stride(0) == 1 || t.stride(1) == 1)) return matrix_of(t);
    keep = contiguous(t);
    return {keep.const_data_ptr(), rows, cols, cols, 1};
  }
  return {t.const_data_ptr(), rows, cols, cols, 1};
}

Tensor as_rows(const Tensor& t) {
  if (t.dim() == 2) return t;
  const auto sizes = t.sym_sizes();
  return t.reshape_symint({c10::multiply_integers(sizes.slice(0, sizes.size() - 1)), sizes.back()});
}

GemmParams Product::params() const {
  GemmParams p{};
  p.a = a.data, p.b = b.data, p.c = out, p.d = d;
  p.batch = batch, p.m = a.rows, p.n = b.cols, p.k = a.cols;
  p.a_stride_batch = a_batch_stride, p.a_stride_m = a.row_stride, p.a_stride_k = a.col_stride;
  p.b_stride_batch = b_batch_stride, p.b_stride_k = b.row_stride, p.b_stride_n = b.col_stride;
  p.c_stride_batch = p.m * p.n, p.c_stride_m = p.n, p.c_stride_n = 1;
  p.d_stride_m = d_row_stride, p.d_stride_n = d_col_stride;
  p.alpha = alpha, p.beta = beta;
  p.dtype = dtype;
  return p;
}

bool own_cuda_product(const char* op, std::initializer_list<const Tensor*> tensors, c10::function_ref<void()> run,
                      at::IntArrayRef options) {
  const CudaChoice choice = choose_cuda({CudaFamily::matmul, op, tensors, options}, run);
  if (!choice.own) note_fallback(op, choice.reason);
  return choice.own;
}

void Product::run(const char* op, const Tensor& like) const {
  GemmParams p = params();
  if (like.is_cuda()) {
    p.tf32 = allows_tf32(CudaFamily::matmul);
    const auto none = [] { return Status::invalid_argument; };
    return launch(op, like, none, [&](auto stream) { return cuda::gemm(p, stream); });
  }
  constexpr int64_t kOnStack = 1 << 14;  // an allocation costs as much as a small product
  const int64_t bytes = cpu::gemm_workspace(p);
  if (bytes <= kOnStack) {
    alignas(64) char buffer[kOnStack];
    p.workspace = buffer;
    return check(cpu::gemm(p), op);
  }
  const Tensor workspace = fresh({bytes}, at::TensorOptions(at::kByte));
  p.workspace = workspace.mutable_data_ptr();
  check(cpu::gemm(p), op);
}

namespace {

// ---- mm, bmm, matmul -----------------------------------------------------------------------------------------------

struct Mm {
  static constexpr const char* name = "mm";
  static Tensor aten(const Tensor& a, const Tensor& b) { return at::mm(a, b); }
  static bool valid(const Tensor& a, const Tensor& b) {
    return a.dim() == 2 && b.dim() == 2 && a.sym_size(1) == b.sym_size(0);
  }
};
struct Bmm {
  static constexpr const char* name = "bmm";
  static Tensor aten(const Tensor& a, const Tensor& b) { return at::bmm(a, b); }
  static bool valid(const Tensor& a, const Tensor& b) {
    return a.dim() == 3 && b.dim() == 3 && a.sym_size(0) == b.sym_size(0) && a.sym_size(2) == b.sym_size(1);
  }
};
struct Matmul {
  static constexpr const char* name = "matmul";
  static Tensor aten(const Tensor& a, const Tensor& b) { return at::matmul(a, b); }
  static bool valid(const Tensor& a, const Tensor& b) {
    if (a.dim() == 0 || b.dim() == 0 || a.sym_size(-1) != b.sym_size(b.dim() == 1 ? 0 : -2)) return false;
    for (int64_t i = 3; i <= std::min(a.dim(), b.dim()); ++i)
      if (a.sym_size(-i) != b.sym_size(-i) && a.sym_size(-i) != 1 && b.sym_size(-i) != 1) return false;
    return true;
  }
};

template <class Op>
const auto& op() {
  static const auto op = handle<Tensor(const Tensor&, const Tensor&)>(Op::name);
  return op;
}

template <class Op>
Tensor forward(const Tensor& a, const Tensor& b);

template <class Op>
bool takes(const Tensor& a, const Tensor& b) {
  if (!native(Op::name, {&a, &b}, true)) return false;
  if (Op::valid(a, b)) return own_product(Op::name, {&a, &b}, [&] { forward<Op>(a, b); });
  note_fallback(Op::name, "shapes");
  return false;
}

// A row or a column seen as many, as the gradient of a sum is, becomes a matrix: the kernels would read it element by
// element (64 times 64x4096, backward: 1920 us, spread out 68).
Tensor spread_out(const Tensor& t) {
  const auto again = [&](int64_t d) { return t.dim() + d >= 0 && t.size(d) > 1 && t.stride(d) == 0; };
  return again(-1) || again(-2) ? contiguous(t) : t;
}

// a [..., m, k] (or [k]) times b [..., k, n] (or [k]), valid and native.
Tensor product(const char* name, const Tensor& a_, const Tensor& b_) {
  const Tensor a = spread_out(a_), b = spread_out(b_);
  const DType dtype = dtype_of(a);
  const int64_t k = a.size(-1);
  c10::SmallVector<int64_t, 8> sizes;
  Tensor keep;
  if (b.dim() <= 2) {  // all rows of a against one matrix
    sizes.assign(a.sizes().begin(), a.sizes().end() - 1);
    if (b.dim() == 2) sizes.push_back(b.size(1));
    Tensor out = fresh(sizes, a.options());
    if (out.numel() == 0) return out;
    const Matrix right = b.dim() == 2 ? matrix_of(b) : Matrix{b.const_data_ptr(), k, 1, k == 1 ? 1 : b.stride(0), 1};
    const Matrix left = a.dim() == 2 ? matrix_of(a) : rows_of(a, keep);
    Product{left, right, out.mutable_data_ptr(), dtype}.run(name, a);
    return out;
  }
  const Tensor left = a.dim() == 1 ? a.unsqueeze(0) : a;
  const auto a_batch = left.sizes().slice(0, left.dim() - 2), b_batch = b.sizes().slice(0, b.dim() - 2);
  const std::vector<int64_t> batch = at::infer_size(a_batch, b_batch);
  const int64_t count = c10::multiply_integers(batch);
  sizes.assign(batch.begin(), batch.end());
  if (a.dim() > 1) sizes.push_back(a.size(-2));
  sizes.push_back(b.size(-1));
  Tensor out = fresh(sizes, a.options());
  if (out.numel() == 0) return out;
  // One stride over all batch dimensions; a copy where there is none.
  const auto flatten = [&](const Tensor& t) {
    if (t.dim() == 3 && t.size(0) == count) return t;
    std::vector<int64_t> full(batch);
    full.insert(full.end(), {t.size(-2), t.size(-1)});
    return t.expand(full).reshape({count, t.size(-2), t.size(-1)});
  };
  const Tensor x = flatten(left), y = flatten(b);
  Product p{matrix_of(x), matrix_of(y), out.mutable_data_ptr(), dtype};
  p.batch = count, p.a_batch_stride = x.stride(0), p.b_batch_stride = y.stride(0);
  p.run(name, a);
  return out;
}

template <class Op>
Tensor forward(const Tensor& a, const Tensor& b) {
  return takes<Op>(a, b) ? product(Op::name, a, b) : Op::aten(a, b);
}

// Gradients of a @ b, by products of the same kind, so that any order of derivative follows. Each reads the other
// factor, which is not kept where only its own gradient is wanted; matmul keeps both shapes, for the sums over what was
// broadcast.
template <class Op>
struct ProductGrad {
  static constexpr const char* kName = Op::name;
  static constexpr size_t kTensors = 2;
  static variable_list backward(const Saved& s, const Tensor& g) {
    const Tensor &a = s.tensors[0], &b = s.tensors[1];
    Tensor grad_a, grad_b;
    if constexpr (__is_same(Op, Matmul)) {  // a product of two vectors: no matrices
      if (s.data[0].toSymIntVector().size() == 1 && s.data[1].toSymIntVector().size() == 1)
        return {s.wants(0) ? g * b : Tensor(), s.wants(1) ? g * a : Tensor()};
    }
    if constexpr (!__is_same(Op, Matmul)) {
      if (s.wants(0)) grad_a = op<Op>().call(g, b.mT());
      if (s.wants(1)) grad_b = op<Op>().call(a.mT(), g);
    } else {
      const auto a_sizes = s.data[0].toSymIntVector(), b_sizes = s.data[1].toSymIntVector();
      Tensor g2 = b_sizes.size() == 1 ? g.unsqueeze(-1) : g;
      if (a_sizes.size() == 1) g2 = g2.unsqueeze(-2);
      if (s.wants(0)) {
        const Tensor wide = op<Matmul>().call(g2, b.dim() == 1 ? b.unsqueeze(0) : b.mT());
        grad_a = at::sum_to(a_sizes.size() == 1 ? wide.squeeze(-2) : wide, a_sizes);
      }
      if (s.wants(1)) {
        const Tensor a2 = a.dim() == 1 ? a.unsqueeze(0) : a;
        if (b_sizes.size() <= 2) {  // one deep product instead of many products and a sum
          grad_b = op<Matmul>().call(as_rows(a2).t(), as_rows(g2));
          if (b_sizes.size() == 1) grad_b = grad_b.squeeze(-1);
        } else {
          grad_b = at::sum_to(op<Matmul>().call(a2.mT(), g2), b_sizes);
        }
      }
    }
    return {std::move(grad_a), std::move(grad_b)};
  }
};

template <class Op>
Tensor forward_autograd(const Tensor& a, const Tensor& b) {
  const bool differentiable = needs_grad({&a, &b});
  if (differentiable && !takes<Op>(a, b)) return Op::aten(a, b);
  Tensor out = below_autograd(op<Op>(), a, b);
  if (differentiable) {
    const auto node = record<ProductGrad<Op>>({}, a, b);
    if constexpr (__is_same(Op, Matmul)) node->data = {a.sym_sizes(), b.sym_sizes()};
    attach(out, node);
    if (b.requires_grad()) node->keep(0, a);
    if (a.requires_grad()) node->keep(1, b);
  }
  return out;
}

template <class Op, c10::DeviceType kDevice>
Tensor forward_autocast(const Tensor& a, const Tensor& b) {
  const NoAutocast guard(kDevice);
  return op<Op>().call(autocast_lower(a, kDevice), autocast_lower(b, kDevice));
}

// ---- addmm ---------------------------------------------------------------------------------------------------------

using at::Scalar;

const auto& addmm_op() {
  static const auto op =
      handle<Tensor(const Tensor&, const Tensor&, const Tensor&, const Scalar&, const Scalar&)>("addmm");
  return op;
}

Tensor addmm_forward(const Tensor& input, const Tensor& a, const Tensor& b, const Scalar& beta, const Scalar& alpha);

bool takes_addmm(const Tensor& input, const Tensor& a, const Tensor& b, const Scalar& beta, const Scalar& alpha) {
  if (!native("addmm", {&input, &a, &b}, true)) return false;
  const auto real = [](const Scalar& s) { return s.isFloatingPoint() || s.isIntegral(false); };
  bool ok = Mm::valid(a, b) && input.dim() <= 2 && real(beta) && real(alpha);
  if (ok && input.dim() >= 1) ok = input.sym_size(-1) == 1 || input.sym_size(-1) == b.sym_size(1);
  if (ok && input.dim() == 2) ok = input.sym_size(0) == 1 || input.sym_size(0) == a.sym_size(0);
  if (ok) return own_product("addmm", {&input, &a, &b}, [&] { addmm_forward(input, a, b, beta, alpha); });
  note_fallback("addmm", "shapes");
  return false;
}

Tensor addmm_forward(const Tensor& input, const Tensor& a, const Tensor& b, const Scalar& beta, const Scalar& alpha) {
  if (!takes_addmm(input, a, b, beta, alpha)) return at::addmm(input, a, b, beta, alpha);
  Tensor out = fresh({a.size(0), b.size(1)}, a.options());
  if (out.numel() == 0) return out;
  Product p{matrix_of(a), matrix_of(b), out.mutable_data_ptr(), dtype_of(a)};
  p.alpha = alpha.toDouble(), p.beta = beta.toDouble();
  if (p.alpha == 0) p.a.cols = p.b.rows = 0;  // ignores the product, NaN and all
  if (p.beta != 0) {                          // 0 ignores the input, NaN and all
    p.d = input.const_data_ptr();
    if (input.dim() >= 1 && input.size(-1) == b.size(1)) p.d_col_stride = b.size(1) == 1 ? 1 : input.stride(-1);
    if (input.dim() == 2 && input.size(0) > 1) p.d_row_stride = input.stride(0);
  }
  p.run("addmm", a);
  return out;
}

struct AddmmGrad {
  static constexpr const char* kName = "addmm";
  static constexpr size_t kTensors = 2;
  static variable_list backward(const Saved& s, const Tensor& g) {
    const auto scaled = [](const Tensor& t, const Scalar& by) { return by.toDouble() == 1 ? t : t * by; };
    const Scalar beta = s.data[3].toScalar(), alpha = s.data[4].toScalar();
    Tensor grad_input, grad_a, grad_b;
    if (s.wants(0)) {
      Tensor sum = g;
      if (s.data[1].toBool()) sum = sum.sum(0, true);
      if (s.data[2].toBool()) sum = sum.sum(1, true);
      for (int64_t d = s.data[0].toInt(); d < 2; ++d) sum = sum.squeeze(0);
      grad_input = scaled(sum, beta);
    }
    if (s.wants(1)) grad_a = scaled(op<Mm>().call(g, s.tensors[1].t()), alpha);
    if (s.wants(2)) grad_b = scaled(op<Mm>().call(s.tensors[0].t(), g), alpha);
    return {std::move(grad_input), std::move(grad_a), std::move(grad_b)};
  }
};

Tensor addmm_autograd(const Tensor& input, const Tensor& a, const Tensor& b, const Scalar& beta, const Scalar& alpha) {
  const bool differentiable = needs_grad({&input, &a, &b});
  if (differentiable && !takes_addmm(input, a, b, beta, alpha)) return at::addmm(input, a, b, beta, alpha);
  Tensor out = below_autograd(addmm_op(), input, a, b, beta, alpha);
  if (differentiable) {
    const bool one_row = input.dim() < 2 || input.sym_size(0) == 1,
               one_column = input.dim() < 1 || input.sym_size(-1) == 1;
    const auto node = record<AddmmGrad>({input.dim(), one_row, one_column, beta, alpha}, input, a, b);
    attach(out, node);
    if (b.requires_grad()) node->keep(0, a);
    if (a.requires_grad()) node->keep(1, b);
  }
  return out;
}

template <c10::DeviceType kDevice>
Tensor addmm_autocast(const Tensor& input, const Tensor& a, const Tensor& b, const Scalar& beta, const Scalar& alpha) {
  const NoAutocast guard(kDevice);
  return addmm_op().call(autocast_lower(input, kDevice), autocast_lower(a, kDevice), autocast_lower(b, kDevice), beta,
                         alpha);
}

// ---- registration --------------------------------------------------------------------------------------------------

TORCH_LIBRARY_FRAGMENT(fastnn, m) {
  m.def("mm(Tensor input, Tensor mat2) -> Tensor");
  m.def("bmm(Tensor input, Tensor mat2) -> Tensor");
  m.def("matmul(Tensor input, Tensor other) -> Tensor");
  m.def("addmm(Tensor input, Tensor mat1, Tensor mat2, *, Scalar beta=1, Scalar alpha=1) -> Tensor");
}

void register_kernels(torch::Library& m) {
  m.impl("mm", forward<Mm>);
  m.impl("bmm", forward<Bmm>);
  m.impl("matmul", forward<Matmul>);
  m.impl("addmm", addmm_forward);
}
TORCH_LIBRARY_IMPL(fastnn, CPU, m) { register_kernels(m); }
TORCH_LIBRARY_IMPL(fastnn, CUDA, m) { register_kernels(m); }

TORCH_LIBRARY_IMPL(fastnn, Autograd, m) {
  m.impl("mm", forward_autograd<Mm>);
  m.impl("bmm", forward_autograd<Bmm>);
  m.impl("matmul", forward_autograd<Matmul>);
  m.impl("addmm", addmm_autograd);
}

template <c10::DeviceType kDevice>
void register_autocast(torch::Library& m) {
  m.impl("mm", forward_autocast<Mm, kDevice>);
  m.impl("bmm", forward_autocast<Bmm, kDevice>);
  m.impl("matmul", forward_autocast<Matmul, kDevice>);
  m.impl("addmm", addmm_autocast<kDevice>);
}
TORCH_LIBRARY_IMPL(fastnn, AutocastCPU, m) { register_autocast<at::kCPU>(m); }
TORCH_LIBRARY_IMPL(fastnn, AutocastCUDA, m) { register_autocast<at::kCUDA>(m); }

template <class Op>
Tensor forward_transformed(const Tensor& a, const Tensor& b) {
  note_fallback(Op::name, kTransform);
  return Op::aten(a, b);
}
TORCH_LIBRARY_IMPL(fastnn, FuncTorchDynamicLayerFrontMode, m) {
  m.impl("mm", forward_transformed<Mm>);
  m.impl("bmm", forward_transformed<Bmm>);
  m.impl("matmul", forward_transformed<Matmul>);
  m.impl("addmm", [](const Tensor& input, const Tensor& a, const Tensor& b, const Scalar& beta, const Scalar& alpha) {
    note_fallback("addmm", kTransform);
    return at::addmm(input, a, b, beta, alpha);
  });
}

void bind(pybind11::module_& m) {
  def(m, "mm", [](const Tensor& a, const Tensor& b) { return op<Mm>().call(a, b); });
  def(m, "bmm", [](const Tensor& a, const Tensor& b) { return op<Bmm>().call(a, b); });
  def(m, "matmul", [](const Tensor& a, const Tensor& b) { return op<Matmul>().call(a, b); });
  def(m, "addmm", [](const Tensor& input, const Tensor& a, const Tensor& b, Scalar beta, Scalar alpha) {
    return addmm_op().call(input, a, b, beta, alpha);
  });
  m.def("gemm_algorithm", [](const Tensor& a, const Tensor& b) {
    return std::string(cpu::gemm_algorithm(Product{matrix_of(a), matrix_of(b), nullptr, dtype_of(a)}.params()));
  });
  m.def("gemm_workspace", [](const Tensor& a, const Tensor& b, int64_t batch) {
    GemmParams p = Product{matrix_of(a), matrix_of(b), nullptr, dtype_of(a)}.params();
    p.batch = batch;
    return cpu::gemm_workspace(p);
  });
}
const Bindings bindings(bind);

}  // namespace
}  // namespace fastnn::ops
