"""Suffix decoding: draft what most often followed the newest tokens, in this text and in finished ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from emssd_compile.drafters.corpus import GRAMS, MOST_IDS, SLOTS, Corpus, buckets, keys, tokens_of
from emssd_compile.errors import OptionError
from emssd_compile.numeric import integer, number, shown
from emssd_compile.step.drafting import Draft, DraftContext, Drafter
from emssd_compile.step.options import RowOption
from emssd_compile.step.parts import PartSizes
from emssd_compile.step.tensor_spec import TensorSpec

PLACES = SLOTS * len(GRAMS)
"""W, places of a row's own text that vote, and places of the corpus: no more of each."""


class SuffixLookup(Drafter):
    """Look the newest tokens up in the row's own text and in a corpus; what followed is voted on (2411.04975).

    Each earlier place matches as many of the newest tokens as lie before it. The longest match wins, and the row's own
    text where the corpus has none that is longer. All places there with as long a match vote, the 16 newest of them:
    each draft is the token that follows most of those that agree with all drafts before it. Of tokens with as many
    votes the one whose followers have more is drafted, then the one that came last. The probability of a draft is the
    part of all voters that agree so far; drafts end where it falls below `threshold`, and after as many as tokens
    matched. Their sum is the row's score (`Draft.scores`). The grade of a draft is the source, and the power of 2 that
    its match reaches.

    With a corpus, texts that end are added to it, and `corpus_id` is an option of each request: its tenant, 0 if
    nothing is said. Rows draft from texts of their own tenant only. An artifact is exported with an empty corpus that
    stays empty: it drafts from the row's own text. With `optimize(..., deterministic=True)` nothing is added: the
    corpus is what it was filled with by hand.

    Args:
        num_draft_tokens: K, tokens to draft.
        max_match: M, newest tokens that are compared; all longer matches count as that.
        min_match: shorter matches draft nothing. In a corpus no match is shorter than 2.
        corpus: finished texts; None for the row's own text alone.
        threshold: 0 to 1, of the probability of a draft.

    Raises:
        OptionError: an option is out of range.

    Example:
        history = 1 2 7 8  1 2 7 9  1 2 7 8  5 1 2: the match "1 2" votes three times for 7, so 7 has probability 1. Two
        of the three go on with 8, which has 2/3. Two tokens match, so the draft is 7 8, its score 1.67.
    """

    any_rows = True

    def __init__(
        self,
        num_draft_tokens: int = 8,
        max_match: int = 16,
        min_match: int = 1,
        *,
        corpus: Corpus | None = None,
        threshold: float = 0.1,
    ) -> None:
        super().__init__()
        self.num_draft_tokens = integer("SuffixLookup num_draft_tokens", num_draft_tokens, least=1)
        self.max_match = integer("SuffixLookup max_match", max_match, least=1)
        self.min_match = integer("SuffixLookup min_match", min_match, least=1, most=self.max_match)
        self.threshold = float(number("SuffixLookup threshold", threshold))
        if not 0 <= self.threshold <= 1:
            raise OptionError(f"SuffixLookup threshold={self.threshold} is out of range; pass 0 to 1")
        if corpus is not None and not isinstance(corpus, Corpus):
            raise OptionError(f"SuffixLookup corpus={shown(corpus)} is no Corpus; pass corpus=Corpus(...)")
        self.corpus = corpus
        self._powers = (self.max_match - 1).bit_length() + 1  # 1, 2, 3 to 4, 5 to 8, ...
        self.num_grades = self._powers * (1 if corpus is None else 2)

    def options(self) -> dict[str, RowOption]:
        """`corpus_id`, the tenant of a request, where there is a corpus."""
        return {} if self.corpus is None else {"corpus_id": RowOption(0, least=0, most=MOST_IDS - 1)}

    def tensors(self, sizes: PartSizes) -> dict[str, TensorSpec]:
        """Those of the corpus, which the host keeps."""
        held = self.host_tensors()
        return {name: TensorSpec(tuple(value.shape), value.dtype, kept="host") for name, value in held.items()}

    def host_tensors(self) -> Mapping[str, Tensor]:
        """The corpus as it is."""
        return {} if self.corpus is None else self.corpus.tensors

    def ended(self, tokens: Tensor, prompt_length: int, options: Mapping[str, float | Tensor]) -> None:
        """Add the output to the corpus, and the prompt where it is wanted."""
        if self.corpus is not None:
            text = tokens if self.corpus.prompts else tokens[prompt_length:]
            self.corpus.add(text, int(options.get("corpus_id", 0)))

    def forward(self, context: DraftContext) -> Draft:
        """Vote: tokens `[B, K]`, lengths and scores `[B]`, grades `[B, K]`."""
        back = torch.arange(self.max_match, device=context.known.device)
        newest = context.history.gather(1, (context.known[:, None] - 1 - back).clamp(min=0))
        newest = torch.where(back < context.known[:, None], newest, -2)  # [B, M], the newest first
        voters, is_second = self._in_row(newest, context), torch.zeros_like(context.active)
        if self.corpus is not None:
            others = self._in_corpus(newest, context)
            is_second = others.match > voters.match
            voters = voters.replaced(others, is_second)
        tokens, probabilities = voters.vote()
        draft = torch.arange(self.num_draft_tokens, device=tokens.device)
        is_worth_it = (probabilities >= self.threshold) & (probabilities > 0) & (draft < voters.match[:, None])
        is_worth_it = is_worth_it & (voters.match >= self.min_match)[:, None]  # [B, K], up to some draft
        power = sum((voters.match > 1 << n).long() for n in range(self._powers - 1)) + is_second * self._powers  # [B]
        return Draft(
            tokens,
            is_worth_it.sum(1),
            grades=power[:, None].expand(tokens.shape),
            scores=torch.where(is_worth_it, probabilities, 0).sum(1),
        )

    def _in_row(self, newest: Tensor, context: DraftContext) -> _Voters:
        """The places of the row's own text with the longest match."""
        history, known, most = context.history, context.known, self.max_match
        capacity = history.shape[1]
        place = torch.arange(capacity, device=known.device)
        before = F.pad(history, (most, 0), value=-1)
        alive = (place > 0) & (place < known[:, None])  # [B, C], with `back` tokens before the place that match
        match = torch.zeros_like(history)
        for back in range(most):
            alive = alive & (before[:, most - back - 1 : most - back - 1 + capacity] == newest[:, back : back + 1])
            match = match + alive
        longest = match.amax(1)  # [B]
        is_longest = (match == longest[:, None]) & (match > 0)
        places = torch.where(is_longest, place, 0).topk(min(PLACES, capacity), 1).values
        places = F.pad(places, (0, PLACES - places.shape[1]))  # [B, W], the newest first; 0 for none
        index = places[:, :, None] + torch.arange(self.num_draft_tokens, device=known.device)  # [B, W, K]
        following = history.gather(1, index.clamp(max=capacity - 1).flatten(1)).view(index.shape)
        return _Voters(longest, places > 0, torch.where(index < known[:, None, None], following, -1))

    def _in_corpus(self, newest: Tensor, context: DraftContext) -> _Voters:
        """The places of the corpus with the longest match, of those that the tables know."""
        texts, tenants = context.state["texts"], context.options["corpus_id"][:, None]
        wanted, capacity = keys(newest, tenants), len(texts)  # [B, M]
        if self.max_match < max(GRAMS.values()):
            wanted = F.pad(wanted, (0, max(GRAMS.values()) - self.max_match), value=-2)
        pairs, quads = (self._looked_up(context.state[name], wanted[:, :size].flip(1)) for name, size in GRAMS.items())
        is_known = (pairs[:, :, None] == quads[:, None]).any(2)  # no place votes twice
        places = torch.cat([quads, torch.where(is_known, -1, pairs)], 1)  # [B, W], the newest first
        back = torch.arange(self.max_match, device=places.device)
        before = texts[(places[:, :, None] - 1 - back) % capacity]  # [B, W, M]
        differs = before != wanted[:, None, : self.max_match]
        match = torch.where(differs, back, self.max_match).amin(2)
        match = torch.where(places >= 0, match, 0)  # [B, W]
        longest = match.amax(1)  # [B]
        draft = torch.arange(self.num_draft_tokens, device=places.device)
        following = tokens_of(texts[(places[:, :, None] + draft) % capacity], tenants[:, :, None])  # [B, W, K]
        is_token = (following >= 0) & (following < MOST_IDS)
        is_longest = (match == longest[:, None]) & (match > 0)
        return _Voters(longest, is_longest, torch.where(is_token, following, -1))

    def _looked_up(self, table: Tensor, grams: Tensor) -> Tensor:
        """What a table says of n-grams `[B, n]`: places `[B, 8]`, the newest first; -1 for none."""
        return table[buckets(grams, len(table))].long() - 1


