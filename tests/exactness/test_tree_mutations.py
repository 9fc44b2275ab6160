"""The exactness check sees trees: with any one of these mistakes built into the step, it fails."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from emssd_compile.acceptance import GreedyMatch, Rule, Verdict, Verification
from emssd_compile.compiler import CompiledModel, compile_model, compile_step
from emssd_compile.drafters import Draft, DraftContext, Drafter
from emssd_compile.ops import WORD_BITS, pack_ancestors
from emssd_compile.optimized_model import OptimizedModel
from emssd_compile.options import CompileOptions
from emssd_compile.passes import fuse_step
from emssd_compile.policies import AllDrafts
from emssd_compile.step.batch import BatchShape
from emssd_compile.step.commit import Emission, commit
from emssd_compile.step.pack import Packed, as_trees
from emssd_compile.step.state import StepState
from tests.exactness.compiled import CAPACITY, NEW_TOKENS, K, target
from tests.exactness.drafters import Oracle
from tests.exactness.models import prompt
from tests.zoo import VOCABULARY

ROWS = 4
PROMPTS = [prompt(n) for n in (5, 40, 17, 1, 64)]
EOS_AT = 4  # where in the texts of two prompts their EOS is

Change = Callable[[pytest.MonkeyPatch], None]


def _laid_out(change: Callable[[Packed], Packed]) -> Change:
    def wrong(packed: Packed, *given: Any) -> Packed:
        return change(as_trees(packed, *given))

    return lambda patch: patch.setattr(fuse_step, "as_trees", wrong)


def _siblings_see_one_another(packed: Packed) -> Packed:
    """Each token sees all before it."""
    assert packed.ancestors is not None
    rows, tokens = packed.row_ids.clamp(max=ROWS - 1), torch.arange(packed.row_ids.shape[0])
    index = tokens - packed.offsets[rows]
    columns = torch.arange(WORD_BITS * packed.ancestors.shape[1])
    return replace(packed, ancestors=pack_ancestors(columns <= index[:, None]))


def _positions_are_slots(packed: Packed) -> Packed:
    assert packed.slots is not None
    return replace(packed, positions=packed.slots)


def _committed(change: Callable[[StepState, Packed, Verdict], tuple[StepState, Emission]]) -> Change:
    return lambda patch: patch.setattr(fuse_step, "commit", change)


def _without_eos(state: StepState, packed: Packed, verdict: Verdict) -> tuple[StepState, Emission]:
    """An EOS inside a path does not end it; one at its end does."""
    inside = commit(replace(state, is_eos=torch.zeros_like(state.is_eos)), packed, verdict)
    ends = state.is_eos[verdict.next_tokens] & packed.ready
    return replace(inside[0], is_eos=state.is_eos, active=inside[0].active & ~ends), inside[1]


def _moved(change: Callable[..., None]) -> Change:
    """In the place of the op that moves the KV of accepted paths; a graph calls it by its overload."""
    library = torch.library.Library("emssd_wrong", "FRAGMENT")
    name = change.__name__
    library.define(f"{name}(Tensor(a!) k, Tensor(b!) v, Tensor starts, Tensor path, Tensor counts) -> ()")
    library.impl(name, change, "CPU")
    torch.library.register_fake(f"emssd_wrong::{name}", lambda *given: None, lib=library)
    op = getattr(torch.ops.emssd_wrong, name).default
    _kept.append(library)
    return lambda patch: patch.setattr(fuse_step, "move_kv", op)


_kept: list[torch.library.Library] = []


def _nothing(k: Tensor, v: Tensor, starts: Tensor, path: Tensor, counts: Tensor) -> None:
    """Accepted KV stays where it was."""


def _descending(k: Tensor, v: Tensor, starts: Tensor, path: Tensor, counts: Tensor) -> None:
    """The last node of a path first: it overwrites what is still to be moved."""
    for cache in (k, v):
        for row, count in enumerate(counts.tolist()):
            for i in reversed(range(count)):
                cache[row, starts[row] + i] = cache[row, starts[row] + path[row, i]].clone()


class _BonusOfTheLastNode(GreedyMatch):
    """What follows the row's last draft, in place of what follows the last one accepted."""

    def forward(self, verification: Verification) -> Verdict:
        verdict = super().forward(verification)
        choice = verification.logits.argmax(-1)
        last = (verification.offsets[1:] - 1).clamp(min=0)
        return replace(verdict, next_tokens=choice[last])


MISTAKES: dict[str, tuple[Change, type[Rule]]] = {
    "a sibling is visible": (_laid_out(_siblings_see_one_another), GreedyMatch),
    "position = slot": (_laid_out(_positions_are_slots), GreedyMatch),
    "the path is moved in the wrong order": (_moved(_descending), GreedyMatch),
    "KV is not moved": (_moved(_nothing), GreedyMatch),
    "the bonus token of another node": (lambda patch: None, _BonusOfTheLastNode),
    "EOS inside a path is ignored": (_committed(_without_eos), GreedyMatch),
}


class _Forks(Drafter):
    """At each depth a wrong token and then the one that another drafter gives; the tree goes on behind the latter."""

    def __init__(self, chain: Drafter) -> None:
        super().__init__()
        self.chain = chain
        self.num_draft_tokens, self.max_depth = 2 * chain.num_draft_tokens, chain.num_draft_tokens

    def forward(self, context: DraftContext) -> Draft:
        """Nodes 1 and 2 follow the root, 3 and 4 follow node 2, and so on: what is accepted skips siblings."""
        chain = self.chain(context)
        tokens = torch.stack([(chain.tokens + 1) % VOCABULARY, chain.tokens], 2).flatten(1)  # [B, K]
        parents = (torch.arange(self.num_draft_tokens) // 2 * 2).expand_as(tokens)
        return Draft(tokens, 2 * chain.lengths, parents=parents)


@pytest.fixture(scope="module")
def compiled() -> CompiledModel:
    return compile_model(target("llama", ROWS).model, BatchShape(ROWS, CAPACITY, 2 * K + 1))


def _generate(change: Change, rule: type[Rule], monkeypatch: pytest.MonkeyPatch, compiled: CompiledModel) -> object:
    subject = target("llama", ROWS)
    drafter = _Forks(Oracle(subject.texts(), CAPACITY, K, wrong_of_seven=1))
    with monkeypatch.context() as patch:
        change(patch)
        step = compile_step(compiled, rule(), drafter, AllDrafts())
    options = CompileOptions(ROWS, CAPACITY, "eager", prefill_chunk=ROWS * (drafter.num_draft_tokens + 1))
    fast = OptimizedModel(subject.model, step, options)
    return fast.generate(PROMPTS, max_new_tokens=NEW_TOKENS, eos_token_id=_eos())


def _eos() -> list[int]:
    reference = target("llama", ROWS).reference
    return [reference(ids, NEW_TOKENS)[EOS_AT] for ids in PROMPTS[:2]]


@pytest.fixture
def expected() -> list[list[int]]:
    reference = target("llama", ROWS).reference
    return [[*ids, *reference(ids, NEW_TOKENS, _eos())] for ids in PROMPTS]


def test_without_a_mistake_the_tokens_are_right(expected, compiled, monkeypatch):
    assert _generate(lambda patch: None, GreedyMatch, monkeypatch, compiled) == expected


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_changes_the_tokens(name, expected, compiled, monkeypatch):
    assert _generate(*MISTAKES[name], monkeypatch, compiled) != expected
