"""A drafter with a model of its own, outside of any step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from emssd_compile.compiler import CompiledModel, compile_model
from emssd_compile.drafters import Draft, DraftModel, PartSizes
from emssd_compile.step.batch import BatchShape
from tests.drafters.contexts import context, target_of
from tests.zoo import VOCABULARY

CAPACITY = 64
D = TypeVar("D", bound=DraftModel)


class Alone(Generic[D]):
    """Drafts behind texts, and keeps what it has read of them.

    Args:
        drafter: of a model over `VOCABULARY` tokens.
        rows: B.
    """

    def __init__(self, drafter: D, rows: int) -> None:
        def compile_draft_model(model: nn.Module, *, tree_nodes: int = 0) -> CompiledModel:
            return compile_model(model, BatchShape(rows, CAPACITY, tree_nodes))

        drafter.prepare(target_of(compile_draft_model, rows, CAPACITY, VOCABULARY))
        sizes = PartSizes(rows, CAPACITY, VOCABULARY, drafter.num_draft_tokens, drafter.num_grades, drafter.max_depth)
        self.drafter, self._specs = drafter, drafter.tensors(sizes)
        self.forget()

    def forget(self) -> None:
        """Begin with texts that are not those of before."""
        self.state = {name: torch.zeros(spec.shape, dtype=spec.dtype) for name, spec in self._specs.items()}

    @torch.no_grad()
    def draft(self, texts: list[list[int]], max_drafts: list[int], budget: int, **seen: Any) -> Draft:
        """Draft behind the texts, reading no more than `budget` tokens of them; `seen` are fields of the context."""
        given = replace(
            context(texts, 0, CAPACITY, filler=77),
            max_drafts=torch.tensor(max_drafts),
            draft_range=torch.arange(budget),
            row_range=torch.arange(budget),
            state=self.state,
            vocabulary=VOCABULARY,
        )
        draft = self.drafter(replace(given, **seen))
        self.state |= draft.state
        return draft


def nodes_of(draft: Draft, row: int) -> list[tuple[int, int, int]]:
    """Token, parent and grade of each draft of a row."""
    assert draft.parents is not None
    assert draft.grades is not None
    fields = [field[row, : draft.lengths[row]].tolist() for field in (draft.tokens, draft.parents, draft.grades)]
    return list(zip(*fields, strict=True))
