// emssd::kept_threshold on CPU: selection by radix, a row a thread; nothing is sorted.
//
// A key is kept if less than a limit lies above it: fewer than `most` keys, and less than `share` of the weight. So the
// smallest kept key is found digit by digit, from the highest: it has the lowest digit above which less than the limit
// lies.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <functional>
#include <limits>
#include <vector>

namespace emssd {

// Integers in the order of the floats; 0 and -0 are one.
inline int32_t ordered(float key) {
  const int32_t bits = std::bit_cast<int32_t>(key + 0.0f);
  return bits ^ ((bits >> 31) & 0x7FFFFFFF);
}
inline float from_ordered(int32_t order) { return std::bit_cast<float>(order ^ ((order >> 31) & 0x7FFFFFFF)); }

// Keys of a row, as integers, and what each of them weighs.
struct Weighed {
  const int32_t* orders;
  const float* weights;
  int64_t count;
};

// Some of the keys of a row.
class Selected {
 public:
  // Those that are wanted; they may be taken from what was selected before.
  template <typename Wanted>
  Weighed take(const Weighed& from, Wanted wanted) {
    clear(from.count);
    add(from, 0, from.count, wanted);
    return all();
  }

  void clear(int64_t capacity) {
    if (static_cast<int64_t>(orders_.size()) < capacity) orders_.resize(capacity), weights_.resize(capacity);
    count_ = 0;
  }

  template <typename Wanted>
  void add(const Weighed& from, int64_t begin, int64_t end, Wanted wanted) {
    int64_t next = count_;
    for (int64_t i = begin; i < end; ++i) {
      const int32_t order = from.orders[i];
      orders_[next] = order;
      weights_[next] = from.weights[i];
      next += wanted(order);
    }
    count_ = next;
  }

  Weighed all() const { return {orders_.data(), weights_.data(), count_}; }

 private:
  std::vector<int32_t> orders_;
  std::vector<float> weights_;
  int64_t count_ = 0;
};

// What the keys with each digit weigh, or how many they are. Neighbours add to different lanes: the keys of a row have
// few digits, and each addition would wait for the one before.
class DigitSums {
 public:
  static constexpr int kDigits = 1 << 11;

  static int digit(int32_t order, int shift) {
    return static_cast<int>((static_cast<uint32_t>(order) ^ 0x80000000u) >> shift) & (kDigits - 1);
  }

  template <bool kCounts>
  void add_all(const Weighed& keys, int shift) {
    std::fill(sums_.begin(), sums_.end(), 0.0);
    std::fill(seen_.begin(), seen_.end(), uint8_t{0});
    const auto add = [&](int lane, int64_t i) {
      const int found = digit(keys.orders[i], shift);
      sums_[lane * kDigits + found] += kCounts ? 1.0 : static_cast<double>(keys.weights[i]);
      seen_[found] = 1;
    };
    int64_t i = 0;
    for (; i + kLanes <= keys.count; i += kLanes)
      for (int lane = 0; lane < kLanes; ++lane) add(lane, i + lane);
    for (; i < keys.count; ++i) add(0, i);
  }

  double total() const {
    double found = 0;
    for (int digit = 0; digit < kDigits; ++digit) found += sum(digit);
    return found;
  }

  // The lowest digit above which less than the limit lies, or the highest; `above` grows by what lies above it.
  int lowest_kept(double& above, double limit) const {
    int lowest = -1;
    double through = above;
    for (int digit = kDigits - 1; digit >= 0; --digit) {
      if (!seen_[digit]) continue;
      if (lowest >= 0 && !(through < limit)) break;
      lowest = digit, above = through;
      through += sum(digit);
    }
    return lowest;
  }

 private:
  static constexpr int kLanes = 4;
  double sum(int digit) const {
    double found = 0;
    for (int lane = 0; lane < kLanes; ++lane) found += sums_[lane * kDigits + digit];
    return found;
  }

  std::vector<double> sums_ = std::vector<double>(kLanes * kDigits);
  std::vector<uint8_t> seen_ = std::vector<uint8_t>(kDigits);
};

// Finds the threshold of one row after the other; its memory is kept from row to row.
class ThresholdOfRow {
 public:
  float find(const float* keys, const float* weights, int64_t count, int64_t most, float share) {
    if (!read(keys, count)) return std::numeric_limits<float>::quiet_NaN();
    Weighed found{orders_.data(), weights, count};
    if (most > 0 && most < count) {
      found = reaching(found, lower_bound(most));
      const int32_t smallest = smallest_kept<true>(found, [&](double) { return static_cast<double>(most); });
      found = kept_.take(found, [&](int32_t order) { return order >= smallest; });
    }
    if (!(share < 1)) return from_ordered(*std::min_element(found.orders, found.orders + found.count));
    return from_ordered(smallest_kept<false>(found, [&](double total) { return share * total; }));
  }

