"""K-SEQ, the sequential rule of SpecTr."""

from __future__ import annotations

import torch
from torch import Tensor

from emssd_compile.acceptance.multi_draft import Candidates, MultiDraftRule
from emssd_compile.acceptance.sampling import ratio

HALVINGS = 12  # r is found to (k - 1) / 2^12; each is a sum over V. The law holds for any number of them


class KSeq(MultiDraftRule):
    """Test k candidates one by one, all alike, each more severely than if it were alone (SpecTr, 2310.15141).

    A candidate x passes with probability min(1, p(x) / (r q(x))). With

        b = sum of min(p / r, q)                      the probability that one passes
        t = 1 + (1 - b) + ... + (1 - b)^(k - 1)       the number of tests that are expected

    x is kept with probability t min(p(x) / r, q(x)), and if none passes, the next token is drawn from
    norm(p - t min(p / r, q)). Nothing of that may be negative: r is at least t. The smallest such r, which is between 1
    and k, keeps most; it is found by bisection, from above. At least 1 - (1 - 1/k)^k of what the best rule for
    independent candidates keeps is kept, and so more than 1 - 1/e of it.
    """

    def choose(self, candidates: Candidates) -> tuple[Tensor, Tensor]:
        """All candidates pass with p / (r q)."""
        p, q, tokens = candidates.p, candidates.q, candidates.tokens
        scale = self.scale(candidates)
        kept = torch.minimum(p / scale, q)  # [B, V], of one test
        left = (p - _expected_tests(candidates, kept) * kept).clamp(min=0)
        return ratio(p.gather(1, tokens), scale * q.gather(1, tokens)).clamp(max=1), left

    def scale(self, candidates: Candidates) -> Tensor:
        """r, `[B, 1]`."""
        p, q = candidates.p, candidates.q
        low, high = torch.ones_like(p[:, :1]), candidates.count.clamp(min=1).to(p.dtype)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            is_enough = _expected_tests(candidates, torch.minimum(p / middle, q)) <= middle
            low, high = torch.where(is_enough, low, middle), torch.where(is_enough, middle, high)
        return high


def _expected_tests(candidates: Candidates, kept: Tensor) -> Tensor:
    """t, `[B, 1]`, where each test keeps `kept[B, V]`: by adding it up, since for small b a quotient loses digits."""
    fails = (1 - kept.sum(1, keepdim=True)).clamp(min=0)  # [B, 1], 1 - b
    before = torch.arange(candidates.tokens.shape[1], device=fails.device)  # [K], tests that have failed
    return torch.where(before < candidates.count, fails**before, 0).sum(1, keepdim=True)
