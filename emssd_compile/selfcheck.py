"""Compare a compiled model with the original before it is used."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from emssd_compile.capture import PlainForward
from emssd_compile.compiler import CompiledModel
from emssd_compile.errors import UnsupportedModelError
from emssd_compile.runtime.memory import allocate
from emssd_compile.step.drafting import TensorSpec
from emssd_compile.step.pack import pack

_LENGTHS = (1, 6, 19)
_FIRST_CHUNK = (1, 2, 11)
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-4}


def check_against(model: nn.Module, compiled: CompiledModel) -> None:
    """Run a few ragged random prompts in two chunks through `compiled` and one by one through `model`.

    The proofs of the passes rest on what a graph says; this rests on what the model does. It catches a forward whose
    graph depends on the length it was captured with. Costs six short forward passes.

    Raises:
        UnsupportedModelError: logits differ by more than rounding.
    """
    capacity = min(max(_LENGTHS), next(iter(compiled.cache_shapes.values())).shape[1])
    lengths = torch.tensor([min(n, capacity) for n in _LENGTHS])
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    ids = torch.randint(compiled.vocabulary, (len(lengths), capacity), generator=torch.Generator().manual_seed(0))
    ids = ids.to(device)
    with torch.inference_mode():
        packed = _packed_logits(compiled, ids, lengths.to(device))
        forward = PlainForward(model)
        for row, length in enumerate(lengths.tolist()):
            expected = forward(ids[row : row + 1, :length]).reshape(-1, compiled.vocabulary)
            actual = packed[row][-len(expected) :]  # a forward may give the last position's logits only
            _compare(model, expected, actual)


def _packed_logits(compiled: CompiledModel, ids: Tensor, lengths: Tensor) -> list[Tensor]:
    """Logits of every token, per row."""
    rows, capacity = ids.shape
    specs = {
        name: TensorSpec((rows, capacity, *spec.shape[2:]), spec.dtype) for name, spec in compiled.cache_shapes.items()
    }
    caches = allocate(specs, ids.device)
    first = torch.minimum(torch.tensor(_FIRST_CHUNK, device=ids.device), lengths)
    found: list[list[Tensor]] = [[] for _ in range(rows)]
    for start, stop in ((torch.zeros_like(lengths), first), (first, lengths)):
        total = int((stop - start).sum())
        token_range = torch.arange(total + 1, device=ids.device)  # one inert tail token
        packed = pack(ids, stop, start, torch.zeros_like(stop), stop > start, token_range, token_range, share=total)
        _, logits = compiled(packed, start, token_range[:total], caches)
        for row, part in enumerate(logits.split((stop - start).tolist())):
            found[row].append(part)
    return [torch.cat(parts) for parts in found]


def _compare(model: nn.Module, expected: Tensor, actual: Tensor) -> None:
    tolerance = _TOLERANCE.get(expected.dtype, 5e-2)
    scale = expected.abs().max().clamp(min=1e-6)
    error = float((actual.to(expected.dtype) - expected).abs().max() / scale)
    if not error <= tolerance:
        raise UnsupportedModelError(
            f"{type(model).__name__} computes something else on packed rows than on single prompts: logits differ by "
            f"{error:.1e} of their largest value (allowed {tolerance:.0e}). Its forward may depend on the length of "
            "the sequence in a way the capture does not show",
            remedy="report this model; until then use it without compiling",
        )
