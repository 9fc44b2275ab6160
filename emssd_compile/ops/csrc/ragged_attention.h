// emssd::ragged_attention on CPU: flash attention whose work is the sum of the rows' lengths.
//
// A tile of queries meets its row's keys in blocks, with a running softmax (Milakov and Gimelshein 2018, algorithm 3),
// kept per span of keys; spans are merged in order. Blocks and spans lie at fixed slots of the cache and every query's
// arithmetic is its own, so a token's result has the same bits whatever the other rows are, however many tokens the
// step holds and however many threads there are.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <optional>
#include <vector>

#include "packed_kv.h"
#include "ragged_plan.h"
#include "ragged_scratch.h"
#include "ragged_tile.h"

namespace emssd {

constexpr int64_t kMinMultiplyAdds = 1 << 16;  // of a thread; with less it costs more than it brings

// Calls function(i, scratch) for i < count. Threads take the next i as they become free, since rows differ in length.
template <typename T, typename scalar_t, typename kv_t, typename F>
void for_each(int64_t count, int64_t multiply_adds, const Arguments<scalar_t, T, kv_t>& args, const F& function) {
  const int64_t num_threads = std::min<int64_t>({multiply_adds / kMinMultiplyAdds + 1, count, at::get_num_threads()});
  std::atomic<int64_t> next{0};
  at::parallel_for(0, num_threads, 1, [&](int64_t, int64_t) {
    Scratch<T> scratch(args.head_size, args.value_size);
    for (int64_t i = next++; i < count; i = next++) function(i, scratch);
  });
}

template <typename scalar_t, typename T, typename kv_t>
void run_plan(const Arguments<scalar_t, T, kv_t>& args, const Plan<scalar_t, T, kv_t>& plan) {
  const int64_t stride = round_up(args.value_size, vector_size<T>());
  std::vector<T> partial_values(plan.num_partials * kQueryTile * stride);
  std::vector<Accumulator<T>> partials(plan.num_partials);
  for (int64_t p = 0; p < plan.num_partials; ++p) {
    partials[p].values = partial_values.data() + p * kQueryTile * stride;
    partials[p].stride = stride;
  }
  for_each(plan.work.size(), plan.multiply_adds, args, [&](int64_t i, Scratch<T>& scratch) {
    const Work& work = plan.work[i];
    const Tile& tile = plan.tiles[work.tile];
    TileAttention<scalar_t, T, kv_t> attention(args, tile, scratch);
    attention.attend(work.begin_slot, work.end_slot);
    if (work.partial < 0)
      attention.store();
    else
      partials[work.partial].assign(scratch.total, tile.num_queries);
  });
  if (plan.num_partials == 0) return;
  for_each(plan.tiles.size(), plan.multiply_adds, args, [&](int64_t i, Scratch<T>& scratch) {
    const Tile& tile = plan.tiles[i];
    if (tile.num_partials == 0) return;
    scratch.total.clear(tile.num_queries);
    for (int64_t p = 0; p < tile.num_partials; ++p)
      scratch.total.merge(partials[tile.first_partial + p], tile.num_queries);
    TileAttention<scalar_t, T, kv_t>(args, tile, scratch).store();
  });
}

inline void check_shapes(const at::Tensor& q, const at::Tensor& k_cache, const at::Tensor& v_cache,
                         const at::Tensor& offsets, const at::Tensor& lengths, const at::Tensor& positions,
                         int64_t rows) {
  TORCH_CHECK(q.dim() == 3 && k_cache.dim() == 4 && v_cache.dim() == 4 && q.size(2) == vector_components(k_cache) &&
                  k_cache.sizes().slice(0, 3) == v_cache.sizes().slice(0, 3) && q.size(1) % k_cache.size(2) == 0,
              "emssd::ragged_attention: q [T, Hq, Dk], k_cache [B, C, Hkv, Dk] and v_cache [B, C, Hkv, Dv] do not fit:",
              " ", q.sizes(), ", ", k_cache.sizes(), ", ", v_cache.sizes());
  TORCH_CHECK(offsets.numel() == rows + 1 && lengths.numel() == rows && positions.numel() == q.size(0),
              "emssd::ragged_attention: offsets [B + 1], lengths [B] and positions [T] do not fit: ", offsets.sizes(),
              ", ", lengths.sizes(), ", ", positions.sizes());
  TORCH_CHECK(k_cache.scalar_type() == v_cache.scalar_type() &&
                  (q.scalar_type() == k_cache.scalar_type() || is_packed(k_cache)),
              "emssd::ragged_attention: q, k_cache and v_cache must have one dtype, or both caches Char, got ", q.scalar_type(), ", ",
              k_cache.scalar_type(), ", ", v_cache.scalar_type());
}

inline void check_per_head(const char* name, const std::optional<at::Tensor>& values, int64_t num_heads) {
  TORCH_CHECK(!values || values->numel() == num_heads, "emssd::ragged_attention: ", name, " must be [Hq], got ",
              values->sizes(), " for ", num_heads, " heads");
}

inline void check_ancestors(const at::Tensor& q, const std::optional<at::Tensor>& ancestors) {
  TORCH_CHECK(!ancestors || (ancestors->dim() == 2 && ancestors->size(0) == q.size(0) &&
                             ancestors->scalar_type() == at::kInt),
              "emssd::ragged_attention: ancestors must be Int [T, W], got ", ancestors->scalar_type(), " ",
              ancestors->sizes(), " for ", q.size(0), " tokens");
}

// Throws if the rows would reach outside the tokens or the cache.
inline void check_rows(const int64_t* offsets, const int64_t* lengths, int64_t rows, int64_t tokens,
                       const BlockTable& table) {
  TORCH_CHECK(offsets[0] == 0 && offsets[rows] <= tokens,
              "emssd::ragged_attention: offsets must run from 0 to at most ", tokens, " tokens, got ", offsets[0],
              " to ", offsets[rows]);
  for (int64_t b = 0; b < rows; ++b) {
    const int64_t count = offsets[b + 1] - offsets[b];
    TORCH_CHECK(count >= 0, "emssd::ragged_attention: offsets decrease at row ", b);
    if (count == 0) continue;
    TORCH_CHECK(lengths[b] >= 0 && lengths[b] + count <= table.capacity(), "emssd::ragged_attention: row ", b, " has ",
                lengths[b], " committed and ", count, " new tokens, its cache holds ", table.capacity());
    table.check(b, 0, lengths[b] + count);
  }
}

inline void zero_tail(const at::Tensor& out, int64_t first) {
  const int64_t token_bytes = out.size(1) * out.size(2) * out.element_size();
  std::memset(static_cast<char*>(out.mutable_data_ptr()) + first * token_bytes, 0, (out.size(0) - first) * token_bytes);
}

inline at::Tensor with_contiguous_rows(const at::Tensor& tensor) {
  return tensor.stride(-1) == 1 ? tensor : tensor.contiguous();
}

inline at::Tensor ragged_attention(const at::Tensor& q_, const at::Tensor& k_cache_, const at::Tensor& v_cache_,
                                   const at::Tensor& offsets_, const at::Tensor& lengths_, const at::Tensor& positions_,
                                   double scale, int64_t window, int64_t chunk, double softcap,
                                   const std::optional<at::Tensor>& alibi_slopes,
                                   const std::optional<at::Tensor>& sinks_,
                                   const std::optional<at::Tensor>& ancestors,
                                   const std::optional<at::Tensor>& block_table) {
  const int64_t rows = block_table ? lengths_.numel() : k_cache_.size(0);
  check_shapes(q_, k_cache_, v_cache_, offsets_, lengths_, positions_, rows);
  check_per_head("alibi_slopes", alibi_slopes, q_.size(1));
  check_per_head("sinks", sinks_, q_.size(1));
  check_ancestors(q_, ancestors);
  const at::Tensor q = with_contiguous_rows(q_);
  const at::Tensor k_cache = with_contiguous_rows(k_cache_), v_cache = with_contiguous_rows(v_cache_);
  const at::Tensor offsets = offsets_.contiguous(), lengths = lengths_.contiguous();
  const at::Tensor positions = positions_.contiguous();
  const BlockTable table("emssd::ragged_attention", block_table, rows, k_cache, v_cache);
  check_rows(offsets.const_data_ptr<int64_t>(), lengths.const_data_ptr<int64_t>(), rows, q.size(0), table);
  at::Tensor out = at::empty({q.size(0), q.size(1), vector_components(v_cache)}, q.options());
  zero_tail(out, offsets.const_data_ptr<int64_t>()[rows]);

  const auto run = [&]<typename scalar_t, typename T, typename kv_t>(scalar_t, T, kv_t) {
    at::Tensor slopes, sinks, tree;
    if (alibi_slopes) slopes = alibi_slopes->to(c10::CppTypeToScalarType<T>::value).contiguous();
    if (sinks_) sinks = sinks_->to(c10::CppTypeToScalarType<T>::value).contiguous();
    if (ancestors) tree = ancestors->contiguous();
    const Arguments<scalar_t, T, kv_t> args{
        .q = q.const_data_ptr<scalar_t>(),
        .k_cache = k_cache.const_data_ptr<kv_t>(),
        .v_cache = v_cache.const_data_ptr<kv_t>(),
        .q_token = q.stride(0), .q_head = q.stride(1),
        .k_row = k_cache.stride(0), .k_slot = k_cache.stride(1), .k_head = k_cache.stride(2),
        .v_row = v_cache.stride(0), .v_slot = v_cache.stride(1), .v_head = v_cache.stride(2),
        .offsets = offsets.const_data_ptr<int64_t>(),
        .lengths = lengths.const_data_ptr<int64_t>(),
        .positions = positions.const_data_ptr<int64_t>(),
        .num_rows = rows, .num_heads = q.size(1), .num_kv_heads = k_cache.size(2),
        .head_size = q.size(2), .value_size = vector_components(v_cache),
        .rule = {static_cast<T>(scale), static_cast<T>(softcap)},
        .reach = {window, chunk},
        .alibi_slopes = alibi_slopes ? slopes.const_data_ptr<T>() : nullptr,
        .sinks = sinks_ ? sinks.const_data_ptr<T>() : nullptr,
        .ancestors = ancestors ? tree.const_data_ptr<int32_t>() : nullptr,
        .ancestor_words = ancestors ? tree.size(1) : 0,
        .table = &table,
        .out = out.mutable_data_ptr<scalar_t>()};
    run_plan(args, Plan<scalar_t, T, kv_t>(args));
  };
  const auto run_for = [&]<typename scalar_t, typename T>(scalar_t, T) {
    is_packed(k_cache) ? run(scalar_t(), T(), int8_t()) : run(scalar_t(), T(), scalar_t());
  };
  switch (q.scalar_type()) {
    case at::kFloat: run_for(float(), float()); break;
    case at::kDouble: run_for(double(), double()); break;
    case at::kBFloat16: run_for(at::BFloat16(), float()); break;
    case at::kHalf: run_for(at::Half(), float()); break;
    default: TORCH_CHECK(false, "emssd::ragged_attention: no CPU kernel for ", q.scalar_type());
  }
  return out;
}

}  // namespace emssd
