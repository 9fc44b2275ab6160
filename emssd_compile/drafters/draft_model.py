"""Classic two-model speculation: a smaller causal LM drafts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from emssd_compile.errors import DrafterError, OptionError
from emssd_compile.step.drafting import Compile, Draft, DraftContext, Drafter, PackedModel
from emssd_compile.step.pack import Packed, pack
from emssd_compile.step.parts import PartSizes
from emssd_compile.step.tensor_spec import TensorSpec

MOST_PADDING, MOST_PADDING_SHARE = 512, 0.01
"""Vocabularies that differ by less than so many tokens, and by no more than this share of the larger one, are taken to
differ by padding: what pads an embedding is 8 to 512 rows that no tokenizer gives out."""


class DraftModel(Drafter):
    """A second causal LM, compiled by the same passes, with its own unpadded KV cache (2211.17192, 2302.01318).

    Each step it first reads the tokens it has not seen (one a row; two where every draft was accepted, since the last
    draft was never fed; a chunk of the prompt in prefill), all rows packed together. Then it drafts greedily, one
    token a row at a time. The grade of a draft is the probability that the draft model gives it, in eighths.

    A draft model may have fewer positions than the target: it drafts as far as they go, and rows that are longer decode
    without drafts. Its vocabulary may be padded to another size than the target's: an id past the target's ends a
    draft, and an id past its own is read as its last one.

    Args:
        model: a causal LM over the target's vocabulary.
        num_draft_tokens: K, tokens to draft.
    """

    reads_ahead = is_costly = True
    num_grades = 8

    def __init__(self, model: nn.Module, num_draft_tokens: int = 4) -> None:
        super().__init__()
        if not isinstance(num_draft_tokens, int) or num_draft_tokens < 1:
            raise OptionError(f"DraftModel num_draft_tokens={num_draft_tokens!r} must be an integer of at least 1")
        self.model = model
        self.num_draft_tokens = num_draft_tokens
        self._packed: PackedModel | None = None
        self._notes: tuple[str, ...] = ()

    @classmethod
    def from_pretrained(cls, path: str, num_draft_tokens: int = 4, **options: Any) -> DraftModel:
        """Load a Hugging Face causal LM (`options` go to its `from_pretrained`) and draft with it."""
        from transformers import AutoModelForCausalLM

        return cls(AutoModelForCausalLM.from_pretrained(path, **options).eval(), num_draft_tokens)

    def prepare(self, compile_model: Compile, rows: int, capacity: int, vocabulary: int) -> None:
        """Compile the model. Raises DrafterError if its vocabulary is not the target's, up to padding."""
        packed = compile_model(self.model)
        larger, difference = max(packed.vocabulary, vocabulary), abs(packed.vocabulary - vocabulary)
        if difference >= MOST_PADDING or difference > MOST_PADDING_SHARE * larger:
            raise DrafterError(
                f"the draft model predicts {packed.vocabulary} tokens and the target {vocabulary}, which differ "
                "by more than padding: drafts would mean other tokens; use a model that shares the target's tokenizer"
            )
        self._packed = packed
        self._notes = (
            *([f"the draft model drafts up to position {packed.capacity}"] if packed.capacity < capacity else []),
            *([f"vocabularies of {packed.vocabulary} and {vocabulary}: taken for padding"] if difference else []),
        )

    def notes(self) -> tuple[str, ...]:
        """In what the draft model and the target differ."""
        return self._notes

    def tensors(self, sizes: PartSizes) -> dict[str, TensorSpec]:
        """`lengths` int64 `[B]`, tokens whose KV the draft model has written, and its KV caches."""
        return {"lengths": TensorSpec((sizes.rows,), torch.int64), **self._model.cache_shapes}

    def forward(self, context: DraftContext) -> Draft:
        """Read what is new, then draft greedily: tokens `[B, K]`, lengths `[B]`, grades `[B, K]`."""
        known, capacity = context.known, self._model.capacity
        has_place = known <= capacity  # [B], whether the root token has a position
        # KV of drafts that were rejected is stale: it counts only up to the root token.
        lengths = torch.minimum(context.state["lengths"], (known - 1).clamp(min=0))
        packed = pack(
            history=context.history,
            known=known,
            lengths=lengths,
            active=context.active & has_place,
            token_range=context.draft_range,
            row_range=context.row_range,
            share=2,
        )
        drafting = context.can_draft & packed.ready
        max_drafts = torch.minimum(context.max_drafts, capacity - known + 1)  # the last one is not fed
        token, grade = self._predict(packed, lengths, packed.roots, context)
        tokens, grades = [token], [grade]  # [B] each
        lengths = lengths + packed.fed
        for index in range(1, self.num_draft_tokens):
            going = drafting & (index < max_drafts)
            # Rows that do not go on may be longer than the cache, which no target may be told.
            position = (known + index - 1).clamp(max=capacity)  # [B]
            single, order = _one_token_each(token, position, going)
            token, grade = self._predict(single, position, order, context)
            tokens.append(token)
            grades.append(grade)
            lengths = lengths + going
        count = torch.where(drafting, max_drafts.clamp(max=self.num_draft_tokens), 0)
        return Draft(torch.stack(tokens, 1), count, {"lengths": lengths}, torch.stack(grades, 1))

    @property
    def _model(self) -> PackedModel:
        assert self._packed is not None, "prepare comes first"
        return self._packed

    def _predict(self, packed: Packed, lengths: Tensor, index: Tensor, context: DraftContext) -> tuple[Tensor, Tensor]:
        """The likeliest token of each row, and its grade."""
        caches = {name: context.state[name] for name in self._model.cache_shapes}
        readable = packed.input_ids.clamp(max=self._model.vocabulary - 1)  # [T]
        _, logits = self._model(replace(packed, input_ids=readable), lengths, index, caches)  # [B, V]
        best, token = logits.float().max(-1)
        probability = (best - logits.float().logsumexp(-1)).exp()
        return token, (probability * self.num_grades).long().clamp(0, self.num_grades - 1)


def _one_token_each(tokens: Tensor, positions: Tensor, going: Tensor) -> tuple[Packed, Tensor]:
    """Pack one token of each row that is going; also where in T each row's token lies (0 for the others)."""
    fed = going.to(positions.dtype)
    ends = fed.cumsum(0)
    slots = torch.arange(len(tokens), device=tokens.device)
    row_ids = torch.searchsorted(ends, slots, right=True)
    rows = row_ids.clamp(max=len(tokens) - 1)
    tail = row_ids >= len(tokens)
    offsets = torch.cat([torch.zeros_like(ends[:1]), ends])
    order = torch.where(going, ends - 1, 0)
    packed = Packed(
        input_ids=torch.where(tail, 0, tokens[rows]),
        positions=torch.where(tail, 0, positions[rows]),
        row_ids=row_ids,
        offsets=offsets,
        fed=fed,
        ready=going,
        drafted=torch.zeros_like(fed),
        roots=order,
    )
    return packed, order
