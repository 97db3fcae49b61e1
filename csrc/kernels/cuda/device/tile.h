// A block's tile of a matrix product, out of registers and shared memory, whatever the operands look like in memory: an
// operand is an object that fetches element (row, k), so that a strided matrix, an image seen as im2col rows and a
// gradient are all the same to it. Float32 and float64 arithmetic, or tensor cores.
#pragma once
#include "mma.h"
#include "reduce.h"

namespace fastnn::cuda {

constexpr int kTile = 64;   // rows of both operands
constexpr int kTileK = 16;  // of the reduced dimension at a time
constexpr int kTileThreads = 256;
constexpr int kMicro = 4;  // a thread computes 4 x 4 results

// Element i of the tile's loads by this thread: neighbouring threads take neighbouring k, or neighbouring rows.
struct TileLoads {
  static constexpr int kCount = kTile * kTileK / kTileThreads;
  bool along_k;
  __device__ __forceinline__ int row(int i) const {
    const int at = i * kTileThreads + int(threadIdx.x);
    return along_k ? at / kTileK : at % kTile;
  }
  __device__ __forceinline__ int k(int i) const {
    const int at = i * kTileThreads + int(threadIdx.x);
    return along_k ? at % kTileK : at / kTile;
  }
};

// sum over k in [k_begin, k_end) of a(row0 + i, k) b(column0 + j, k), handed to store(row, column, sum) for the rows
// below `rows` and columns below `columns`. An operand has:
//   using Row = ...;         what is known of a row before the loop over k
//   Row row(int r) const;    r below rows (columns)
//   A at(const Row&, int k) const
//   bool along_k;            neighbouring k lie together in memory, rather than neighbouring rows
// along_rows: neighbouring rows of the result lie together in memory, rather than neighbouring columns.
template <class A, class OperandA, class OperandB, class Store>
__device__ __forceinline__ void tile_product(const OperandA& a, const OperandB& b, int rows, int columns, int row0,
                                             int column0, int k_begin, int k_end, bool along_rows, const Store& store) {
  constexpr int kPadded = kTile + 16 / int(sizeof(A));  // rows stay 16-byte aligned, k's spread over the banks
  FASTNN_SHARED(as, A[kTileK][kPadded]);
  FASTNN_SHARED(bs, A[kTileK][kPadded]);
  constexpr int kLoads = TileLoads::kCount;
  const TileLoads la{a.along_k}, lb{b.along_k};
  typename OperandA::Row ra[kLoads];
  typename OperandB::Row rb[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {  // rows past the end repeat the last one; nobody stores what comes of them
    ra[i] = a.row(min(row0 + la.row(i), rows - 1));
    rb[i] = b.row(min(column0 + lb.row(i), columns - 1));
  }
  A next_a[kLoads], next_b[kLoads];
  const auto fetch = [&](int k0) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      next_a[i] = k0 + la.k(i) < k_end ? a.at(ra[i], k0 + la.k(i)) : A(0);
      next_b[i] = k0 + lb.k(i) < k_end ? b.at(rb[i], k0 + lb.k(i)) : A(0);
    }
  };
  const int fast = threadIdx.x % (kTile / kMicro) * kMicro, slow = threadIdx.x / (kTile / kMicro) * kMicro;
  const int my_row = along_rows ? fast : slow, my_column = along_rows ? slow : fast;
  A sum[kMicro][kMicro] = {};
  fetch(k_begin);
  for (int k0 = k_begin; k0 < k_end; k0 += kTileK) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      as[la.k(i)][la.row(i)] = next_a[i];
      bs[lb.k(i)][lb.row(i)] = next_b[i];
    }
    __syncthreads();
    if (k0 + kTileK < k_end) fetch(k0 + kTileK);  // in flight during the arithmetic
