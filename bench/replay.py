"""Drafts of a wanted quality, for measuring speed where a model's weights, and so its own drafts, mean nothing.

A model with random weights says nothing that prompt lookup could copy. `ReplayDrafter` knows what the model is about to
say and leaves out or spoils draft i of a step with given probabilities, so that a step costs what it costs and accepts
what real text would have let it accept. Verification stays real: a spoilt draft is rejected because the model disagrees
with it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bench.profiles import Profile
from emssd_compile.drafters import Draft, DraftContext, Drafter
from emssd_compile.errors import DrafterError, OptionError
from emssd_compile.step.drafting import Target

_EMBEDDING_STD = 32.0


class ReplayDrafter(Drafter):
    """Drafts a known continuation: as many tokens, and as many of them right, as a `Profile` says.

    A number drawn once from `seed` for each (row, position in the continuation) decides: below `right[i]`, draft i is
    right; else, below `drafted[i]`, it is the right token plus one; else the draft ends there. So the same drafts are
    made whatever the layout, the batch or the order of the steps.

    One compiled step serves many texts: `load` copies into tensors that keep their place. Row b must decode the b-th
    loaded prompt, which it does if `generate` gets at most `rows` prompts, in the order they were loaded.

    Args:
        num_draft_tokens: K.
        rows: B, the `max_batch` of `optimize`.
        max_new_tokens: longest continuation, L.
        device: where the model is.
        seed: of what is spoilt.
    """

    def __init__(
        self,
        num_draft_tokens: int,
        rows: int,
        max_new_tokens: int,
        *,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.num_draft_tokens = num_draft_tokens
        self.vocabulary = 0  # told by `prepare`
        # -1 is no token: a draft ends there.
        self.register_buffer("continuations", torch.full((rows, max_new_tokens), -1, device=device))
        self.register_buffer("prompt_lengths", torch.zeros(rows, dtype=torch.int64, device=device))
        self.register_buffer("right", torch.zeros(num_draft_tokens, device=device))
        self.register_buffer("drafted", torch.zeros(num_draft_tokens, device=device))
        self.register_buffer("draws", draw(rows, max_new_tokens, seed).to(device))
        self.continuations: Tensor
        self.prompt_lengths: Tensor
        self.right: Tensor
        self.drafted: Tensor
        self.draws: Tensor

    def prepare(self, target: Target) -> None:
        """Raises DrafterError if the step has more rows than the drafter has texts."""
        if target.rows != len(self.prompt_lengths):
            raise DrafterError(
                f"ReplayDrafter was made for {len(self.prompt_lengths)} rows; max_batch is {target.rows}"
            )
        self.vocabulary = target.vocabulary

    def load(self, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]], profile: Profile) -> None:
        """What to draft from now on.

        Args:
            prompts: of rows 0, 1, ...
            continuations: what the model makes of each.
            profile: of K drafts.

        Raises:
            OptionError: there are more texts than rows, a continuation is too long, or K differs.
        """
        rows, longest = self.continuations.shape
        if len(prompts) > rows or len(prompts) != len(continuations):
            raise OptionError(f"{len(prompts)} prompts and {len(continuations)} continuations for {rows} rows")
        if max(map(len, continuations)) > longest or len(profile.right) != self.num_draft_tokens:
            raise OptionError(
                f"continuations of up to {max(map(len, continuations))} tokens and {len(profile.right)} probabilities; "
                f"the drafter was made for {longest} tokens and K={self.num_draft_tokens}"
            )
        padded = torch.full((rows, longest), -1)
        for row, tokens in enumerate(continuations):
            padded[row, : len(tokens)] = torch.tensor(tokens)
        lengths = [len(prompt) for prompt in prompts]
        self.continuations.copy_(padded)
        self.prompt_lengths[: len(lengths)] = torch.tensor(lengths, device=self.prompt_lengths.device)
        self.right.copy_(torch.tensor(profile.right))
        self.drafted.copy_(torch.tensor([*map(max, profile.right, profile.drafted)]))

    def forward(self, context: DraftContext) -> Draft:
        """The recorded continuation, spoilt where the profile says that a draft is wrong."""
        known = context.known
        draft = torch.arange(self.num_draft_tokens, device=known.device)
        place = (known - self.prompt_lengths)[:, None] + draft
        within = place.clamp(0, self.continuations.shape[1] - 1)
        expected, drawn = self.continuations.gather(1, within), self.draws.gather(1, within)
        tokens = torch.where(drawn < self.right, expected, (expected + 1) % self.vocabulary)
        there = (drawn < self.drafted) & (expected >= 0)
        return Draft(torch.where(there, tokens, -1), torch.full_like(known, self.num_draft_tokens))


class FullWidthDrafter(Drafter):
    """K drafts a row and step, never right where `plant_continuation` was applied.

    Every step costs T = B (K + 1) tokens and emits B, so the context grows by one token a step.

    Args:
        num_draft_tokens: K.
    """

    def __init__(self, num_draft_tokens: int) -> None:
        super().__init__()
        self.num_draft_tokens = num_draft_tokens

    def forward(self, context: DraftContext) -> Draft:
        """K copies of the newest token."""
        newest = context.history.gather(1, (context.known - 1).clamp(min=0)[:, None])
        return Draft(newest.expand(-1, self.num_draft_tokens), torch.full_like(context.known, self.num_draft_tokens))


def draw(rows: int, max_new_tokens: int, seed: int = 0) -> Tensor:
    """What decides over drafts: float32 `[rows, L]` in [0, 1); see `ReplayDrafter`."""
    return torch.rand(rows, max_new_tokens, generator=torch.Generator().manual_seed(seed))


def foretell(draws: Tensor, profile: Profile, num_new_tokens: int) -> list[int]:
    """Tokens that each decoding step of a row will emit: drafting and verification on paper.

    Args:
        draws: the row's, `[L]`.
        profile: of the drafts; how many there are beyond the right ones does not matter.
        num_new_tokens: of the row; the first comes from reading the prompt and is in no step.
    """
    right = (draws[:, None] < torch.tensor(profile.right)).tolist()
    counts: list[int] = []
    place = 1
    while place < num_new_tokens:
        room = min(len(profile.right), num_new_tokens - place - 1)
        agreeing = itertools.takewhile(bool, (right[place + i][i] for i in range(room)))
        counts.append(sum(1 for _ in agreeing) + 1)
        place += counts[-1]
    return counts


def gap_lengths(emitted: Sequence[Sequence[int]]) -> list[int]:
    """Slots that a shared write index would leave unused in each row, averaged over the row's steps and rounded.

    The index advances by the most that any row emits in a step; a row that emits less is left with a gap, which it
    reads in every step after.

    Args:
        emitted: of each row, the tokens each of its steps emits.
    """
    advances = [max(counts) for counts in itertools.zip_longest(*emitted, fillvalue=0)]
    gaps = []
    for counts in emitted:
        opened = [advance - count for advance, count in zip(advances, counts, strict=False)]
        seen = itertools.accumulate(opened[:-1], initial=0)
        gaps.append(round(sum(seen) / max(len(counts), 1)))
    return gaps


@torch.no_grad()
def plant_continuation(model: PreTrainedModel) -> None:
    """Make token t + 1 (modulo V) the model's clear choice after token t; in place, with the cost unchanged.

    The greedy choice of a model with random weights is now and then closer to the second best than half precision
    rounds; one flipped choice, and the rest of a replayed continuation would be for nothing. So embeddings become loud
    against what the layers add, and the LM head gets the embedding of the token before: the logit of the right token is
    about sqrt(H), the others' about 1. Ties between LM head and embedding are cut; every shape stays.

    Args:
        model: a Hugging Face causal LM with random weights, as wide at the LM head as at the embedding.

    Raises:
        OptionError: the widths differ.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding.weight.shape != head.weight.shape:
        raise OptionError(f"embedding {tuple(embedding.weight.shape)} and LM head {tuple(head.weight.shape)} differ")
    generator = torch.Generator(embedding.weight.device).manual_seed(0)
    embedding.weight.normal_(std=_EMBEDDING_STD, generator=generator)
    scale = 1 / (_EMBEDDING_STD * embedding.weight.shape[1] ** 0.5)
    head.weight = torch.nn.Parameter(embedding.weight.roll(1, 0) * scale, requires_grad=head.weight.requires_grad)
    model.config.tie_word_embeddings = False
