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

// The polynomials in z whose coefficients are given from the highest power on.
template <int K, int N, class A, class Raw>
FASTNN_INLINE void evaluate(const A (&coefficients)[N], const Raw* z, Raw* p) {
  each<K>([&](int k) { p[k] = z[k] * coefficients[0] + coefficients[1]; });
#pragma GCC unroll 10
  for (int i = 2; i < N; ++i) each<K>([&](int k) { p[k] = p[k] * z[k] + coefficients[i]; });
}

#if defined(__AVX512F__)
// A register holds one coefficient of 16 intervals. Sixteen short polynomials beat one long one: 0.15 ns an element,
// 0.30 with the baseline's formula below.
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

// The fits of |x|'s intervals, at z: |x|, or |x| held below infinity. For results of 16 bits their first five terms do.
template <class S, int K>
FASTNN_INLINE void piecewise(const float (&power)[7][kIntervals], const Vec<float>* x, const Vec<float>* z, f32v* p) {
  using V = Vec<float>;
  const f32v magic = V::set1(0x1.8p23f).v;  // adding it leaves the integer in the low mantissa bits
  f32v c[K], u[K];
  each<K>([&](int k) { c[k] = min(V::set1((kIntervals - 1) * kIntervalWidth), abs(x[k])).v; });
  each<K>([&](int k) { c[k] = c[k] * (1 / kIntervalWidth) + magic; });
  each<K>([&](int k) { u[k] = z[k].v - (c[k] - magic) * kIntervalWidth; });
  constexpr int kDegree = sizeof(S) == 2 ? 4 : 6;
#pragma GCC unroll 7
  for (int i = kDegree; i >= 0; --i) {
    const f32v table = V::load(power[i]).v;
    each<K>([&](int k) {
      const f32v of_interval = _mm512_permutexvar_ps((__m512i)c[k], table);
      p[k] = i == kDegree ? of_interval : p[k] * u[k] + of_interval;
    });
  }
}

