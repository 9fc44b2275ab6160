"""Baseline: Hugging Face `generate`, a left-padded batch, greedy, no speculation.

What most users run today. Prompts are padded to the longest one and every row is fed until the last row has finished.
"""

from transformers import PreTrainedModel

from bench.baselines.common import (
    BaselineResult,
    EosTokenId,
    ForwardClock,
    check_request,
    cut_after_stop,
    stop_tokens,
)
from bench.baselines.hf_greedy import generate, greedy_config, padding_tokens


def run(
    model: PreTrainedModel, prompts: list[list[int]], *, max_new_tokens: int, eos_token_id: EosTokenId = None
) -> BaselineResult:
    """Greedy continuations of all prompts as one padded batch.

    Args:
        model: the target, in `eval` mode.
        prompts: token ids of each row, not padded.
        max_new_tokens: most tokens a row may gain.
        eos_token_id: token(s) that end a row; `None` lets every row run to `max_new_tokens`, whatever the checkpoint
            says.

    Returns:
        The result, with the stats `num_forward_passes` and `num_padding_tokens`: inputs that are no row's text.

    Raises:
        InvalidInputError, OptionError, UnsupportedModelError: see `check_request`.
    """
    check_request(model, prompts, max_new_tokens)
    stop = stop_tokens(eos_token_id)
    with ForwardClock(model) as clock:
        rows = generate(model, prompts, greedy_config(max_new_tokens, eos_token_id))
        tokens = [cut_after_stop(row, stop) for row in rows]
    stats: dict[str, float] = {
        "num_forward_passes": clock.num_forward_passes,
        "num_padding_tokens": padding_tokens(prompts, tokens),
    }
    return BaselineResult(tokens, clock.seconds, clock.prefill_seconds, stats)
