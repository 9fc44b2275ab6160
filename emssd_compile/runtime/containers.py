"""Batches of sequences as callers hold them: tensors, arrays, lists. Each is taken apart into one 1-D tensor a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from emssd_compile.errors import InvalidInputError
from emssd_compile.numeric import plain

PromptKind = Literal["tensor", "jagged", "tensors", "lists", "array", "arrays"]
Array = npt.NDArray[Any]
Sequences = Tensor | list[Tensor] | list[list[int]] | Array | list[Array]
Kind = TypeVar("Kind", bound=Sequences, covariant=True)

ACCEPTED = (
    "a LongTensor[B, S], a list of token lists, a list of 1-D tensors, a jagged nested tensor, or numpy arrays where "
    "tensors may be"
)


def split_rows(value: object, name: str) -> tuple[PromptKind, list[Tensor], torch.device]:
    """Take a batch of any accepted kind apart into one 1-D CPU tensor per row, of whatever dtype it has."""
    device = torch.device("cpu")
    if isinstance(value, Tensor):
        kind, rows = _split_tensor(value.detach(), name)
        device = value.device
    elif isinstance(value, np.ndarray):
        kind, rows = "array", _split_tensor(_from_numpy(value, name), name)[1]
    elif isinstance(value, (list, tuple)):
        kind, rows = _split_list(value, name)
        device = value[0].device if kind == "tensors" else device
    else:
        raise InvalidInputError(f"{name} is a {type(value).__name__}; pass {ACCEPTED}")
    return kind, rows, device


def _split_tensor(value: Tensor, name: str) -> tuple[PromptKind, list[Tensor]]:
    _check_readable(value, name)
    if value.is_nested and value.layout != torch.jagged:
        raise InvalidInputError(
            f"{name} is a nested tensor of layout {value.layout}; build it with layout=torch.jagged"
        )
    if value.dim() != 2:
        hint = "; add the batch dimension with unsqueeze(0)" if value.dim() == 1 else ""
        raise InvalidInputError(f"{name} is a {value.dim()}-D tensor; a batch of prompts is 2-D [B, S]{hint}")
    rows = list(value.cpu().unbind())
    if not rows:
        raise InvalidInputError(f"{name} is an empty batch; pass at least one prompt")
    return "jagged" if value.is_nested else "tensor", rows


def _split_list(value: Sequence[object], name: str) -> tuple[PromptKind, list[Tensor]]:
    if not value:
        raise InvalidInputError(f"{name} is an empty batch; pass at least one prompt")
    if isinstance(value[0], int):
        raise InvalidInputError(f"{name} is a flat list of ids; one prompt is a batch of one: wrap it in a list")
    kinds: list[PromptKind] = [_row_kind(row) for row in value]
    if len(set(kinds)) > 1:
        raise InvalidInputError(f"{name} mixes tensors, arrays and lists; make every row the same kind")
    rows = [_read_row(row, f"row {index} of {name}") for index, row in enumerate(value)]
    return kinds[0], rows


def _row_kind(row: object) -> PromptKind:
    return "tensors" if isinstance(row, Tensor) else "arrays" if isinstance(row, np.ndarray) else "lists"


def _read_row(row: object, where: str) -> Tensor:
    if isinstance(row, Tensor):
        _check_readable(row, where)
        tensor = row.detach().cpu()
    elif isinstance(row, np.ndarray):
        tensor = _from_numpy(row, where)
    else:
        tensor = _read_list(row, where)
    if tensor.dim() != 1:
        raise InvalidInputError(f"{where} has {tensor.dim()} dimensions; a prompt is a flat list or 1-D tensor of ids")
    return tensor


def _read_list(row: object, where: str) -> Tensor:
    try:
        tensor = torch.tensor(row)
        elements = list(row) if tensor.dim() == 1 else []  # type: ignore[call-overload]  # torch has just read it
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise InvalidInputError(f"{where} is not a list of token ids: {error}") from error
    if tensor.dtype != torch.bool and any(isinstance(plain(each), bool) for each in elements):
        raise InvalidInputError(f"{where} mixes bools and numbers: True would be read as 1")
    return tensor


def _from_numpy(array: Array, where: str) -> Tensor:
    """A copy as a tensor: integers of any width as int64, other numbers as they are."""
    if array.dtype.kind not in "iubf":
        raise InvalidInputError(f"{where} is an array of {array.dtype}; token ids are integers, and rows of one length")
    return torch.from_numpy(array.astype(np.int64 if array.dtype.kind in "iu" else array.dtype))


def _check_readable(value: Tensor, where: str) -> None:
    """Refuse a tensor whose values cannot be read one by one."""
    if value.is_meta:
        raise InvalidInputError(f"{where} is on the meta device, where tensors have no values")
    if value.layout not in (torch.strided, torch.jagged):
        raise InvalidInputError(f"{where} has layout {value.layout}; pass it as {where}.to_dense()")
