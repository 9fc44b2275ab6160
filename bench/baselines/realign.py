"""Baseline: batched prompt-lookup speculation that realigns the KV cache after every step.

The other way to be right with a padded batch: unpad, append, repad, as EQSPEC of "Batch Speculative Decoding Done
Right" (arXiv 2510.22876). After each step the rows, which accepted different numbers of drafts, are moved so that all
end at the same slot. Attention then reads no holes inside a row, but the cache is copied step by step. Everything else,
drafts included, is as in `vanilla_padded`.
"""

from transformers import PreTrainedModel

from bench.baselines import vanilla_padded
from bench.baselines.common import BaselineResult, EosTokenId
from bench.baselines.realigned_cache import RealignedCache


def run(
    model: PreTrainedModel,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    eos_token_id: EosTokenId = None,
    num_draft_tokens: int = 7,
    max_ngram: int = 2,
) -> BaselineResult:
    """Greedy continuations of all prompts as one padded batch, drafted by prompt lookup.

    Arguments, result and errors are those of `vanilla_padded.run`.
    """
    return vanilla_padded.run(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        eos_token_id=eos_token_id,
        num_draft_tokens=num_draft_tokens,
        max_ngram=max_ngram,
        make_cache=RealignedCache,
    )
