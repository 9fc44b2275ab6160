// Attention of one tile of queries to its row's keys, block by block.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "ragged_plan.h"
#include "ragged_scratch.h"
#include "tile_math.h"

namespace emssd {

template <typename scalar_t, typename T, typename kv_t>
class TileAttention {
 public:
  TileAttention(const Arguments<scalar_t, T, kv_t>& args, const Tile& tile, Scratch<T>& scratch)
      : args_(args), tile_(tile), scratch_(scratch), first_packed_(args.offsets[tile.row]),
        length_(args.lengths[tile.row]) {}

  // Leaves the attention of the tile to these slots in scratch.total.
  void attend(int64_t begin_slot, int64_t end_slot) {
    load_queries();
    scratch_.total.clear(tile_.num_queries);
    for (int64_t begin = begin_slot; begin < end_slot; begin = end_of_span(begin, end_slot)) {
      const int64_t end = end_of_span(begin, end_slot);
      scratch_.span.clear(tile_.num_queries);
      for (int64_t slot = begin; slot < end; slot += kKeyBlock) attend_block(slot, std::min(kKeyBlock, end - slot));
      scratch_.total.merge(scratch_.span, tile_.num_queries);
    }
  }

  // Writes scratch.total, divided by the sum of its weights, to the op's output. What sees no key becomes zeros.
  void store() {
    for (int64_t m = 0; m < tile_.num_queries; ++m) {
      T* values = scratch_.total.values + m * scratch_.total.stride;
      const T* sink = args_.sinks == nullptr ? nullptr : args_.sinks + head_of(m);
      scale_row(values, scratch_.total.stride, normaliser(scratch_.total.softmax[m], sink));
      scalar_t* out = args_.out + ((first_packed_ + token_of(m)) * args_.num_heads + head_of(m)) * args_.value_size;
      at::vec::convert(values, out, args_.value_size);
    }
  }

 private:
  int64_t token_of(int64_t m) const { return (tile_.first_query + m) / args_.group(); }
  int64_t head_of(int64_t m) const {
    return tile_.kv_head * args_.group() + (tile_.first_query + m) % args_.group();
  }

  void attend_block(int64_t slot, int64_t num_keys) {
    const int64_t columns = round_up(num_keys, vector_size<T>());
    const bool some_hidden = columns != num_keys || !sees_all(slot, num_keys);
    if (some_hidden || args_.alibi_slopes != nullptr) describe_block(slot, num_keys);
    load_keys(slot, num_keys);
    multiply<T, false>(scratch_.q, args_.head_size, scratch_.keys, kKeyBlock, scratch_.scores, kKeyBlock,
                       tile_.num_queries, columns, args_.head_size, /*accumulate=*/false);
    for (int64_t m = 0; m < tile_.num_queries; ++m) weigh(m, columns, some_hidden);
    int64_t value_stride = 0;
    const T* values = load_values(slot, num_keys, &value_stride);
    const auto add_values = some_hidden ? multiply<T, true> : multiply<T, false>;
    add_values(scratch_.scores, kKeyBlock, values, value_stride, scratch_.span.values, scratch_.span.stride,
               tile_.num_queries, scratch_.span.stride, num_keys, /*accumulate=*/true);
  }

  void weigh(int64_t m, int64_t columns, bool some_hidden) {
    const int64_t token = (token_of(m) - tile_.first_token) * kKeyBlock;
    const bool alibi = args_.alibi_slopes != nullptr;
    const T shrink = update_softmax(
        scratch_.scores + m * kKeyBlock, columns, args_.rule, alibi ? args_.alibi_slopes[head_of(m)] : T(0),
        alibi ? scratch_.distance + token : nullptr, some_hidden ? scratch_.visible + token : nullptr,
        scratch_.span.softmax[m]);
    if (shrink != T(1)) scale_row(scratch_.span.values + m * scratch_.span.stride, scratch_.span.stride, shrink);
  }

  // Whether every token of the tile sees every one of these slots. May say no where the answer is yes.
  bool sees_all(int64_t slot, int64_t num_keys) const {
    if (args_.reach.is_limited())
      return slot + num_keys <= length_ && slot >= args_.reach.first_seen(tile_.highest_position);
    if (slot + num_keys <= length_) return true;
    const bool in_order = args_.num_bits() == 0 || slot >= length_ + args_.num_bits();
    return in_order && slot + num_keys <= length_ + tile_.first_token + 1;
  }

