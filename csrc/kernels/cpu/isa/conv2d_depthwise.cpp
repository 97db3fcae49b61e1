// Depthwise convolution (one input and one output channel per group) with channels in the vector lanes.
//
// A band of rows of N channels is laid out [row][column][lane], padded (and, for the gradient of the input of a strided
// convolution, with the stride's zeros between grad_output's values); a transposition for NCHW, a copy for NHWC. Every
// image size then fills its vectors, padding costs no branch, and no sum crosses lanes.
#include "../../parallel.h"
#include "conv2d.h"
#include "conv2d_problem.h"
#include "packed_conv2d.h"
#include "transpose.h"

namespace fastnn::cpu::FASTNN_ISA_NS {
namespace {

constexpr int64_t kMaxTaps = 64;
constexpr int kBlock = 4;  // outputs of a row computed together

// The problem of channel 0 (its neighbours are xc, yk and weight_k apart), and how bands of it are laid out.
struct Depthwise {
  ConvProblem d;
  int64_t up_h, up_w;  // input values lie this far apart, zeros between
  int64_t channels;
  int64_t weight_k;
  int64_t columns, rows;  // of an input band
  int64_t band_p, bands;  // output rows per band, bands per image
  int64_t grad;           // byte offset of the output band behind the input band
  int64_t bytes;          // per worker
};

template <class S>
Depthwise plan(const Conv2dParams& p) {
  using A = acc_t<S>;
  constexpr int N = Vec<A>::N;
  constexpr int64_t kBandBytes = 192 << 10;
  Depthwise o{};
  o.up_h = o.up_w = 1;
  o.channels = p.C;
  o.weight_k = p.weight_stride_k;
  ConvProblem& d = o.d;
  if (p.pass != Conv2dPass::grad_input) {
    d.x = p.input;
    d.xn = p.input_stride_n, d.xc = p.input_stride_c, d.xh = p.input_stride_h, d.xw = p.input_stride_w;
    d.n = p.N, d.h = p.H, d.w = p.W;
    d.weight = p.weight;
    d.wr = p.weight_stride_r, d.ws = p.weight_stride_s;
    d.r = p.R, d.s = p.S;
    d.bias = p.bias;
    d.y = p.pass == Conv2dPass::forward ? p.output : const_cast<void*>(p.grad_output);
    d.yn = p.output_stride_n, d.yk = p.output_stride_k, d.yh = p.output_stride_p, d.yw = p.output_stride_q;
    d.p = p.P, d.q = p.Q;
    d.stride_h = p.stride_h, d.stride_w = p.stride_w, d.pad_h = p.pad_h, d.pad_w = p.pad_w;
    d.dil_h = p.dilation_h, d.dil_w = p.dilation_w;
  } else {
    d.x = p.grad_output;
    d.xn = p.output_stride_n, d.xc = p.output_stride_k, d.xh = p.output_stride_p, d.xw = p.output_stride_q;
    d.n = p.N, d.h = p.P, d.w = p.Q;
    d.weight = p.weight
                   ? static_cast<const S*>(p.weight) + (p.R - 1) * p.weight_stride_r + (p.S - 1) * p.weight_stride_s
                   : nullptr;
    d.wr = -p.weight_stride_r, d.ws = -p.weight_stride_s;
    d.r = p.R, d.s = p.S;
    d.y = p.grad_input;
    d.yn = p.input_stride_n, d.yk = p.input_stride_c, d.yh = p.input_stride_h, d.yw = p.input_stride_w;
    d.p = p.H, d.q = p.W;
    d.stride_h = d.stride_w = 1;
    d.dil_h = p.dilation_h, d.dil_w = p.dilation_w;
    d.pad_h = (p.R - 1) * p.dilation_h - p.pad_h, d.pad_w = (p.S - 1) * p.dilation_w - p.pad_w;
    o.up_h = p.stride_h, o.up_w = p.stride_w;
  }
  const auto input_rows = [&](int64_t rows) { return (rows - 1) * d.stride_h + (d.r - 1) * d.dil_h + 1; };
  // Blocks of outputs may read past the row's end.
  o.columns = (round_up(d.q, kBlock) - 1) * d.stride_w + (d.s - 1) * d.dil_w + 1 + 2 * N;
  const int64_t row_bytes = o.columns * N * int64_t(sizeof(A));
  o.band_p = d.p;
  while (o.band_p > 1 && input_rows(o.band_p) * row_bytes > kBandBytes) o.band_p = ceil_div(o.band_p, 2);
  o.bands = ceil_div(d.p, o.band_p);
  o.rows = input_rows(o.band_p);
  o.grad = round_up(o.rows * row_bytes, 64);
  // One output row, or for the weight's gradient the band of grad_output.
  const int64_t out_rows = p.pass == Conv2dPass::grad_weight ? o.band_p : 1;
  o.bytes = o.grad + round_up(out_rows * (round_up(d.q, kBlock) + N) * N * int64_t(sizeof(A)), 64);
  return o;
}

template <class A>
FASTNN_INLINE void zero(A* to, int64_t vectors) {
  for (int64_t i = 0; i < vectors; ++i) Vec<A>::zero().store(to + i * Vec<A>::N);
}

// Row `ih` of the (dilated) input, from column -pad_w on: to[column][lane].
template <class S, class A>
void fill_row(const Depthwise& o, const S* x, int64_t ih, int lanes, A* to) {
  using V = Vec<A>;
  constexpr int N = V::N;
  const ConvProblem& d = o.d;
  if (ih < 0 || ih % o.up_h != 0 || ih / o.up_h >= d.h) return zero(to, o.columns);
  const S* from = x + ih / o.up_h * d.xh;
  // Input columns first .. last land at pad_w + column * up_w.
  const int64_t first = d.pad_w >= 0 ? 0 : ceil_div(-d.pad_w, o.up_w);
  const int64_t last = max64(first, min64(d.w, ceil_div(max64(0, o.columns - N - d.pad_w), o.up_w)));
  const int64_t start = d.pad_w + first * o.up_w;
  if (o.up_w > 1) zero(to, o.columns);
  else zero(to, start);
  for (int64_t i = first; i < last; i += N) {
    const int pixels = int(min64(N, last - i));
    A* at = to + (d.pad_w + i * o.up_w) * N;
    if (d.xc == 1 || o.up_w > 1) {
      alignas(64) A block[N * N];
      if (d.xc == 1)
        for (int j = 0; j < pixels; ++j)
          (lanes == N ? V::load(from + (i + j) * d.xw) : V::load_n(from + (i + j) * d.xw, lanes))
              .store(at + j * o.up_w * N);
      else {
        transpose_block(from + i * d.xw, d.xc, d.xw, lanes, pixels, block);
        for (int j = 0; j < pixels; ++j) V::load(block + j * N).store(at + j * o.up_w * N);
      }
    } else {
      transpose_block(from + i * d.xw, d.xc, d.xw, lanes, pixels, at);
    }
  }
  if (o.up_w == 1) zero(to + (d.pad_w + last) * N, o.columns - d.pad_w - last);
}

template <class S, class A>
void fill_band(const Depthwise& o, const S* x, int64_t p0, int64_t rows, int lanes, A* band) {
  const ConvProblem& d = o.d;
  const int64_t count = (rows - 1) * d.stride_h + (d.r - 1) * d.dil_h + 1;
  for (int64_t i = 0; i < count; ++i)
    fill_row<S, A>(o, x, p0 * d.stride_h - d.pad_h + i, lanes, band + i * o.columns * Vec<A>::N);
}

// kBlock outputs of a row; kR x kS when known at compile time (0: any).
template <class A, int kR, int kS, int kStride>
FASTNN_INLINE void forward_block(const ConvProblem& d, int64_t row, const A* from, const A* w,
                                 typename Vec<A>::Raw acc[kBlock]) {
  using V = Vec<A>;
  constexpr int N = V::N;
  const int64_t R = kR ? kR : d.r, S = kS ? kS : d.s, step = (kStride ? kStride : d.stride_w) * N;
#pragma GCC unroll 3
  for (int64_t r = 0; r < R; ++r)
#pragma GCC unroll 3
    for (int64_t s = 0; s < S; ++s) {
      const typename V::Raw a = V::load(w + (r * S + s) * N).v;
      const A* at = from + r * d.dil_h * row + s * (kStride ? 1 : d.dil_w) * N;
#pragma GCC unroll 4
      for (int j = 0; j < kBlock; ++j) acc[j] += a * V::load(at + j * step).v;
    }
}

template <class A, int kR, int kS, int kStride>
void forward_row(const Depthwise& o, const A* band, const A* w, Vec<A> bias, A* out) {
  using V = Vec<A>;
  constexpr int N = V::N;
  const ConvProblem& d = o.d;
  for (int64_t q = 0; q < d.q; q += kBlock) {
    typename V::Raw acc[kBlock];
#pragma GCC unroll 4
    for (int j = 0; j < kBlock; ++j) acc[j] = bias.v;
    forward_block<A, kR, kS, kStride>(d, o.columns * N, band + q * d.stride_w * N, w, acc);
#pragma GCC unroll 4
    for (int j = 0; j < kBlock; ++j) V{acc[j]}.store(out + (q + j) * N);
  }
}

template <class S, class A>
void store_out(const ConvProblem& d, const A* row, int lanes, S* y) {
  using V = Vec<A>;
  constexpr int N = V::N;
  if (d.yk == 1) {
    for (int64_t q = 0; q < d.q; ++q) {
      const V v = V::load(row + q * N);
      if (lanes == N) v.store(y + q * d.yw);
      else v.store_n(y + q * d.yw, lanes);
    }
  } else {
    for (int64_t q = 0; q < d.q; q += N)
      untranspose_block(row + q * N, y + q * d.yw, d.yk, d.yw, lanes, int(min64(N, d.q - q)));
  }
}

// acc[tap] += sum over the band of grad_output times the input it meets.
template <class A, int kR, int kS, int kStride>
void grad_row(const Depthwise& o, const A* band, const A* g, A* acc) {
  using V = Vec<A>;
  constexpr int N = V::N;
  const ConvProblem& d = o.d;
  const int64_t R = kR ? kR : d.r, S = kS ? kS : d.s, stride = kStride ? kStride : d.stride_w;
#pragma GCC unroll 3
  for (int64_t r = 0; r < R; ++r) {
    const A* from = band + r * d.dil_h * o.columns * N;
#pragma GCC unroll 3
    for (int64_t s = 0; s < S; ++s) {
      const A* at = from + s * (kStride ? 1 : d.dil_w) * N;
      // Four sums: one would wait for its own addition.
      typename V::Raw sum[kBlock] = {};
      for (int64_t q = 0; q < d.q; q += kBlock)
#pragma GCC unroll 4
        for (int j = 0; j < kBlock; ++j) sum[j] += V::load(g + (q + j) * N).v * V::load(at + (q + j) * stride * N).v;
      A* to = acc + (r * S + s) * N;
      V{V::load(to).v + ((sum[0] + sum[1]) + (sum[2] + sum[3]))}.store(to);
    }
  }
}

template <class S>
void run_forward(const Conv2dParams& p, const Depthwise& o, int64_t workers) {
  using A = acc_t<S>;
  using V = Vec<A>;
  constexpr int N = V::N;
  const ConvProblem& d = o.d;
  const int64_t groups = ceil_div(o.channels, N), items = d.n * groups * o.bands;
  const bool three = d.r == 3 && d.s == 3 && d.dil_w == 1;
  const auto row_fn = three && d.stride_w == 1   ? forward_row<A, 3, 3, 1>
                      : three && d.stride_w == 2 ? forward_row<A, 3, 3, 2>
                                                 : forward_row<A, 0, 0, 0>;
  parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      A* band = reinterpret_cast<A*>(static_cast<char*>(p.workspace) + worker * o.bytes);
      A* out = reinterpret_cast<A*>(reinterpret_cast<char*>(band) + o.grad);
      for (int64_t item = items * worker / workers; item < items * (worker + 1) / workers; ++item) {
        const int64_t b = item % o.bands, c = item / o.bands % groups * N, n = item / o.bands / groups;
        const int lanes = int(min64(N, o.channels - c));
        alignas(64) A w[kMaxTaps * N], bias[N] = {};
        for (int64_t r = 0; r < d.r; ++r)
          for (int64_t s = 0; s < d.s; ++s) {
            const S* from = static_cast<const S*>(d.weight) + c * o.weight_k + r * d.wr + s * d.ws;
            A* to = w + (r * d.s + s) * N;
            for (int l = 0; l < N; ++l) to[l] = l < lanes ? to_acc(from[l * o.weight_k]) : A(0);
          }
        if (d.bias)
          for (int l = 0; l < lanes; ++l) bias[l] = to_acc(static_cast<const S*>(d.bias)[c + l]);
        const int64_t p0 = b * o.band_p, rows = min64(o.band_p, d.p - p0);
        fill_band<S, A>(o, static_cast<const S*>(d.x) + n * d.xn + c * d.xc, p0, rows, lanes, band);
        S* y = static_cast<S*>(d.y) + n * d.yn + c * d.yk + p0 * d.yh;
        for (int64_t row = 0; row < rows; ++row) {
          row_fn(o, band + row * d.stride_h * o.columns * N, w, V::load(bias), out);
          store_out<S, A>(d, out, lanes, y + row * d.yh);
        }
      }
    }
  });
}

