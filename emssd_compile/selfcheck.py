"""Compare a compiled model with the original before it is used."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from emssd_compile import tested_graphs
from emssd_compile.capture import PlainForward, device_of
from emssd_compile.compiler import CompiledModel
from emssd_compile.errors import UnsupportedModelError
from emssd_compile.identity import Told
from emssd_compile.memory import available_memory
from emssd_compile.passes import PassRecord
from emssd_compile.precision import Precision, coarsest
from emssd_compile.runtime.memory import allocate
from emssd_compile.step.pack import pack
from emssd_compile.step.tensor_spec import TensorSpec

_SHORT = (1, 6, 19)
_SHORT_FIRST = (1, 2, 11)
_LONGEST, _BRIEF = 2048, 64
_COMPARED = 64
"""Tokens of the long row whose logits are compared: spread over it, its last one among them."""
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-4}
_HALF_TOLERANCE = 5e-2
_SHARE = 4
"""The check takes at most one part in so many of the memory that is available."""


@dataclass(frozen=True)
class _Prompts:
    """Ragged random prompts, read in two chunks.

    Attributes:
        ids: int64 `[B, longest]`.
        lengths: tokens of each row.
        first: of them in the first chunk.
        compared: positions of each row whose logits are compared, ascending.
    """

    ids: Tensor
    lengths: tuple[int, ...]
    first: tuple[int, ...]
    compared: tuple[Tensor, ...]

    @classmethod
    def of(cls, vocabulary: int, longest: int, device: torch.device) -> _Prompts:
        """Three short rows and one of `longest` tokens."""
        lengths = tuple(min(n, longest) for n in (*_SHORT, longest))
        first = tuple(min(a, b) for a, b in zip((*_SHORT_FIRST, max(1, longest // 2)), lengths, strict=True))
        ids = torch.randint(vocabulary, (len(lengths), longest), generator=torch.Generator().manual_seed(0))
        spread = torch.linspace(0, longest - 1, min(longest, _COMPARED), dtype=torch.float64).long()
        compared = (*(torch.arange(n) for n in lengths[:-1]), spread.unique())
        return cls(ids.to(device), lengths, first, compared)


def check_against(model: nn.Module, compiled: CompiledModel, code: Told | None = None) -> None:
    """Run ragged random prompts in two chunks through `compiled` and one by one through `model`.

    The proofs of the passes rest on what a graph says; this rests on what the model does. It catches a forward whose
    graph depends on the length it was captured with, and rows that influence one another: three short rows stand
    beside one as long as a row can be (2,048 tokens at most, fewer where memory is short), half of it in the first
    chunk. What was compared so before on this machine, with whatever weights, is compared with a long row of 64 tokens
    (`tested_graphs`). A model in half precision is compared in float32, weight by weight, so that a mistake does not
    pass as rounding; where that is impossible, with the rounding of its coarsest dtype. What was compared is noted in
    the compiled model's records.

    Args:
        model, compiled: to be compared.
        code: the model's, if it was told before (`identity.code_of`): to capture a model may change what can be told.

    Raises:
        UnsupportedModelError: logits differ by more than rounding.
    """
    start = time.perf_counter()
    device = device_of(model)
    own = _coarsest(compiled)
    longest = _longest(compiled, device)
    raised = own not in _TOLERANCE and _room_for_float32(model, device)
    name = tested_graphs.name_of(model, compiled, raised, code) if longest > _BRIEF else None
    known = name is not None and tested_graphs.tested_length(name) >= longest
    prompts = _Prompts.of(compiled.vocabulary, _BRIEF if known else longest, device)
    try:
        error = _error(model, compiled, prompts, torch.float32 if raised else None)
        dtype = torch.float32 if raised else own
    except (RuntimeError, TypeError, NotImplementedError):
        if not raised:
            raise
        error, dtype = _error(model, compiled, prompts, None), own
    tolerance = _TOLERANCE.get(dtype, _HALF_TOLERANCE)
    if not error <= tolerance:
        raise UnsupportedModelError(
            f"{type(model).__name__} computes something else on packed rows than on single prompts: logits differ by "
            f"{error:.1e} of their largest value (allowed {tolerance:.0e}), in rows of {prompts.lengths} tokens. Its "
            "forward may depend on the length of the sequence, or on other rows, in a way the capture does not show",
            remedy="report this model; until then use it without compiling",
        )
    nodes = len(compiled.graph_module.graph.nodes)
    if name is not None and not known:
        tested_graphs.remember(name, longest)
    note = f"tested: logits of rows of {prompts.lengths} tokens side by side, in {str(dtype).removeprefix('torch.')}"
    if known:
        note = f"tested at full length when this graph was first made; {note}"
    compiled.records.append(
        PassRecord("selfcheck", "L2", 0, nodes, nodes, time.perf_counter() - start, (f"{note}: {error:.0e} apart",))
    )


def _coarsest(compiled: CompiledModel) -> torch.dtype:
    """The dtype on the way from tokens to logits that rounds most."""
    values = (n.meta.get("val") for n in compiled.graph_module.graph.nodes)
    return coarsest(v.dtype for v in values if isinstance(v, Tensor))


def _longest(compiled: CompiledModel, device: torch.device) -> int:
    """Tokens of the long row: what a row can hold, as far as caches and logits of the check fit into memory."""
    shapes = [spec.shape for spec in compiled.cache_shapes.values()]
    cached = (len(_SHORT) + 1) * sum(torch.Size(s[2:]).numel() for s in shapes)
    elements = available_memory(device) // _SHARE // 4  # of float32
    return max(1, min(compiled.capacity, _LONGEST, elements // (cached + 2 * compiled.vocabulary)))


def _room_for_float32(model: nn.Module, device: torch.device) -> bool:
    """Whether the largest weight can be held in float32 beside the model."""
    largest = max((p.numel() for p in model.parameters()), default=0)
    return largest * 4 <= available_memory(device) // _SHARE


def _error(model: nn.Module, compiled: CompiledModel, prompts: _Prompts, dtype: torch.dtype | None) -> float:
    """Largest difference of logits, as a part of the largest logit of the row; computed in `dtype` at least."""
    worst = 0.0
    with torch.no_grad(), Precision(dtype) if dtype is not None else contextlib.nullcontext():
        packed = _packed_logits(compiled, prompts, dtype)
        forward = PlainForward(model)
        for row, length in enumerate(prompts.lengths):
            expected = forward(prompts.ids[row : row + 1, :length])[..., : compiled.vocabulary]
            expected = expected.reshape(-1, compiled.vocabulary)
            # a forward may give the last position's logits only
            places = prompts.compared[row].to(expected.device) - (length - len(expected))
            actual, expected = packed[row][places.to(packed[row].device) >= 0], expected[places[places >= 0]]
            scale = expected.abs().max().clamp(min=1e-6)
            error = float((actual.to(expected.dtype) - expected).abs().max() / scale)
            worst = max(worst, error) if error == error else float("inf")
    return worst


def _packed_logits(compiled: CompiledModel, prompts: _Prompts, dtype: torch.dtype | None) -> list[Tensor]:
    """Logits of the compared tokens, per row."""
    ids = prompts.ids
    rows, capacity = ids.shape
    specs = {
        name: TensorSpec(
            (rows, capacity, *spec.shape[2:]), spec.dtype if dtype is None else torch.promote_types(spec.dtype, dtype)
        )
        for name, spec in compiled.cache_shapes.items()
    }
    caches = allocate(specs, ids.device)
    found: list[list[Tensor]] = [[] for _ in range(rows)]
    for starts, stops in ((torch.zeros(rows, dtype=torch.int64), prompts.first), (prompts.first, prompts.lengths)):
        start, stop = (torch.as_tensor(n, device=ids.device) for n in (starts, stops))
        total = int((stop - start).sum())
        token_range = torch.arange(total + 1, device=ids.device)  # one inert tail token
        packed = pack(ids, stop, start, stop > start, token_range, token_range, share=total)
        wanted = [
            places[(places >= a) & (places < b)] - a + offset
            for places, a, b, offset in zip(
                prompts.compared, start.tolist(), stop.tolist(), packed.offsets.tolist(), strict=False
            )
        ]
        _, logits = compiled(packed, start, torch.cat(wanted).to(ids.device), caches)
        for row, part in enumerate(logits.split([len(w) for w in wanted])):
            found[row].append(part)
    return [torch.cat(parts) for parts in found]
