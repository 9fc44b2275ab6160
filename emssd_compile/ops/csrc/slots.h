// Where the slots of rows lie: in a slab for each row, or in blocks of a pool.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>

namespace emssd {

// With a table int32 [B, M] of the numbers of each row's blocks, caches are [blocks, P, Hkv, D]; without, [B, C, Hkv, D].
class BlockTable {
 public:
  BlockTable(const char* op, const std::optional<at::Tensor>& table, int64_t rows, const at::Tensor& k_cache,
             const at::Tensor& v_cache)
      : op_(op), num_blocks_(k_cache.size(0)), size_(std::min(k_cache.size(1), v_cache.size(1))) {
    if (!table) return;
    TORCH_CHECK(table->dim() == 2 && table->size(0) == rows && table->scalar_type() == at::kInt, op,
                ": block_table must be Int [B, M], got ", table->scalar_type(), " ", table->sizes(), " for ", rows,
                " rows");
    TORCH_CHECK(k_cache.size(0) == v_cache.size(0) && k_cache.size(1) == v_cache.size(1) && size_ > 0, op,
                ": k_cache and v_cache must be blocks of one size, got ", k_cache.sizes(), " and ", v_cache.sizes());
    table_ = table->contiguous();
    numbers_ = table_.const_data_ptr<int32_t>();
    columns_ = table->size(1);
  }

  bool is_paged() const { return numbers_ != nullptr; }
  // Slots that a row can have.
  int64_t capacity() const { return is_paged() ? columns_ * size_ : size_; }

  // The element at which a row's slot begins, by the strides of a cache's first two dimensions.
  int64_t place(int64_t row, int64_t slot, int64_t stride_0, int64_t stride_1) const {
    if (!is_paged()) return row * stride_0 + slot * stride_1;
    return numbers_[row * columns_ + slot / size_] * stride_0 + slot % size_ * stride_1;
  }
  // How many slots from this one on, and before `end`, lie one behind the other.
  int64_t run(int64_t slot, int64_t end) const {
    return is_paged() ? std::min(end - slot, size_ - slot % size_) : end - slot;
  }

  // Throws if the row lacks a block for one of these slots, which are within its capacity.
  void check(int64_t row, int64_t begin, int64_t end) const {
    if (!is_paged() || begin >= end) return;
    for (int64_t m = begin / size_; m <= (end - 1) / size_; ++m) {
      const int64_t block = numbers_[row * columns_ + m];
      TORCH_CHECK(block >= 0 && block < num_blocks_, op_, ": slots ", m * size_, " to ", (m + 1) * size_ - 1,
                  " of row ", row, " are in block ", block, "; there are ", num_blocks_, " blocks");
    }
  }

 private:
  const char* op_;
  int64_t num_blocks_, size_;
  at::Tensor table_;
  const int32_t* numbers_ = nullptr;  // [B, columns_]
  int64_t columns_ = 0;
};

}  // namespace emssd
