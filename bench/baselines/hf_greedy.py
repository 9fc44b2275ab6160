"""Makes Hugging Face `generate` decode greedily, whatever generation settings the checkpoint came with."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from bench.baselines.common import EosTokenId, pad, stop_tokens


def greedy_config(max_new_tokens: int, eos_token_id: EosTokenId, **options: Any) -> GenerationConfig:
    """Plain greedy decoding; `options` are further fields of `GenerationConfig`."""
    stop = sorted(stop_tokens(eos_token_id)) or None
    return GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=stop, pad_token_id=0, **options
    )


def generate(
    model: PreTrainedModel, prompts: list[list[int]], config: GenerationConfig, **options: Any
) -> list[list[int]]:
    """What `model.generate` adds to the left-padded prompts; rows that end early are filled up with padding."""
    input_ids, is_real = (part.to(model.device) for part in pad(prompts, side="left"))
    model_generate: Any = model.generate  # a type checker takes it for a submodule: it is mixed in by subclasses
    with bare_generation_config(model):
        output = model_generate(input_ids, attention_mask=is_real.long(), generation_config=config, **options)
    new_tokens: list[list[int]] = output[:, input_ids.shape[1] :].tolist()
    return new_tokens


def padding_tokens(prompts: list[list[int]], tokens: list[list[int]]) -> int:
    """Inputs that `generate` computed for nobody: left of the prompts, and in rows that had ended before the last one.

    Args:
        prompts: of each row.
        tokens: new tokens of each row, without what fills up a row that ended early.
    """
    prefill = len(prompts) * max(map(len, prompts)) - sum(map(len, prompts))
    decoding = len(tokens) * max(map(len, tokens)) - sum(map(len, tokens))
    return prefill + decoding


@contextmanager
def bare_generation_config(model: PreTrainedModel, **options: int) -> Iterator[None]:
    """Replaces `model.generation_config` while the block runs.

    `generate` fills every field that its caller left at `None` from there: a checkpoint's `eos_token_id` would end rows
    that the caller asked to run on, and its `repetition_penalty` would change tokens.
    """
    original = model.generation_config
    model.generation_config = GenerationConfig(**options)
    try:
        yield
    finally:
        model.generation_config = original
