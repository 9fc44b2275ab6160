"""What a logits processor sees, for the tests of processors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from emssd_compile.step.logits import LogitContext
from emssd_compile.step.nodes import Nodes

CAPACITY, RUBBISH = 12, 99


@dataclass
class Line:
    """One row: its text, its drafts, and the parent of each of them."""

    text: list[int]
    drafts: list[int]
    parents: list[int]

    def path(self, node: int) -> list[int]:
        """The drafts on the way to a node."""
        return [] if node == 0 else [*self.path(self.parents[node - 1]), self.drafts[node - 1]]


def _filled(values: list[list[int]], width: int) -> Tensor:
    return torch.tensor([[*each, *[RUBBISH] * (width - len(each))] for each in values]).view(len(values), width)


def context(rows: list[Line], most: int, *, trees: bool, tail: int = 0) -> LogitContext:
    """A logit for each node of each row, and some that belong to none; as `logit_rows` lays them out."""
    entries = [(b, n) for b, row in enumerate(rows) for n in range(len(row.drafts) + 1)]
    positions = [len(rows[b].text) + len(rows[b].path(n)) for b, n in entries]
    draft = Nodes(
        _filled([row.drafts for row in rows], most),
        torch.tensor([len(row.drafts) for row in rows]),
        torch.zeros(len(rows), most, dtype=torch.int64),
        _filled([row.parents for row in rows], most).clamp(max=most) if trees else None,
        most,
    )
    return LogitContext(
        logits=torch.zeros(len(entries) + tail, 5),
        row_ids=torch.tensor([*(b for b, _ in entries), *[len(rows) - 1] * tail]),
        nodes=torch.tensor([*(n for _, n in entries), *[0] * tail]),
        positions=torch.tensor([*positions, *[0] * tail]),
        history=_filled([row.text for row in rows], CAPACITY),
        known=torch.tensor([len(row.text) for row in rows]),
        prompt_lengths=torch.ones(len(rows), dtype=torch.int64),
        limits=torch.full((len(rows),), CAPACITY),
        draft=draft,
        is_eos=torch.zeros(5, dtype=torch.bool),
    )
