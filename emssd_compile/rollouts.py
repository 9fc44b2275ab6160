"""Rollouts for TRL's GRPOTrainer: a compiled model samples with the weights that the trainer has just written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from emssd_compile.chat import chat_tokens
from emssd_compile.numeric import integer
from emssd_compile.optimized_model import OptimizedModel, optimize


class Rollouts:
    """What to pass as `rollout_func` to `trl.GRPOTrainer`.

    The trainer's model is compiled in the first rollout, and its weights are shared: each rollout samples with them as
    they are by then. The trainer's `generation_config` says how. Each sequence has a seed of its own, on any
    process, so that the members of a group differ, and a run is repeatable.

    Args:
        seed: of all sequences of all rollouts.
        **options: of `emssd_compile.optimize`. `max_length` has to hold the longest prompt and its completion;
            `max_batch` sequences are sampled at a time, and the others wait for a row.

    Attributes:
        fast: the compiled model; None before the first rollout.
    """

    def __init__(self, *, seed: int = 0, **options: Any) -> None:
        self.fast: OptimizedModel | None = None
        self._options = options
        self._seeds = torch.Generator().manual_seed(integer("seed", seed))

    def __call__(self, prompts: Sequence[Any], trainer: Any) -> dict[str, list[Any]]:
        """Sample a completion of each prompt.

        Args:
            prompts: texts, or lists of messages of a chat, each as often as its group has members.
            trainer: a `GRPOTrainer`.

        Returns:
            `prompt_ids` and `completion_ids`, lists of token ids; `logprobs`, the log-probability of each token of a
            completion in the distribution that it was drawn from, with temperature and filters applied.

        Raises:
            StaleModelError: the trainer's model has changed in another way than in its weights.
            EmssdError: as `optimize` and `generate`.
        """
        model = trainer.accelerator.unwrap_model(trainer.model)
        ids = [_tokens(prompt, trainer.processing_class) for prompt in prompts]
        ranks, rank = trainer.accelerator.num_processes, trainer.accelerator.process_index
        seeds = torch.randint(-(2**63), 2**63 - 1, (ranks, len(ids)), generator=self._seeds)[rank]
        training = [module for module in model.modules() if module.training]
        model.eval()
        try:
            if self.fast is None:
                self.fast = optimize(model, **self._options)
            found: Any = self.fast.generate(
                ids,
                trainer.generation_config,
                seed=seeds.tolist(),
                logprobs=True,
                return_dict_in_generate=True,
            )
        finally:
            for module in training:
                module.training = True
        new = [row[len(prompt) :] for row, prompt in zip(found.sequences, ids, strict=True)]
        return {"prompt_ids": ids, "completion_ids": new, "logprobs": [each.tolist() for each in found.logprobs]}


def _tokens(prompt: Any, tokenizer: Any) -> list[int]:
    return [*tokenizer(prompt)["input_ids"]] if isinstance(prompt, str) else chat_tokens(tokenizer, prompt)
