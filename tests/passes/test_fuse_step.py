"""`fuse_step`: one graph that packs, runs, accepts and commits; the tokens are the model's own."""

from dataclasses import replace

import pytest
import torch
from torch import fx

import emssd_compile
from emssd_compile import passes
from emssd_compile.acceptance import GreedyMatch, Rule, Verdict, Verification
from emssd_compile.drafters import Drafter, NoDrafter, PartSizes, PromptLookup, TensorSpec
from emssd_compile.passes.fuse_step import FuseStep
from emssd_compile.passes.graph import caches, inputs
from emssd_compile.policies import AllDrafts
from emssd_compile.step.signature import SIZE_NAMES
from emssd_compile.step.state import CONSTANT_FIELDS, StepState
from tests.passes.graphs import (
    BATCH,
    LONGEST,
    VOCABULARY,
    Scripted,
    ScriptedTree,
    model_with_attention,
    ops,
    returned,
    step_of,
    step_with,
    unpadded,
)

PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7]]


def _decode(step: fx.GraphModule, drafter: Drafter, count: int) -> list[list[int]]:
    """Run the step until each of `PROMPTS` has `count` new tokens, as the engine does."""
    drafts, depth = drafter.num_draft_tokens, drafter.max_depth
    sizes_of_parts = PartSizes(len(PROMPTS), LONGEST, VOCABULARY, drafts, max_depth=depth)
    state = StepState.empty(sizes_of_parts, torch.device("cpu")).tensors()
    for row, prompt in enumerate(PROMPTS):
        state["history"][row, : len(prompt)] = torch.tensor(prompt)
        state["known"][row] = len(prompt)
        state["limits"][row] = len(prompt) + count
    state["active"][:] = True
    for name, value in caches(step.graph).items():
        state[name] = torch.zeros([int(size) for size in value.shape])
    sizes = {"token_range": 24, "logit_range": 3 * (drafts + 1), "draft_range": 16, "row_range": 24}
    state |= {name: torch.arange(size) for name, size in sizes.items()}
    names = [str(node.target) for node in inputs(step.graph)]
    with torch.inference_mode():
        for _ in range(count):
            state.update(step(*(state[name] for name in names)))
    return [state["history"][row, len(p) : len(p) + count].tolist() for row, p in enumerate(PROMPTS)]


def _greedy(count: int) -> list[list[int]]:
    """The tiny model's own greedy tokens, each prompt alone, without a cache."""
    torch.manual_seed(0)
    model = model_with_attention()
    rows = []
    for prompt in PROMPTS:
        ids = list(prompt)
        for _ in range(count):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        rows.append(ids[len(prompt) :])
    return rows


DRAFTERS = {
    "none": NoDrafter(),
    "prompt lookup": PromptLookup(4, 2),
    "one token after another": Scripted([1, 2, 3]),
    "ids beyond the vocabulary": Scripted([1, 10**6, 2]),
    "negative ids": Scripted([-1, -5]),
    "a length beyond the draft": Scripted([1, 2], length=50),
    "a negative length": Scripted([1, 2], length=-3),
    "a tree": ScriptedTree([*range(5)], [0, 0, 1, 3, 0], max_depth=3),
    "a tree with nodes that follow none before them": ScriptedTree([*range(5)], [3, -1, 10**9, 0, 4], max_depth=2),
    "a tree deeper than it may be": ScriptedTree([1, 2, 3, 4], [0, 1, 2, 3], max_depth=1),
    "a tree with ids beyond the vocabulary": ScriptedTree([1, 10**6, 2, -4], [0, 0, 2, 1], max_depth=2),
}


@pytest.mark.parametrize("drafter", DRAFTERS.values(), ids=DRAFTERS)
def test_whatever_is_drafted_the_tokens_are_the_models_own(drafter):
    torch.manual_seed(0)
    step = step_of(drafter)
    assert _decode(step, drafter, 12) == _greedy(12)


class _Wild(Rule):
    """Accepts more drafts than there are, or fewer than none, and goes on with what is no token."""

    guarantees = "tokens"

    def __init__(self, accept: int, token: int) -> None:
        super().__init__()
        self.accept, self.token = accept, token

    def forward(self, verification: Verification) -> Verdict:
        lengths = verification.draft.lengths
        return Verdict(torch.full_like(lengths, self.accept), torch.full_like(lengths, self.token))


