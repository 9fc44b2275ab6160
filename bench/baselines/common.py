"""What the baselines share: their result, their clock, and the checks and padding of a request."""

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from emssd_compile.errors import InvalidInputError, OptionError, UnsupportedModelError

EosTokenId = int | Sequence[int] | None


@dataclass(frozen=True)
class BaselineResult:
    """Greedy continuations of a batch of prompts and what they cost.

    Args:
        tokens: new tokens of each row, without the prompt; an end-of-sequence token, if one was reached, is the last.
        seconds: wall time from token lists in to token lists out.
        prefill_seconds: the part of `seconds` up to the end of the first forward pass; `None` where prompts are not
            prefilled together.
        stats: counters by name; which ones is said by each baseline.
    """

    tokens: list[list[int]]
    seconds: float
    prefill_seconds: float | None = None
    stats: dict[str, float] = field(default_factory=dict)


class ForwardClock:
    """Wall time of a `with` block, with the forward passes of `model` counted and the end of the first one noted.

    The device is synchronised where the clock is read, and nowhere else.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self.num_forward_passes = 0
        self.prefill_seconds = 0.0
        self.seconds = 0.0

    def __enter__(self) -> Self:
        self._hook = self._model.register_forward_hook(self._after_forward)
        self._start = 0.0
        self._start = self._elapsed()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._hook.remove()
        self.seconds = self._elapsed()

    def _after_forward(self, *_: Any) -> None:
        self.num_forward_passes += 1
        if self.num_forward_passes == 1:
            self.prefill_seconds = self._elapsed()

    def _elapsed(self) -> float:
        if self._model.device.type != "cpu":
            torch.accelerator.synchronize(self._model.device)
        return time.perf_counter() - self._start


def check_request(model: PreTrainedModel, prompts: list[list[int]], max_new_tokens: int) -> None:
    """Raises before any work if a request makes no sense.

    Raises:
        InvalidInputError: there is no prompt, or one of them is empty.
        OptionError: `max_new_tokens` is not positive.
        UnsupportedModelError: the model is in training mode, where dropout makes greedy decoding random.
    """
    if not prompts:
        raise InvalidInputError("prompts is empty: pass at least one list of token ids")
    empty = [row for row, prompt in enumerate(prompts) if not prompt]
    if empty:
        raise InvalidInputError(f"prompts {empty} are empty: every prompt needs at least one token (e.g. BOS)")
    if max_new_tokens < 1:
        raise OptionError(f"max_new_tokens is {max_new_tokens}: it must be at least 1")
    if model.training:
        raise UnsupportedModelError("the model is in training mode", remedy="call model.eval() first")


def pad(rows: Sequence[Sequence[int]], *, side: Literal["left", "right"]) -> tuple[Tensor, Tensor]:
    """Pads token lists with token 0 to the longest one.

    Returns:
        `input_ids[B, S]` (int64) and `is_real[B, S]` (bool, false at padding), both on the CPU.
    """
    longest = max(len(row) for row in rows)
    input_ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    is_real = torch.zeros(len(rows), longest, dtype=torch.bool)
    for index, row in enumerate(rows):
        place = slice(longest - len(row), longest) if side == "left" else slice(len(row))
        input_ids[index, place] = torch.tensor(row, dtype=torch.int64)
        is_real[index, place] = True
    return input_ids, is_real


def stop_tokens(eos_token_id: EosTokenId) -> frozenset[int]:
    """The end-of-sequence ids as a set; `None` means that nothing stops a row before `max_new_tokens`."""
    if eos_token_id is None:
        return frozenset()
    return frozenset([eos_token_id] if isinstance(eos_token_id, int) else eos_token_id)


def cut_after_stop(tokens: Sequence[int], stop: frozenset[int]) -> list[int]:
    """`tokens` up to and including the first one in `stop`."""
    before = list(itertools.takewhile(lambda token: token not in stop, tokens))
    return [*before, *tokens[len(before) : len(before) + 1]]
