"""How the logits of a model that drafts become drafts."""

from __future__ import annotations

import torch
from torch import Tensor

from emssd_compile.logits import filtered, tempered
from emssd_compile.step.drafting import DraftContext
from emssd_compile.step.proposals import DETERMINISTIC, SAMPLED
from emssd_compile.step.randomness import DRAFTS, gumbels


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
    # To find one is much faster than to rank several.
    found = scores.max(2, keepdim=True).indices if count == draws else scores.topk(count // draws, 2).indices
    return found.flatten(1)


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
    found = scores.max(1, keepdim=True) if count == 1 else scores.topk(count, 1)
    return ids[found.indices], found.values - scores.logsumexp(1, keepdim=True)


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
