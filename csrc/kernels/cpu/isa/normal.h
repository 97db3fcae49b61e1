// The normal distribution function and the derivative of gelu(x) = x normal_cdf(x). Both are f(x) = 1 - f(-x): what is
// approximated is the tail f(-|x|), with a small relative error far out. tests/test_activation.py states the bounds.
// S is the type the result is stored in.
#pragma once
#include "math.h"

namespace fastnn::cpu::FASTNN_ISA_NS {

template <class A>
FASTNN_INLINE Vec<A> from_tail(Vec<A> x, typename Vec<A>::Raw tail) {
  return {x.v < A(0) ? tail : A(1) - tail};
}

template <class A>
FASTNN_INLINE Vec<A> normal_pdf(Vec<A> x) {
  return {A(0.39894228040143267794) * exp(Vec<A>{x.v * x.v * A(-0.5)}).v};
}

#if defined(__AVX512F__)
// A register holds one coefficient of 16 intervals. Sixteen short polynomials beat one long one: a vector's dependent
// steps, times its instructions, have to fit the CPU's window (0.30 ns an element with the AVX2 formula below).
constexpr int kIntervals = 16;
constexpr float kIntervalWidth = 27.f / 64;  // exact, so that z minus an interval's centre is too

// Coefficients by power and interval, in the distance from the centre; nothing is left beyond z = 6.1.
constexpr float kNormalTail[7][kIntervals] = {
    {0.5f, 0.336558133f, 0.199404567f, 0.102823682f, 0.0457536243f, 0.0174561124f, 0.00568284048f, 0.00157287274f,
     0.000369078451f, 7.32658154e-05f, 1.22830243e-05f, 1.73678495e-06f, 2.06897028e-07f, 2.07466879e-08f,
     1.74991366e-09f, 0.f},
    {-0.398942262f, -0.364974499f, -0.279460162f, -0.179094478f, -0.0960615054f, -0.0431242399f, -0.016203111f,
     -0.00509542413f, -0.00134111894f, -0.000295433303f, -5.44699651e-05f, -8.40544362e-06f, -1.08560198e-06f,
     -1.17351284e-07f, -1.06172831e-08f, 0.f},
    {0.f, 0.0769868046f, 0.11789725f, 0.113333218f, 0.0810518935f, 0.0454825982f, 0.0205070656f, 0.00752371317f,
     0.00226313784f, 0.000560861139f, 0.000114897251f, 1.9503128e-05f, 2.74789409e-06f, 3.21791589e-07f,
     3.13528972e-08f, 0.f},
    {0.0664883405f, 0.050001882f, 0.0134190219f, -0.0179619845f, -0.0295809563f, -0.0247929245f, -0.0146027589f,
     -0.00655709393f, -0.00232249801f, -0.000660549325f, -0.000152464578f, -2.87563871e-05f, -4.45306569e-06f,
     -5.68100347e-07f, -5.98600067e-08f, 0.f},
    {0.f, -0.018104298f, -0.0224795118f, -0.0132052749f, -0.00102930318f, 0.00549364323f, 0.00582273956f,
     0.00358697679f, 0.00158245896f, 0.000533576182f, 0.000141678625f, 3.01207856e-05f, 5.18046954e-06f,
     7.25813948e-07f, 8.32473646e-08f, 0.f},
    {-0.0098816026f, -0.00593091594f, 0.00173880788f, 0.00597453024f, 0.00476279436f, 0.00141679274f, -0.000737571623f,
     -0.00112707028f, -0.000720337674f, -0.000308423856f, -9.80813857e-05f, -2.41642902e-05f, -4.71547628e-06f,
     -7.38652773e-07f, -9.37003719e-08f, 0.f},
    {0.f, 0.00280821952f, 0.00272850855f, 0.000493051775f, -0.00119385647f, -0.00121904223f, -0.000459286064f,
     7.67981983e-05f, 0.000192510561f, 0.000122640529f, 4.94132437e-05f, 1.44521691e-05f, 3.23190807e-06f,
     5.67345978e-07f, 7.94089914e-08f, 0.f},
};
constexpr float kGeluTail[7][kIntervals] = {
    {0.5f, 0.182584509f, -0.0363899432f, -0.123842753f, -0.116350159f, -0.0735090822f, -0.0353312939f, -0.0134745548f,
     -0.00415719766f, -0.00104845641f, -0.000217511406f, -3.72694267e-05f, -5.28887631e-06f, -6.22832999e-07f,
     -6.09552586e-08f, 0.f},
    {-0.797884464f, -0.664991379f, -0.359968752f, -0.0713142827f, 0.0814271346f, 0.105631262f, 0.0714108124f,
     0.0342460796f, 0.012593939f, 0.00366817112f, 0.000860505621f, 0.000164202764f, 2.56513486e-05f, 3.2949863e-06f,
     3.4912938e-07f, 0.f},
    {0.f, 0.294245213f, 0.387656271f, 0.271794975f, 0.0933996588f, -0.020442741f, -0.0493651628f, -0.0355190597f,
     -0.016726004f, -0.00584207429f, -0.00158533442f, -0.000341994775f, -5.94338308e-05f, -8.39177483e-06f,
     -9.68291943e-07f, 0.f},
    {0.265945196f, 0.16945377f, -0.0221871827f, -0.138694748f, -0.125271872f, -0.0528215989f, 0.000542990514f,
     0.0161430165f, 0.012073664f, 0.00546167092f, 0.00178097002f, 0.000444063044f, 8.70774093e-05f, 1.36456765e-05f,
     1.72633634e-06f, 0.f},
    {0.f, -0.103117891f, -0.104884267f, -0.0278249551f, 0.0352215879f, 0.0422471873f, 0.0195288658f, 0.00117636926f,
     -0.00423396239f, -0.00314330636f, -0.00133082049f, -0.000397996424f, -8.99669903e-05f, -1.5867161e-05f,
     -2.2228819e-06f, 0.f},
    {-0.0591067001f, -0.0284152888f, 0.0241317041f, 0.0394813567f, 0.0164944995f, -0.00687125698f, -0.0113736009f,
     -0.00540681416f, -0.000434017362f, 0.0009393238f, 0.000662251899f, 0.000258057349f, 7.02096877e-05f,
     1.4337701e-05f, 2.27304758e-06f, 0.f},
    {0.f, 0.0211908985f, 0.015899308f, -0.00362490094f, -0.0116244154f, -0.00558888027f, 0.00127663487f, 0.00263339444f,
     0.0011780475f, 6.68629364e-05f, -0.000187831509f, -0.00011615632f, -4.01638463e-05f, -9.68276981e-06f,
     -1.74691093e-06f, 0.f},
};

// The fit of |x|'s interval, at z: |x|, or |x| held below infinity. For results of 16 bits its first five terms do.
template <class S>
FASTNN_INLINE f32v piecewise(const float (&k)[7][kIntervals], Vec<float> x, Vec<float> z) {
  using V = Vec<float>;
  const f32v magic = V::set1(0x1.8p23f).v;  // adding it leaves the integer in the low mantissa bits
  const f32v c = min(V::set1((kIntervals - 1) * kIntervalWidth), abs(x)).v * (1 / kIntervalWidth) + magic;
  const f32v u = z.v - (c - magic) * kIntervalWidth;
  const auto of_interval = [&](int power) { return _mm512_permutexvar_ps((__m512i)c, V::load(k[power]).v); };
  constexpr int kDegree = sizeof(S) == 2 ? 4 : 6;
  f32v p = of_interval(kDegree);
#pragma GCC unroll 6
  for (int power = kDegree - 1; power >= 0; --power) p = p * u + of_interval(power);
  return p;
}

template <class S>
FASTNN_INLINE Vec<float> normal_cdf(Vec<float> x) {
  const Vec<float> z = min(Vec<float>::set1(100.f), abs(x));  // NaN stays
  return from_tail(x, piecewise<S>(kNormalTail, x, z));
}
template <class S>
FASTNN_INLINE Vec<float> gelu_derivative(Vec<float> x) {
  return from_tail(x, piecewise<S>(kGeluTail, x, abs(x)));  // NaN at infinity, as torch's
}
#else
// log2 of the tail is smooth: a fit of degree 10 on [0, 6.5], falling steeply beyond; 2^f by a fit of degree 6.
template <class S>
FASTNN_INLINE Vec<float> normal_cdf(Vec<float> a) {
  using V = Vec<float>;
  const f32v z = min(V::set1(12.5f), abs(a)).v;  // where Q has long become 0; NaN stays
  f32v q = z * -0x1.4fbec8p-26f + 0x1.5367f0p-21f;
  q = q * z - 0x1.22febap-17f;
  q = q * z + 0x1.0c11c6p-14f;
  q = q * z - 0x1.f5db04p-13f;
  q = q * z - 0x1.483362p-14f;
  q = q * z + 0x1.cd287cp-8f;
  q = q * z - 0x1.ae11f2p-5f;
  q = q * z - 0x1.d6393ap-2f;
  q = q * z - 0x1.26aee8p+0f;
  q = q * z - 0x1.fffffep-1f;
  const f32v magic = V::set1(0x1.8p23f).v;
  const f32v n = (q + magic) - magic, f = q - n;
  f32v p = f * 0.000154531828f + 0.00133908863f;
  p = p * f + 0.00961808252f;
  p = p * f + 0.0555035707f;
  p = p * f + 0.240226508f;
  p = p * f + 0.693147188f;
  p = p * f + 1.f;
  const f32v tail = scale2(p, n).v;
  return from_tail(a, tail);
}

template <class S>
FASTNN_INLINE Vec<float> gelu_derivative(Vec<float> x) {
  return fma(x, normal_pdf(x), normal_cdf<S>(x));
}
#endif

// The tail is exp(-z^2 / 2) P(z) / D(z), a rational fit on [0, 10] whose coefficients are all positive.
template <class S>
FASTNN_INLINE Vec<double> normal_cdf(Vec<double> a) {
  using V = Vec<double>;
  const f64v z = min(V::set1(40.), abs(a)).v;  // NaN stays
  f64v p = z * 0.0000153792936421095763 + 0.000364682563698909791;
  p = p * z + 0.00403057626430728758;
  p = p * z + 0.0267956149684204153;
  p = p * z + 0.115788837306347828;
  p = p * z + 0.327636535268748696;
  p = p * z + 0.570818465199466312;
  p = p * z + 0.5;
  f64v d = z * 0.000038550230663812562 + 0.000914120350238713478;
  d = d * z + 0.0101417953820222763;
  d = d * z + 0.0680792143043169756;
  d = d * z + 0.300285446288304386;
  d = d * z + 0.886406165200420598;
  d = d * z + 1.70278732371277753;
  d = d * z + 1.93952149120179762;
  d = d * z + 1.;
  const f64v tail = exp(V{a.v * a.v * -0.5}).v * (p / d);
  return from_tail(a, tail);
}

template <class S>
FASTNN_INLINE Vec<double> gelu_derivative(Vec<double> x) {
  return fma(x, normal_pdf(x), normal_cdf<S>(x));
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
