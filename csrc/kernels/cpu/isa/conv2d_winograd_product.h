// The matrix products between Winograd's transforms of the input and of the output.
#pragma once
#include "conv2d_winograd.h"

namespace fastnn::cpu::FASTNN_ISA_NS {

#if defined(__AVX512F__)
constexpr int kMaxRows = 14;  // tiles in registers
#else
constexpr int kMaxRows = 6;
#endif

// M[group][tile][lane] = (or +=) sum over the channels c of V[c][tile] U[c][lanes], MR tiles by NV lane groups. Rows of
// U are 2 N apart; PACKED: NV N, and they come from memory, so those `ahead` elements on are asked for.
template <int MR, int NV, bool PACKED>
void winograd_product(const float* v, int64_t v_group, const float* u, int64_t ahead, int64_t channels, float* m,
                      int64_t m_group, bool add) {
  using V = Vec<float>;
  using Raw = V::Raw;
  constexpr int N = V::N;
  Raw acc[MR][NV];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) acc[i][j] = add ? V::load(m + j * m_group + i * N).v : Raw{};
  for (int64_t left = channels; left > 0; left -= N, v += v_group) {
    const int count = int(min64(N, left));
    for (int c = 0; c < count; ++c, u += (PACKED ? NV : 2) * N) {
      Raw b[NV];
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) {
        b[j] = V::load(u + j * N).v;
        if constexpr (PACKED) __builtin_prefetch(u + ahead + j * N, 0, 2);
      }
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i) {
        const Raw a = V::set1(v[i * N + c]).v;
#pragma GCC unroll 2
        for (int j = 0; j < NV; ++j) acc[i][j] += a * b[j];
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) V{acc[i][j]}.store(m + j * m_group + i * N);
}

using WinogradProduct = void (*)(const float*, int64_t, const float*, int64_t, int64_t, float*, int64_t, bool);
template <int MR, int NV, bool PACKED>
WinogradProduct find_winograd_product(int rows) {
  if constexpr (MR == 0) return nullptr;
  else return rows == MR ? winograd_product<MR, NV, PACKED> : find_winograd_product<MR - 1, NV, PACKED>(rows);
}

// The products of the points of `tiles` tiles with one pair (nv = 2) or one (nv = 1) of output channel groups.
template <bool PACKED>
void winograd_products(int points, const float* v, int64_t v_xi, int64_t v_group, int64_t tiles, const float* u,
                       int64_t u_xi, int64_t channels, int nv, float* m, bool add) {
  constexpr int N = Vec<float>::N;
  constexpr int64_t kNear = 512, kFar = (32 << 10) / sizeof(float);
  const int64_t mr = ceil_div(tiles, ceil_div(tiles, kMaxRows)), m_group = tiles * N, m_xi = odd_lines(nv * m_group);
  for (int64_t xi = 0; xi < points; ++xi)
    for (int64_t t = 0; t < tiles; t += mr) {
      const int count = int(min64(mr, tiles - t));
      // During the last tiles, the next xi of U is asked for. Larger ones would displace V.
      const int64_t ahead = t + mr >= tiles && u_xi <= kFar ? u_xi : kNear;
      const WinogradProduct run = nv == 2 ? find_winograd_product<kMaxRows, 2, PACKED>(count)
                                          : find_winograd_product<kMaxRows, 1, PACKED>(count);
      run(v + xi * v_xi + t * N, v_group, u + xi * u_xi, ahead, channels, m + xi * m_xi + t * N, m_group, add);
    }
}

}  // namespace fastnn::cpu::FASTNN_ISA_NS
