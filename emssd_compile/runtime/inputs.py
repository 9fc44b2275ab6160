"""The prompts of one `generate` call: any kind the user holds is checked, unpadded, and given back as the same kind."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from emssd_compile.errors import CapacityError, InvalidInputError
from emssd_compile.runtime.containers import ACCEPTED, PromptKind, Sequences, split_rows

_TOKEN_DTYPES = (torch.int64, torch.int32)


@dataclass(frozen=True)
class PromptBatch:
    """The prompts of `B` rows, packed without their padding.

    Attributes:
        kind: what the user gave, and what `restore` gives back: `"tensor"` [B, S], `"jagged"` nested tensor,
            `"tensors"` (a list of 1-D tensors), `"lists"` (a list of token lists), `"array"` [B, S] or `"arrays"` (a
            list of 1-D arrays).
        given: `B` int64 CPU tensors [width]: each row as the user gave it, padding included.
        values: int64 CPU tensor [sum of `lengths`]: the tokens of all rows side by side, without padding.
        offsets: `B + 1` ints: row `b` is `values[offsets[b]:offsets[b + 1]]`.
        device: where the user's tensors are, so where `restore` puts its own; the CPU where there are none.
    """

    kind: PromptKind
    given: tuple[Tensor, ...]
    values: Tensor
    offsets: list[int]
    device: torch.device

    def __len__(self) -> int:
        return len(self.given)

    @property
    def is_padded(self) -> bool:
        """Whether rows lie side by side in one block, so that the shorter ones are filled up."""
        return self.kind in ("tensor", "array")

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row, padding left out."""
        return [stop - start for start, stop in pairwise(self.offsets)]

    @property
    def widths(self) -> list[int]:
        """Tokens of each row as given: `S` for every row of a tensor [B, S], padding included."""
        return [len(row) for row in self.given]

    def repeated(self, times: int) -> PromptBatch:
        """Each prompt so many times, side by side."""
        rows = [row for row in self.values.split(self.lengths) for _ in range(times)]
        offsets = [0, *accumulate(map(len, rows))]
        given = tuple(row for row in self.given for _ in range(times))
        return replace(self, given=given, values=torch.cat(rows), offsets=offsets)

    def restore(self, generated: Sequence[Sequence[int] | Tensor], pad_token_id: int | None) -> Sequences:
        """Join the prompts and the new tokens into the kind of container that the prompts came in.

        A tensor or array [B, S] follows Hugging Face `generate`: the prompts as given, with their padding, then the new
        tokens, and `pad_token_id` after the rows that ended early. The other kinds are ragged and need no padding.

        Args:
            generated: the new tokens of each of the `B` rows, a sequence or 1-D tensor per row.
            pad_token_id: what follows a shorter row; read for kinds `"tensor"` and `"array"` only.

        Returns:
            int64 ids: a tensor or array [B, S + longest continuation], a jagged nested tensor, or a list of `B`
            tensors, arrays or lists.

        Raises:
            InvalidInputError: a tensor's rows ended at different lengths and there is no `pad_token_id`.
        """
        new = [torch.as_tensor(tokens, dtype=torch.int64, device="cpu") for tokens in generated]
        if self.is_padded:
            new = _pad_right(new, pad_token_id)
        rows = [torch.cat(pair) for pair in zip(self.given, new, strict=True)]
        match self.kind:
            case "tensor":
                return torch.stack(rows).to(self.device)
            case "jagged":
                return torch.nested.as_nested_tensor(rows, layout=torch.jagged, device=self.device)
            case "tensors":
                return [row.to(self.device) for row in rows]
            case "lists":
                return [row.tolist() for row in rows]
            case "array":
                return torch.stack(rows).numpy()
            case "arrays":
                return [row.numpy() for row in rows]


def parse_prompts(
    inputs: object = None,
    attention_mask: object = None,
    *,
    vocab_size: int,
    capacity: int,
    pad_token_id: int | None = None,
    input_ids: object = None,
    token_type_ids: object = None,
) -> PromptBatch:
    """Check the prompts of a `generate` call and pack them, before anything is computed.

    Args:
        inputs: a LongTensor (int64 or int32) [B, S], a list of token lists, a list of 1-D tensors, a jagged nested
            tensor [B, j], numpy arrays of integers in place of tensors, or a mapping such as transformers'
            `BatchEncoding` with `input_ids` and perhaps the two masks below.
        attention_mask: 1 at tokens and 0 at padding, in the shape of `inputs`; each row is padded on one side at most.
        vocab_size: ids must be below it; ids at padding are not looked at.
        capacity: tokens that a row of KV cache can hold; a prompt must leave room for one more.
        pad_token_id: the id that marks padding in a tensor [B, S] given without `attention_mask`. As in Hugging Face
            this is a configured `pad_token_id` that is no `eos_token_id`; with `None` every id is a token.
        input_ids: Hugging Face's name for `inputs`, so that `generate(**tokenizer(...))` works.
        token_type_ids: some tokenizers add it; all zeros say nothing and pass.

    Raises:
        InvalidInputError: nothing, or not token ids, or an empty batch or prompt, or an id outside the vocabulary, or a
            mask that is not one run of padding on one side.
        CapacityError: a prompt does not fit its row.
        NotImplementedError: `token_type_ids` holds more than zeros.
    """
    if isinstance(inputs, Mapping):
        if any(given is not None for given in (input_ids, attention_mask, token_type_ids)):
            raise InvalidInputError("inputs is a mapping: pass nothing beside it, or unpack it with generate(**inputs)")
        fields = _read_mapping(inputs)
        inputs, attention_mask, token_type_ids = (fields.get(name) for name in _MODEL_INPUTS)
    elif inputs is not None and input_ids is not None:
        raise InvalidInputError("inputs and input_ids are two names for the prompts; pass one of them")
    elif inputs is None:
        inputs = input_ids
    if inputs is None:
        raise InvalidInputError(f"no prompts: pass {ACCEPTED}; to start from nothing, pass [[bos_token_id]]")

    kind, rows, device = split_rows(inputs, "inputs")
    _check_tokens(rows)
    _check_token_types(token_type_ids)
    if attention_mask is None and kind in ("tensor", "array") and pad_token_id is not None:
        spans = _infer_spans(rows, pad_token_id)
    else:
        spans = _read_spans(rows, attention_mask)
    real = [row[span] for row, span in zip(rows, spans, strict=True)]
    offsets = list(accumulate(map(len, real), initial=0))
    values = torch.cat(real)
    _check_ids(values, offsets, spans, vocab_size)
    _check_capacity(offsets, capacity)
    return PromptBatch(kind, tuple(rows), values, offsets, device)


