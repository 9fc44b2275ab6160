"""Beams of drafts as trees: what several of them begin with is verified once."""

from __future__ import annotations

import torch
from torch import Tensor

from emssd_compile.step.nodes import Nodes, select


def prefix_tree(beams: Tensor, grades: Tensor, exists: Tensor) -> Nodes:
    """The tree whose paths are the beams of each row: equal beginnings are one path.

    Nodes are numbered breadth first, and those of one depth in the order of the beams, so a parent comes before its
    children. A row has as many nodes as its beams have different beginnings, K = W * D at most.

    Args:
        beams: int64 `[B, W, D]`, W beams of D tokens each.
        grades: int64 `[B, W, D]`; tokens that are one node have the same.
        exists: bool `[B, W]`, which beams there are.

    Example:
        The beams (5, 3, 1), (5, 3, 2) and (7, 3, 1) have the nodes 5, 7, 3, 3, 1, 2, 1, whose parents are the nodes 0,
        0, 1, 2, 3, 3, 4: seven tokens rather than nine.
    """
    _, width, depth = beams.shape
    beam = torch.arange(width, device=beams.device)
    agrees = beams[:, :, None] == beams[:, None]  # [B, W, W, D]
    shares = agrees.to(torch.int64).cumprod(3) > 0  # [B, W, W, D], whether all up to there is the same
    shares = shares & exists[:, None, :, None]
    owner = torch.where(shares, beam[:, None], width).amin(2)  # [B, W, D], the first of those: the token is its node
    level = torch.arange(depth, device=beams.device)
    # Were every token a node, that of beam i at level k would be node k W + i + 1.
    parents = torch.where(level > 0, (level - 1) * width + owner.roll(1, 2) + 1, 0)  # [B, W, D]
    kept = owner == beam[:, None]
    tokens, grades, parents, kept = (
        value.transpose(1, 2).flatten(1) for value in (beams, grades, parents, kept)
    )  # [B, K], breadth first
    every = Nodes(tokens, torch.full_like(tokens[:, 0], width * depth), grades, parents, depth)
    return select(every, kept)
