"""Baseline: batched prompt-lookup speculation the usual, padded way, on top of any Hugging Face decoder.

The "vanilla" method that EMS-SD (arXiv 2405.07542) is compared with. Rows accept different numbers of drafts, yet share
one rectangular input and one KV write index:

- inputs are padded to the row with the most drafts, and a finished row is padding from end to end;
- the write index advances by the batch's largest acceptance, so that other rows keep holes, which the mask hides;
- positions are passed explicitly, since the index of a slot no longer says where its token stands.

Tokens are those of greedy decoding of each prompt alone.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from bench.baselines.common import (
    BaselineResult,
    EosTokenId,
    ForwardClock,
    check_request,
    pad,
    stop_tokens,
)
from bench.baselines.padded_cache import PaddedCache
from bench.baselines.prompt_lookup import PromptLookup
from bench.baselines.row import Row, RowDrafter
from emssd_compile.errors import OptionError, UnsupportedModelError

MakeCache = Callable[[int, torch.device], PaddedCache]


def run(
    model: PreTrainedModel,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    eos_token_id: EosTokenId = None,
    num_draft_tokens: int = 7,
    max_ngram: int = 2,
    make_cache: MakeCache = PaddedCache,
) -> BaselineResult:
    """Greedy continuations of all prompts as one padded batch, drafted by prompt lookup.

    Args:
        model: the target, in `eval` mode.
        prompts: token ids of each row, not padded.
        max_new_tokens: most tokens a row may gain.
        eos_token_id: token(s) that end a row; `None` lets every row run to `max_new_tokens`.
        num_draft_tokens: most tokens copied per row and step; EMS-SD uses 7.
        max_ngram: longest n-gram looked up; EMS-SD uses 2.
        make_cache: see `speculate`.

    Returns:
        The result, with the stats of `speculate`.

    Raises:
        OptionError: `num_draft_tokens` or `max_ngram` is not positive.
        InvalidInputError, OptionError, UnsupportedModelError: see `check_request` and `speculate`.
    """
    if num_draft_tokens < 1 or max_ngram < 1:
        raise OptionError(f"num_draft_tokens is {num_draft_tokens}, max_ngram is {max_ngram}: both must be at least 1")
    return speculate(
        model,
        prompts,
        lambda prompt: PromptLookup(prompt, max_ngram=max_ngram),
        max_new_tokens=max_new_tokens,
        eos_token_id=eos_token_id,
        num_draft_tokens=num_draft_tokens,
        make_cache=make_cache,
    )


@torch.inference_mode()
def speculate(
    model: PreTrainedModel,
    prompts: list[list[int]],
    drafter: Callable[[list[int]], RowDrafter],
    *,
    max_new_tokens: int,
    num_draft_tokens: int,
    eos_token_id: EosTokenId = None,
    make_cache: MakeCache = PaddedCache,
) -> BaselineResult:
    """As `run`, with any drafter.

    Args:
        drafter: makes the drafter of a row from its prompt.
        make_cache: makes the KV cache of so many rows on a device.

    Returns:
        The result, with these stats: `num_forward_passes`; `num_spec_steps`, those after the prefill;
        `num_draft_tokens` and `num_accepted_draft_tokens`; `mean_acceptance_length`, tokens emitted per step and
        unfinished row; `num_padding_tokens`, inputs computed that are no row's text or draft; `num_padding_kv_slots`,
        KV slots (per layer) given up to padding or holes. The prefill counts in both paddings.

    Raises:
        InvalidInputError, OptionError: see `check_request`.
        UnsupportedModelError: see `check_model`.
    """
    check_request(model, prompts, max_new_tokens)
    check_model(model)
    stop = stop_tokens(eos_token_id)
    with ForwardClock(model) as clock:
        rows = [Row(drafter(prompt), len(prompt), max_new_tokens, stop) for prompt in prompts]
        batch = _PaddedBatch(model, rows, make_cache(len(rows), model.device))
        batch.prefill(prompts)
        while not all(row.finished for row in rows):
            batch.step(num_draft_tokens)
    return BaselineResult(
        tokens=[row.emitted for row in rows],
        seconds=clock.seconds,
        prefill_seconds=clock.prefill_seconds,
        stats={"num_forward_passes": clock.num_forward_passes, **batch.stats()},
    )


def check_model(model: PreTrainedModel) -> None:
    """Refuses models for which a mask with holes and explicit positions would not say everything.

    A model that hides such a thing from its configuration is not noticed (GPT-Neo keeps a window of KV slots in a
    buffer); `bench.timing.compare` shows wrong tokens as such.

    Raises:
        UnsupportedModelError: the model takes no `position_ids` (BLOOM and MPT derive theirs from a 2-D mask), uses
            ALiBi, has a layer that is not full attention over plain keys and values (sliding window, recurrent state),
            or uses an attention implementation that ignores 4-D masks.
    """
    missing = {"position_ids", "logits_to_keep", "past_key_values"} - set(inspect.signature(model.forward).parameters)
    if missing:
        raise UnsupportedModelError(f"{type(model).__name__}.forward does not take {', '.join(sorted(missing))}")
    if getattr(model.config, "alibi", False):
        raise UnsupportedModelError("ALiBi counts distances in KV slots, which holes falsify")
    layers = {type(layer) for layer in DynamicCache(config=model.config).layers}
    if layers != {DynamicLayer}:
        names = ", ".join(sorted(layer.__name__ for layer in layers))
        raise UnsupportedModelError(f"the padded baseline needs full attention in every layer, found {names}")
    if model.config._attn_implementation not in ("sdpa", "eager"):
        raise UnsupportedModelError(
            f"attention implementation {model.config._attn_implementation!r} ignores 4-D masks",
            remedy='load the model with attn_implementation="sdpa"',
        )


@dataclass
class _PaddedBatch:
    """Rows that are decoded together in rectangles."""

    model: PreTrainedModel
    rows: list[Row]
    cache: PaddedCache
    num_steps: int = 0
    num_padding_tokens: int = 0

    def prefill(self, prompts: list[list[int]]) -> None:
        """Feeds the prompts, right-aligned so that the last column predicts, and emits each row's first token."""
        predicted, is_real = self._predict(prompts, [0] * len(prompts), side="left", logits_to_keep=1)
        self.cache.commit(is_real, advance=is_real.shape[1])
        for row, first in zip(self.rows, predicted, strict=True):
            row.accept([], first)

    def step(self, num_draft_tokens: int) -> None:
        """Drafts, verifies all rows with one forward pass, and emits what agrees."""
        fed = [row.next_input(num_draft_tokens) for row in self.rows]
        starts = [row.prompt_length + len(row.emitted) - 1 for row in self.rows]
        predicted, is_real = self._predict(fed, starts, side="right", logits_to_keep=0)
        emitted = [
            row.accept(tokens[1:], prediction) if tokens else 0
            for row, tokens, prediction in zip(self.rows, fed, predicted, strict=True)
        ]
        # A row keeps the KV of as many tokens as it emitted: its newest one is the next step's input.
        slots = torch.arange(is_real.shape[1], device=is_real.device)
        self.cache.commit(slots < torch.tensor(emitted, device=is_real.device)[:, None], advance=max(emitted))
        self.num_steps += 1

    def stats(self) -> dict[str, float]:
        """The counters that `speculate` lists, except `num_forward_passes`."""
        num_row_steps = sum(row.num_steps for row in self.rows)
        num_step_tokens = sum(len(row.emitted) - 1 for row in self.rows)  # a row's first token is the prefill's
        return {
            "num_spec_steps": self.num_steps,
            "num_draft_tokens": sum(row.num_drafts for row in self.rows),
            "num_accepted_draft_tokens": sum(row.num_accepted for row in self.rows),
            "mean_acceptance_length": num_step_tokens / max(num_row_steps, 1),
            "num_padding_tokens": self.num_padding_tokens,
            "num_padding_kv_slots": self.cache.num_padding_slots,
        }

    def _predict(
        self, fed: list[list[int]], starts: list[int], *, side: Literal["left", "right"], logits_to_keep: int
    ) -> tuple[list[list[int]], Tensor]:
        """One forward pass over `fed`, padded to its longest row; row `b` starts at position `starts[b]`.

        Returns:
            The greedy prediction after each of the last `logits_to_keep` tokens (0: all) of each padded row, and
            `is_real[B, Q]` on the model's device.
        """
        input_ids, is_real = (part.to(self.model.device) for part in pad(fed, side=side))
        self.num_padding_tokens += is_real.numel() - sum(map(len, fed))
        # Padding takes the position of a real neighbour: one past the end could be outside a learned position table.
        offsets = (is_real.cumsum(dim=1) - 1).clamp_(min=0)
        logits = self.model(
            input_ids,
            attention_mask=self.cache.attention_mask(is_real, self.model.dtype),
            position_ids=torch.tensor(starts, device=is_real.device)[:, None] + offsets,
            past_key_values=self.cache.kv,
            use_cache=True,
            logits_to_keep=logits_to_keep,
        ).logits
        predicted: list[list[int]] = logits.argmax(dim=-1).tolist()
        return predicted, is_real