_MODEL_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def _read_mapping(inputs: Mapping[object, object]) -> dict[object, object]:
    unknown = [name for name in inputs if name not in _MODEL_INPUTS]
    if unknown:
        raise InvalidInputError(f"inputs holds {unknown}, which nothing reads; it may hold {', '.join(_MODEL_INPUTS)}")
    return dict(inputs)


def _check_tokens(rows: list[Tensor]) -> None:
    """Refuse empty and non-integer rows, and turn the others into int64 in place."""
    for index, row in enumerate(rows):
        if row.numel() == 0:
            raise InvalidInputError(f"row {index} is an empty prompt; give it at least one token, such as bos_token_id")
        if row.dtype not in _TOKEN_DTYPES:
            raise InvalidInputError(f"row {index} of inputs has dtype {row.dtype}; token ids are int64 or int32")
        rows[index] = row.to(torch.int64)


def _check_token_types(token_type_ids: object) -> None:
    if token_type_ids is None:
        return
    _, rows, _ = split_rows(token_type_ids, "token_type_ids")
    if any(row.any() for row in rows):
        raise NotImplementedError(
            "token_type_ids: the model is compiled for token ids alone, so segments other than 0 cannot be passed on; "
            "tokenize with return_token_type_ids=False"
        )


def _infer_spans(rows: list[Tensor], pad_token_id: int) -> list[slice]:
    source = (
        f"attention_mask, inferred from pad_token_id={pad_token_id} since none was given; if {pad_token_id} is a token "
        "of your text, pass attention_mask=torch.ones_like(inputs)"
    )
    return [_span(row != pad_token_id, index, source) for index, row in enumerate(rows)]


def _read_spans(rows: list[Tensor], attention_mask: object) -> list[slice]:
    if attention_mask is None:
        return [slice(0, len(row)) for row in rows]
    _, masks, _ = split_rows(attention_mask, "attention_mask")
    if len(masks) != len(rows):
        raise InvalidInputError(f"attention_mask has {len(masks)} rows, inputs has {len(rows)}; they must match")
    spans = []
    for index, (row, mask) in enumerate(zip(rows, masks, strict=True)):
        if len(mask) != len(row):
            raise InvalidInputError(f"row {index} has {len(row)} ids but {len(mask)} entries in attention_mask")
        if not ((mask == 0) | (mask == 1)).all():
            raise InvalidInputError(f"row {index} of attention_mask has entries other than 0 (padding) and 1 (token)")
        spans.append(_span(mask != 0, index, "attention_mask"))
    return spans


def _span(is_token: Tensor, index: int, source: str) -> slice:
    """Where the tokens of a row lie among its padding, from a bool tensor [width]."""
    places = is_token.nonzero().flatten()
    if places.numel() == 0:
        raise InvalidInputError(f"row {index} is an empty prompt: all of it is padding ({source})")
    start, stop = int(places[0]), int(places[-1]) + 1
    if stop - start != places.numel() or (start > 0 and stop < len(is_token)):
        raise InvalidInputError(f"row {index} is not padded on one side only ({source})")
    return slice(start, stop)


def _check_ids(values: Tensor, offsets: list[int], spans: list[slice], vocab_size: int) -> None:
    wrong = ((values < 0) | (values >= vocab_size)).nonzero().flatten()
    if wrong.numel():
        place = int(wrong[0])
        row = bisect_right(offsets, place) - 1
        column = place - offsets[row] + spans[row].start
        raise InvalidInputError(
            f"row {row}, index {column}: token id {int(values[place])} is outside the vocabulary of {vocab_size}; "
            "tokenize with the tokenizer of this model, and pass attention_mask if the id is padding"
        )


def _check_capacity(offsets: list[int], capacity: int) -> None:
    for row, (start, stop) in enumerate(pairwise(offsets)):
        if stop - start >= capacity:
            raise CapacityError(
                f"row {row}: a prompt of {stop - start} tokens leaves no room for a new one in a row of {capacity}; "
                f"shorten it, or compile with optimize(model, max_length={stop - start + 1}) or more"
            )


def _pad_right(rows: list[Tensor], pad_token_id: int | None) -> list[Tensor]:
    width = max(map(len, rows))
    if pad_token_id is None and any(len(row) < width for row in rows):
        raise InvalidInputError(
            "rows ended at different lengths: pass pad_token_id, or prompts as lists, which need none"
        )
    return [torch.nn.functional.pad(row, (0, width - len(row)), value=pad_token_id) for row in rows]
