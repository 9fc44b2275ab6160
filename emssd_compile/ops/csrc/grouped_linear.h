// emssd::grouped_linear on CPU: products of few tokens are as fast as the weights stream in, from where they lie.
//
// Each thread takes a part of the output columns, which are rows of the weights, block by block. A block stays in the
// cache for all tokens; meanwhile a block to come is asked for. A token's result depends on nothing but its own values: not
// on other tokens, nor on the number of threads. Many tokens are bound by arithmetic and left to oneDNN.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "dot_tile.h"

namespace emssd {

constexpr int64_t kFewTokens = 64;  // up to so many are multiplied here
constexpr int64_t kBlockRows = 48;  // at most, and a multiple of the rows of most tiles
constexpr int64_t kMacsPerThread = 1 << 16;

// The linear layer of one weight, on x[tokens][depth].
template <typename weight_t, typename scalar_t>
struct LinearLayer {
  const weight_t* weight;
  const scalar_t* bias;           // may be null
  int64_t stride, size;           // of a row of the weight; number of rows
  const scalar_t* x;
  int64_t tokens, depth;
  scalar_t* y;
  int64_t y_stride;

  // Computes these columns of y.
  void run(int64_t begin, int64_t end) const {
    const int64_t rows = block_rows();
    for (int64_t n = begin; n < end; n += rows) run_block(n, std::min(n + rows, end));
  }

 private:
  bool is_deep() const { return depth * static_cast<int64_t>(sizeof(scalar_t)) > 3 << 10; }
  // So that a block takes part of a core's second cache.
  int64_t block_rows() const { return is_deep() ? kBlockRows / 2 : kBlockRows; }
  // So that the tokens of a tile stay in the first one.
  int64_t tile_tokens() const { return is_deep() ? std::min(kTileTokens, 4) : kTileTokens; }

  void run_block(int64_t begin, int64_t end) const {
    const int64_t passes = (tokens + tile_tokens() - 1) / tile_tokens();
    alignas(64) float sums[kTileTokens * kBlockRows];
    for (int64_t pass = 0; pass < passes; ++pass) {
      const int64_t first = tokens * pass / passes, count = tokens * (pass + 1) / passes - first;
      multiply_block(begin, end, first, count, pass, passes, sums, std::make_integer_sequence<int, kTileTokens>());
      for (int64_t t = 0; t < count; ++t) {
        float* row = sums + t * kBlockRows;
        for (int64_t n = begin; bias != nullptr && n < end; ++n) row[n - begin] += static_cast<float>(bias[n]);
        at::vec::convert(row, y + (first + t) * y_stride + begin, end - begin);
      }
    }
  }

  template <int... kTokens>
  void multiply_block(int64_t begin, int64_t end, int64_t first, int64_t count, int64_t pass, int64_t passes,
                      float* sums, std::integer_sequence<int, kTokens...>) const {
    ((count == kTokens + 1 ? multiply_tokens<kTokens + 1>(begin, end, first, pass, passes, sums) : void()), ...);
  }

  template <int kTokens>
  void multiply_tokens(int64_t begin, int64_t end, int64_t first, int64_t pass, int64_t passes, float* sums) const {
    constexpr int kRows = kRowsOfTile[kTokens];
    int64_t n = begin;
    for (int64_t tile = 0; n + kRows <= end; n += kRows, ++tile)
      multiply<kTokens, kRows>(n, tile % passes == pass, first, sums + (n - begin));
    for (; n < end; ++n) multiply<kTokens, 1>(n, pass == 0, first, sums + (n - begin));
  }

  // Each pass over a block asks for its share of a block to come.
  template <int kTokens, int kRows>
  void multiply(int64_t n, bool asks, int64_t first, float* sums) const {
    const weight_t* w = weight + n * stride;
    multiply_rows<weight_t, scalar_t, kTokens, kRows>(w, stride, asks ? w + block_rows() * stride : nullptr,
                                                      x + first * depth, depth, depth, sums, kBlockRows);
  }
};

template <typename weight_t, typename scalar_t>
void multiply_few(const at::Tensor& x, at::TensorList weights, at::TensorList biases,
                  const at::Tensor& y) {
  const int64_t depth = x.size(-1), tokens = x.numel() / depth, columns = y.size(-1);
  const int64_t grain = std::max<int64_t>(1, kMacsPerThread / (depth * tokens));
  at::parallel_for(0, columns, grain, [&](int64_t begin, int64_t end) {
    int64_t offset = 0;
    for (size_t i = 0; i < weights.size(); ++i) {
      const int64_t size = weights[i].size(0);
      const LinearLayer<weight_t, scalar_t> layer{
          weights[i].const_data_ptr<weight_t>(), biases.empty() ? nullptr : biases[i].const_data_ptr<scalar_t>(),
          weights[i].stride(0), size, x.const_data_ptr<scalar_t>(), tokens, depth,
          y.mutable_data_ptr<scalar_t>() + offset, columns};
      layer.run(std::max<int64_t>(0, begin - offset), std::min(size, end - offset));
      offset += size;
    }
  });
}

// A weight as it lies times many tokens, in float32. oneDNN arranges the weight anew; it still beats `at::linear`.
inline at::Tensor multiply_by_onednn(const at::Tensor& x, const at::Tensor& weight,
                                     const std::optional<at::Tensor>& bias) {
  using Scalars = c10::List<std::optional<at::Scalar>>;
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("mkldnn::_linear_pointwise", "")
          .typed<at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, c10::string_view,
                            Scalars, std::optional<c10::string_view>)>();
  return op.call(x, weight, bias, "none", Scalars(), "");
}

