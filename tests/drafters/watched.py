"""What a head drafts while it decodes, against a plain one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from emssd_compile.optimized_model import OptimizedModel
from emssd_compile.step.randomness import gumbels


def _noise(seed: Tensor, ids: int, position: int) -> Tensor | float:
    """That of the target for the first ids, `[ids]`; 0 for none."""
    return gumbels(seed, torch.tensor(position), torch.arange(ids)) if ids else 0.0


def paths_of(tokens: list[int], parents: list[int]) -> list[list[int]]:
    """The tokens from the root to each draft, itself included."""
    paths: list[list[int]] = [[]]
    for token, parent in zip(tokens, parents, strict=True):
        paths.append([*paths[parent], token])
    return paths[1:]


def check_drafts(
    fast: OptimizedModel,
    plain: Any,
    prompts: list[list[int]],
    *,
    tree: Any = None,
    shape: Callable[[Tensor], Tensor] = lambda logits: logits,
    **options: Any,
) -> int:
    """Decode, and compare the drafts of each row and step with the plain head's; returns how many there were.

    Args:
        fast: decodes with a head; all drafts are verified.
        plain: a `PlainHead`, or what has its `ids`, `chain` and `tree`, of the same weights.
        prompts: to decode.
        tree: that it drafts; None for chains.
        shape: what the options do to logits.
        **options: of `generate`.
    """
    engine: Any = fast._engine
    compared = 0
    drafts_of_a_chain = engine.tensors["draft_tokens"].shape[1]
    launch, samples = engine.launcher.launch, bool(options.get("do_sample"))

    def watched(sizes: Any) -> Any:
        nonlocal compared
        report = launch(sizes)
        tensors = engine.tensors
        for row in torch.nonzero(tensors["active"] & (tensors["draft_lengths"] > 0)).flatten().tolist():
            known, count = int(tensors["known"][row]), int(tensors["draft_lengths"][row])
            text = tensors["history"][row, :known].tolist()
            drafts = tensors["draft_tokens"][row, :count].tolist()
            left = int(tensors["limits"][row]) - known - 1

            noise = partial(_noise, tensors["seeds"][row], int(plain.ids.max()) + 1 if samples else 0)
            if tree is None:
                last = drafts
                assert drafts == plain.chain(text, min(left, drafts_of_a_chain), shape, noise)
            else:
                paths = paths_of(drafts, tensors["draft_parents"][row, :count].tolist())
                last = paths[-1]
                assert paths == plain.tree(text, tree, left, shape, noise)
            log_q = plain.log_q(text, last[:-1], shape, noise)[plain.ids == last[-1]]
            eighths = int(tensors["draft_grades"][row, count - 1]) - 8 * float(log_q.exp())
            assert -1 <= round(eighths, 3) <= 0, "the grade of the last one is its probability, in whole eighths"
            compared += count
        return report

    fast.warmup()
    engine.launcher.launch = watched
    try:
        fast.generate(prompts, **options)
    finally:
        engine.launcher.launch = launch
    return compared