#pragma unroll
    for (int k = 0; k < kTileK; ++k) {
      A x[kMicro], y[kMicro];
      constexpr int N = kPack<A>;
#pragma unroll
      for (int i = 0; i < kMicro; i += N) {
        const Pack<A, N> px = load_pack<N>(&as[k][my_row + i]), py = load_pack<N>(&bs[k][my_column + i]);
#pragma unroll
        for (int n = 0; n < N; ++n) x[i + n] = px.at[n], y[i + n] = py.at[n];
      }
#pragma unroll
      for (int i = 0; i < kMicro; ++i)
#pragma unroll
        for (int j = 0; j < kMicro; ++j) sum[i][j] += x[i] * y[j];
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < kMicro; ++i)
#pragma unroll
    for (int j = 0; j < kMicro; ++j) {
      const int row = row0 + my_row + i, column = column0 + my_column + j;
      if (row < rows && column < columns) store(row, column, sum[i][j]);
    }
}

// How a product multiplies: `plain` arithmetic of the accumulation type for float32 and float64,
// tensor cores for 16-bit types; float32 on tensor cores `rounded` to tf32; or float32 `split` into
// a tf32 and a tf32 of the rest, three of whose four products keep float32's precision ("3xTF32").
enum class Multiply { plain, rounded, split };

// The same on tensor cores, with float32 sums: S is the operands' type. Returns false on every thread, having stored
// nothing, where a split product is no number or infinite: infinity times the rest of a number is not what a float32
// product would be.
template <class S, bool kSplit, class OperandA, class OperandB, class Store>
__device__ __forceinline__ bool mma_tile_product(const OperandA& a, const OperandB& b, int rows, int columns, int row0,
                                                 int column0, int k_begin, int k_end, const Store& store) {
  constexpr int kStride = kTileK + 16 / int(sizeof(S));  // the words of a fragment fall into 32 different banks
  constexpr int kWarpRows = 16, kWarpColumns = 32, kMmas = kWarpColumns / 8, kLoads = TileLoads::kCount;
  static_assert(kTileThreads / kWarp * kWarpRows * kWarpColumns == kTile * kTile);
  FASTNN_SHARED(as, S[kTile][kStride]);
  FASTNN_SHARED(bs, S[kTile][kStride]);
  const TileLoads la{a.along_k}, lb{b.along_k};
  typename OperandA::Row ra[kLoads];
  typename OperandB::Row rb[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    ra[i] = a.row(min(row0 + la.row(i), rows - 1));
    rb[i] = b.row(min(column0 + lb.row(i), columns - 1));
  }
  S next_a[kLoads], next_b[kLoads];
  const auto fetch = [&](int k0) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      next_a[i] = from_acc<S>(k0 + la.k(i) < k_end ? a.at(ra[i], k0 + la.k(i)) : 0.f);
      next_b[i] = from_acc<S>(k0 + lb.k(i) < k_end ? b.at(rb[i], k0 + lb.k(i)) : 0.f);
    }
  };
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int warp_row = warp % (kTile / kWarpRows) * kWarpRows, warp_column = warp / (kTile / kWarpRows) * kWarpColumns;
  float sum[kMmas][4] = {};
  fetch(k_begin);
  for (int k0 = k_begin; k0 < k_end; k0 += kTileK) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      as[la.row(i)][la.k(i)] = next_a[i];
      bs[lb.row(i)][lb.k(i)] = next_b[i];
    }
    __syncthreads();
    if (k0 + kTileK < k_end) fetch(k0 + kTileK);
    if constexpr (!kSplit) {
#pragma unroll
      for (int k = 0; k < kTileK; k += kMmaK<S>) {
        const FragmentA x = load_a(&as[warp_row][k], kStride);
#pragma unroll
        for (int j = 0; j < kMmas; ++j) mma<S>(sum[j], x, load_b(&bs[warp_column + 8 * j][k], kStride));
      }
    } else {
      // Tensor cores cut their sums off instead of rounding them: short sums, added by ordinary arithmetic.
      float part[kMmas][4] = {};
#pragma unroll
      for (int k = 0; k < kTileK; k += kMmaK<S>) {
        const FragmentA x = load_a(&as[warp_row][k], kStride), x_rest = load_a<true>(&as[warp_row][k], kStride);
#pragma unroll
        for (int j = 0; j < kMmas; ++j) {
          const S* const column = &bs[warp_column + 8 * j][k];
          const FragmentB y = load_b(column, kStride);
          mma<S>(part[j], x_rest, y);
          mma<S>(part[j], x, load_b<true>(column, kStride));
          mma<S>(part[j], x, y);
        }
      }
#pragma unroll
      for (int j = 0; j < kMmas; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[j][i] += part[j][i];
    }
    __syncthreads();
  }
  if constexpr (kSplit) {
    float largest = 0;
#pragma unroll
    for (int j = 0; j < kMmas; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) largest = sum[j][i] - sum[j][i] == 0 ? largest : 1.f;
    if (block_reduce(largest, 0.f, Max{}) > 0) return false;
  }
