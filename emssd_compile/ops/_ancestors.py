"""Ancestor masks in bits: which tokens of its row each token of a step sees, where rows hold trees of drafts."""

import torch
from torch import Tensor

WORD_BITS = 32  # a GPU loads words of 32 bits, and shifts them in one instruction

# Not computed: behind its C++ wrapper, Inductor has no `2 ** n` of integers.
_POWERS = [1 << bit for bit in range(WORD_BITS)]


def pack_ancestors(mask: Tensor) -> Tensor:
    """A mask in the form that ``emssd::ragged_attention`` takes.

    Bit ``j % 32`` of word ``j // 32`` is ``mask[t, j]``; bit 31 is the sign. For three tokens, the root (bit 0) and two
    drafts behind it that do not see one another::

        [[1, 0, 0], [1, 1, 0], [1, 0, 1]]  ->  [[0b001], [0b011], [0b101]]

    Args:
        mask: bool ``[T, N]``, whether token ``t`` sees the ``j``-th token of its row in this step (itself included).

    Returns:
        int32 ``[T, ceil(N / 32)]``; bits from ``N`` on are 0.
    """
    padded = torch.nn.functional.pad(mask, (0, -mask.shape[1] % WORD_BITS))
    # Of different bits, so no sum of them leaves the range of int32, in whatever order they are added.
    values = torch.tensor([*_POWERS[:-1], -_POWERS[-1]], device=mask.device)
    words: Tensor = (padded.unflatten(1, (-1, WORD_BITS)) * values).sum(-1).to(torch.int32)
    return words


def unpack_ancestors(words: Tensor) -> Tensor:
    """The inverse of `pack_ancestors`: bool ``[T, 32 * W]`` for int32 ``[T, W]``.

    Exported graphs hold this too, so it does without shifts: ONNX has them for unsigned numbers only. Bit ``j`` of a
    number is set if the number modulo ``2**(j + 1)`` is at least ``2**j``, also of a negative one.
    """
    powers = torch.tensor(_POWERS, device=words.device)
    bits = words.to(torch.int64)[:, :, None] % (2 * powers) >= powers
    return bits.flatten(1)