template <class S>
void run_grad_weight(const Conv2dParams& p, const Depthwise& o, int64_t workers) {
  using A = acc_t<S>;
  constexpr int N = Vec<A>::N;
  const ConvProblem& d = o.d;
  const int64_t groups = ceil_div(o.channels, N), g_columns = round_up(d.q, kBlock) + N;
  const bool three = d.r == 3 && d.s == 3 && d.dil_w == 1;
  const auto row_fn = three && d.stride_w == 1   ? grad_row<A, 3, 3, 1>
                      : three && d.stride_w == 2 ? grad_row<A, 3, 3, 2>
                                                 : grad_row<A, 0, 0, 0>;
  // grad_output's rows, without padding.
  Depthwise grad{};
  grad.up_h = grad.up_w = 1;
  grad.columns = g_columns;
  grad.d.xc = d.yk, grad.d.xh = d.yh, grad.d.xw = d.yw, grad.d.h = d.p, grad.d.w = d.q;
  parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      A* band = reinterpret_cast<A*>(static_cast<char*>(p.workspace) + worker * o.bytes);
      A* g = reinterpret_cast<A*>(reinterpret_cast<char*>(band) + o.grad);
      for (int64_t group = groups * worker / workers; group < groups * (worker + 1) / workers; ++group) {
        const int64_t c = group * N;
        const int lanes = int(min64(N, o.channels - c));
        alignas(64) A acc[kMaxTaps * N] = {};
        for (int64_t n = 0; n < d.n; ++n)
          for (int64_t b = 0; b < o.bands; ++b) {
            const int64_t p0 = b * o.band_p, rows = min64(o.band_p, d.p - p0);
            fill_band<S, A>(o, static_cast<const S*>(d.x) + n * d.xn + c * d.xc, p0, rows, lanes, band);
            const S* from = static_cast<const S*>(d.y) + n * d.yn + c * d.yk;
            for (int64_t row = 0; row < rows; ++row) {
              fill_row<S, A>(grad, from, p0 + row, lanes, g + row * g_columns * N);
              row_fn(o, band + row * d.stride_h * o.columns * N, g + row * g_columns * N, acc);
            }
          }
        for (int64_t r = 0; r < d.r; ++r)
          for (int64_t s = 0; s < d.s; ++s)
            for (int l = 0; l < lanes; ++l)
              static_cast<S*>(p.grad_weight)[(c + l) * o.weight_k + r * d.wr + s * d.ws] =
                  from_acc<S>(acc[(r * d.s + s) * N + l]);
      }
    }
  });
}