 private:
  static constexpr int64_t kBlock = 64;

  // Take the keys in as integers, and note the largest of each block. False if one of them is NaN.
  bool read(const float* keys, int64_t count) {
    constexpr int32_t kInfinity = 0x7F800000;
    orders_.resize(count);
    largest_.clear();
    int32_t farthest = 0;  // from 0, and NaN is farther than infinity
    for (int64_t begin = 0; begin < count; begin += kBlock) {
      const int64_t end = std::min(begin + kBlock, count);
      int32_t largest = std::numeric_limits<int32_t>::min();
      for (int64_t i = begin; i < end; ++i) {
        const int32_t order = ordered(keys[i]);
        orders_[i] = order;
        largest = std::max(largest, order);
        farthest = std::max(farthest, std::bit_cast<int32_t>(keys[i]) & 0x7FFFFFFF);
      }
      largest_.push_back(largest);
    }
    return farthest <= kInfinity;
  }

  // A key that at least `most` keys reach, as near as is cheap to know: the largest keys of so many blocks do.
  int32_t lower_bound(int64_t most) {
    if (most > static_cast<int64_t>(largest_.size())) return std::numeric_limits<int32_t>::min();
    ranked_ = largest_;
    std::nth_element(ranked_.begin(), ranked_.begin() + (most - 1), ranked_.end(), std::greater<>());
    return ranked_[most - 1];
  }

  // The keys that reach a bound; blocks without one are passed over.
  Weighed reaching(const Weighed& keys, int32_t bound) {
    kept_.clear(keys.count);
    for (int64_t block = 0; block < static_cast<int64_t>(largest_.size()); ++block)
      if (largest_[block] >= bound)
        kept_.add(keys, block * kBlock, std::min((block + 1) * kBlock, keys.count),
                  [&](int32_t order) { return order >= bound; });
    return kept_.all();
  }

  // The smallest key above which less than the limit lies, or the largest there is.
  template <bool kCounts, typename Limit>
  int32_t smallest_kept(Weighed keys, Limit limit_of) {
    double above = 0, limit = 0;
    for (const int shift : {21, 10, 0}) {
      sums_.add_all<kCounts>(keys, shift);
      if (shift == 21) limit = limit_of(sums_.total());
      const int lowest = sums_.lowest_kept(above, limit);
      keys = within_.take(keys, [&](int32_t order) { return DigitSums::digit(order, shift) == lowest; });
    }
    return keys.orders[0];
  }

  std::vector<int32_t> orders_, largest_, ranked_;
  Selected kept_, within_;
  DigitSums sums_;
};

inline at::Tensor kept_threshold(const at::Tensor& keys, const at::Tensor& weights, const at::Tensor& most,
                                 const at::Tensor& share) {
  TORCH_CHECK(keys.dim() == 2 && keys.size(1) > 0, "emssd::kept_threshold: keys must be [R, V], got ", keys.sizes());
  TORCH_CHECK(weights.sizes() == keys.sizes(), "emssd::kept_threshold: weights must be ", keys.sizes(), " as keys, got ",
              weights.sizes());
  const int64_t rows = keys.size(0), count = keys.size(1);
  TORCH_CHECK(most.sizes() == at::IntArrayRef{rows} && share.sizes() == at::IntArrayRef{rows},
              "emssd::kept_threshold: most and share must be [", rows, "], got ", most.sizes(), " and ", share.sizes());
  const auto keys_ = keys.expect_contiguous(), weights_ = weights.expect_contiguous();
  const auto most_ = most.expect_contiguous(), share_ = share.expect_contiguous();
  const float *key = keys_->const_data_ptr<float>(), *weight = weights_->const_data_ptr<float>();
  const int64_t* most_of = most_->const_data_ptr<int64_t>();
  const float* share_of = share_->const_data_ptr<float>();
  at::Tensor thresholds = at::empty({rows}, keys.options());
  float* threshold = thresholds.mutable_data_ptr<float>();
  constexpr int64_t kKeysPerThread = 1 << 14;
  at::parallel_for(0, rows, std::max<int64_t>(1, kKeysPerThread / count), [&](int64_t begin, int64_t end) {
    static thread_local ThresholdOfRow of_row;
    for (int64_t r = begin; r < end; ++r)
      threshold[r] = of_row.find(key + r * count, weight + r * count, count, most_of[r], share_of[r]);
  });
  return thresholds;
}

}  // namespace emssd
