"""Rollouts for TRL's GRPOTrainer: a compiled model samples with the weights that the trainer has just written."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

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
        with self._compiled(model) as fast:
            found: Any = fast.generate(
                ids,
                trainer.generation_config,
                seed=self._next_seeds(len(ids), ranks, rank),
                logprobs=True,
                return_dict_in_generate=True,
            )
        new = [row[len(prompt) :] for row, prompt in zip(found.sequences, ids, strict=True)]
        return {"prompt_ids": ids, "completion_ids": new, "logprobs": [each.tolist() for each in found.logprobs]}

    def attach(self, model: nn.Module) -> None:
        """Sample where a trainer calls `model.generate_batch`: with `use_transformers_continuous_batching=True`.

        Only what transformers' `generate_batch` tells comes back, so log-probabilities are the trainer's to compute.
        """

        def generate_batch(inputs: Sequence[Sequence[int]], *given: Any, **options: Any) -> dict[str, Any]:
            ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
            (seed, *_) = self._next_seeds(1, ranks, rank)
            with self._compiled(model) as fast:
                return fast.generate_batch(inputs, *given, seed=seed, **options)

        model.generate_batch = generate_batch  # type: ignore[assignment]

    def _next_seeds(self, count: int, ranks: int, rank: int) -> list[int]:
        """So many, which no other process has."""
        seeds: list[int] = torch.randint(-(2**63), 2**63 - 1, (ranks, count), generator=self._seeds)[rank].tolist()
        return seeds

    @contextlib.contextmanager
    def _compiled(self, model: nn.Module) -> Iterator[OptimizedModel]:
        """The compiled model; what is in training is in evaluation meanwhile."""
        training = [module for module in model.modules() if module.training]
        model.eval()
        try:
            if self.fast is None:
                self.fast = optimize(model, **self._options)
            yield self.fast
        finally:
            for module in training:
                module.training = True


def _tokens(prompt: Any, tokenizer: Any) -> list[int]:
    return [*tokenizer(prompt)["input_ids"]] if isinstance(prompt, str) else chat_tokens(tokenizer, prompt)