// Float32 images whose channels lie together need no band: the kernel of frozen models reads them in place, on a weight
// packed for this call. Forward, and the gradient of the input of stride 1 (the same with the weight flipped).
bool in_place(const Conv2dParams& p) {
  return p.dtype == DType::f32 && p.input_stride_c == 1 && p.output_stride_k == 1 && p.C > 1 &&
         (p.pass == Conv2dPass::forward ||
          (p.pass == Conv2dPass::grad_input && p.stride_h == 1 && p.stride_w == 1 &&
           (p.R - 1) * p.dilation_h >= p.pad_h && (p.S - 1) * p.dilation_w >= p.pad_w));
}

PackedConv2dParams as_packed(const Conv2dParams& p) {
  PackedConv2dParams o{};
  const bool forward = p.pass == Conv2dPass::forward;
  o.N = p.N, o.C = o.K = o.groups = p.C, o.R = p.R, o.S = p.S;
  o.stride_h = p.stride_h, o.stride_w = p.stride_w, o.dilation_h = p.dilation_h, o.dilation_w = p.dilation_w;
  o.weight_stride_k = p.weight_stride_k, o.weight_stride_c = p.weight_stride_c;
  o.input_stride_c = 1;
  o.low = -__builtin_inff(), o.high = __builtin_inff();
  const float* weight = static_cast<const float*>(p.weight);
  if (forward) {
    o.input = static_cast<const float*>(p.input), o.output = static_cast<float*>(p.output);
    o.weight = weight, o.bias = static_cast<const float*>(p.bias);
    o.H = p.H, o.W = p.W, o.P = p.P, o.Q = p.Q, o.pad_h = p.pad_h, o.pad_w = p.pad_w;
    o.weight_stride_r = p.weight_stride_r, o.weight_stride_s = p.weight_stride_s;
    o.input_stride_n = p.input_stride_n, o.input_stride_h = p.input_stride_h, o.input_stride_w = p.input_stride_w;
    o.output_stride_n = p.output_stride_n, o.output_stride_h = p.output_stride_p, o.output_stride_w = p.output_stride_q;
  } else {
    o.input = static_cast<const float*>(p.grad_output), o.output = static_cast<float*>(p.grad_input);
    o.weight = weight ? weight + (p.R - 1) * p.weight_stride_r + (p.S - 1) * p.weight_stride_s : nullptr;
    o.H = p.P, o.W = p.Q, o.P = p.H, o.Q = p.W;
    o.pad_h = (p.R - 1) * p.dilation_h - p.pad_h, o.pad_w = (p.S - 1) * p.dilation_w - p.pad_w;
    o.weight_stride_r = -p.weight_stride_r, o.weight_stride_s = -p.weight_stride_s;
    o.input_stride_n = p.output_stride_n, o.input_stride_h = p.output_stride_p, o.input_stride_w = p.output_stride_q;
    o.output_stride_n = p.input_stride_n, o.output_stride_h = p.input_stride_h, o.output_stride_w = p.input_stride_w;
  }
  o.packed = static_cast<float*>(p.workspace);
  return o;
}

}  // namespace