inline at::Tensor multiply_many(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  const bool by_onednn = at::hasMKLDNN() && x.scalar_type() == at::kFloat && x.numel() > 0 &&
                         weight.scalar_type() == at::kFloat && weight.is_contiguous();
  return by_onednn ? multiply_by_onednn(x, weight, bias) : at::linear(x, weight, bias);
}

// The products side by side.
inline at::Tensor multiply_many(const at::Tensor& x, at::TensorList weights, at::TensorList biases) {
  std::vector<at::Tensor> parts;
  for (size_t i = 0; i < weights.size(); ++i) {
    const at::Tensor weight = weights[i].scalar_type() == at::kChar ? weights[i].to(x.scalar_type()) : weights[i];
    parts.push_back(multiply_many(x, weight, biases.empty() ? std::nullopt : std::optional(biases[i])));
  }
  return parts.size() == 1 ? parts[0] : at::cat(parts, -1);
}

// Whether the weights can be streamed as they lie, and for so few tokens that this is the fastest.
inline bool is_streamed(const at::Tensor& x, at::TensorList weights, at::TensorList biases) {
  const auto dtype = x.scalar_type(), kind = weights[0].scalar_type();
  return (dtype == at::kFloat || dtype == at::kBFloat16) && (kind == dtype || kind == at::kChar) && x.size(-1) > 0 &&
         x.numel() <= kFewTokens * x.size(-1) &&
         std::all_of(biases.begin(), biases.end(), [&](const auto& b) { return b.scalar_type() == dtype; }) &&
         std::all_of(weights.begin(), weights.end(), [&](const auto& w) {
           return w.scalar_type() == kind && (w.stride(1) == 1 || w.size(1) == 1);
         });
}

template <typename scalar_t>
void multiply_streamed(const at::Tensor& x, at::TensorList weights, at::TensorList biases, const at::Tensor& y) {
  if (weights[0].scalar_type() == at::kChar) {
    multiply_few<int8_t, scalar_t>(x, weights, biases, y);
  } else {
    multiply_few<scalar_t, scalar_t>(x, weights, biases, y);
  }
}

inline at::Tensor grouped_linear(const at::Tensor& x, at::TensorList parameters, int64_t num_weights) {
  const auto given = static_cast<int64_t>(parameters.size());
  TORCH_CHECK(num_weights > 0 && (given == num_weights || given == 2 * num_weights), "emssd::grouped_linear: ",
              num_weights, " weights among ", given, " parameters");
  const at::TensorList weights = parameters.slice(0, num_weights), given_biases = parameters.slice(num_weights);
  std::vector<at::Tensor> biases(given_biases.begin(), given_biases.end());
  for (at::Tensor& bias : biases) bias = bias.contiguous();  // they are read without strides
  int64_t columns = 0;
  for (int64_t i = 0; i < num_weights; ++i) {
    const at::Tensor& weight = weights[i];
    TORCH_CHECK(weight.dim() == 2 && x.dim() > 0 && x.size(-1) == weight.size(1), "emssd::grouped_linear: x ",
                x.sizes(), " does not fit weight ", weight.sizes());
    TORCH_CHECK(biases.empty() || biases[i].sizes() == weight.sizes().slice(0, 1), "emssd::grouped_linear: bias ",
                biases.empty() ? at::IntArrayRef() : biases[i].sizes(), " does not fit weight ", weight.sizes());
    columns += weight.size(0);
  }
  const at::AutoDispatchBelowADInplaceOrView guard;  // parameters may require gradients; none are computed
  at::DimVector sizes(x.sizes());
  sizes.back() = columns;
  const int64_t outputs = c10::multiply_integers(sizes);
  if (outputs == 0) return at::empty(sizes, x.options());
  const at::Tensor input = x.contiguous();
  if (!is_streamed(x, weights, biases))
    return multiply_many(input.view({outputs / columns, x.size(-1)}), weights, biases).view(sizes);
  at::Tensor y = at::empty(sizes, x.options());
  if (x.scalar_type() == at::kFloat) {
    multiply_streamed<float>(input, weights, biases, y);
  } else {
    multiply_streamed<at::BFloat16>(input, weights, biases, y);
  }
  return y;
}

}  // namespace emssd