template <class S, int K>
FASTNN_INLINE void normal_cdf_each(Vec<float>* x) {
  Vec<float> z[K];
  f32v tail[K];
  each<K>([&](int k) { z[k] = min(Vec<float>::set1(100.f), abs(x[k])); });  // NaN stays
  piecewise<S, K>(kNormalTail, x, z, tail);
  each<K>([&](int k) { x[k] = from_tail(x[k], tail[k]); });
}
template <class S, int K>
FASTNN_INLINE void gelu_derivative_each(Vec<float>* x) {
  Vec<float> z[K];
  f32v tail[K];
  each<K>([&](int k) { z[k] = abs(x[k]); });
  piecewise<S, K>(kGeluTail, x, z, tail);
  each<K>([&](int k) { x[k] = from_tail(x[k], tail[k]); });  // NaN at infinity, as torch's
}
#elif defined(__AVX2__)
// Half as many lanes for the coefficients: eight intervals up to `end`, where the last one's fit is centred and 0,
// narrower far out: z (linear + square z) rounds to the interval's number. 0.35 ns an element, with the baseline's
// formula 0.77; the derivative, which that takes from an exponential besides, 0.41 and 1.26.
struct Fit {
  float linear, square, end;
  alignas(32) float centre[8];
  alignas(32) float power[9][8];
};
constexpr Fit kNormalTail = {
    0x1.9cae04p-2f,
    0x1.836e78p-4f,
    7.02140522f,
    {0.f, 1.6875f, 2.90625f, 3.875f, 4.703125f, 5.4375f, 6.109375f, 7.02140522f},
    {
        {0.5f, 0.0457536243f, 0.00182894536f, 5.3312353e-05f, 1.28104693e-06f, 2.70166503e-08f, 5.0011012e-10f, 0.f},
        {-0.398942262f, -0.0960614979f, -0.00584550062f, -0.000218931687f, -6.27691861e-06f, -1.51581446e-07f,
         -3.13332205e-09f, -3.73849812e-10f},
        {-7.02243597e-07f, 0.0810520425f, 0.00849423558f, 0.000424179452f, 1.4760667e-05f, 4.12120471e-07f,
         9.57161372e-09f, -1.85883486e-08f},
        {0.0664989129f, -0.029581558f, -0.00725453161f, -0.000511406397f, -2.20945785e-05f, -7.21729634e-07f,
         -1.89674392e-08f, -3.39878568e-07f},
        {-5.1195555e-05f, -0.00103112508f, 0.00385534321f, 0.000424747239f, 2.35143798e-05f, 9.12012126e-07f,
         2.7365946e-08f, -2.90205958e-06f},
        {-0.00979899149f, 0.00478596194f, -0.00115294009f, -0.000252548896f, -1.87925998e-05f, -8.82318261e-07f,
         -3.0781198e-08f, -1.29424643e-05f},
        {-0.000359402271f, -0.00119788421f, 4.30381515e-05f, 0.000106315732f, 1.16432529e-05f, 6.83973099e-07f,
         2.70698131e-08f, -3.09741154e-05f},
        {0.00163878547f, -0.000284062786f, 0.000120709039f, -2.81476423e-05f, -5.71406053e-06f, -4.44075113e-07f,
         -1.90638794e-08f, -3.76149437e-05f},
        {-0.000329892297f, 0.0001669021f, -4.43640492e-05f, 2.59683998e-06f, 1.91018148e-06f, 1.99633504e-07f,
         1.96035508e-08f, -1.81684827e-05f},
    },
};
constexpr Fit kGeluTail = {
    0x1.5ae102p-1f,
    0x1.c0ac68p-5f,
    7.04628801f,
    {0.f, 1.3125f, 2.453125f, 3.453125f, 4.359375f, 5.1875f, 5.96875f, 7.04628801f},
    {
        {0.5f, -0.126602799f, -0.0412110612f, -0.00326978508f, -0.000123386155f, -2.86100862e-06f, -4.25277094e-08f,
         0.f},
        {-0.797884524f, -0.0467584915f, 0.0790946931f, 0.0101934336f, 0.000506718177f, 1.42501658e-05f, 2.46322031e-07f,
         1.38184122e-08f},
        {-1.16498893e-06f, 0.251963139f, -0.048722472f, -0.014052758f, -0.000974576862f, -3.39939506e-05f,
         -6.91391506e-07f, 6.05338585e-07f},
        {0.265981078f, -0.14304398f, -0.00626909034f, 0.0107363435f, 0.00115286384f, 5.14665007e-05f, 1.2498781e-06f,
         9.7126258e-06f},
        {-0.0001583251f, -0.0186059661f, 0.0241104048f, -0.00428848667f, -0.000920827966f, -5.51612211e-05f,
         -1.63163509e-06f, 7.23298945e-05f},
        {-0.0591254011f, 0.0385312252f, -0.0119012473f, 8.84337933e-05f, 0.000506217708f, 4.40896438e-05f,
         1.63350796e-06f, 0.000279949134f},
        {-0.0019183174f, -0.00549229002f, 0.000440670672f, 0.000893963675f, -0.000177209338f, -2.69601223e-05f,
         -1.27030808e-06f, 0.000578912033f},
        {0.012564525f, -0.00479835644f, 0.00177109009f, -0.00047222033f, 1.91131858e-05f, 1.27388284e-05f,
         8.28788188e-07f, 0.000605244015f},
        {-0.00277021341f, 0.00149051822f, -0.000587384508f, 8.1442231e-05f, 1.40084167e-05f, -4.01329271e-06f,
         -5.81553422e-07f, 0.000250893616f},
    },
};

template <int K>
FASTNN_INLINE void piecewise(const Fit& fit, const Vec<float>* x, f32v* p) {
  using V = Vec<float>;
  const f32v magic = V::set1(0x1.8p23f).v;  // adding it leaves the integer in the low mantissa bits
  f32v c[K], u[K];
  each<K>([&](int k) { u[k] = min(V::set1(fit.end), abs(x[k])).v; });  // NaN stays
  each<K>([&](int k) { c[k] = u[k] * fit.square + fit.linear; });
  each<K>([&](int k) { c[k] = c[k] * u[k] + magic; });
  const auto of_interval = [&](const float* table, int k) __attribute__((always_inline)) {
    return (f32v)_mm256_permutevar8x32_ps(_mm256_load_ps(table), (__m256i)c[k]);
  };
  each<K>([&](int k) { u[k] = u[k] - of_interval(fit.centre, k); });
  each<K>([&](int k) { p[k] = of_interval(fit.power[8], k); });
#pragma GCC unroll 8
  for (int i = 7; i >= 0; --i) each<K>([&](int k) { p[k] = p[k] * u[k] + of_interval(fit.power[i], k); });
}

