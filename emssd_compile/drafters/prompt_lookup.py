"""Prompt lookup: draft what followed the last n-gram the last time it occurred."""

from __future__ import annotations

import torch
from torch import Tensor

from emssd_compile.errors import OptionError
from emssd_compile.step.drafting import Draft, DraftContext, Drafter


class PromptLookup(Drafter):
    """Look the newest tokens up in the row's own prompt and output, and copy what followed (LLMA, 2304.04487).

    The longest match wins (from `max_ngram` tokens down to 1), then the most recent one. A row without a match drafts
    nothing. The grade of a draft is the number of tokens that matched.

    Args:
        num_draft_tokens: K, tokens to copy.
        max_ngram: longest suffix to match.

    Example:
        history = 5 6 7 8 9 5 6 with max_ngram=2, K=3: the suffix "5 6" occurred at 0, so the draft is 7 8 9.
    """

    any_rows = True

    def __init__(self, num_draft_tokens: int = 7, max_ngram: int = 3) -> None:
        super().__init__()
        for name, value in (("num_draft_tokens", num_draft_tokens), ("max_ngram", max_ngram)):
            if not isinstance(value, int) or value < 1:
                raise OptionError(f"PromptLookup {name}={value!r} must be an integer of at least 1")
        self.num_draft_tokens = num_draft_tokens
        self.max_ngram = max_ngram
        self.num_grades = max_ngram + 1

    def forward(self, context: DraftContext) -> Draft:
        """Copy what followed the best match: tokens `[B, K]`, lengths `[B]`, and the length of the match as grade."""
        history, known = context.history, context.known
        start, matched = self._continuation(history, known)
        index = start[:, None] + torch.arange(self.num_draft_tokens, device=known.device)
        tokens = history.gather(1, index.clamp(0, history.shape[1] - 1))
        lengths = torch.where(start > 0, (known - start).clamp(0, self.num_draft_tokens), 0)
        return Draft(tokens, lengths, grades=matched[:, None].expand(tokens.shape))

    def assisted(self) -> dict[str, object]:
        """K, and the longest match."""
        return {"prompt_lookup_num_tokens": self.num_draft_tokens, "max_matching_ngram_size": self.max_ngram}

    def _continuation(self, history: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """Where the text after the best match begins, and how long the match is; [B] each, 0 where there is none."""
        capacity = history.shape[1]
        place = torch.arange(capacity, device=known.device)
        # run[b, p]: how many tokens before place p equal the newest tokens, counted backwards, up to max_ngram.
        run = torch.zeros_like(history)
        alive = torch.ones_like(history, dtype=torch.bool)
        for back in range(1, self.max_ngram + 1):
            newest = history.gather(1, (known - back).clamp(min=0)[:, None])
            alive = alive & (history.roll(back, 1) == newest) & (place >= back)
            run = run + alive
        eligible = (place > 0) & (place < known[:, None]) & (run > 0)
        score = torch.where(eligible, run * capacity + place, 0)
        best, where = score.max(1)
        return torch.where(best > 0, where, 0), best // capacity
