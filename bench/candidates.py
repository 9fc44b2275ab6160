"""The ways to decode that `bench.speedup` compares, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from transformers import PreTrainedModel

from bench.baselines import hf_assisted, hf_generate, realign, vanilla_padded
from bench.baselines.common import BaselineResult
from bench.baselines.hf_static import StaticGenerate
from bench.ours import compile_ours, decode
from emssd_compile.drafters import DraftModel, PromptLookup
from emssd_compile.errors import OptionError


class Run(Protocol):
    """Decodes a batch greedily, without end of sequence."""

    def __call__(self, prompts: list[list[int]], *, max_new_tokens: int) -> BaselineResult:
        """Continuations of `prompts`, token ids of each row, by `max_new_tokens` tokens each."""


@dataclass(frozen=True)
class Task:
    """What all candidates are made for.

    Attributes:
        model: the target.
        draft_model: a smaller model of the same vocabulary, or `None` if there is none.
        max_batch: most rows of a batch.
        max_length: most tokens of a row, prompt and output together.
        lookup_tokens: K of every prompt lookup.
        max_ngram: longest suffix that every prompt lookup matches.
        draft_tokens: K of the draft model.
        backend: that of `emssd_compile.optimize`.
    """

    model: PreTrainedModel
    draft_model: PreTrainedModel | None
    max_batch: int
    max_length: int
    lookup_tokens: int
    max_ngram: int
    draft_tokens: int
    backend: str


def _hf_generate(task: Task) -> Run:
    return partial(hf_generate.run, task.model)


def _hf_generate_static(task: Task) -> Run:
    return StaticGenerate(task.model).run


def _hf_assisted(task: Task) -> Run:
    return partial(
        hf_assisted.run,
        task.model,
        prompt_lookup_num_tokens=task.lookup_tokens,
        max_matching_ngram_size=task.max_ngram,
    )


def _vanilla_padded(task: Task) -> Run:
    return partial(vanilla_padded.run, task.model, num_draft_tokens=task.lookup_tokens, max_ngram=task.max_ngram)


def _realign(task: Task) -> Run:
    return partial(realign.run, task.model, num_draft_tokens=task.lookup_tokens, max_ngram=task.max_ngram)


def _ours_none(task: Task) -> Run:
    return _ours(task, "none", "packed")


def _ours_lookup(layout: str, kv_dtype: str | None = None) -> Callable[[Task], Run]:
    return lambda task: _ours(task, PromptLookup(task.lookup_tokens, task.max_ngram), layout, kv_dtype)


def _ours_draft_model(task: Task) -> Run:
    if task.draft_model is None:
        raise OptionError("no draft model is known for this shape; --shape demo has one")
    return _ours(task, DraftModel(task.draft_model, task.draft_tokens), "packed")


def _ours(task: Task, drafter: str | PromptLookup | DraftModel, layout: str, kv_dtype: str | None = None) -> Run:
    fast = compile_ours(
        task.model,
        drafter,
        max_batch=task.max_batch,
        max_length=task.max_length,
        layout=layout,
        backend=task.backend,
        kv_dtype=kv_dtype,
    )
    return partial(decode, fast)


CANDIDATES: dict[str, Callable[[Task], Run]] = {
    "hf_generate": _hf_generate,
    "hf_generate_static": _hf_generate_static,
    "hf_assisted": _hf_assisted,
    "vanilla_padded": _vanilla_padded,
    "realign": _realign,
    "ours_none": _ours_none,
    "ours_packed": _ours_lookup("packed"),
    "ours_padded": _ours_lookup("padded"),
    "ours_auto": _ours_lookup("auto"),
    "ours_int8_kv": _ours_lookup("auto", "int8"),
    "ours_draft_model": _ours_draft_model,
}


class Attempt:
    """A candidate that may fail without taking the others down. After its first failure it is not run again.

    Args:
        make: makes it; may raise anything.

    Attributes:
        failure: why it is not run any more, `None` while nothing is wrong.
    """

    def __init__(self, make: Callable[[], Run]) -> None:
        self.failure: str | None = None
        self._run: Run | None = None
        try:
            self._run = make()
        except Exception as error:
            self.give_up(_reason(error))

    def __call__(self, prompts: list[list[int]], *, max_new_tokens: int) -> BaselineResult | None:
        """As `Run`; `None` if it fails, or failed before."""
        if self._run is None:
            return None
        try:
            return self._run(prompts, max_new_tokens=max_new_tokens)
        except Exception as error:
            self.give_up(f"batch {len(prompts)}: {_reason(error)}")
            return None

    def give_up(self, reason: str) -> None:
        """Not to be run again, and its memory is free to go."""
        self.failure, self._run = reason, None


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
