// Dot products of a few rows of a weight with a few tokens, in registers.
//
// Each of them is a chain of its own: a lane takes in every element that falls to it, in order, then the lanes are added
// in pairs. Neither depends on what else is in the tile: a token gets the same bits in any company.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <iterator>
#include <cstdint>
#include <tuple>

namespace emssd {

using Sums = at::vec::Vectorized<float>;

// The rows of a tile by its tokens: the sums fill most of the registers and leave room for what is multiplied.
#if defined(CPU_CAPABILITY_AVX512)
constexpr int kRowsOfTile[] = {0, 8, 8, 8, 6, 4, 4, 3, 3};
#else
constexpr int kRowsOfTile[] = {0, 8, 4, 3, 3};
#endif
constexpr int kTileTokens = std::size(kRowsOfTile) - 1;

// How a vector of a weight's elements is multiplied with one of a token's, and added to sums in float32.
template <typename weight_t, typename scalar_t>
struct Dot;

template <>
struct Dot<float, float> {
  using Operand = Sums;
  static constexpr int64_t kStep = Sums::size();
  static Operand load(const float* from, int64_t count) { return Operand::loadu(from, count); }
  static void add(Sums& sum, const Operand& w, const Operand& x) { sum = at::vec::fmadd(w, x, sum); }
  static void hold(Operand& x) {
#if defined(CPU_CAPABILITY_AVX512)
    asm("" : "+v"(x.values));  // else GCC reads it from memory again for each row
#endif
  }
};

#if defined(__AVX512BF16__)
template <>
struct Dot<at::BFloat16, at::BFloat16> {  // products are exact, sums rounded to float32; denormals count as 0
  using Operand = __m512i;
  static constexpr int64_t kStep = 32;
  static Operand load(const at::BFloat16* from, int64_t count) {
    return count == kStep ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi16((__mmask32{1} << count) - 1, from);
  }
  static void add(Sums& sum, const Operand& w, const Operand& x) {
    sum = _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(w), reinterpret_cast<__m512bh>(x));
  }
  static void hold(Operand& x) { asm("" : "+v"(x)); }
};
#else
template <>
struct Dot<at::BFloat16, at::BFloat16> {
  using Operand = std::tuple<Sums, Sums>;
  static constexpr int64_t kStep = 2 * Sums::size();
  static Operand load(const at::BFloat16* from, int64_t count) {
    return at::vec::convert_to_float<at::BFloat16>(at::vec::Vectorized<at::BFloat16>::loadu(from, count));
  }
  static void add(Sums& sum, const Operand& w, const Operand& x) {
    sum = at::vec::fmadd(std::get<0>(w), std::get<0>(x), sum);
    sum = at::vec::fmadd(std::get<1>(w), std::get<1>(x), sum);
  }
  static void hold(Operand&) {}
};
#endif

inline Sums load_integers(const int8_t* from, int64_t count) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m128i bytes = count == 16 ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(from))
                                    : _mm_maskz_loadu_epi8((__mmask16{1} << count) - 1, from);
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
#else
  float values[Sums::size()] = {};
  for (int64_t i = 0; i < count; ++i) values[i] = from[i];
  return Sums::loadu(values);
#endif
}

template <>
struct Dot<int8_t, float> : Dot<float, float> {
  static Operand load(const int8_t* from, int64_t count) { return load_integers(from, count); }
  static Operand load(const float* from, int64_t count) { return Operand::loadu(from, count); }
};

template <>
struct Dot<int8_t, at::BFloat16> : Dot<float, float> {
  static Operand load(const int8_t* from, int64_t count) { return load_integers(from, count); }
  static Operand load(const at::BFloat16* from, int64_t count) {
    at::BFloat16 values[2 * kStep] = {};
    std::copy_n(from, count, values);
    return std::get<0>(at::vec::convert_to_float<at::BFloat16>(at::vec::Vectorized<at::BFloat16>::loadu(values)));
  }
};

// Lane i of the result is what the lanes of sums[i] add up to. kCount is at most the number of lanes.
template <int kCount>
inline Sums add_lanes(const Sums* sums) {
  Sums folded[kCount];
#pragma GCC unroll 16
  for (int i = 0; i < kCount; ++i) folded[i] = sums[i];
  int count = kCount;
#pragma GCC unroll 4
  for (int lanes = Sums::size(); lanes > 1; lanes /= 2) {
    const int last = count - 1;
    count = (count + 1) / 2;
#pragma GCC unroll 8
    for (int i = 0; i < count; ++i) {
      const auto [even, odd] = at::vec::deinterleave2(folded[2 * i], folded[std::min(2 * i + 1, last)]);
      folded[i] = even + odd;
    }
  }
  return folded[0];
}

// y[kTokens][kRows] = x[kTokens][depth] * w[kRows][depth]^T. Asks for rows that are needed later, the same number of
// them at `ahead`, as it goes.
template <typename weight_t, typename scalar_t, int kTokens, int kRows>
void multiply_rows(const weight_t* w, int64_t w_stride, const weight_t* ahead, const scalar_t* x, int64_t x_stride,
                   int64_t depth, float* y, int64_t y_stride) {
  using Product = Dot<weight_t, scalar_t>;
  using Operand = typename Product::Operand;
  constexpr int kSums = kTokens * kRows, kLanes = Sums::size();
  constexpr int64_t kStep = Product::kStep;
  Sums sums[kSums];
#pragma GCC unroll 32
  for (int i = 0; i < kSums; ++i) sums[i] = Sums(0);
  const auto add = [&](int64_t k, int64_t count) __attribute__((always_inline)) {
    Operand rows[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) rows[r] = Product::load(w + r * w_stride + k, count);
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) {
      Operand token = Product::load(x + t * x_stride + k, count);
      Product::hold(token);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) Product::add(sums[t * kRows + r], rows[r], token);
    }
  };
  constexpr int64_t kLine = 64 / sizeof(weight_t);  // of the cache
  int64_t k = 0;
  for (; k + kStep <= depth; k += kStep) {
    if (ahead != nullptr && k % kLine == 0) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) __builtin_prefetch(ahead + r * w_stride + k, /*write=*/0, /*locality: L2*/ 2);
    }
    add(k, kStep);
  }
  if (k < depth) add(k, depth - k);
  float products[(kSums + kLanes - 1) / kLanes * kLanes];
#pragma GCC unroll 32
  for (int i = 0; i + kLanes <= kSums; i += kLanes) add_lanes<kLanes>(sums + i).store(products + i);
  constexpr int kRest = kSums % kLanes;
  if constexpr (kRest > 0) add_lanes<kRest>(sums + kSums - kRest).store(products + kSums - kRest);
#pragma GCC unroll 8
  for (int t = 0; t < kTokens; ++t) std::copy_n(products + t * kRows, kRows, y + t * y_stride);
}

}  // namespace emssd
