// What a thread of emssd::ragged_attention writes to while it works.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "ragged_plan.h"
#include "tile_math.h"

namespace emssd {

// Running softmax and weighted sum of values of a tile's queries.
template <typename T>
struct Accumulator {
  Softmax<T> softmax[kQueryTile];
  T* values;       // [kQueryTile][stride]
  int64_t stride;  // the value size, rounded up to whole vectors

  void clear(int64_t num_queries) {
    std::fill_n(softmax, num_queries, Softmax<T>());
    std::fill_n(values, num_queries * stride, T(0));
  }
  void merge(const Accumulator& other, int64_t num_queries) {
    for (int64_t m = 0; m < num_queries; ++m)
      merge_softmax(softmax[m], values + m * stride, other.softmax[m], other.values + m * stride, stride);
  }
  void assign(const Accumulator& other, int64_t num_queries) {
    std::copy_n(other.softmax, num_queries, softmax);
    std::copy_n(other.values, num_queries * stride, values);
  }
};

template <typename T>
struct Scratch {
  T* q;         // [kQueryTile][head_size]
  T* rows;      // [kKeyBlock][max(head_size, stride of values)]: a block's keys or values, widened
  T* keys;      // [head_size][kKeyBlock]: a block's keys, transposed
  T* scores;    // [kQueryTile][kKeyBlock]
  T* visible;   // [kQueryTile][kKeyBlock]: 1 where the tile's token sees the key, else 0
  T* distance;  // [kQueryTile][kKeyBlock]: position of the key minus position of the tile's token
  Accumulator<T> span, total;

  Scratch(int64_t head_size, int64_t value_size) {
    span.stride = total.stride = round_up(value_size, vector_size<T>());
    const int64_t tile_values = kQueryTile * span.stride, tile_keys = kQueryTile * kKeyBlock;
    const std::pair<T**, int64_t> parts[] = {
        {&q, kQueryTile * head_size}, {&rows, kKeyBlock * std::max(head_size, span.stride)},
        {&keys, head_size * kKeyBlock}, {&scores, tile_keys}, {&visible, tile_keys}, {&distance, tile_keys},
        {&span.values, tile_values}, {&total.values, tile_values}};
    size_t lines = 0;
    for (const auto& [pointer, count] : parts) lines += num_lines(count);
    Line* next = reserve(lines);
    for (const auto& [pointer, count] : parts) {
      *pointer = reinterpret_cast<T*>(next);
      next += num_lines(count);
    }
  }

 private:
  struct alignas(64) Line {
    char bytes[64];
  };
  static size_t num_lines(int64_t count) { return (count * sizeof(T) + sizeof(Line) - 1) / sizeof(Line); }
  // A thread keeps its memory from call to call: to allocate and touch it anew would cost more than a small step.
  static Line* reserve(size_t lines) {
    static thread_local std::vector<Line> memory;
    if (memory.size() < lines) memory.resize(lines);
    return memory.data();
  }
};

}  // namespace emssd
