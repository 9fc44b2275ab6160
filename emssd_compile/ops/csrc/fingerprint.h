// emssd::fingerprint on CPU: 64 bits that tell whether the values of a tensor have changed, at the speed of reading them.
//
// Version counters miss changes made through `tensor.data`, and there are none for inference tensors. Each step of the
// hash is a bijection of the word it takes in, so one changed word always shows; several changed words cancel with a
// chance of 2^-64.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <vector>

namespace emssd {

class Hash {
 public:
  void add(const char* bytes, int64_t count) {
    int64_t at = 0;
    for (; at + kStripe <= count; at += kStripe)
      for (int lane = 0; lane < kLanes; ++lane) mix(lane, word(bytes + at + 8 * lane, 8));
    for (int lane = 0; at < count; at += 8, ++lane) mix(lane, word(bytes + at, std::min<int64_t>(8, count - at)));
  }

  uint64_t value() {
    for (int lane = 1; lane < kLanes; ++lane) mix(0, lanes_[lane]);
    return lanes_[0];
  }

 private:
  static constexpr int kLanes = 8;  // independent chains: multiplications overlap
  static constexpr int64_t kStripe = 8 * kLanes;
  static constexpr uint64_t kOdd = 0x9E3779B97F4A7C15;  // 2^64 / golden ratio

  static uint64_t word(const char* bytes, int64_t count) {
    uint64_t found = 0;
    std::memcpy(&found, bytes, static_cast<size_t>(count));
    return found;
  }

  void mix(int lane, uint64_t value) { lanes_[lane] = std::rotl((lanes_[lane] ^ value) * kOdd, 31); }

  std::array<uint64_t, kLanes> lanes_{1, 2, 3, 4, 5, 6, 7, 8};
};

inline int64_t fingerprint(const at::Tensor& tensor) {
  constexpr int64_t kChunk = 1 << 18;  // bytes; fixed, so that the number of threads does not matter
  const at::Tensor held = tensor.detach().contiguous();
  const auto* bytes = static_cast<const char*>(held.const_data_ptr());
  const auto size = static_cast<int64_t>(held.nbytes());
  std::vector<uint64_t> chunks(static_cast<size_t>((size + kChunk - 1) / kChunk));
  at::parallel_for(0, static_cast<int64_t>(chunks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      Hash hash;
      hash.add(bytes + i * kChunk, std::min(kChunk, size - i * kChunk));
      chunks[static_cast<size_t>(i)] = hash.value();
    }
  });
  Hash all;
  all.add(reinterpret_cast<const char*>(chunks.data()), static_cast<int64_t>(8 * chunks.size()));
  return static_cast<int64_t>(all.value());
}

}  // namespace emssd
