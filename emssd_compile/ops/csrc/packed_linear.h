// emssd::packed_linear on CPU: oneDNN's product with a weight held in the blocked layout that oneDNN chose for it.
//
// A matrix product of few tokens is bound by how fast the weight streams in; a plain row-major weight costs two to three
// times the blocked one. Packing belongs to this form of the op alone, so packed weights are remembered here, one for
// each weight seen, and forgotten with it. A weight changed in place is packed anew.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/intrusive_ptr.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <tuple>
#include <vector>

namespace emssd {

class PackedWeights {
 public:
  at::Tensor get(const at::Tensor& weight) {
    const void* storage = weight.storage().unsafeGetStorageImpl();
    // Not the tensor's address: an alias made for one call is the same weight.
    const Key key{storage, weight.storage_offset(), weight.sizes().vec(), weight.strides().vec()};
    const int64_t version = weight.is_inference() ? 0 : static_cast<int64_t>(weight._version());
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = entries_.find(key);
    if (found != entries_.end() && !found->second.source.expired() && found->second.version == version)
      return found->second.packed;
    std::erase_if(entries_, [](const auto& entry) { return entry.second.source.expired(); });
    at::Tensor packed = pack(weight);
    entries_.insert_or_assign(key, Entry{weight.storage().getWeakStorageImpl(), version, packed});
    return packed;
  }

 private:
  using Key = std::tuple<const void*, int64_t, std::vector<int64_t>, std::vector<int64_t>>;
  using Source = c10::weak_intrusive_ptr<c10::StorageImpl>;
  struct Entry {
    Source source;
    int64_t version;
    at::Tensor packed;
  };

  static at::Tensor pack(const at::Tensor& weight) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("mkldnn::_reorder_linear_weight", "")
                               .typed<at::Tensor(const at::Tensor&, std::optional<int64_t>)>();
    return op.call(weight.detach().contiguous(), std::nullopt);
  }

  std::mutex mutex_;
  std::map<Key, Entry> entries_;
};

inline at::Tensor packed_linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  TORCH_CHECK(weight.dim() == 2 && x.size(-1) == weight.size(1), "emssd::packed_linear: x ", x.sizes(),
              " does not fit weight ", weight.sizes());
  using Scalars = c10::List<std::optional<at::Scalar>>;
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("mkldnn::_linear_pointwise", "")
          .typed<at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, c10::string_view,
                            Scalars, std::optional<c10::string_view>)>();
  static PackedWeights packed_weights;
  return op.call(x.contiguous(), packed_weights.get(weight), bias, "none", Scalars(), "");
}

}  // namespace emssd
