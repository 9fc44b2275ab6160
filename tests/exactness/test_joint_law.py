"""Whole steps, drafter, rule and logits processors together: the first tokens are as likely as the target says."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from emssd_compile.acceptance import RULES
from emssd_compile.compiler import CompiledModel, CompiledStep, compile_model, compile_step
from emssd_compile.drafters import Drafter, DraftModel, MultiCandidate, PromptLookup
from emssd_compile.logits import make_processors
from emssd_compile.passes.graph import inputs
from emssd_compile.policies import AllDrafts
from emssd_compile.step.batch import BatchShape
from emssd_compile.step.drafting import tree_nodes
from tests.acceptance.draws import FALSE_ALARM, Tiny, chi_square, counts_of

ROWS, LAUNCHES = 8192, 25  # 204,800 texts, as many with each of the options if --long; so few at once stay in a cache
PROMPT, NEW, CAPACITY = [1, 3], 3, 7
DRAFTERS: dict[str, Callable[[], Drafter]] = {
    "chain": lambda: DraftModel(Tiny(1), 2),
    "tree": lambda: DraftModel(Tiny(1), tree=(2, 2)),
    "fork": lambda: DraftModel(Tiny(1), tree=(2, 1)),  # takes less time
    "lookup": lambda: PromptLookup(2),
    "mcsd": lambda: MultiCandidate(Tiny(1), (3, 1)),
}
OPTIONS: tuple[dict[str, float], ...] = (
    {},
    {"temperature": 0.6},
    {"top_p": 0.75},
    {"presence_penalty": -0.4, "frequency_penalty": 0.9},
)
"""Of each fourth of the rows, which lie side by side: row b sets those of `b % 4`."""


@functools.cache
def _compiled(seed: int, tree_nodes: int) -> CompiledModel:
    return compile_model(Tiny(seed), BatchShape(ROWS, CAPACITY, tree_nodes))


def _step(rule: str, name: str) -> CompiledStep:
    drafter, used = DRAFTERS[name](), {"do_sample", *(option for options in OPTIONS for option in options)}
    target = _compiled(0, tree_nodes(drafter))
    drafter.prepare(target.target(lambda _, tree_nodes=0: _compiled(1, tree_nodes)))
    return compile_step(target, RULES[rule](), drafter, AllDrafts(), make_processors(()), used=used)


def _begun(step: CompiledStep, first_seed: int) -> dict[str, Tensor]:
    """What the step reads, but for the ranges, of rows that are about to read their prompt."""
    state = {
        str(node.target): torch.zeros(node.meta["val"].shape, dtype=node.meta["val"].dtype)
        for node in inputs(step.graph_module.graph)
        if node.meta["role"] != "size"
    }
    for name, option in step.options.items():
        of_each = [options.get(name.removeprefix("option_"), option.default) for options in OPTIONS]
        state[name] = torch.tensor(of_each, dtype=option.dtype).repeat(ROWS // len(OPTIONS))
    return state | {
        "option_do_sample": torch.ones(ROWS, dtype=torch.bool),
        "history": torch.tensor(PROMPT + [0] * (CAPACITY - len(PROMPT))).repeat(ROWS, 1),
        "known": torch.full((ROWS,), len(PROMPT)),
        "prompt_lengths": torch.full((ROWS,), len(PROMPT)),
        "limits": torch.full((ROWS,), CAPACITY),
        "seeds": first_seed + torch.arange(ROWS),
        "draft_budget": torch.tensor(ROWS * step.drafter.num_draft_tokens),
    }


def _drawn(step: CompiledStep, first_seed: int) -> Tensor:
    """The tokens behind the prompt, `[ROWS, NEW]`, of rows with seeds from `first_seed` on; no engine is around it."""
    state = _begun(step, first_seed)
    for _ in range(NEW):  # steps, of a token of each row at least
        active = state["active"] = state["known"] < len(PROMPT) + NEW
        drafts = int(state["draft_lengths"][active].sum())
        lengths = {
            "token_range": int((state["known"] - state["lengths"])[active].sum()) + drafts,
            "logit_range": int(active.sum()) + drafts,
            "draft_range": ROWS * 3,  # D + 1, or the prompt
            "row_range": CAPACITY,
        }
        given = state | {name: torch.arange(length) for name, length in lengths.items()}
        with torch.no_grad():
            results = step.graph_module(*(given[str(node.target)] for node in inputs(step.graph_module.graph)))
        state |= {name: value for name, value in results.items() if name in state}
    return state["history"][:, len(PROMPT) : len(PROMPT) + NEW]


def _changed(logits: Tensor, texts: Tensor, options: dict[str, float]) -> Tensor:
    """What the options do to logits `[texts, V]`, written to be obvious."""
    logits = logits.clone()
    for line, text in zip(logits, texts.tolist(), strict=True):
        for token in text[len(PROMPT) :]:
            line[token] -= options.get("frequency_penalty", 0)
        for token in set(text[len(PROMPT) :]):
            line[token] -= options.get("presence_penalty", 0)
        line /= options.get("temperature", 1)
        p = line.softmax(0)
        likelier = torch.where(p > p[:, None], p, 0).sum(1)  # [V], what the tokens likelier than each hold
        line[likelier >= options.get("top_p", 1)] = -torch.inf
    return logits


@pytest.mark.parametrize(
    ("rule", "drafter"),
    [
        *(("token-level", drafter) for drafter in ("chain", "lookup")),
        ("block", "chain"),
        ("rrs", "tree"),
        ("traversal", "fork"),
        # Of rules for independent siblings the laws are proved in `tests/acceptance/` each time.
        pytest.param("k-seq", "tree", marks=pytest.mark.long),
        pytest.param("largest-ratio", "fork", marks=pytest.mark.long),
        # `match` is compared token by token in `test_sampling.py` each time.
        *(pytest.param("match", drafter, marks=pytest.mark.long) for drafter in ("chain", "tree", "lookup")),
        pytest.param("rrs", "mcsd", marks=pytest.mark.long),
        pytest.param("match", "mcsd", marks=pytest.mark.long),
        pytest.param("rrs-with-replacement", "tree", marks=pytest.mark.long),
        pytest.param("largest-ratio", "tree", marks=pytest.mark.long),
        pytest.param("traversal", "tree", marks=pytest.mark.long),
    ],
)
def test_the_first_three_tokens_are_as_likely_as_the_target_says(rule, drafter, pytestconfig):
    """Chi-square of the 125 texts with each options, and of all; each fails of a right rule once in a million."""
    step, target = _step(rule, drafter), Tiny(0)
    launches = LAUNCHES * (len(OPTIONS) if pytestconfig.getoption("--long") else 1)
    found = torch.stack([_drawn(step, launch * ROWS) for launch in range(launches)])
    pairs = [
        counts_of(
            found[:, number :: len(OPTIONS)].flatten(0, 1), target, PROMPT, functools.partial(_changed, options=o)
        )
        for number, o in enumerate(OPTIONS)
    ]
    assert min(chi_square(*pair) for pair in pairs) > FALSE_ALARM
    assert chi_square(*map(torch.cat, zip(*pairs, strict=True))) > FALSE_ALARM