@dataclass
class _Voters:
    """Places with the longest match.

    Attributes:
        match: int64 `[B]`, tokens that match.
        votes: bool `[B, W]`, which of the places there are; the newest first.
        following: int64 `[B, W, K]`, the tokens from each place on; -1 where the text has ended, and rubbish behind.
    """

    match: Tensor
    votes: Tensor
    following: Tensor

    def replaced(self, other: _Voters, where: Tensor) -> _Voters:
        """The other voters in some rows, bool `[B]`."""
        return _Voters(
            torch.where(where, other.match, self.match),
            torch.where(where[:, None], other.votes, self.votes),
            torch.where(where[:, None, None], other.following, self.following),
        )

    def vote(self) -> tuple[Tensor, Tensor]:
        """The tokens that most agree on, `[B, K]`, and which part of all voters agrees so far, float32 `[B, K]`."""
        rows, width, most = self.following.shape
        draft = torch.arange(most, device=self.following.device)
        mine, others = self.following[:, :, None], self.following[:, None]  # [B, W, 1, K], [B, 1, W, K]
        differs = (mine != others) | (mine < 0)
        shared = torch.where(differs, draft, most).amin(3)  # [B, W, W], tokens that two places have in common
        shared = torch.where(self.votes[:, None], shared, 0)
        agreeing = (shared[:, :, :, None] > draft).sum(2)  # [B, W, K], how many say what a place says, so far
        ahead = self.votes
        for count in agreeing.unbind(2):
            ahead = ahead & (count == torch.where(ahead, count, -1).amax(1, keepdim=True))
        newest = torch.where(ahead, torch.arange(width, 0, -1, device=ahead.device), 0).argmax(1)  # [B]
        index = newest[:, None, None].expand(rows, 1, most)
        probabilities = agreeing.gather(1, index).squeeze(1) / self.votes.sum(1, keepdim=True).clamp(min=1)
        return self.following.gather(1, index).squeeze(1), probabilities
