// emssd::move_kv on CPU: each row's tokens are copied towards its start, one after the other.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>

#include "append_kv.h"
#include "slots.h"

namespace emssd {

// The moves of all rows: the token `path[b][i]` behind slot `starts[b]` goes to slot `starts[b] + i`, for i < counts[b].
struct Moves {
  const int64_t *starts, *path, *counts;
  int64_t num_rows, num_nodes;
};

inline void move_tokens(const at::Tensor& cache, const Moves& moves, const BlockTable& table) {
  const int64_t item = cache.element_size(), heads = cache.size(2), bytes = cache.size(3) * item;
  const int64_t head_stride = cache.stride(2) * item;
  char* data = static_cast<char*>(cache.mutable_data_ptr());
  constexpr int64_t kBytesPerThread = 1 << 16;
  const int64_t grain = std::max<int64_t>(1, kBytesPerThread / std::max<int64_t>(1, moves.num_nodes * heads * bytes));
  at::parallel_for(0, moves.num_rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t* path = moves.path + b * moves.num_nodes;
      for (int64_t i = 0; i < moves.counts[b]; ++i) {
        if (path[i] == i) continue;
        const auto place = [&](int64_t slot) {
          return data + table.place(b, moves.starts[b] + slot, cache.stride(0), cache.stride(1)) * item;
        };
        copy_token(place(i), head_stride, place(path[i]), head_stride, heads, bytes);
      }
    }
  });
}

inline void check_moves(const Moves& moves, int64_t capacity) {
  for (int64_t b = 0; b < moves.num_rows; ++b) {
    const int64_t count = moves.counts[b], start = moves.starts[b];
    TORCH_CHECK(count >= 0 && count <= moves.num_nodes, "emssd::move_kv: row ", b, " moves ", count,
                " tokens, its path has ", moves.num_nodes);
    TORCH_CHECK(count == 0 || (start >= 0 && start < capacity), "emssd::move_kv: row ", b, " starts at slot ", start,
                "; the cache has ", capacity, " slots");
    const int64_t* path = moves.path + b * moves.num_nodes;
    for (int64_t i = 0; i < count; ++i)
      TORCH_CHECK(path[i] > (i == 0 ? -1 : path[i - 1]) && path[i] < capacity - start, "emssd::move_kv: row ", b,
                  " moves node ", path[i], " behind slot ", start, " to depth ", i,
                  "; nodes must ascend, and the cache has ", capacity, " slots");
  }
}

inline void check_cache(const at::Tensor& cache, int64_t rows, bool is_pool, const char* name) {
  TORCH_CHECK(cache.dim() == 4 && (is_pool || cache.size(0) == rows), "emssd::move_kv: ", name,
              " must be [B, C, Hkv, D] for ", rows, " rows, got ", cache.sizes());
  TORCH_CHECK(cache.stride(3) == 1 || cache.size(3) == 1, "emssd::move_kv: the last dimension of ", name,
              " must be contiguous, its strides are ", cache.strides());
}

inline void move_kv(const at::Tensor& k_cache, const at::Tensor& v_cache, const at::Tensor& starts,
                    const at::Tensor& path, const at::Tensor& counts,
                    const std::optional<at::Tensor>& block_table) {
  TORCH_CHECK(path.dim() == 2 && starts.numel() == path.size(0) && counts.numel() == path.size(0),
              "emssd::move_kv: starts [B], path [B, N] and counts [B] do not fit: ", starts.sizes(), ", ", path.sizes(),
              ", ", counts.sizes());
  check_cache(k_cache, path.size(0), block_table.has_value(), "k_cache");
  check_cache(v_cache, path.size(0), block_table.has_value(), "v_cache");
  const BlockTable table("emssd::move_kv", block_table, path.size(0), k_cache, v_cache);
  const auto starts_ = starts.expect_contiguous();
  const auto path_ = path.expect_contiguous();
  const auto counts_ = counts.expect_contiguous();
  const Moves moves{.starts = starts_->const_data_ptr<int64_t>(),
                    .path = path_->const_data_ptr<int64_t>(),
                    .counts = counts_->const_data_ptr<int64_t>(),
                    .num_rows = path.size(0),
                    .num_nodes = path.size(1)};
  check_moves(moves, table.capacity());
  for (int64_t b = 0; b < moves.num_rows; ++b)
    if (moves.counts[b] > 0)
      table.check(b, moves.starts[b], moves.starts[b] + moves.path[b * moves.num_nodes + moves.counts[b] - 1] + 1);
  move_tokens(k_cache, moves, table);
  move_tokens(v_cache, moves, table);
}

}  // namespace emssd
