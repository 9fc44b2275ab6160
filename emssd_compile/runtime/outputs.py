"""The output side of one `generate` call: how much each row may emit, when it stops, and the object returned."""

from __future__ import annotations

import reprlib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic

import torch
from torch import Tensor

from emssd_compile.errors import CapacityError, InvalidInputError, OptionError
from emssd_compile.generation import DEFAULT_NEW_TOKENS, GenerateOptions, StoppingCriterion
from emssd_compile.runtime.containers import Kind
from emssd_compile.runtime.inputs import PromptBatch
from emssd_compile.runtime.requests import Request
from emssd_compile.step.probe import READING, ReadingSpec

Reading = tuple[Tensor, ...] | list[Tensor | None]


@dataclass(frozen=True)
class RowLimits:
    """How much each of the `B` rows may and must emit.

    Attributes:
        max_new_tokens: `B` ints, at least 1: a row ends with this many tokens.
        min_new_tokens: `B` ints, at least 0: while a row has emitted fewer, the logits of every EOS count as -inf.
    """

    max_new_tokens: list[int]
    min_new_tokens: list[int]


def limit_rows(
    options: GenerateOptions, prompts: PromptBatch, capacity: int, of_rows: Sequence[GenerateOptions] = ()
) -> RowLimits:
    """Fit the options to a batch: turn lengths that count the prompt into new tokens per row, and check that they fit.

    Without `max_new_tokens` and `max_length`, a row emits up to 20 tokens or until it is full, as in transformers.

    Args:
        options: what the call asked for.
        prompts: what it asked it for.
        capacity: tokens that a row of KV cache can hold, prompt and new ones together.
        of_rows: what it asked for each row, where they have lengths of their own.

    Raises:
        InvalidInputError: a streamer and more than one row.
        OptionError: a prompt is as long as `max_length` already; or the rows of a tensor may end at different lengths
            and there is no `pad_token_id`.
        CapacityError: a prompt and its new tokens do not fit a row.
    """
    if options.streamer is not None and len(prompts) > 1:
        raise InvalidInputError(f"streamer: only one prompt can be streamed, not {len(prompts)}; pass them one by one")
    every = of_rows or [options] * len(prompts)
    sizes = enumerate(zip(every, prompts.lengths, prompts.widths, strict=True))
    most = [_max_new_tokens(own, row, length, width, capacity) for row, (own, length, width) in sizes]
    asked = [_min_new_tokens(own, width) for own, width in zip(every, prompts.widths, strict=True)]
    least = [min(low, high) for low, high in zip(asked, most, strict=True)]
    if options.eos_token_ids and asked != least:
        message = (
            "min_new_tokens or min_length asks for more than the maximum; such rows end at the maximum, without EOS"
        )
        warnings.warn(message, UserWarning, stacklevel=4)
    stops = options.stopping_criteria or options.row_criteria or options.max_time is not None
    may_be_ragged = len(prompts) > 1 and (stops or len(set(most)) > 1)
    if prompts.is_padded and may_be_ragged and options.pad_token_id is None:
        raise OptionError("rows may end at different lengths: pass pad_token_id, or prompts as lists, which need none")
    return RowLimits(most, least)


def _max_new_tokens(options: GenerateOptions, row: int, length: int, width: int, capacity: int) -> int:
    room = capacity - length
    if options.max_new_tokens is not None:
        wanted = options.max_new_tokens
    elif options.max_length is not None:
        wanted = options.max_length - width
    else:
        wanted = min(DEFAULT_NEW_TOKENS, room)
    if wanted < 1:
        raise OptionError(
            f"row {row}: a prompt of {width} tokens, as given, leaves none up to max_length={options.max_length}; "
            "raise it, or pass max_new_tokens"
        )
    if wanted > room:
        raise CapacityError(
            f"row {row}: {length} prompt tokens and {wanted} new ones do not fit a row of {capacity}; pass "
            f"max_new_tokens={room} or less, or compile with optimize(model, max_length={length + wanted})"
        )
    return wanted


def _min_new_tokens(options: GenerateOptions, width: int) -> int:
    if options.min_new_tokens is not None:
        return options.min_new_tokens
    return max(0, (options.min_length or 0) - width)


