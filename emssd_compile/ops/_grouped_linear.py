"""``emssd::grouped_linear``: linear layers that read the same input, as one product."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._ops import OpOverload

torch.library.define(
    "emssd::grouped_linear",
    "(Tensor x, Tensor[] parameters, int num_weights) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def reference(x: Tensor, parameters: Sequence[Tensor], num_weights: int) -> Tensor:
    """``x @ cat(weights).T + cat(biases)``; nothing is concatenated but results. Weights may be int8.

    The C++ form reads each weight once, from where it lies. Up to 64 tokens, what it gives for one of them has the same
    bits whatever the others are, how many there are, and however many threads there are: if the weights' rows are
    contiguous, in float32 or bfloat16, and x in the same or weights in int8. Sums are in float32.

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
    parts = [torch.nn.functional.linear(x, w.to(x.dtype), b) for w, b in zip(weights, given, strict=True)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


torch.library.impl("emssd::grouped_linear", "default", reference)


@torch.library.register_fake("emssd::grouped_linear")
def _fake(x: Tensor, parameters: Sequence[Tensor], num_weights: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], sum(w.shape[0] for w in parameters[:num_weights])))


grouped_linear: OpOverload = torch.ops.emssd.grouped_linear.default
