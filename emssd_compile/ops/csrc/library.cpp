// Registers the CPU forms but for that of grouped_linear.cpp. The schemas are defined by the Python package, which loads this library.
#include <torch/library.h>

#include "append_kv.h"
#include "fingerprint.h"
#include "kept_threshold.h"
#include "move_kv.h"
#include "ragged_attention.h"

TORCH_LIBRARY_IMPL(emssd, CPU, m) {
  m.impl("append_kv", emssd::append_kv);
  m.impl("fingerprint", emssd::fingerprint);
  m.impl("kept_threshold", emssd::kept_threshold);
  m.impl("move_kv", emssd::move_kv);
  m.impl("ragged_attention", emssd::ragged_attention);
}