template <class S, int K>
FASTNN_INLINE void normal_cdf_each(Vec<float>* x) {
  f32v tail[K];
  piecewise<K>(kNormalTail, x, tail);
  each<K>([&](int k) { x[k] = from_tail(x[k], tail[k]); });
}
template <class S, int K>
FASTNN_INLINE void gelu_derivative_each(Vec<float>* x) {
  f32v tail[K];
  piecewise<K>(kGeluTail, x, tail);
  each<K>([&](int k) { x[k] = from_tail(x[k], x[k].v * 0.f + tail[k]); });  // NaN at infinity, as torch's
}
#else
// log2 of the tail is smooth: a fit of degree 10 on [0, 6.5], falling steeply beyond; 2^f by a fit of degree 6.
template <class S, int K>
FASTNN_INLINE void normal_cdf_each(Vec<float>* x) {
  using V = Vec<float>;
  constexpr float kLog2[] = {-0x1.4fbec8p-26f, 0x1.5367f0p-21f,  -0x1.22febap-17f, 0x1.0c11c6p-14f,
                             -0x1.f5db04p-13f, -0x1.483362p-14f, 0x1.cd287cp-8f,   -0x1.ae11f2p-5f,
                             -0x1.d6393ap-2f,  -0x1.26aee8p+0f,  -0x1.fffffep-1f};
  constexpr float kPower[] = {
      0.000154531828f, 0.00133908863f, 0.00961808252f, 0.0555035707f, 0.240226508f, 0.693147188f, 1.f};
  const f32v magic = V::set1(0x1.8p23f).v;
  f32v z[K], q[K], n[K], f[K];
  each<K>([&](int k) { z[k] = min(V::set1(12.5f), abs(x[k])).v; });  // where Q has long become 0; NaN stays
  evaluate<K>(kLog2, z, q);
  each<K>([&](int k) { n[k] = (q[k] + magic) - magic; });
  each<K>([&](int k) { f[k] = q[k] - n[k]; });
  evaluate<K>(kPower, f, q);
  each<K>([&](int k) { x[k] = from_tail(x[k], scale2(q[k], n[k]).v); });
}
#endif

// The tail is exp(-z^2 / 2) P(z) / D(z), a rational fit on [0, 10] whose coefficients are all positive. exps are these
// exponentials.
template <int K>
FASTNN_INLINE void normal_cdf_each(Vec<double>* x, const Vec<double>* exps) {
  using V = Vec<double>;
  constexpr double kP[] = {
      0.0000153792936421095763, 0.000364682563698909791, 0.00403057626430728758, 0.0267956149684204153,
      0.115788837306347828,     0.327636535268748696,    0.570818465199466312,   0.5};
  constexpr double kD[] = {0.000038550230663812562, 0.000914120350238713478, 0.0101417953820222763,
                           0.0680792143043169756,   0.300285446288304386,    0.886406165200420598,
                           1.70278732371277753,     1.93952149120179762,     1.};
  f64v z[K], p[K], d[K];
  each<K>([&](int k) { z[k] = min(V::set1(40.), abs(x[k])).v; });  // NaN stays
  evaluate<K>(kP, z, p);
  evaluate<K>(kD, z, d);
  each<K>([&](int k) { x[k] = from_tail(x[k], exps[k].v * (p[k] / d[k])); });
}

// exp(-x^2 / 2)
template <int K, class A>
FASTNN_INLINE void density_exps(const Vec<A>* x, Vec<A>* exps) {
  each<K>([&](int k) { exps[k] = {x[k].v * x[k].v * A(-0.5)}; });
  exp_each<K>(exps);
}
template <class S, int K>
FASTNN_INLINE void normal_cdf_each(Vec<double>* x) {
  Vec<double> exps[K];
  density_exps<K>(x, exps);
  normal_cdf_each<K>(x, exps);
}

// What has no fit of its own above: the distribution function and x times the density.
template <class S, int K, class A>
FASTNN_INLINE void gelu_derivative_each(Vec<A>* x) {
  Vec<A> cdf[K], exps[K];
  each<K>([&](int k) { cdf[k] = x[k]; });
  density_exps<K>(x, exps);
  if constexpr (sizeof(A) == 8) normal_cdf_each<K>(cdf, exps);
  else normal_cdf_each<S, K>(cdf);
  each<K>([&](int k) { x[k] = fma(x[k], Vec<A>{A(0.39894228040143267794) * exps[k].v}, cdf[k]); });
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
