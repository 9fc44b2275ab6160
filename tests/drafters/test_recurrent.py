"""`RecurrentDrafter`: beams of a recurrent head, as its formula says, and the tokens stay the target's."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import emssd_compile
from emssd_compile.drafters import DraftContext, RecurrentDrafter
from emssd_compile.drafters.head import Features
from emssd_compile.drafters.recurrent import RecurrentConfig
from emssd_compile.step.drafting import TokenTables
from emssd_compile.step.randomness import gumbels
from tests import zoo
from tests.drafters.alone import nodes_of
from tests.drafters.contexts import context, target_of
from tests.drafters.head_cases import Largest
from tests.passes.graphs import HIDDEN, VOCABULARY, TinyModel, causal

ROWS = [[3, 1, 4], [9], [2, 6, 5, 3, 5, 8, 9, 7, 1, 1, 2]]
GREEDY: dict[str, Any] = {}
SAMPLING: dict[str, Any] = {"do_sample": True, "seed": 5, "temperature": 0.8, "top_k": [3, 0, 1]}
CONFIGS = {
    "as published": RecurrentConfig(HIDDEN, VOCABULARY),
    "other exit": RecurrentConfig(HIDDEN, VOCABULARY, exit_size=24, num_layers=1),
    "sum": RecurrentConfig(HIDDEN, VOCABULARY, num_layers=0, rnn=False),
}


def _head(config: RecurrentConfig, **options: Any) -> RecurrentDrafter:
    """A random head, loud enough to tell tokens apart, that has seen a target."""
    torch.manual_seed(0)
    head = RecurrentDrafter(config, **options)
    with torch.no_grad():
        head.get_parameter(f"lm_head.{config.num_layers}.weight").mul_(6)
    table = torch.randn(config.vocabulary, config.hidden_size)
    head.prepare(target_of(None, len(ROWS), 24, config.vocabulary, config.hidden_size, TokenTables(embedding=table)))
    return head.eval()


def _logits(head: RecurrentDrafter, hidden: Tensor, path: list[int]) -> Tensor:
    """The formula, for one path that begins with the root token: `[V]`."""
    config, w = head.config, head.state_dict()
    assert head.tables.embedding is not None
    state = torch.zeros(config.hidden_size)
    for token in path:
        e = head.tables.embedding[token]
        state = F.silu(w["rnn_w.weight"] @ e + w["rnn_u.weight"] @ state + w["rnn_u.bias"]) if config.rnn else e + state
    x = torch.cat([hidden, state])
    if config.exit_size != 2 * config.hidden_size:
        x = w["input_proj.weight"] @ x + w["input_proj.bias"]
    for i in range(config.num_layers):
        x = x + F.silu(w[f"lm_head.{i}.linear.weight"] @ x + w[f"lm_head.{i}.linear.bias"])
    return w[f"lm_head.{config.num_layers}.weight"] @ x


def _expected(head: RecurrentDrafter, seen: DraftContext, row: int, shape: Any) -> list[tuple[int, int, int]]:
    """Token, parent and grade of each draft of a row, by a beam search over lists.

    Args:
        head, seen: as they are given to it.
        row: of the batch.
        shape: what temperature, top-k and noise make of the logits `[V]` at a depth.
    """
    beams = [(0.0, [int(seen.history[row, seen.known[row] - 1])], [0.0])]
    for depth in range(head.length):
        found = []
        for score, path, sure in beams:
            log_probs = shape(_logits(head, seen.hidden[row], path), row, depth).log_softmax(0).tolist()
            found += [(score + p, [*path, token], [*sure, p]) for token, p in enumerate(log_probs)]
        beams = sorted(found, key=lambda each: -each[0])[: head.width]
    nodes: dict[tuple[int, ...], tuple[int, int, int]] = {}
    for depth in range(1, head.length + 1):
        for score, path, sure in beams:
            above = [*nodes].index(tuple(path[1:depth])) + 1 if depth > 1 and score > -torch.inf else 0
            grade = min(int(8 * torch.tensor(sure[depth]).exp()), 7)
            if score > -torch.inf:
                nodes.setdefault(tuple(path[1 : depth + 1]), (path[depth], above, grade))
    return [*nodes.values()]


@pytest.mark.parametrize("options", [GREEDY, SAMPLING], ids=["greedy", "sampling"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize(("width", "length"), [(4, 5), (1, 3), (3, 1)])
@torch.no_grad()
def test_drafts_are_the_beams_that_the_formula_says(config, width, length, options):
    """With sampling by temperature 0.8 and top-k of 3, all and 1 tokens; but the last row, which does not sample."""
    head = _head(config, width=width, length=length)
    seeds = torch.tensor([5, 6, 7])
    seen = replace(
        context(ROWS, length), hidden=torch.randn(len(ROWS), HIDDEN), seeds=seeds, vocabulary=config.vocabulary
    )
    samples, top_k = torch.tensor([True, True, False]), torch.tensor([3, 0, 1])
    if options:
        temperature, top_p = torch.tensor([0.8, 0.8, 1.0]), torch.ones(3)
        row_options = {"do_sample": samples, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        seen = replace(seen, options=row_options)

    def shape(logits: Tensor, row: int, depth: int) -> Tensor:
        if not options:
            return logits
        logits = logits / seen.options["temperature"][row]
        if top_k[row]:
            logits = torch.where(logits < logits.topk(int(top_k[row])).values[-1], -torch.inf, logits)
        noise = gumbels(seeds[row], seen.known[row] + depth, torch.arange(len(logits)))
        return logits + noise if samples[row] else logits

    draft = head(seen)
    for row in range(len(ROWS)):
        assert nodes_of(draft, row) == _expected(head, seen, row, shape)
    if options:
        assert draft.lengths[2] == length, "of one possible token there is one beam"


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@torch.no_grad()
def test_rollout_gives_the_logits_of_drafts_behind_the_texts_own_tokens(config):
    head = _head(config, width=2, length=3)
    tokens, hidden = torch.randint(config.vocabulary, (2, 7)), torch.randn(2, 7, HIDDEN)
    found = [*head.rollout(Features(tokens, hidden, {}))]
    assert len(found) == head.length
    for draft, logits in enumerate(found, 1):
        assert logits.shape == (2, 7, config.vocabulary)
        for row in range(2):
            for t in range(7 - draft):
                expected = _logits(head, hidden[row, t], tokens[row, t + 1 : t + 1 + draft].tolist())
                torch.testing.assert_close(logits[row, t], expected)


def test_training_changes_the_head_and_not_the_embedding():
    head = _head(CONFIGS["as published"])
    table = head.tables.embedding
    assert table is not None
    table.requires_grad_()
    features = Features(torch.randint(VOCABULARY, (1, 8)), torch.randn(1, 8, HIDDEN), {})
    sum((logits.logsumexp(2).mean() for logits in head.rollout(features)), torch.zeros(())).backward()
    assert table.grad is None
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in head.parameters())


@torch.no_grad()
def test_without_sampling_there_is_no_noise_and_nothing_larger_than_the_logits_of_one_depth():
    head = _head(RecurrentConfig(HIDDEN, 512), width=16, length=3)
    no_seeds: Any = None
    seen = replace(context(ROWS, 3), hidden=torch.randn(len(ROWS), HIDDEN), seeds=no_seeds, vocabulary=512)
    with Largest() as largest:
        head(seen)
    assert largest.elements == len(ROWS) * 16 * 512


@torch.no_grad()
def test_a_token_that_the_target_does_not_have_is_not_drafted():
    """A head of 161 tokens, the last one the likeliest; the target has 160."""
    head = RecurrentDrafter(RecurrentConfig(HIDDEN, 161, num_layers=0), width=2, length=3)
    head.get_parameter("lm_head.0.weight")[160] = 1
    tables = TokenTables(embedding=torch.randn(160, HIDDEN))
    head.prepare(target_of(None, len(ROWS), 24, 160, HIDDEN, tables))
    draft = head(replace(context(ROWS, 3), hidden=torch.full((len(ROWS), HIDDEN), 9.0), vocabulary=160))
    assert draft.tokens.max() < 160


# Whole steps


def _knowing(target: nn.Module, vocabulary: int, hidden: int, **options: Any) -> RecurrentDrafter:
    """A head that expects what the target would, had that no attention: SiLU(x + 30) - 30 is x."""
    head = RecurrentDrafter(RecurrentConfig(hidden, vocabulary, exit_size=hidden, num_layers=0), **options)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
        weights = dict(head.named_parameters())
        weights["rnn_w.weight"].copy_(torch.eye(hidden))
        weights["rnn_u.bias"].fill_(30)
        weights["input_proj.weight"].copy_(torch.cat([torch.zeros(hidden, hidden), torch.eye(hidden)], 1))
        weights["input_proj.bias"].fill_(-30)
        weights["lm_head.0.weight"].copy_(target.get_parameter("lm_head.weight"))
    return head


def _target(attention: float) -> TinyModel:
    """A model whose attention counts so much."""
    torch.manual_seed(0)
    model = TinyModel(attend=causal, kv_heads=2)
    with torch.no_grad():
        for parameter in model.v.parameters():
            parameter.mul_(attention)
        model.lm_head.weight.mul_(8)
    return model


def _fast(model: nn.Module, drafter: Any, **options: Any) -> Any:
    sizes = {"max_batch": 2, "max_length": 48, "backend": "eager", "layout": "packed"}
    return emssd_compile.optimize(model, drafter, **{**sizes, **options})


def test_of_a_head_that_knows_each_step_accepts_a_whole_beam():
    """Also of rows that sample: the best beam is what the target will draw. Rows end where a step does."""
    model = _target(attention=0.0)
    fast, plain = _fast(model, _knowing(model, VOCABULARY, HIDDEN, width=3, length=4)), _fast(model, "none")
    for options in (GREEDY, SAMPLING):
        fast.stats.reset()
        texts = fast.generate(ROWS, max_new_tokens=16, **options)
        assert texts == plain.generate(ROWS, max_new_tokens=16, **options)
        assert fast.stats.acceptance_histogram == [0, 0, 0, 0, 3 * len(ROWS)]


def test_tokens_are_the_targets_and_what_beams_share_is_verified_once():
    model, length = _target(attention=2.0), 5
    fast = _fast(model, _knowing(model, VOCABULARY, HIDDEN, width=4, length=length))
    plain = _fast(model, "none")
    for options in (GREEDY, SAMPLING):
        fast.stats.reset()
        texts = fast.generate(ROWS, max_new_tokens=20, **options)
        assert texts == plain.generate(ROWS, max_new_tokens=20, **options)
        stats = fast.stats
        assert 0 < stats.num_accepted_draft_tokens < stats.num_draft_tokens < 0.9 * 4 * length * stats.num_spec_steps
        assert stats.num_padding_tokens == 0


def test_the_whole_step_holds_logits_of_one_depth_of_beams_and_no_more():
    """Where nobody samples, verification included; rows and packed tokens count as one here."""
    width, length = 4, 5
    head = RecurrentDrafter(RecurrentConfig(64, zoo.VOCABULARY), width=width, length=length)
    fast = _fast(zoo.toy_model("llama"), head)
    fast.warmup()
    sizes = set()
    for node in fast._step.graph_module.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.shape[-1:] == (zoo.VOCABULARY,):
            is_weight = all(isinstance(size, int) for size in value.shape)
            sizes.add(0 if is_weight else math.prod(map(_with_every_symbol_one, value.shape[:-1])))
    assert max(sizes) == width


def _with_every_symbol_one(size: Any) -> int:
    """A size of a graph, where each that is left open is 1."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, 1)))


def test_it_drafts_for_a_target_in_bfloat16():
    model = _target(attention=1.0).bfloat16()
    fast = _fast(model, _knowing(model, VOCABULARY, HIDDEN))
    assert [len(row) for row in fast.generate(ROWS, max_new_tokens=12)] == [len(row) + 12 for row in ROWS]
    assert fast.stats.num_accepted_draft_tokens > 0
