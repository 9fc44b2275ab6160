"""``emssd::packed_linear``: linear layers whose weights are held in the layout that this machine multiplies fastest."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._ops import OpOverload

torch.library.define(
    "emssd::packed_linear",
    "(Tensor x, Tensor[] parameters, int num_weights) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define("emssd::follow_packed", "(Tensor[] weights) -> bool")


def reference(x: Tensor, parameters: Sequence[Tensor], num_weights: int) -> Tensor:
    """``x @ cat(weights).T + cat(biases)``: layers that read the same input, as one product.

    The C++ form keeps a packed copy of the weights it has seen for as long as they live. It packs anew when a weight
    has moved or its version counter has; what else was changed in place shows when `follow_packed` is called.

    Args:
        x: ``[..., in]``.
        parameters: weights, ``[out_i, in]`` each, and behind them no biases or as many, ``[out_i]`` each. They are one
            list because AOTInductor cannot pass an empty one.
        num_weights: how many of them are weights, at least one.

    Returns:
        ``[..., sum of out_i]``, contiguous.
    """
    weights, biases = parameters[:num_weights], parameters[num_weights:]
    given: Sequence[Tensor | None] = biases or [None] * num_weights
    parts = [torch.nn.functional.linear(x, w, b) for w, b in zip(weights, given, strict=True)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def follow_reference(weights: Sequence[Tensor]) -> bool:
    """Forget the packed copy of `weights` if their values are no longer those it was made of; whether that was so.

    Costs one reading of the weights.
    """
    return False  # there are no copies but those of the C++ form


torch.library.impl("emssd::packed_linear", "default", reference)
torch.library.impl("emssd::follow_packed", "default", follow_reference)


@torch.library.register_fake("emssd::packed_linear")
def _fake(x: Tensor, parameters: Sequence[Tensor], num_weights: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], sum(w.shape[0] for w in parameters[:num_weights])))


packed_linear: OpOverload = torch.ops.emssd.packed_linear.default
follow_packed: OpOverload = torch.ops.emssd.follow_packed.default
