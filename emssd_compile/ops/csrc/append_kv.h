// emssd::append_kv on CPU: one pass over the new tokens, each copied to its slot.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "packed_kv.h"

namespace emssd {

// Copies token[h][:] for every head. The innermost dimension of both is contiguous.
inline void copy_token(char* cache, int64_t cache_stride, const char* token, int64_t stride, int64_t heads,
                       int64_t bytes) {
  if (cache_stride == bytes && stride == bytes) {
    std::memcpy(cache, token, heads * bytes);
    return;
  }
  for (int64_t h = 0; h < heads; ++h) std::memcpy(cache + h * cache_stride, token + h * stride, bytes);
}

// Calls function(token, its slot's first byte) for each token that has a row.
template <typename F>
void for_each_token(const at::Tensor& cache, const at::Tensor& fresh, const int64_t* rows, const int64_t* slots,
                    const F& function) {
  const int64_t item = cache.element_size(), num_rows = cache.size(0);
  char* target = static_cast<char*>(cache.mutable_data_ptr());
  constexpr int64_t kBytesPerThread = 1 << 16;
  const int64_t bytes = cache.size(2) * cache.size(3) * item;
  const int64_t grain = std::max<int64_t>(1, kBytesPerThread / std::max<int64_t>(1, bytes));
  at::parallel_for(0, fresh.size(0), grain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      if (rows[t] != num_rows) function(t, target + (rows[t] * cache.stride(0) + slots[t] * cache.stride(1)) * item);
  });
}

inline void scatter_tokens(const at::Tensor& cache, const at::Tensor& fresh, const int64_t* rows,
                           const int64_t* slots) {
  const int64_t item = cache.element_size();
  const char* source = static_cast<const char*>(fresh.const_data_ptr());
  for_each_token(cache, fresh, rows, slots, [&](int64_t t, char* slot) {
    copy_token(slot, cache.stride(2) * item, source + t * fresh.stride(0) * item, fresh.stride(1) * item,
               cache.size(2), cache.size(3) * item);
  });
}

template <typename scalar_t>
void scatter_packed(const at::Tensor& cache, const at::Tensor& fresh, const int64_t* rows, const int64_t* slots) {
  const scalar_t* source = fresh.const_data_ptr<scalar_t>();
  for_each_token(cache, fresh, rows, slots, [&](int64_t t, char* slot) {
    for (int64_t h = 0; h < cache.size(2); ++h)
      pack_vector(source + t * fresh.stride(0) + h * fresh.stride(1), fresh.size(2),
                  reinterpret_cast<int8_t*>(slot) + h * cache.stride(2));
  });
}

// The tokens into their slots; packed, where that is how the cache holds them.
inline void write_tokens(const at::Tensor& cache, const at::Tensor& fresh, const int64_t* rows, const int64_t* slots) {
  if (cache.scalar_type() == fresh.scalar_type()) return scatter_tokens(cache, fresh, rows, slots);
  switch (fresh.scalar_type()) {
    case at::kFloat: return scatter_packed<float>(cache, fresh, rows, slots);
    case at::kDouble: return scatter_packed<double>(cache, fresh, rows, slots);
    case at::kBFloat16: return scatter_packed<at::BFloat16>(cache, fresh, rows, slots);
    case at::kHalf: return scatter_packed<at::Half>(cache, fresh, rows, slots);
    default: TORCH_CHECK(false, "emssd::append_kv: ", fresh.scalar_type(), " cannot be packed");
  }
}

inline void check_append(const at::Tensor& cache, const at::Tensor& fresh, int64_t tokens, const char* name) {
  TORCH_CHECK(cache.dim() == 4 && fresh.dim() == 3, "emssd::append_kv: ", name, "_cache must be [B, C, Hkv, D] and ",
              name, " [T, Hkv, D], got ", cache.sizes(), " and ", fresh.sizes());
  TORCH_CHECK(fresh.size(0) == tokens && fresh.size(1) == cache.size(2) && fresh.size(2) == vector_components(cache),
              "emssd::append_kv: ", name, " ", fresh.sizes(), " does not fit ", tokens, " tokens of ", name, "_cache ",
              cache.sizes());
  TORCH_CHECK(cache.scalar_type() == fresh.scalar_type() || is_packed(cache), "emssd::append_kv: ", name, "_cache holds ",
              cache.scalar_type(), ", ", name, " is ", fresh.scalar_type());
  TORCH_CHECK(cache.stride(3) == 1 || cache.size(3) == 1, "emssd::append_kv: the last dimension of ", name,
              "_cache must be contiguous, its strides are ", cache.strides());
}

inline void append_kv(const at::Tensor& k_cache, const at::Tensor& v_cache, const at::Tensor& k, const at::Tensor& v,
                      const at::Tensor& row_ids, const at::Tensor& slots) {
  const int64_t tokens = row_ids.numel();
  TORCH_CHECK(k_cache.size(0) == v_cache.size(0), "emssd::append_kv: k_cache has ", k_cache.size(0), " rows, v_cache ",
              v_cache.size(0));
  check_append(k_cache, k, tokens, "k");
  check_append(v_cache, v, tokens, "v");
  const auto rows_ = row_ids.expect_contiguous();
  const auto slots_ = slots.expect_contiguous();
  TORCH_CHECK(slots.numel() == tokens, "emssd::append_kv: ", tokens, " row_ids but ", slots.numel(), " slots");
  const int64_t* rows = rows_->const_data_ptr<int64_t>();
  const int64_t* slot = slots_->const_data_ptr<int64_t>();
  const int64_t num_rows = k_cache.size(0), capacity = std::min(k_cache.size(1), v_cache.size(1));
  for (int64_t t = 0; t < tokens; ++t)
    TORCH_CHECK(rows[t] == num_rows || (rows[t] >= 0 && rows[t] < num_rows && slot[t] >= 0 && slot[t] < capacity),
                "emssd::append_kv: token ", t, " goes to row ", rows[t], ", slot ", slot[t], "; the cache has ",
                num_rows, " rows of ", capacity, " slots");
  write_tokens(k_cache, k.stride(-1) == 1 ? k : k.contiguous(), rows, slot);
  write_tokens(v_cache, v.stride(-1) == 1 ? v : v.contiguous(), rows, slot);
}

}  // namespace emssd