#pragma unroll
  for (int j = 0; j < kMmas; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = row0 + warp_row + lane / 4 + 8 * (i / 2),
                column = column0 + warp_column + 8 * j + lane % 4 * 2 + i % 2;
      if (row < rows && column < columns) store(row, column, sum[j][i]);
    }
  return true;
}

// The product of operands of type S.
template <class S, Multiply kMultiply, class OperandA, class OperandB, class Store>
__device__ __forceinline__ void product(const OperandA& a, const OperandB& b, int rows, int columns, int row0,
                                        int column0, int k_begin, int k_end, bool along_rows, const Store& store) {
  constexpr bool kSplit = kMultiply == Multiply::split;
  if constexpr (sizeof(S) == 2 || kMultiply != Multiply::plain)
    if (mma_tile_product<S, kSplit>(a, b, rows, columns, row0, column0, k_begin, k_end, store)) return;
  if constexpr (sizeof(S) > 2 && kMultiply != Multiply::rounded)
    tile_product<acc_t<S>>(a, b, rows, columns, row0, column0, k_begin, k_end, along_rows, store);
}

// Calls f(Tag<S>, Constant<Multiply>) for the kernels of a dtype. Strict float32 is split where the
// product fills at least half a tile each way, and plain where most of a tile would be padding.
template <class F>
Status dispatch_product(DType dtype, bool tf32, int64_t rows, int64_t columns, int64_t depth, const F& f) {
  const bool fills = min64(min64(rows, columns), depth) >= kTile / 2;
  if (dtype == DType::f32 && tf32) return f(Tag<float>{}, Constant<Multiply::rounded>{});
  if (dtype == DType::f32 && fills) return f(Tag<float>{}, Constant<Multiply::split>{});
  return dispatch_dtype(dtype, [&](auto tag) { return f(tag, Constant<Multiply::plain>{}); });
}

// The tile of this block among `tiles` x `others` tiles: rows vary fastest.
struct TileAt {
  int row0, column0;
  int64_t other;
};
__device__ __forceinline__ TileAt tile_at(int rows, int columns) {
  const int64_t row_tiles = (rows + kTile - 1) / kTile, column_tiles = (columns + kTile - 1) / kTile;
  const int64_t b = blockIdx.x;
  return {int(b % row_tiles) * kTile, int(b / row_tiles % column_tiles) * kTile, b / (row_tiles * column_tiles)};
}
inline int64_t tiles_of(int64_t rows, int64_t columns) { return ceil_div(rows, kTile) * ceil_div(columns, kTile); }
template <class... P, class... A>
Status launch_tiles(void (*kernel)(P...), int64_t tiles, CUstream_st* stream, const A&... args) {
  return launch(kernel, grid_of(tiles), dim3(kTileThreads), 0, stream, args...);
}

}  // namespace fastnn::cuda
