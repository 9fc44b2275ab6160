"""Baseline: Hugging Face `generate` with a static KV cache and a compiled decode step, greedy, no speculation.

The fastest setting that the documentation of `generate` offers. Prompts are read by the plain model; every later step
is one compiled forward, replayed as a CUDA graph on a GPU. Hugging Face compiles on GPUs only unless told otherwise, as
here: it works on a CPU as well.
"""

from dataclasses import dataclass, field

import torch
from transformers import CompileConfig, PreTrainedModel, StaticCache

from bench.baselines.common import BaselineResult, check_request
from bench.baselines.hf_greedy import generate, greedy_config, padding_tokens
from bench.command import timed

RECOMPILE_LIMIT = 64
"""Batch sizes that may be compiled in one process. Past its own limit of 8, Dynamo would quietly run uncompiled."""


@dataclass
class StaticGenerate:
    """Decodes batches with a static cache that has room for what the batch needs: attention reads all of it.

    It is kept while the batch's sizes stay and it is long enough, since a CUDA graph holds its address: ask for the
    most new tokens first.

    Args:
        model: the target, in `eval` mode.

    Attributes:
        cache_length: tokens that a row of the cache can hold, left padding included.
    """

    model: PreTrainedModel
    cache_length: int = field(init=False, default=0)
    _cache: StaticCache = field(init=False, repr=False)
    _sizes: tuple[int, int] = field(init=False, default=(0, 0))

    def run(self, prompts: list[list[int]], *, max_new_tokens: int) -> BaselineResult:
        """Greedy continuations of all prompts as one padded batch, without end of sequence.

        The first call with a batch's sizes compiles, which takes a minute or so.

        Args:
            prompts: token ids of each row, not padded.
            max_new_tokens: tokens that every row gains.

        Returns:
            The result, with the stat `num_padding_tokens`: inputs that are no row's text.

        Raises:
            InvalidInputError, OptionError, UnsupportedModelError: see `check_request`.
        """
        check_request(self.model, prompts, max_new_tokens)
        config = greedy_config(max_new_tokens, None, compile_config=_compile_config())
        limits = torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT, fail_on_recompile_limit_hit=True)
        with limits:
            tokens, seconds = timed(
                lambda: generate(
                    self.model, prompts, config, past_key_values=self._empty_cache(prompts, max_new_tokens)
                ),
                self.model.device,
            )
        return BaselineResult(tokens, seconds, stats={"num_padding_tokens": padding_tokens(prompts, tokens)})

    def _empty_cache(self, prompts: list[list[int]], max_new_tokens: int) -> StaticCache:
        sizes = (len(prompts), max(map(len, prompts)))
        needed = sizes[1] + max_new_tokens
        if sizes == self._sizes and needed <= self.cache_length:
            self._cache.reset()
        else:
            self._cache, self._sizes = StaticCache(self.model.config, max_cache_len=needed), sizes
            self.cache_length = needed
        return self._cache


def _compile_config() -> CompileConfig:
    """One graph per batch size, with Hugging Face's default mode (`reduce-overhead`), on every device."""
    config = CompileConfig(dynamic=False)
    config._compile_all_devices = True
    return config
