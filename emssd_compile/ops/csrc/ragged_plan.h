// How emssd::ragged_attention is cut into pieces of work.
//
// The query heads of a group and the tokens of a row share each load of a key: together they are one list of queries,
// cut into tiles. A row with many keys is cut into spans of keys too, where there are too few tiles to occupy every
// thread.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "slots.h"
#include "tile_math.h"

namespace emssd {

constexpr int64_t kQueryTile = 32;   // queries that share a block of keys
constexpr int64_t kKeyBlock = 64;    // keys whose scores are held at once
constexpr int64_t kKeySpan = 1024;   // keys after which the running softmax starts anew, so that spans can run apart
constexpr int64_t kTilesPerThread = 4;
constexpr int64_t kWordBits = 32;  // of an ancestor mask

// How far back a query sees: to the start of its window and of its chunk.
struct Reach {
  int64_t window, chunk;  // in tokens; not positive: none

  bool is_limited() const { return window > 0 || chunk > 0; }
  // Position of the first key that a query sees. Never falls as the query's position rises.
  int64_t first_seen(int64_t position) const {
    const int64_t of_window = window > 0 ? position - window + 1 : 0;
    const int64_t of_chunk = chunk > 0 ? position / chunk * chunk : 0;
    return std::max<int64_t>({of_window, of_chunk, 0});
  }
};

// The op's arguments as raw pointers; strides in elements. kv_t is scalar_t, or int8_t where vectors are packed.
template <typename scalar_t, typename T, typename kv_t>
struct Arguments {
  const scalar_t* q;
  const kv_t *k_cache, *v_cache;
  int64_t q_token, q_head, k_row, k_slot, k_head, v_row, v_slot, v_head;
  const int64_t *offsets, *lengths, *positions;
  int64_t num_rows, num_heads, num_kv_heads, head_size, value_size;
  ScoreRule<T> rule;
  Reach reach;
  const T* alibi_slopes;  // [num_heads] or null
  const T* sinks;         // [num_heads] or null
  const int32_t* ancestors;  // [T, ancestor_words] or null; bit j % 32 of word j / 32: sees the row's token j
  int64_t ancestor_words;    // 0 without them
  const BlockTable* table;   // where slots lie
  scalar_t* out;  // [T, num_heads, value_size]

  int64_t group() const { return num_heads / num_kv_heads; }
  int64_t num_tokens(int64_t row) const { return offsets[row + 1] - offsets[row]; }
  // Tokens of a row of whom bits say by which others they are seen; those behind them are seen in order.
  int64_t num_bits() const { return ancestor_words * kWordBits; }
};

// Queries of one row and one key/value head. Query m is the group's head m % group of the row's token m / group.
struct Tile {
  int64_t row, kv_head, first_query, num_queries;
  int64_t first_token, last_token;                // of the row
  int64_t lowest_position, highest_position;      // of these tokens
  int64_t begin_slot, end_slot;                   // no token sees a slot outside
  int64_t first_partial = -1, num_partials = 0;   // its partial results, if it is split
};

// A tile and the part of its slots that one thread works through.
struct Work {
  int64_t tile, begin_slot, end_slot;
  int64_t partial;  // index of the result, -1 if the work is all of its tile
};

inline int64_t end_of_span(int64_t slot, int64_t limit) { return std::min((slot / kKeySpan + 1) * kKeySpan, limit); }

template <typename scalar_t, typename T, typename kv_t>
class Plan {
 public:
  explicit Plan(const Arguments<scalar_t, T, kv_t>& args) : args_(args) {
    for (int64_t row = 0; row < args.num_rows; ++row) {
      const int64_t num_queries = args.num_tokens(row) * args.group();
      for (int64_t kv_head = 0; kv_head < args.num_kv_heads; ++kv_head)
        for (int64_t first = 0; first < num_queries; first += kQueryTile)
          tiles.push_back(plan_tile({row, kv_head, first, std::min(kQueryTile, num_queries - first)}));
    }
    const bool split = static_cast<int64_t>(tiles.size()) < kTilesPerThread * at::get_num_threads();
    for (size_t i = 0; i < tiles.size(); ++i) plan_work(i, split);
  }

  std::vector<Tile> tiles;
  std::vector<Work> work;
  int64_t num_partials = 0;
  int64_t multiply_adds = 0;

 private:
  Tile plan_tile(Tile tile) {
    tile.first_token = tile.first_query / args_.group();
    tile.last_token = (tile.first_query + tile.num_queries - 1) / args_.group();
    const int64_t* positions = args_.positions + args_.offsets[tile.row];
    const auto [lowest, highest] =
        std::minmax_element(positions + tile.first_token, positions + tile.last_token + 1);
    tile.lowest_position = *lowest;
    tile.highest_position = *highest;
    const int64_t length = args_.lengths[tile.row];
    tile.begin_slot = std::min(args_.reach.first_seen(*lowest), length) / kKeyBlock * kKeyBlock;
    tile.end_slot = length + std::max(tile.last_token + 1, std::min(args_.num_bits(), args_.num_tokens(tile.row)));
    multiply_adds += tile.num_queries * (tile.end_slot - tile.begin_slot) * (args_.head_size + args_.value_size);
    return tile;
  }

  void plan_work(int64_t index, bool split) {
    Tile& tile = tiles[index];
    if (!split || end_of_span(tile.begin_slot, tile.end_slot) == tile.end_slot) {
      work.push_back({index, tile.begin_slot, tile.end_slot, -1});
      return;
    }
    tile.first_partial = num_partials;
    for (int64_t begin = tile.begin_slot; begin < tile.end_slot; begin = end_of_span(begin, tile.end_slot))
      work.push_back({index, begin, end_of_span(begin, tile.end_slot), num_partials++});
    tile.num_partials = num_partials - tile.first_partial;
  }

  const Arguments<scalar_t, T, kv_t>& args_;
};

}  // namespace emssd
