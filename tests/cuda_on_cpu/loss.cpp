// Cross-entropy and negative log likelihood: rows and columns, every kind of target, weights, smoothing, ignored rows.
#include "../../csrc/kernels/cross_entropy.h"
#include "../../csrc/kernels/nll_loss.h"
#include "harness.h"

namespace {

using namespace fastnn;
using namespace harness;

struct Shape {
  int64_t outer, classes, inner;
};
constexpr Shape kShapes[] = {{1, 1, 1}, {19, 10, 1}, {3, 1000, 1}, {3, 1104, 1}, {2, 1061, 1}, {3, 7, 5}, {1, 4, 300}};

Array targets(TargetKind kind, DType dtype, const Shape& s) {
  if (kind == TargetKind::uint8) return indices<uint8_t>(s.outer * s.inner, min64(s.classes, 200));
  if (kind == TargetKind::int64) return indices<int64_t>(s.outer * s.inner, s.classes);
  return uniform(dtype, s.outer * s.classes * s.inner, 0, 2.0 / double(s.classes));
}

std::string name_of(const char* op, DType dtype, const Shape& s, TargetKind kind, Reduction reduction) {
  return std::string(op) + harness::name_of(dtype) + " " + std::to_string(s.outer) + "x" + std::to_string(s.classes) +
         "x" + std::to_string(s.inner) + " target " + std::to_string(int(kind)) + " reduction " +
         std::to_string(int(reduction));
}

void run_cross_entropy(DType dtype, const Shape& s, TargetKind kind, Reduction reduction, bool weighted,
                       double smoothing) {
  const DType acc = dtype == DType::f64 ? DType::f64 : DType::f32;
  const int64_t rows = s.outer * s.inner, n = rows * s.classes;
  const bool reduced = reduction != Reduction::none;
  const Array x = normal(dtype, n), weight = uniform(dtype, s.classes, 0.5, 1.5), target = targets(kind, dtype, s);
  const Array g = uniform(dtype, reduced ? 1 : rows, 0.5, 1.5);
  Array loss = output(dtype, reduced ? 1 : rows), stats = output(acc, 2 * rows + 1);
  Array dx = output(dtype, n), dt = output(dtype, n);
  for (Array* a : {&loss, &dx, &dt}) a->tolerance = 32;
  CrossEntropyParams p{};
  p.input = x.data(), p.target = target.data(), p.weight = weighted ? weight.data() : nullptr, p.loss = loss.data();
  p.stats = stats.data(), p.grad_output = g.data(), p.grad_input = dx.data();
  p.outer = s.outer, p.classes = s.classes, p.inner = s.inner, p.ignore_index = s.classes > 3 ? 1 : -100;
  p.label_smoothing = smoothing, p.target_kind = kind, p.reduction = reduction, p.dtype = dtype;
  const std::string name = name_of("cross_entropy ", dtype, s, kind, reduction);
  const auto with_partials = [&](int64_t blocks, auto run) {
    CrossEntropyParams q = p;
    const Array partials = output(acc, 2 * blocks);
    q.partials = partials.data();
    return run(q);
  };
  const auto forward = [&] {
    return with_partials(loss_blocks(p.outer, p.classes, p.inner),
                         [](auto& q) { return cpu::cross_entropy_forward(q); });
  };
  check(name, {&loss}, forward, [&] {
    return with_partials(cuda::cross_entropy_blocks(p),
                         [](auto& q) { return cuda::cross_entropy_forward(q, nullptr); });
  });
  // Backward of each from its own forward's stats.
  std::vector<Array*> written{&dx};
  if (kind == TargetKind::probabilities) p.grad_target = dt.data(), written.push_back(&dt);
  check(
      name + " backward", written,
      [&] {
        forward();
        return cpu::cross_entropy_backward(p);
      },
      [&] {
        with_partials(cuda::cross_entropy_blocks(p), [](auto& q) { return cuda::cross_entropy_forward(q, nullptr); });
        return cuda::cross_entropy_backward(p, nullptr);
      });
}

void run_nll(DType dtype, const Shape& s, TargetKind kind, Reduction reduction, bool weighted) {
  const DType acc = dtype == DType::f64 ? DType::f64 : DType::f32;
  const int64_t rows = s.outer * s.inner, n = rows * s.classes;
  const bool reduced = reduction != Reduction::none;
  const Array x = uniform(dtype, n, -3, 0), weight = uniform(dtype, s.classes, 0.5, 1.5);
  const Array target = targets(kind, dtype, s), g = uniform(dtype, reduced ? 1 : rows, 0.5, 1.5);
  Array loss = output(dtype, reduced ? 1 : rows), total = output(acc, 1), dx = output(dtype, n);
  NllLossParams p{};
  p.input = x.data(), p.target = target.data(), p.weight = weighted ? weight.data() : nullptr, p.loss = loss.data();
  p.total_weight = total.data(), p.grad_output = g.data(), p.grad_input = dx.data();
  p.outer = s.outer, p.classes = s.classes, p.inner = s.inner, p.ignore_index = s.classes > 3 ? 1 : -100;
  p.target_kind = kind, p.reduction = reduction, p.dtype = dtype;
  p.height = s.inner % 2 ? 1 : 2, p.width = s.inner / p.height, p.x_stride_n = s.classes * s.inner;
  p.x_stride_class = weighted ? 1 : s.inner, p.x_stride_w = weighted ? s.classes : 1;  // classes last or planes
  p.x_stride_h = p.width * p.x_stride_w;
  loss.tolerance = total.tolerance = 64;  // sums of either sign, in another order
  const std::string name = name_of("nll_loss ", dtype, s, kind, reduction);
  check(
      name, {&loss, &total}, [&] { return cpu::nll_loss_forward(p); },
      [&] { return cuda::nll_loss_forward(p, nullptr); });
  cpu::nll_loss_forward(p);
  check(
      name + " backward", {&dx}, [&] { return cpu::nll_loss_backward(p); },
      [&] { return cuda::nll_loss_backward(p, nullptr); });
}

void run() {
  for (DType dtype : kDTypes)
    for (const Shape& s : kShapes)
      for (TargetKind kind : {TargetKind::int64, TargetKind::uint8, TargetKind::probabilities})
        for (Reduction reduction : {Reduction::none, Reduction::mean, Reduction::sum}) {
          // Every combination in float32; in the other types every kind of target and every reduction.
          if (dtype != DType::f32 && (int(kind) + int(reduction) + (&s - kShapes)) % 3) continue;
          const bool odd = (int(kind) + int(reduction)) % 2;
          run_cross_entropy(dtype, s, kind, reduction, odd, odd ? 0 : 0.1);
          run_cross_entropy(dtype, s, kind, reduction, !odd, odd ? 0 : 0.1);
          if (kind != TargetKind::probabilities) run_nll(dtype, s, kind, reduction, odd);
        }
}

const Test loss("loss", run);

}  // namespace
