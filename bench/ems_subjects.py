"""What `bench.ems_table` decodes with: a model, its prompts, and two compiled steps of it."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from rich.console import Console
from transformers import PreTrainedModel

import emssd_compile
from bench import shapes
from bench.replay import ReplayDrafter, plant_continuation
from emssd_compile import OptimizedModel

Prompts = list[list[int]]


@dataclass
class Compiled:
    """A compiled model that remembers which prompts its KV cache holds, so that they are read once.

    Attributes:
        fast: the model.
        held: the prompts.
    """

    fast: OptimizedModel
    held: Prompts | None = None

    def read(self, prompts: Prompts) -> None:
        """Have the KV cache hold `prompts`; decoding leaves them there."""
        if prompts != self.held:
            self.fast.generate(prompts, max_new_tokens=1, eos_token_id=None)
            self.held = prompts


@dataclass
class Subjects:
    """What is timed: a model, and what was compiled of it.

    Attributes:
        model: the target.
        prompts: as many as the largest batch.
        replay: the drafter of `replayed`.
        plain: it decodes greedily.
        replayed: it speculates, in any layout.
    """

    model: PreTrainedModel
    prompts: Prompts
    replay: ReplayDrafter
    plain: Compiled
    replayed: Compiled

    @staticmethod
    def compile(console: Console, options: argparse.Namespace, num_draft_tokens: int, room: int) -> Subjects:
        """Build and compile; prompts are cut if a trained model is too short for them, `room` and the new tokens."""
        rows = max(options.batches)
        beside = room + options.new_tokens + num_draft_tokens
        with console.status(f"building {options.shape}"):
            model = _build(options, options.prompt_tokens + beside)
        length = min(options.prompt_tokens, model.config.max_position_embeddings - beside)
        if length < 2:
            raise SystemExit(f"{options.shape} has no room for a prompt and {beside} more tokens: pass --no-ablation")
        generator = torch.Generator().manual_seed(0)
        prompts = torch.randint(model.config.vocab_size, (rows, length), generator=generator).tolist()
        replay = ReplayDrafter(num_draft_tokens, rows, options.new_tokens, device=options.device)
        compiled = []
        for drafter in ("none", replay):
            with console.status(f"compiling {options.shape}"):
                compiled.append(Compiled(_compile(model, drafter, rows, length + beside, options.backend)))
        return Subjects(model, prompts, replay, *compiled)


def _build(options: argparse.Namespace, positions: int) -> PreTrainedModel:
    if options.shape in shapes.TRAINED:
        return shapes.build(options.shape, options.device, options.dtype)
    model = shapes.build(options.shape, options.device, options.dtype, positions=positions)
    plant_continuation(model)
    return model


def _compile(
    model: PreTrainedModel, drafter: str | ReplayDrafter, rows: int, length: int, backend: str
) -> OptimizedModel:
    """All prompts are read in one step, as Hugging Face does, so that all rows begin to decode together."""
    fast = emssd_compile.optimize(
        model,
        drafter,
        max_batch=rows,
        max_length=length,
        layout="packed",
        backend=backend,
        prefill_chunk=rows * length,
    )
    fast.warmup()
    return fast
