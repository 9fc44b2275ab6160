"""Baseline: Hugging Face assisted generation, one prompt after the other.

`generate` refuses to speculate on more than one row, so a batch is a loop.
"""

from contextlib import ExitStack

from transformers import PreTrainedModel

from bench.baselines.common import BaselineResult, EosTokenId, ForwardClock, check_request
from bench.baselines.hf_greedy import bare_generation_config, generate, greedy_config
from emssd_compile.errors import OptionError


def run(
    model: PreTrainedModel,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    eos_token_id: EosTokenId = None,
    prompt_lookup_num_tokens: int | None = None,
    max_matching_ngram_size: int = 2,
    assistant_model: PreTrainedModel | None = None,
    num_assistant_tokens: int = 20,
) -> BaselineResult:
    """Greedy continuations of each prompt alone, drafted either by prompt lookup or by `assistant_model`.

    Args:
        model: the target, in `eval` mode.
        prompts: token ids of each row, not padded.
        max_new_tokens: most tokens a row may gain.
        eos_token_id: token(s) that end a row; `None` lets every row run to `max_new_tokens`, whatever the checkpoint
            says.
        prompt_lookup_num_tokens: draft tokens copied from a match in the row's own text; selects prompt lookup.
        max_matching_ngram_size: longest n-gram that prompt lookup looks for.
        assistant_model: a smaller model of the same vocabulary that drafts.
        num_assistant_tokens: most tokens that `assistant_model` drafts; it stops earlier where its confidence falls
            below Hugging Face's threshold.

    Returns:
        The result, with the stats `num_forward_passes` (of `model`, all prompts together) and `mean_acceptance_length`,
        tokens emitted per forward pass: the first one reads the prompt and verifies drafts, too.

    Raises:
        OptionError: not exactly one of `prompt_lookup_num_tokens` and `assistant_model` is given.
        InvalidInputError, OptionError, UnsupportedModelError: see `check_request`.
    """
    check_request(model, prompts, max_new_tokens)
    if (prompt_lookup_num_tokens is None) == (assistant_model is None):
        raise OptionError("give either prompt_lookup_num_tokens or assistant_model: one of them drafts")
    lookup = {}
    if prompt_lookup_num_tokens is not None:
        lookup["prompt_lookup_num_tokens"] = prompt_lookup_num_tokens
        lookup["max_matching_ngram_size"] = max_matching_ngram_size
    config = greedy_config(max_new_tokens, eos_token_id, **lookup)
    with ExitStack() as stack:
        if assistant_model is not None:
            stack.enter_context(bare_generation_config(assistant_model, num_assistant_tokens=num_assistant_tokens))
        clock = stack.enter_context(ForwardClock(model))
        tokens = [generate(model, [prompt], config, assistant_model=assistant_model)[0] for prompt in prompts]
    stats: dict[str, float] = {
        "num_forward_passes": clock.num_forward_passes,
        "mean_acceptance_length": sum(map(len, tokens)) / clock.num_forward_passes,
    }
    return BaselineResult(tokens, clock.seconds, stats=stats)
