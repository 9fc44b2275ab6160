"""`MultiCandidate`: the tree of MCSD, whose candidates are those of the paper's drawing, one after another."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import emssd_compile
from emssd_compile.acceptance import RecursiveRejection
from emssd_compile.compiler import compile_model, compile_step
from emssd_compile.drafters import DraftModel, MultiCandidate
from emssd_compile.drafters.tree_shape import TreeShape
from emssd_compile.errors import DrafterError, OptionError
from emssd_compile.policies import AllDrafts
from emssd_compile.step.batch import BatchShape
from emssd_compile.step.proposals import DETERMINISTIC, WITHOUT_REPLACEMENT
from emssd_compile.step.randomness import DRAFTS, gumbels
from tests.drafters.alone import Alone, nodes_of
from tests.exactness.models import prompt
from tests.passes.graphs import TinyModel, causal, model_with_attention
from tests.zoo import VOCABULARY, toy_model

SEEDS = [5, -6, 7]
K = (3, 1, 2)


@torch.no_grad()
def _tree(
    model: nn.Module, text: list[int], k: tuple[int, ...], seed: int | None, drawn: str, threshold: float | None = None
) -> tuple[list[tuple[int, int]], list[Tensor]]:
    """Token and parent of each candidate behind a text, and q at each node that has some: MCSD in plain Python.

    Candidates are drawn one at a time, and what was drawn is not there for the next. `seed` is None without sampling.
    """
    nodes: list[tuple[int, int]] = []
    laws, level = [], [(0, text, 1.0)]  # number of each node, the text up to it, and how likely that branch is
    for depth, count in enumerate(k):
        chosen: list[tuple[int, int]] = []
        below = []
        for node, path, likely in level:
            q = model(torch.tensor([path])).logits[0, -1].softmax(0)
            laws.append(q)
            noise, ids = torch.zeros(VOCABULARY), torch.arange(VOCABULARY)
            if seed is not None and drawn == DETERMINISTIC:  # the target's own
                noise = gumbels(torch.tensor(seed), torch.tensor(len(text) + depth), ids)
            elif seed is not None:
                first = len(nodes) + len(chosen)  # of the drafts behind the node
                noise = gumbels(torch.tensor(seed), torch.tensor(len(text)), first * VOCABULARY + ids, DRAFTS)
            left = q.log() + noise
            for _ in range(count):
                token = int(left.argmax())
                left[token] = -torch.inf
                chosen.append((token, node))
                below.append((len(nodes) + len(chosen), [*path, token], likely * float(q[token])))
        if threshold is not None and not any(likely > threshold for *_, likely in below):
            break
        nodes, level = [*nodes, *chosen], below
    return nodes, laws


@pytest.fixture(scope="module")
def alone() -> Alone[MultiCandidate]:
    return Alone(MultiCandidate(toy_model("llama"), K), rows=3)


@pytest.mark.parametrize(
    ("samples", "drawn", "threshold"),
    [
        (False, DETERMINISTIC, None),
        (True, DETERMINISTIC, 0.01),
        (True, WITHOUT_REPLACEMENT, None),
    ],
)
def test_candidates_are_drawn_one_after_another_from_what_is_left(samples, drawn, threshold, alone):
    """Of rows of several lengths, one of which has no room for the last depth; twice, after what was kept."""
    texts = [prompt(n) for n in (3, 1, 17)]
    alone.drafter.threshold = threshold
    alone.forget()
    seen = {"seeds": torch.tensor(SEEDS), "drawn": drawn}
    if samples:
        seen["options"] = {"do_sample": torch.tensor([True, True, False])}
    lengths = set()
    for room in ([3, 2, 3], [1, 3, 3]):
        draft = alone.draft(texts, room, budget=32, **seen)
        for row, text in enumerate(texts):
            seed = SEEDS[row] if samples and row < 2 else None
            nodes, laws = _tree(alone.drafter.model, text, K[: room[row]], seed, drawn, threshold)
            assert [node[:2] for node in nodes_of(draft, row)] == nodes
            if drawn == WITHOUT_REPLACEMENT:
                torch.testing.assert_close(draft.proposal[row, : len(laws)], torch.stack(laws))
            lengths.add((room[row], len(nodes)))
            text += [nodes[0][0] if nodes else 4, 5]
    stops = {length < {1: 3, 2: 6, 3: 12}[most] for most, length in lengths}
    assert stops == ({False} if threshold is None else {False, True})


def test_the_step_is_that_of_a_draft_model_with_the_same_tree():
    """Node for node, so what holds for that one holds here, wherever it is decoded."""
    target, draft, batch = model_with_attention(), TinyModel(attend=causal, kv_heads=1), BatchShape(2, 48, 7)
    compiled, drafting = compile_model(target, batch), compile_model(draft, replace(batch, tree_nodes=3))
    steps = []
    for drafter in (MultiCandidate(draft, 2, depth=2), DraftModel(draft, tree=(2, 2))):
        drafter.prepare(compiled.target(lambda model, *, tree_nodes=0: drafting))
        steps.append(compile_step(compiled, RecursiveRejection(), drafter, AllDrafts(), used=("do_sample",)))
    assert steps[0].graph_module.code == steps[1].graph_module.code


def _optimize(drafter: MultiCandidate, acceptance: str = "match") -> emssd_compile.OptimizedModel:
    return emssd_compile.optimize(model_with_attention(), drafter, max_length=48, acceptance=acceptance)


@pytest.mark.parametrize(
    ("k", "options", "message"),
    [
        ((4, 0), {}, r"MultiCandidate k\[1\]=0 is out of range; pass at least 1"),
        ((), {}, r"MultiCandidate k=\(\) has 0 drafts"),
        ("42", {}, "MultiCandidate k='42' is not a sequence of integers"),
        (2.5, {"depth": 2}, "MultiCandidate k=2.5 is not an integer"),
        (0, {"depth": 2}, "MultiCandidate k=0 is out of range"),
        (2, {}, r"MultiCandidate k=2 is one number for all depths; pass depth, or k=\(2, 2, 2\)"),
        (2, {"depth": 0}, "MultiCandidate depth=0 is out of range"),
        (3, {"depth": 9}, r"MultiCandidate k=\(3, 3, .* has 29523 drafts; use 1 to 512"),
        ((4, 2), {"depth": 2}, r"MultiCandidate depth=2 is for one k .* k=\(4, 2\) says how deep"),
        ((2,), {"threshold": 1.5}, "MultiCandidate threshold=1.5 is out of range; pass 0 to 1"),
        ((2,), {"threshold": -0.1}, "MultiCandidate threshold=-0.1 is out of range"),
        ((2,), {"threshold": math.nan}, "MultiCandidate threshold=nan is not a number"),
        ((2,), {"threshold": "0.5"}, "MultiCandidate threshold='0.5' is not a number"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(k, options, message):
    with pytest.raises(OptionError, match=message):
        MultiCandidate(TinyModel(), k, **options)


def test_more_candidates_than_tokens_are_refused():
    with pytest.raises(DrafterError, match="MultiCandidate drafts 33 tokens behind one node, and there are only 32"):
        _optimize(MultiCandidate(model_with_attention(), (2, 33)))


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        ("block", {}, "BlockVerification verifies chains, and MultiCandidate proposes trees"),
        ("rrs", {"threshold": 0.5}, "RecursiveRejection needs .*, and those of MultiCandidate are 'deterministic'"),
    ],
)
def test_a_rule_that_does_not_go_with_it_is_refused_before_any_work(rule, options, message, monkeypatch):
    monkeypatch.setattr(torch.export, "export", lambda *args, **kwargs: pytest.fail("work was done"))
    with pytest.raises(OptionError, match=message):
        _optimize(MultiCandidate(TinyModel(), **options), rule)


def test_it_is_loaded_with_its_options(tmp_path):
    toy_model("gpt2").save_pretrained(tmp_path)
    drafter = MultiCandidate.from_pretrained(tmp_path, 2, depth=3, threshold=0.25)
    assert (type(drafter), drafter.tree, drafter.threshold) == (MultiCandidate, TreeShape((2, 2, 2)), 0.25)