def apply_stopping_criteria(criteria: Iterable[StoppingCriterion], input_ids: Tensor) -> list[bool]:
    """Which of B rows end, since any of Hugging Face's stopping criteria holds for them.

    Args:
        criteria: transformers' `StoppingCriteriaList`, or any iterable of such callables. Each is called, with
            `input_ids` and `scores=None`, and answers with a bool for all rows or a bool tensor `[B]`.
        input_ids: int64 `[B, n]`, the rows so far.

    Raises:
        OptionError: one answers with something else.
    """
    ends = torch.zeros(len(input_ids), dtype=torch.bool)
    for criterion in criteria:
        ends |= _answer(criterion, criterion(input_ids.clone(), None), len(input_ids))
    rows: list[bool] = ends.tolist()
    return rows


def _answer(criterion: StoppingCriterion, answer: object, rows: int) -> Tensor:
    """What a criterion said, as bool `[]` or `[B]`."""
    try:
        told = torch.as_tensor(answer).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        told = torch.empty(0)
    if told.dtype != torch.bool or (told.dim() > 0 and (told.numel() != rows or (rows > 1 and told.dim() > 1))):
        kind = f"a {told.dtype} of shape {list(told.shape)}" if isinstance(answer, Tensor) else reprlib.repr(answer)
        raise OptionError(
            f"the stopping criterion {_name(criterion)} answered {kind}; it must return True, False, or a bool tensor "
            f"of shape [{rows}], one for each row of the batch"
        )
    return told.reshape(rows) if told.dim() else told


def _name(criterion: StoppingCriterion) -> str:
    return getattr(criterion, "__qualname__", type(criterion).__qualname__)


def arrange(specs: Mapping[str, ReadingSpec], requests: Sequence[Request], device: torch.device) -> dict[str, Reading]:
    """What requests were told, as it is returned; by the names that probes gave.

    Args:
        specs: by the names of results.
        requests: all of a call, ended.
        device: where tensors are put.

    Returns:
        Of each reading that some request asked for: a tuple of `[B, *shape]` for each place in the output, zeros where
        a row has ended or did not ask; or a list with `[n, *shape]` for each row, None where it did not ask.
    """
    found: dict[str, Reading] = {}
    for name, spec in specs.items():
        lines = [request.reading(name) if name in request.told else None for request in requests]
        if all(line is None for line in lines):
            continue
        if spec.is_cut:
            shown = [int(request.options.get(spec.asked_by, 0)) for request in requests]
            lines = [line if line is None else line[..., :most] for line, most in zip(lines, shown, strict=True)]
        lines = [line if line is None else line.to(device) for line in lines]
        found[name.removeprefix(READING)] = _by_step(lines) if spec.of_steps else lines
    return found


def _by_step(lines: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    there = [line for line in lines if line is not None]
    steps = there[0].new_zeros((max(map(len, there)), len(lines), *there[0].shape[1:]))  # [n, B, *shape]
    for row, line in enumerate(lines):
        if line is not None:
            steps[: len(line), row] = line
    return steps.unbind()


class GenerateOutput(Mapping[str, Any], Generic[Kind]):
    """Read like transformers' `ModelOutput`: `out.sequences`, `out["sequences"]` and `out[0]` are the same object.

    What was asked for beside the sequences, such as `scores` and `logprobs`, is an attribute, too.

    Attributes:
        sequences: prompts and new tokens, in the kind of container that the prompts came in.
        scores: with `output_scores`, a tensor `[B, V]` for each place in the output: the logits that tokens were chosen
            by, all options applied. Zeros behind the end of a row.
        logits: with `output_logits` the same, as the model gave them.
    """

    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    attentions = hidden_states = past_key_values = cache = None  # transformers' outputs have them

    def __init__(self, sequences: Kind, **readings: Reading) -> None:
        self.sequences = sequences
        vars(self).update(readings)

    def __getitem__(self, key: str | int | slice) -> Any:
        return self.to_tuple()[key] if isinstance(key, (int, slice)) else vars(self)[key]

    def __iter__(self) -> Iterator[str]:
        return iter(vars(self))

    def __len__(self) -> int:
        return len(vars(self))

    def to_tuple(self) -> tuple[Any, ...]:
        """The values in the order of the attributes."""
        return tuple(vars(self).values())
