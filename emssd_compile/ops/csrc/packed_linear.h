// emssd::packed_linear on CPU: oneDNN's product with weights held in the blocked layout that oneDNN chose for them.
//
// A matrix product of few tokens is bound by how fast the weight streams in; a plain row-major weight costs two to three
// times the blocked one. Packing belongs to this form of the op alone, so packed weights are remembered here, one for
// each list of weights seen, and forgotten with them. Weights that share an input are packed as one, straight from where
// they lie. Weights changed in place are packed anew: a version counter that moved shows at once, any other change when
// `emssd::follow_packed` is called.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/intrusive_ptr.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "fingerprint.h"

namespace emssd {

class PackedWeights {
 public:
  at::Tensor get(at::TensorList weights) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto [key, versions] = identify(weights);
    const auto found = entries_.find(key);
    if (found != entries_.end() && !expired(found->second) && found->second.versions == versions)
      return found->second.packed;
    std::erase_if(entries_, [](const auto& entry) { return expired(entry.second); });
    return entries_.insert_or_assign(key, make(weights, versions)).first->second.packed;
  }

  bool follow(at::TensorList weights) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = entries_.find(identify(weights).first);
    if (found == entries_.end() || found->second.fingerprints == fingerprints(weights)) return false;
    entries_.erase(found);
    return true;
  }

 private:
  using Numbers = std::vector<int64_t>;
  using Source = c10::weak_intrusive_ptr<c10::StorageImpl>;
  struct Entry {
    std::vector<Source> sources;
    Numbers versions, fingerprints;
    at::Tensor packed;
  };

  // Where the weights lie and how: not the tensors' addresses, since an alias made for one call is the same weight.
  static std::pair<Numbers, Numbers> identify(at::TensorList weights) {
    Numbers key, versions;
    key.reserve(6 * weights.size());
    for (const at::Tensor& weight : weights) {
      key.push_back(reinterpret_cast<int64_t>(weight.storage().unsafeGetStorageImpl()));
      // The storage stays when `set_` or a resize gives it other memory.
      key.push_back(reinterpret_cast<int64_t>(weight.const_data_ptr()));
      for (const int64_t number : {weight.size(0), weight.size(1), weight.stride(0), weight.stride(1)})
        key.push_back(number);
      versions.push_back(weight.is_inference() ? 0 : static_cast<int64_t>(weight._version()));
    }
    return {std::move(key), std::move(versions)};
  }

  static bool expired(const Entry& entry) {
    return std::any_of(entry.sources.begin(), entry.sources.end(), [](const Source& s) { return s.expired(); });
  }

  static Numbers fingerprints(at::TensorList weights) {
    Numbers found;
    for (const at::Tensor& weight : weights) found.push_back(fingerprint(weight));
    return found;
  }

  static Entry make(at::TensorList weights, Numbers versions) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("mkldnn::_reorder_linear_weight", "")
                               .typed<at::Tensor(const at::Tensor&, std::optional<int64_t>)>();
    std::vector<Source> sources;
    for (const at::Tensor& weight : weights) sources.push_back(weight.storage().getWeakStorageImpl());
    // Before the packing: a change made meanwhile by another thread then shows as one.
    Numbers before = fingerprints(weights);
    const at::Tensor whole = weights.size() == 1 ? weights[0].detach().contiguous() : at::cat(weights).detach();
    return {std::move(sources), std::move(versions), std::move(before), op.call(whole, std::nullopt)};
  }

  std::mutex mutex_;
  std::map<Numbers, Entry> entries_;
};

inline PackedWeights& packed_weights() {
  static PackedWeights packed;
  return packed;
}

inline at::Tensor packed_linear(const at::Tensor& x, at::TensorList parameters, int64_t num_weights) {
  TORCH_CHECK(num_weights > 0 && num_weights <= static_cast<int64_t>(parameters.size()),
              "emssd::packed_linear: ", num_weights, " weights among ", parameters.size(), " parameters");
  const at::TensorList weights = parameters.slice(0, num_weights), biases = parameters.slice(num_weights);
  for (const at::Tensor& weight : weights)
    TORCH_CHECK(weight.dim() == 2 && x.size(-1) == weight.size(1), "emssd::packed_linear: x ", x.sizes(),
                " does not fit weight ", weight.sizes());
  using Scalars = c10::List<std::optional<at::Scalar>>;
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("mkldnn::_linear_pointwise", "")
          .typed<at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, c10::string_view,
                            Scalars, std::optional<c10::string_view>)>();
  std::optional<at::Tensor> bias;
  if (!biases.empty()) bias = biases.size() == 1 ? biases[0] : at::cat(biases);
  return op.call(x.contiguous(), packed_weights().get(weights), bias, "none", Scalars(), "");
}

inline bool follow_packed(at::TensorList weights) { return packed_weights().follow(weights); }

}  // namespace emssd
