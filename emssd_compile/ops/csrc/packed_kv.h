// Keys and values in 8 bits, as ops/_packed_kv.py has them: integers, and behind them the bytes of their scale.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace emssd {

constexpr int64_t kScaleBytes = sizeof(float);

// Whether a cache holds packed vectors, and how many components the vectors of a cache have.
inline bool is_packed(const at::Tensor& cache) { return cache.scalar_type() == at::kChar; }
inline int64_t vector_components(const at::Tensor& cache) {
  return cache.size(3) - (is_packed(cache) ? kScaleBytes : 0);
}

template <typename scalar_t>
void pack_vector(const scalar_t* vector, int64_t size, int8_t* packed) {
  float largest = 1e-30f;
  bool is_number = true;
  for (int64_t i = 0; i < size; ++i) {
    const float value = std::abs(static_cast<float>(vector[i]));
    is_number &= value == value;
    largest = std::max(largest, value);
  }
  const float scale = is_number ? largest / 127.0f : std::numeric_limits<float>::quiet_NaN();
  const bool is_finite = std::isfinite(scale);
  for (int64_t i = 0; i < size; ++i)
    packed[i] = is_finite ? static_cast<int8_t>(std::nearbyint(static_cast<float>(vector[i]) / scale)) : int8_t{0};
  std::memcpy(packed + size, &scale, sizeof scale);
}

}  // namespace emssd
