// Matrix products: every combination of transposed operands and result, biases, batches, odd sizes; column sums.
#include <cmath>

#include "../../csrc/kernels/epilogue.h"

#include "harness.h"

namespace {

using namespace fastnn;
using namespace harness;

struct Shape {
  int64_t batch, m, n, k;
};
constexpr Shape kShapes[] = {{1, 1, 1, 1}, {1, 5, 7, 3}, {2, 64, 64, 16}, {3, 17, 70, 33}, {1, 130, 65, 100}, {2, 4, 3, 0}};

void run_gemm(DType dtype, const Shape& s, int variant, bool tf32 = false) {
  const bool a_transposed = variant & 1, b_transposed = variant & 2, c_transposed = variant & 4;
  const Array a = normal(dtype, s.batch * s.m * s.k), b = normal(dtype, s.batch * s.k * s.n);
  const Array d = normal(dtype, s.batch * s.m * s.n);
  Array c = output(dtype, s.batch * s.m * s.n);
  c.tolerance = tf32 ? 1 << 15 : 32;  // tf32: operands of ten bits, sums that cancel
  GemmParams p{};
  p.tf32 = tf32;
  p.a = a.data(), p.b = b.data(), p.c = c.data();
  p.batch = s.batch, p.m = s.m, p.n = s.n, p.k = s.k, p.dtype = dtype, p.alpha = 1, p.beta = 1;
  p.a_stride_batch = s.m * s.k, p.a_stride_m = a_transposed ? 1 : s.k, p.a_stride_k = a_transposed ? s.m : 1;
  p.b_stride_batch = s.k * s.n, p.b_stride_k = b_transposed ? 1 : s.n, p.b_stride_n = b_transposed ? s.k : 1;
  p.c_stride_batch = s.m * s.n, p.c_stride_m = c_transposed ? 1 : s.n, p.c_stride_n = c_transposed ? s.m : 1;
  if (variant & 8) p.d = d.data(), p.d_stride_n = 1, p.relu = true;  // a bias of the first row
  if (variant == 9) p.d_stride_batch = s.m * s.n, p.d_stride_m = s.n, p.alpha = 0.5, p.beta = -2, p.relu = false;
  const auto cpu = [&] {
    GemmParams on_cpu = p;
    const Array workspace = index_output<char>(cpu::gemm_workspace(p) + 64);
    on_cpu.workspace = reinterpret_cast<void*>((uintptr_t(workspace.data()) + 63) / 64 * 64);
    return cpu::gemm(on_cpu);
  };
  check(std::string("gemm ") + name_of(dtype) + (tf32 ? " tf32" : "") + " " + std::to_string(s.m) + "x" + std::to_string(s.n) + "x" +
            std::to_string(s.k) + " variant " + std::to_string(variant),
        {&c}, cpu, [&] { return cuda::gemm(p, nullptr); });
}

void run() {
  for (DType dtype : kDTypes) {
    for (const Shape& s : kShapes)
      for (int variant = 0; variant < 16; ++variant) {
        run_gemm(dtype, s, variant);
        if (dtype == DType::f32 && variant % 5 == 0) run_gemm(dtype, s, variant, true);
      }
    for (bool tall : {false, true})
      for (auto [rows, columns] : {std::pair<int64_t, int64_t>{1, 1}, {300, 5}, {7, 70}, {0, 3}}) {
        const Array x = normal(dtype, rows * columns);
        Array y = output(dtype, columns);
        y.tolerance = 32;
        const ColumnSumParams p{x.data(), y.data(), rows, columns, tall ? 1 : columns, tall ? rows : 1, dtype};
        check(std::string("column_sum ") + name_of(dtype), {&y}, [&] { return cpu::column_sum(p); },
              [&] { return cuda::column_sum(p, nullptr); });
      }
  }
}

// Split float32 products where an operand or a product is infinite, huge or tiny: as a plain product has it.
void run_special() {
  constexpr int64_t kSize = 40;
  for (const double special : {double(INFINITY), -double(INFINITY), double(NAN), 3.4e38, 1e30, 1e-30}) {
    Array a = normal(DType::f32, kSize * kSize), b = normal(DType::f32, kSize * kSize);
    a.set(5 * kSize + 7, special), b.set(7 * kSize, 0);
    if (special != 3.4e38) b.set(3 * kSize + 2, special);  // two such terms may overflow in one order alone
    Array c = output(DType::f32, kSize * kSize);
    c.tolerance = 32;
    GemmParams p{};
    p.a = a.data(), p.b = b.data(), p.c = c.data();
    p.batch = 1, p.m = p.n = p.k = kSize, p.alpha = 1;
    p.a_stride_m = p.b_stride_k = p.c_stride_m = kSize, p.a_stride_k = p.b_stride_n = p.c_stride_n = 1;
    const auto plain = [&] {
      for (int64_t m = 0; m < kSize; ++m)
        for (int64_t n = 0; n < kSize; ++n) {
          double sum = 0;
          for (int64_t k = 0; k < kSize; ++k)
            sum += double(a.data<float>()[m * kSize + k]) * double(b.data<float>()[k * kSize + n]);
          c.data<float>()[m * kSize + n] = float(sum);
        }
      return Status::ok;
    };
    check("gemm of " + std::to_string(special), {&c}, plain, [&] { return cuda::gemm(p, nullptr); });
  }
}

// A residual, a bias and ReLU behind one product.
void run_epilogue() {
  for (DType dtype : kDTypes) {
    const int64_t m = 37, n = 70, k = 33;
    const Array a = normal(dtype, m * k), b = normal(dtype, k * n), d = normal(dtype, m * n), bias = normal(dtype, n);
    Array c = output(dtype, m * n), sum = normal(dtype, m * n);
    c.tolerance = 32;
    GemmParams p{};
    p.a = a.data(), p.b = b.data(), p.c = c.data(), p.d = d.data(), p.dtype = dtype;
    p.batch = 1, p.m = m, p.n = n, p.k = k, p.alpha = p.beta = 1;
    const Epilogue e{bias.data(), nullptr, true, 0, INFINITY};
    p.a_stride_m = k, p.b_stride_k = p.c_stride_m = p.d_stride_m = n;
    p.a_stride_k = p.b_stride_n = p.c_stride_n = p.d_stride_n = 1;
    const auto by_hand = [&] {
      for (int64_t i = 0; i < m; ++i)
        for (int64_t j = 0; j < n; ++j) {
          double y = d.at(i * n + j) + bias.at(j);
          for (int64_t l = 0; l < k; ++l) y += a.at(i * k + l) * b.at(l * n + j);
          sum.set(i * n + j, y > 0 ? y : 0);
        }
      std::memcpy(c.data(), sum.data(), size_t(sum.bytes()));
      return Status::ok;
    };
    check(std::string("gemm bias residual relu ") + name_of(dtype), {&c}, by_hand, [&] { return cuda::gemm(p, e, nullptr); });
  }
}

const Test gemm("gemm", run);
const Test special("gemm special values", run_special);
const Test epilogue("gemm epilogue", run_epilogue);

}  // namespace