@pytest.mark.parametrize(
    ("accept", "token", "text"),
    [
        (10**9, VOCABULARY + 5, [31, 1, 2, 31, 1, 2, 31]),
        (-3, -7, [0, 0, 0, 0, 0, 0, 0]),
        (1, 9, [9, 1, 9, 1, 9, 1, 9]),
    ],
    ids=["too much", "too little", "in range"],
)
def test_a_verdict_is_carried_out_as_far_as_it_can_be_meant(accept, token, text):
    drafter = Scripted([1, 2])
    step = step_with(drafter, rule=_Wild(accept, token)).graph_module
    assert _decode(step, drafter, len(text)) == [text] * 3


class _WildPath(Rule):
    """Goes through a tree along a path of its own choice, then on with token 9."""

    guarantees = "tokens"

    def __init__(self, path: list[int], accept: int) -> None:
        super().__init__()
        self.path, self.accept = path, accept

    def forward(self, verification: Verification) -> Verdict:
        lengths = verification.draft.lengths
        path = torch.tensor(self.path).expand(len(lengths), -1)
        return Verdict(torch.full_like(lengths, self.accept), torch.full_like(lengths, 9), path=path)


@pytest.mark.parametrize(
    ("path", "accept", "text"),
    [
        ([0, 2, 3], 2, [9, 2, 3, 9, 2, 3, 9]),
        ([0, 2, 3], 10**9, [9, 2, 3, 9, 2, 3, 9]),
        ([77, 2, 3], 1, [9, 2, 9, 2, 9, 2, 9]),
        ([0, 1, 3], 2, [9, 1, 9, 1, 9, 1, 9]),
        ([0, 3, 2], 2, [9, 9, 9, 9, 9, 9, 9]),
        ([0, -5, 10**9], 2, [9, 9, 9, 9, 9, 9, 9]),
        ([0, 2, 3], -1, [9, 9, 9, 9, 9, 9, 9]),
    ],
    ids=["in range", "too much", "from no root", "from another node", "not from the root", "no nodes", "too little"],
)
def test_a_path_is_gone_as_far_as_it_is_one(path, accept, text):
    drafter = ScriptedTree([1, 2, 3], [0, 0, 2], max_depth=2)
    assert _decode(step_of(drafter, _WildPath(path, accept)), drafter, len(text)) == [text] * 3


class _Counts(GreedyMatch):
    """Remembers how many drafts of each row it has accepted."""

    def tensors(self, sizes: PartSizes) -> dict[str, TensorSpec]:
        return {"accepted": TensorSpec((sizes.rows,), torch.int64)}

    def forward(self, verification: Verification) -> Verdict:
        verdict = super().forward(verification)
        return replace(verdict, state={"accepted": verification.state["accepted"] + verdict.accept_lengths})


def test_a_rule_may_have_state():
    torch.manual_seed(0)
    fast = emssd_compile.optimize(
        model_with_attention(),
        PromptLookup(4, 2),
        max_batch=3,
        max_length=LONGEST,
        layout="packed",
        backend="eager",
        acceptance=_Counts(),
    )
    assert fast.generate(PROMPTS, max_new_tokens=12) == [
        [*ids, *new] for ids, new in zip(PROMPTS, _greedy(12), strict=True)
    ]
    assert fast._engine.tensors["rule_accepted"].sum() >= fast.stats.num_accepted_draft_tokens > 0


def test_the_step_is_one_graph_of_ops_with_named_inputs_and_outputs():
    step = step_of(PromptLookup(4, 2))
    names = [str(node.target) for node in inputs(step.graph)]
    state = [*StepState.empty(PartSizes(BATCH.rows, LONGEST, VOCABULARY, 4), torch.device("cpu")).tensors()]
    assert names == [*state, *SIZE_NAMES, "k_cache_0", "v_cache_0"]
    assert {*returned(step)} == {*state, "report"} - CONSTANT_FIELDS
    assert "_local_scalar_dense" not in ops(step)
    assert {n.op for n in step.graph.nodes} == {"placeholder", "get_attr", "call_function", "output"}


def test_the_manager_counts_it_as_one_change():
    graph_module, manager = unpadded(model_with_attention())
    manager.apply(
        graph_module, (passes.step(FuseStep(BATCH, GreedyMatch(), NoDrafter(), AllDrafts(), manager.fake_mode)),)
    )
    assert [(r.name, r.changed) for r in manager.records[-1:]] == [(FuseStep.name, 1)]
