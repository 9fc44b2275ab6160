"""The exactness check has teeth: with any one of these mistakes built into the step, it fails."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from emssd_compile.acceptance import GreedyMatch, Rule, Verdict, Verification
from emssd_compile.compiler import CompiledModel, compile_step
from emssd_compile.optimized_model import OptimizedModel
from emssd_compile.options import CompileOptions
from emssd_compile.passes import fuse_step
from emssd_compile.passes.graph import placeholder
from emssd_compile.policies import AllDrafts
from emssd_compile.step.pack import Packed, pack
from tests.exactness.compiled import CAPACITY, NEW_TOKENS, ROWS, target
from tests.exactness.models import prompt

PROMPTS = [prompt(n) for n in (5, 40, 17, 1, 64)]


@dataclass(frozen=True)
class Mistake:
    """What to build into a step; by default nothing is wrong.

    Attributes:
        pack: in place of the function that lays out a step's tokens.
        rule: the acceptance rule.
        length_error: added to the committed length of every row that attention is told.
    """

    pack: Callable[..., Packed] = pack
    rule: type[Rule] = GreedyMatch
    length_error: int = 0


def _rows_begin_early(*given: Any, **options: Any) -> Packed:
    packed = pack(*given, **options)
    inner = (packed.offsets[1:-1] - 1).clamp(min=0)
    return replace(packed, offsets=torch.cat([packed.offsets[:1], inner, packed.offsets[-1:]]))


def _positions_of_the_longest_row(
    history: Tensor, known: Tensor, lengths: Tensor, *rest: Any, **options: Any
) -> Packed:
    packed = pack(history, known, lengths, *rest, **options)
    behind = lengths.max() - lengths[packed.row_ids.clamp(max=ROWS - 1)]
    return replace(packed, positions=(packed.positions + behind).clamp(max=CAPACITY - 1))


class _BonusFromDraft(GreedyMatch):
    """Emits the draft that was rejected in place of the correction."""

    def forward(self, verification: Verification) -> Verdict:
        verdict = super().forward(verification)
        tokens = verification.draft.tokens
        draft = tokens.gather(1, verdict.accept_lengths.clamp(max=tokens.shape[1] - 1)[:, None]).squeeze(1)
        rejected = verdict.accept_lengths < verification.draft.lengths
        return Verdict(verdict.accept_lengths, torch.where(rejected, draft, verdict.next_tokens))


class _BatchMinimum(GreedyMatch):
    """Keeps as many drafts of every row as of the row that accepted the fewest."""

    def forward(self, verification: Verification) -> Verdict:
        verdict = super().forward(verification)
        return Verdict(verdict.accept_lengths.amin().expand(ROWS), verdict.next_tokens)


MISTAKES = {
    "wrong row offset": Mistake(pack=_rows_begin_early),
    "wrong positions": Mistake(pack=_positions_of_the_longest_row),
    "stale length": Mistake(length_error=-1),
    "KV of a rejected token visible": Mistake(
        length_error=1
    ),  # the slot behind the newest token holds a rejected draft
    "bonus token from the draft": Mistake(rule=_BonusFromDraft),
    "batch-minimum rollback": Mistake(rule=_BatchMinimum),
}


def _with_wrong_lengths(compiled: CompiledModel, error: int) -> CompiledModel:
    graph_module = copy.deepcopy(compiled.graph_module)
    graph = graph_module.graph
    lengths = placeholder(graph, "lengths")
    with graph.inserting_before(lengths.next):
        moved = graph.call_function(torch.ops.aten.add.Tensor, (lengths, error))
    with graph.inserting_after(moved):
        wrong = graph.call_function(torch.ops.aten.clamp.default, (moved, 0))
    for node in (moved, wrong):
        node.meta["val"] = lengths.meta["val"]
    lengths.replace_all_uses_with(wrong, delete_user_cb=lambda user: user is not moved)
    return replace(compiled, graph_module=graph_module)


def _generate(mistake: Mistake, monkeypatch: pytest.MonkeyPatch) -> object:
    compiled = target("llama")
    drafter = compiled.drafter("sometimes-wrong")
    model = _with_wrong_lengths(compiled.compiled, mistake.length_error) if mistake.length_error else compiled.compiled
    with monkeypatch.context() as patch:
        patch.setattr(fuse_step, "pack", mistake.pack)
        step = compile_step(model, mistake.rule(), drafter, AllDrafts())
    options = CompileOptions(ROWS, CAPACITY, "eager", prefill_chunk=ROWS * (drafter.num_draft_tokens + 1))
    return OptimizedModel(compiled.model, step, options).generate(PROMPTS, max_new_tokens=NEW_TOKENS)


@pytest.fixture
def expected() -> list[list[int]]:
    reference = target("llama").reference
    return [[*ids, *reference(ids, NEW_TOKENS)] for ids in PROMPTS]


def test_without_a_mistake_the_tokens_are_right(expected, monkeypatch):
    assert _generate(Mistake(), monkeypatch) == expected


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_changes_the_tokens(name, expected, monkeypatch):
    assert _generate(MISTAKES[name], monkeypatch) != expected
