"""How often each of the likeliest tokens of a head is right, and the tree that is the best for that."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from emssd_compile.drafters.head import DraftHead, Features
from emssd_compile.drafters.tree_shape import MOST_NODES
from emssd_compile.errors import OptionError
from emssd_compile.numeric import integer
from emssd_compile.optimized_model import optimize
from emssd_compile.training.features import FrozenTarget
from emssd_compile.training.loss import drafts_of

ROWS = 8
"""Prompts that are decoded together."""


def calibrate(
    model: nn.Module,
    head: DraftHead,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    num_nodes: int = 31,
    ranks: int = 10,
    backend: str = "inductor",
) -> Tensor:
    """Let a head draft the tree that is best for how the model goes on from these prompts (2401.10774, section 2.3.3).

    The head is changed: from then on it drafts that tree, and `save_pretrained` writes it down. Do so before it is
    handed to `optimize`.

    Args:
        model: the target.
        head: one that drafts a tree over the ranks of its logits.
        prompts: token ids, such as the head will meet.
        max_new_tokens: that each prompt is continued with, greedily.
        num_nodes: of the tree.
        ranks: of each draft, the likeliest tokens that may be in it.
        backend: that continuations are decoded with.

    Returns:
        float64 `[D, ranks]`: how often the token of that rank is right, as `rank_accuracies`.

    Raises:
        OptionError: the head drafts no tree of ranks, something is out of range, or no token of it is ever right.
        InvalidInputError, UnsupportedModelError: as `optimize` and its `generate`.
    """
    if not head.drafts_ranks:
        raise OptionError(f"a {type(head).__name__} drafts no tree of ranks: there is nothing to choose")
    integer("num_nodes", num_nodes, least=1, most=MOST_NODES)
    integer("ranks", ranks, least=1)
    rows = min(ROWS, len(prompts)) or 1
    longest = max((len(prompt) for prompt in prompts), default=1) + max_new_tokens
    fast = optimize(model, max_batch=rows, max_length=longest, backend=backend)
    texts = fast.generate([*map(list, prompts)], max_new_tokens=max_new_tokens, do_sample=False)
    target = FrozenTarget(model, rows, longest)
    measured = type(head)(head.config)
    measured.load_state_dict(head.state_dict())
    measured.prepare(target.as_target())  # in float32, as training does
    firsts = range(0, len(texts), rows)
    readings = (_read(target, texts[first : first + rows], prompts[first:], longest) for first in firsts)
    accuracies = rank_accuracies(measured, readings, ranks)
    head.calibrate(accuracies, num_nodes)
    return accuracies


def _read(
    target: FrozenTarget, texts: Sequence[Sequence[int]], prompts: Sequence[Sequence[int]], longest: int
) -> tuple[Features, Tensor, None]:
    """What the target computes of some texts; what lies behind their ends is seen by nothing that counts."""
    tokens = torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts])  # [B, S]
    counts = torch.zeros_like(tokens, dtype=torch.bool)
    for row, (text, prompt) in enumerate(zip(texts, prompts, strict=False)):
        counts[row, len(prompt) : len(text)] = True
    features, _ = target.read(tokens)
    return features, counts.to(target.device), None


@torch.no_grad()
def rank_accuracies(head: DraftHead, readings: Iterable[tuple[Features, Tensor, Tensor | None]], ranks: int) -> Tensor:
    """float64 `[D, ranks]`: of the k-th drafts, the share where the token of that rank, 0 the likeliest, is right.

    Args:
        head: prepared for the target.
        readings: features, which tokens count, and the target's logits or None, as `drafts_of` takes them.
        ranks: how many are counted.
    """
    hits: dict[int, Tensor] = {}
    for features, counts, teacher in readings:
        for depth, drafts in enumerate(drafts_of(head, features, counts, teacher)):
            own = drafts.logits.gather(-1, drafts.right[..., None])  # [B, S', 1]
            rank = (drafts.logits > own).sum(-1).masked_fill(own[..., 0] == -torch.inf, ranks)  # [B, S']
            found = rank[drafts.counts].clamp(max=ranks).bincount(minlength=ranks + 1)  # the last: of none of them
            hits[depth] = hits.get(depth, 0) + found
    counted = torch.stack([*hits.values()]).double().cpu()  # [D, ranks + 1]
    return counted[:, :ranks] / counted.sum(1, keepdim=True).clamp(min=1)