// ---- launchers -----------------------------------------------------------------------------------------------------

int64_t conv2d_depthwise_workspace(const Conv2dParams& p) {
  if (depthwise_3x3_grad_takes(p)) return depthwise_3x3_grad_workspace(p);
  if (in_place(p)) return packed_depthwise_bytes(as_packed(p));
  if (depthwise_rows_take(p)) return 0;
  int64_t bytes = 0;
  dispatch_dtype(p.dtype, [&](auto tag) {
    bytes = num_threads() * plan<typename decltype(tag)::type>(p).bytes;
    return Status::ok;
  });
  return bytes;
}

Status conv2d_depthwise(const Conv2dParams& p) {
  if (depthwise_3x3_grad_takes(p)) return depthwise_3x3_grad(p), Status::ok;
  if (in_place(p)) {
    const PackedConv2dParams packed = as_packed(p);
    packed_depthwise_pack(packed);
    packed_depthwise_run(packed);
    return Status::ok;
  }
  if (depthwise_rows_take(p)) return depthwise_rows(p), Status::ok;
  return dispatch_dtype(p.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    const Depthwise o = plan<S>(p);
    if (p.pass == Conv2dPass::grad_weight) run_grad_weight<S>(p, o, num_threads());
    else run_forward<S>(p, o, num_threads());
    return Status::ok;
  });
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
