// Dense arithmetic on small row-major tiles that lie in a core's cache. Nothing here knows of rows, heads or threads.
//
// Each output element is computed by its own chain of operations, in an order that does not depend on the tile's size:
// a query gets the same bits whichever other queries share its tile.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

namespace emssd {

// Rows and vectors of one register tile: 8 accumulators hide the latency of a fused multiply-add, and fit 16 registers.
constexpr int kTileRows = 4;
constexpr int kTileVectors = 2;

template <typename T>
constexpr int64_t vector_size() {
  return at::vec::Vectorized<T>::size();
}

inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

template <typename T, int kRows, int kVectors, bool kSkipZeros>
inline void multiply_tile(
    const T* a, int64_t lda, const T* b, int64_t ldb, T* c, int64_t ldc, int64_t depth, bool accumulate) {
  using Vec = at::vec::Vectorized<T>;
  Vec sums[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v)
      sums[r][v] = accumulate ? Vec::loadu(c + r * ldc + v * Vec::size()) : Vec(0);
  for (int64_t k = 0; k < depth; ++k) {
    Vec b_k[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) b_k[v] = Vec::loadu(b + k * ldb + v * Vec::size());
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const T a_rk = a[r * lda + k];
      if (kSkipZeros && a_rk == 0) continue;
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sums[r][v] = at::vec::fmadd(Vec(a_rk), b_k[v], sums[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sums[r][v].store(c + r * ldc + v * Vec::size());
}

template <typename T, int kVectors, bool kSkipZeros>
inline void multiply_columns(
    const T* a, int64_t lda, const T* b, int64_t ldb, T* c, int64_t ldc, int64_t rows, int64_t depth, bool accumulate) {
  int64_t r = 0;
  for (; r + kTileRows <= rows; r += kTileRows)
    multiply_tile<T, kTileRows, kVectors, kSkipZeros>(a + r * lda, lda, b, ldb, c + r * ldc, ldc, depth, accumulate);
  for (; r + 2 <= rows; r += 2)
    multiply_tile<T, 2, kVectors, kSkipZeros>(a + r * lda, lda, b, ldb, c + r * ldc, ldc, depth, accumulate);
  if (r < rows)
    multiply_tile<T, 1, kVectors, kSkipZeros>(a + r * lda, lda, b, ldb, c + r * ldc, ldc, depth, accumulate);
}

// c[rows][columns] = a[rows][depth] * b[depth][columns], added to what c holds if `accumulate`. `columns` is a multiple
// of the vector size. With kSkipZeros an exact 0 in `a` hides whatever `b` holds there, NaN included.
template <typename T, bool kSkipZeros>
void multiply(
    const T* a, int64_t lda, const T* b, int64_t ldb, T* c, int64_t ldc,
    int64_t rows, int64_t columns, int64_t depth, bool accumulate) {
  constexpr int64_t width = kTileVectors * vector_size<T>();
  int64_t n = 0;
  for (; n + width <= columns; n += width)
    multiply_columns<T, kTileVectors, kSkipZeros>(a, lda, b + n, ldb, c + n, ldc, rows, depth, accumulate);
  for (; n < columns; n += vector_size<T>())
    multiply_columns<T, 1, kSkipZeros>(a, lda, b + n, ldb, c + n, ldc, rows, depth, accumulate);
}

// What turns a dot product into a score.
template <typename T>
struct ScoreRule {
  T scale;
  T softcap;  // 0: none
};

// The running softmax of one query: largest score so far, and the sum of exp(score - max).
template <typename T>
struct Softmax {
  T max = -std::numeric_limits<T>::infinity();
  T sum = 0;
};

// Turns one query's dot products with a block of keys into exp(score - max), in place, and takes them into `state`.
// `columns` is a multiple of the vector size; `distance` (times `slope`) and `visible` (0 or 1) may be null.
// Returns the factor by which what was summed up before has to shrink.
template <typename T>
T update_softmax(
    T* scores, int64_t columns, const ScoreRule<T>& rule, T slope, const T* distance, const T* visible,
    Softmax<T>& state) {
  using Vec = at::vec::Vectorized<T>;
  constexpr T kNothing = -std::numeric_limits<T>::infinity();
  Vec max_of_lanes(kNothing);
  for (int64_t j = 0; j < columns; j += Vec::size()) {
    Vec score = Vec::loadu(scores + j) * Vec(rule.scale);
    if (rule.softcap > 0) score = Vec(rule.softcap) * (score / Vec(rule.softcap)).tanh();
    if (distance != nullptr) score = at::vec::fmadd(Vec(slope), Vec::loadu(distance + j), score);
    if (visible != nullptr) score = Vec::blendv(Vec(kNothing), score, Vec::loadu(visible + j) != Vec(0));
    max_of_lanes = at::vec::maximum(max_of_lanes, score);
    score.store(scores + j);
  }
  const T block_max = at::vec::vec_reduce_all<T>([](Vec x, Vec y) { return at::vec::maximum(x, y); }, max_of_lanes);
  const T old_max = state.max;
  if (block_max > old_max) state.max = block_max;
  // While nothing is visible the maximum is -inf, and -inf - -inf would be NaN.
  const Vec shift(state.max == kNothing ? T(0) : state.max);
  Vec sum_of_lanes(0);
  for (int64_t j = 0; j < columns; j += Vec::size()) {
    const Vec weight = (Vec::loadu(scores + j) - shift).exp();
    weight.store(scores + j);
    sum_of_lanes = sum_of_lanes + weight;
  }
  const T block_sum = at::vec::vec_reduce_all<T>([](Vec x, Vec y) { return x + y; }, sum_of_lanes);
  const T shrink = state.max == old_max ? T(1) : std::exp(old_max - state.max);
  state.sum = state.sum * shrink + block_sum;
  return shrink;
}

// What a weighted sum of values is multiplied by to become their mean; 0 where nothing was seen. A `sink`, which may be
// null, is the score of one more key, whose value is 0.
template <typename T>
T normaliser(const Softmax<T>& state, const T* sink) {
  if (state.sum == 0) return 0;
  if (sink == nullptr) return T(1) / state.sum;
  const T max = std::max(state.max, *sink);
  const T shrink = std::exp(state.max - max);
  return shrink / (state.sum * shrink + std::exp(*sink - max));
}

// values[columns] *= factor; `columns` is a multiple of the vector size.
template <typename T>
void scale_row(T* values, int64_t columns, T factor) {
  using Vec = at::vec::Vectorized<T>;
  for (int64_t j = 0; j < columns; j += Vec::size()) (Vec::loadu(values + j) * Vec(factor)).store(values + j);
}

// Takes `other`, a softmax-weighted sum over further keys, into `state` and `values`.
template <typename T>
void merge_softmax(Softmax<T>& state, T* values, const Softmax<T>& other, const T* other_values, int64_t columns) {
  using Vec = at::vec::Vectorized<T>;
  if (other.sum == 0) return;
  const T old_max = state.max;
  if (other.max > old_max) state.max = other.max;
  const T shrink = state.max == old_max ? T(1) : std::exp(old_max - state.max);
  const T other_shrink = state.max == other.max ? T(1) : std::exp(other.max - state.max);
  state.sum = state.sum * shrink + other.sum * other_shrink;
  for (int64_t j = 0; j < columns; j += Vec::size())
    at::vec::fmadd(Vec::loadu(values + j), Vec(shrink), Vec::loadu(other_values + j) * Vec(other_shrink))
        .store(values + j);
}

// destination[i] = source[i], widened to T.
template <typename T, typename scalar_t>
void widen_row(const scalar_t* source, T* destination, int64_t count) {
  int64_t i = 0;
  if constexpr (!std::is_same_v<T, scalar_t>) {
    for (; i + vector_size<T>() <= count; i += vector_size<T>()) {
      at::vec::Vectorized<T> wide;
      at::vec::load_to_float(source + i, wide);
      wide.store(destination + i);
    }
  }
  for (; i < count; ++i) destination[i] = static_cast<T>(source[i]);
}

// Of a packed vector: its integers times its scale, which lies behind them.
template <typename T>
void widen_row(const int8_t* source, T* destination, int64_t count) {
  float scale;
  std::memcpy(&scale, source + count, sizeof scale);
  for (int64_t i = 0; i < count; ++i) destination[i] = static_cast<T>(source[i]) * static_cast<T>(scale);
}

}  // namespace emssd
