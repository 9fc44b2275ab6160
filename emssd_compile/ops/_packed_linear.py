"""``emssd::packed_linear``: a linear layer whose weight is held in the layout that this machine multiplies fastest."""

import torch
from torch import Tensor
from torch._ops import OpOverload

torch.library.define(
    "emssd::packed_linear",
    "(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``.

    The C++ form keeps a packed copy of every weight it has seen for as long as the weight lives, and packs anew when
    the weight was changed in place, as far as its version counter tells: changes of `weight.data` and of inference
    tensors escape it.

    Args:
        x: ``[..., in]``.
        weight: ``[out, in]``.
        bias: ``[out]``, or None.

    Returns:
        ``[..., out]``, contiguous.
    """
    return torch.nn.functional.linear(x, weight, bias)


torch.library.impl("emssd::packed_linear", "default", reference)


@torch.library.register_fake("emssd::packed_linear")
def _fake(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


packed_linear: OpOverload = torch.ops.emssd.packed_linear.default
