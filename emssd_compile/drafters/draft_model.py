"""Classic two-model speculation: a smaller causal LM drafts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from emssd_compile.errors import DrafterError, OptionError
from emssd_compile.step.drafting import Compile, Draft, DraftContext, Drafter, PackedModel, TensorSpec
from emssd_compile.step.pack import Packed, pack


class DraftModel(Drafter):
    """A second causal LM, compiled by the same passes, with its own unpadded KV cache (2211.17192, 2302.01318).

    Each step it first reads the tokens it has not seen (one a row; two where every draft was accepted, since the last
    draft was never fed; a chunk of the prompt in prefill), all rows packed together. Then it drafts greedily, one
    token a row at a time. The grade of a draft is the probability that the draft model gives it, in eighths.

    Args:
        model: a causal LM over the target's vocabulary.
        num_draft_tokens: K, tokens to draft.
    """

    reads_ahead = True
    num_grades = 8

    def __init__(self, model: nn.Module, num_draft_tokens: int = 4) -> None:
        super().__init__()
        if not isinstance(num_draft_tokens, int) or num_draft_tokens < 1:
            raise OptionError(f"DraftModel num_draft_tokens={num_draft_tokens!r} must be an integer of at least 1")
        self.model = model
        self.num_draft_tokens = num_draft_tokens
        self._packed: PackedModel | None = None

    @classmethod
    def from_pretrained(cls, path: str, num_draft_tokens: int = 4, **options: Any) -> DraftModel:
        """Load a Hugging Face causal LM (`options` go to its `from_pretrained`) and draft with it."""
        from transformers import AutoModelForCausalLM

        return cls(AutoModelForCausalLM.from_pretrained(path, **options).eval(), num_draft_tokens)

    def prepare(self, compile_model: Compile, rows: int, capacity: int, vocabulary: int) -> None:
        """Compile the model. Raises DrafterError if its vocabulary is not the target's."""
        packed = compile_model(self.model)
        if packed.vocabulary != vocabulary:
            raise DrafterError(
                f"the draft model predicts {packed.vocabulary} tokens and the target {vocabulary}: drafts would mean "
                "other tokens; use a draft model that shares the target's tokenizer"
            )
        self._packed = packed
        self._rows = rows

    def state_spec(self) -> dict[str, TensorSpec]:
        """`draft_model_lengths[B]`: tokens whose KV the draft model has written."""
        return {"draft_model_lengths": TensorSpec((self._rows,), torch.int64)}

    def cache_spec(self) -> dict[str, TensorSpec]:
        """The draft model's KV caches."""
        assert self._packed is not None
        return {f"draft_model_{name}": spec for name, spec in self._packed.cache_shapes.items()}

    def forward(self, context: DraftContext) -> Draft:
        """See the class."""
        known = context.known
        # KV of drafts that were rejected is stale: it counts only up to the root token.
        lengths = torch.minimum(context.state["draft_model_lengths"], (known - 1).clamp(min=0))
        packed = pack(
            history=context.history,
            known=known,
            lengths=lengths,
            draft_lengths=torch.zeros_like(known),
            active=context.active,
            token_range=context.draft_range,
            row_range=context.row_range,
            share=2,
        )
        drafting = context.can_draft & packed.ready
        token, grade = self._predict(packed, lengths, packed.roots, context)
        tokens, grades = [token], [grade]
        lengths = lengths + packed.fed
        for index in range(1, self.num_draft_tokens):
            going = drafting & (index < context.max_drafts)
            single, order = _one_token_each(token, known + index - 1, going)
            token, grade = self._predict(single, known + index - 1, order, context)
            tokens.append(token)
            grades.append(grade)
            lengths = lengths + going
        count = torch.where(drafting, self.num_draft_tokens, 0)
        state = {"draft_model_lengths": lengths}
        return Draft(torch.stack(tokens, 1), count, state, torch.stack(grades, 1))

    def _predict(self, packed: Packed, lengths: Tensor, index: Tensor, context: DraftContext) -> tuple[Tensor, Tensor]:
        """The likeliest token of each row, and its grade."""
        assert self._packed is not None
        caches = {name: context.state[f"draft_model_{name}"] for name in self._packed.cache_shapes}
        _, logits = self._packed(packed, lengths, index, caches)
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
