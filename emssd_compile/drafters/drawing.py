"""How the logits of a model that drafts become drafts."""

from __future__ import annotations

import torch
from torch import Tensor

from emssd_compile.logits import filtered, tempered
from emssd_compile.step.drafting import DraftContext
from emssd_compile.step.proposals import DETERMINISTIC, SAMPLED
from emssd_compile.step.randomness import DRAFTS, gumbels

_BLOCK = 64
"""Scores of a block: the best of a row are in the blocks with the largest maxima."""


def over(logits: Tensor, vocabulary: int) -> Tensor:
    """The logits of the tokens that the target has, `[R, V]`: only those are drawn."""
    if logits.shape[1] >= vocabulary:
        return logits[:, :vocabulary]
    unknown = logits.new_full((logits.shape[0], vocabulary - logits.shape[1]), -torch.inf)
    return torch.cat([logits, unknown], 1)


def shaped(logits: Tensor, context: DraftContext) -> Tensor:
    """The logits of q, `[R, V]`, as what the target draws from is shaped; of the other rows as they are."""
    times = logits.shape[0] // context.known.shape[0]  # nodes of each row
    options = {name: value.repeat_interleave(times) for name, value in context.options.items()}  # [R]
    if "temperature" in options:
        logits = tempered(logits, options["temperature"])
    if {"top_k", "top_p"} <= options.keys():
        logits = filtered(logits, options["top_k"], options["top_p"])
    return logits


def best(logits: Tensor, count: int, depth: int, first_draft: int, context: DraftContext) -> Tensor:
    """The tokens with the largest log q, and of rows that sample the largest log q + noise, `[R, count]`.

    Independent draws have noise of their own each, and each is the one best token by it: of rows that do not sample
    they are all the same. Otherwise the noise of a node is the same for all `count` of them.

    Args:
        logits: log q, or what differs from it by a number, `[R, V]`: equally many nodes of each row, all of a depth.
        count: drafts behind each node.
        depth: of the nodes.
        first_draft: the drafts behind them are those of their rows from this one on.
        context: says how drafts are drawn, and for whom.
    """
    draws = count if context.drawn == SAMPLED else 1  # W
    ids = torch.arange(logits.shape[1], device=logits.device)
    noise = _noise(logits, count, draws, depth, first_draft, context, ids)
    scores = logits[:, None] if noise is None else logits[:, None] + noise  # [R, W, V]
    return scores.argmax(2) if draws == count else largest(scores.squeeze(1), count)[1]


def likeliest(
    logits: Tensor, count: int, depth: int, context: DraftContext, ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The tokens that `best` drafts where drafts are deterministic, and how likely each of them is, `[R, count]` each.

    That is a log-probability by the softmax of what the tokens are ranked by, so the best token of a node is never far
    from 0. Of rows that do not sample it is log q. Of those that do, noise alone would say which node has good tokens,
    if log q + noise were taken instead: the noise of all nodes of a depth is the same, and so are its largest numbers.

    Args:
        logits, count, depth, context: as for `best`.
        ids: int64 `[V']`, the tokens that logits `[R, V']` are for, where they are not for all.
    """
    ids = torch.arange(logits.shape[1], device=logits.device) if ids is None else ids
    noise = _noise(logits, count, 1, depth, 0, context, ids)
    scores = logits if noise is None else logits + noise.squeeze(1)  # [R, V]
    values, found = largest(scores, count)
    return ids[found], values - scores.logsumexp(1, keepdim=True)


def largest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """What `topk` gives, values and indices `[R, count]`, faster where there is much to choose from.

    `topk` ranks all that it is given, in a kernel of its own. Maxima are found while scores are computed: there is one
    of each block of scores, and ranked is what is in the blocks with the largest.

    Args:
        scores: `[R, V]`.
        count: at most V.
    """
    if count == 1:  # to find one is much faster than to rank several
        return scores.max(1, keepdim=True)
    num_blocks, rest = divmod(scores.shape[1], _BLOCK)  # n
    if num_blocks < 4 * count:
        return scores.topk(count, 1)
    blocks = scores[:, : num_blocks * _BLOCK].unflatten(1, (num_blocks, _BLOCK))  # [R, n, 64]
    chosen = blocks.amax(2).topk(count, 1).indices[:, :, None]  # [R, count, 1]
    ids = (chosen * _BLOCK + torch.arange(_BLOCK, device=scores.device)).flatten(1)  # [R, count * 64]
    if rest:
        behind = torch.arange(num_blocks * _BLOCK, scores.shape[1], device=scores.device)  # the last whole block
        ids = torch.cat([ids, behind.expand(len(ids), rest)], 1)
    found = scores.gather(1, ids).topk(count, 1)
    return found.values, ids.gather(1, found.indices)


def _noise(
    logits: Tensor, count: int, draws: int, depth: int, first_draft: int, context: DraftContext, ids: Tensor
) -> Tensor | None:
    """What is added to the logits, `[R, W, V]`: 0 for rows that do not sample; None where there are no others."""
    samples = context.options.get("do_sample")
    if samples is None:
        if context.drawn == DETERMINISTIC:
            return None
        samples = torch.ones_like(context.active)
    times = logits.shape[0] // context.known.shape[0]  # nodes of each row
    samples, seeds, known = (
        value.repeat_interleave(times)[:, None, None] for value in (samples, context.seeds, context.known)
    )  # [R, 1, 1]
    if context.drawn == DETERMINISTIC:
        noise = gumbels(seeds, known + depth, ids)
    else:
        node = torch.arange(logits.shape[0], device=logits.device)[:, None] % times  # [R, 1], of the row's nodes here
        draft = first_draft + node * count + torch.arange(draws, device=logits.device)  # [R, W]
        noise = gumbels(seeds, known, draft[:, :, None] * context.vocabulary + ids, DRAFTS)
    return torch.where(samples, noise, 0)
