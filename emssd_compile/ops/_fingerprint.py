"""``emssd::fingerprint``: whether the values of a tensor have changed."""

import hashlib

import torch
from torch import Tensor
from torch._ops import OpOverload

_PIECE = 1 << 25  # bytes at a time: what is computed of them takes several times as much memory
_ODD = 0x1E3779B97F4A7C15

torch.library.define("emssd::fingerprint", "(Tensor tensor) -> int")


def reference(tensor: Tensor) -> int:
    """64 bits that depend on every bit of `tensor` and on nothing else.

    Compare only what the same process gave for the same shape and dtype: the C++ form computes other numbers. Unlike
    the version counter it sees what is changed through `tensor.data`, or in an inference tensor.

    Args:
        tensor: any shape and dtype.
    """
    held = tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu()
    digest = hashlib.blake2b(held.numpy().tobytes(), digest_size=8)
    return int.from_bytes(digest.digest(), "little", signed=True)


def on_device(tensor: Tensor) -> int:
    """Such 64 bits, computed where the tensor is: weights of gigabytes are not copied to the host.

    Each word is mixed with its place by a bijection, so one changed word always shows; several cancel with a chance of
    2^-64.
    """
    held = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    total = torch.zeros((), dtype=torch.int64, device=held.device)
    for start in range(0, held.numel(), _PIECE):
        piece = held[start : start + _PIECE]
        piece = torch.nn.functional.pad(piece, (0, -piece.numel() % 8)).view(torch.int64)  # words
        places = torch.arange(start // 8, start // 8 + piece.numel(), device=held.device)
        mixed = (piece ^ (places * _ODD)) * _ODD
        total += ((mixed ^ (mixed >> 32)) * _ODD).sum()
    return int(total)


torch.library.impl("emssd::fingerprint", "default", reference)
torch.library.impl("emssd::fingerprint", "CUDA", on_device)

fingerprint: OpOverload = torch.ops.emssd.fingerprint.default