  // Fills scratch.visible and scratch.distance.
  void describe_block(int64_t slot, int64_t num_keys) {
    const int64_t num_committed = std::clamp<int64_t>(length_ - slot, 0, num_keys);
    const int64_t* positions = args_.positions + first_packed_;
    for (int64_t token = tile_.first_token; token <= tile_.last_token; ++token) {
      T* visible = scratch_.visible + (token - tile_.first_token) * kKeyBlock;
      T* distance = scratch_.distance + (token - tile_.first_token) * kKeyBlock;
      const int64_t first_seen = args_.reach.first_seen(positions[token]);
      for (int64_t j = 0; j < num_committed; ++j) {
        visible[j] = slot + j >= first_seen;
        distance[j] = static_cast<T>(slot + j - positions[token]);
      }
      for (int64_t j = num_committed; j < num_keys; ++j) {
        const int64_t other = slot + j - length_;  // token of this step whose key lies in the slot
        visible[j] = is_ancestor(other, token) && positions[other] >= first_seen;
        distance[j] = static_cast<T>(positions[other] - positions[token]);
      }
      std::fill(visible + num_keys, visible + kKeyBlock, T(0));
      std::fill(distance + num_keys, distance + kKeyBlock, T(0));
    }
  }

  bool is_ancestor(int64_t other, int64_t token) const {
    if (other >= args_.num_bits()) return other <= token;
    const int32_t* words = args_.ancestors + (first_packed_ + token) * args_.ancestor_words;
    return words[other / kWordBits] >> other % kWordBits & 1;
  }

  void load_queries() {
    for (int64_t m = 0; m < tile_.num_queries; ++m) {
      const scalar_t* q = args_.q + (first_packed_ + token_of(m)) * args_.q_token + head_of(m) * args_.q_head;
      widen_row(q, scratch_.q + m * args_.head_size, args_.head_size);
    }
  }

  // Calls function(i, slots) for slots that lie one behind the other, the first of them the i-th of the block.
  template <typename F>
  void for_runs(int64_t slot, int64_t num_keys, const F& function) const {
    for (int64_t i = 0; i < num_keys;) {
      const int64_t count = args_.table->run(slot + i, slot + num_keys);
      function(i, count);
      i += count;
    }
  }
  const kv_t* keys_at(int64_t slot) const {
    return args_.k_cache + args_.table->place(tile_.row, slot, args_.k_row, args_.k_slot) +
           tile_.kv_head * args_.k_head;
  }
  const kv_t* values_at(int64_t slot) const {
    return args_.v_cache + args_.table->place(tile_.row, slot, args_.v_row, args_.v_slot) +
           tile_.kv_head * args_.v_head;
  }

  void load_keys(int64_t slot, int64_t num_keys) {
    const int64_t size = args_.head_size;
    for_runs(slot, num_keys, [&](int64_t i, int64_t count) {
      const kv_t* keys = keys_at(slot + i);
      if constexpr (std::is_same_v<kv_t, T>) {
        at::vec::transpose_mxn<T>(keys, args_.k_slot, scratch_.keys + i, kKeyBlock, count, size);
      } else {
        for (int64_t j = 0; j < count; ++j) widen_row(keys + j * args_.k_slot, scratch_.rows + (i + j) * size, size);
      }
    });
    if constexpr (!std::is_same_v<kv_t, T>)
      at::vec::transpose_mxn<T>(scratch_.rows, size, scratch_.keys, kKeyBlock, num_keys, size);
  }

  // Returns the block's values as [num_keys][*stride], each padded with zeros to whole vectors.
  const T* load_values(int64_t slot, int64_t num_keys, int64_t* stride) {
    const int64_t padded = scratch_.span.stride;
    if constexpr (std::is_same_v<kv_t, T>) {
      // What is read only once is read where it lies.
      const bool in_one_piece = args_.table->run(slot, slot + num_keys) == num_keys;
      if (padded == args_.value_size && tile_.num_queries <= kTileRows && in_one_piece) {
        *stride = args_.v_slot;
        return values_at(slot);
      }
    }
    for_runs(slot, num_keys, [&](int64_t i, int64_t count) {
      const kv_t* values = values_at(slot + i);
      for (int64_t j = 0; j < count; ++j) {
        T* row = scratch_.rows + (i + j) * padded;
        widen_row(values + j * args_.v_slot, row, args_.value_size);
        std::fill(row + args_.value_size, row + padded, T(0));
      }
    });
    *stride = padded;
    return scratch_.rows;
  }

  const Arguments<scalar_t, T, kv_t>& args_;
  const Tile& tile_;
  Scratch<T>& scratch_;
  const int64_t first_packed_;  // the row's first packed token
  const int64_t length_;        // the row's committed slots
};

}  // namespace emssd
