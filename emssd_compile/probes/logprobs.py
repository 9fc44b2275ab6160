"""How likely each token was, and which ones were likeliest in its place."""

from __future__ import annotations

import torch
from torch import Tensor

from emssd_compile.step.options import RowOption
from emssd_compile.step.parts import PartSizes
from emssd_compile.step.probe import Probe, ProbeContext, Probed, ReadingSpec

MOST = 20  # as in OpenAI's API


class LogProbs(Probe):
    """Tells `logprobs`: the log-probability of each token in the distribution that it was drawn from.

    That is the softmax of the logits with all options of the request applied. Where a row decodes greedily, so that no
    filters apply, it is the model's own, but for penalties and the like.
    """

    def options(self) -> dict[str, RowOption]:
        """`logprobs`."""
        return {"logprobs": RowOption(False, torch.bool)}

    def readings(self, sizes: PartSizes) -> dict[str, ReadingSpec]:
        """`logprobs`, a number."""
        return {"logprobs": ReadingSpec(asked_by="logprobs")}

    def forward(self, context: ProbeContext) -> Probed:
        """Log-softmax at the tokens emitted."""
        logits = context.logits[context.places]  # [B, D + 1, V]
        chosen = logits.gather(2, context.tokens[..., None]).squeeze(2)  # [B, D + 1]
        return Probed({"logprobs": chosen - logits.logsumexp(2)})


class TopLogProbs(Probe):
    """Tells `top_logprobs` and `top_logprob_ids`: the likeliest tokens in the place of each, in the same distribution.

    The likeliest comes first. Where fewer tokens are possible, what follows them has -inf.
    """

    def options(self) -> dict[str, RowOption]:
        """`top_logprobs`, how many."""
        return {"top_logprobs": RowOption(0, least=0, most=MOST)}

    def readings(self, sizes: PartSizes) -> dict[str, ReadingSpec]:
        """Log-probabilities and token ids, as many as were asked for."""
        most = min(MOST, sizes.vocabulary)
        return {
            "top_logprobs": ReadingSpec((most,), torch.float32, asked_by="top_logprobs", is_cut=True),
            "top_logprob_ids": ReadingSpec((most,), torch.int64, asked_by="top_logprobs", is_cut=True),
        }

    def forward(self, context: ProbeContext) -> Probed:
        """The top of the log-softmax at each place."""
        logits = context.logits[context.places]  # [B, D + 1, V]
        top, ids = logits.topk(min(MOST, logits.shape[2]), 2)  # [B, D + 1, n]
        total: Tensor = logits.logsumexp(2, keepdim=True)
        return Probed({"top_logprobs": top - total, "top_logprob_ids": ids})
