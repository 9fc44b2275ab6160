"""`bench.acceptance`: which rules meet which drafts, and what its figures are of."""

import pytest

import emssd_compile
from bench import acceptance, shapes
from bench.acceptance import CHAIN, TREE, Drawn
from tests.export.subjects import Small


def test_each_rule_is_measured_with_the_drafts_that_it_verifies():
    found = acceptance.combinations(Small())
    assert {("match", CHAIN), ("match", TREE), ("block", CHAIN), ("rrs", TREE), ("traversal", TREE)} <= {*found}
    assert {("rrs-with-replacement", TREE), ("k-seq", TREE), ("largest-ratio", TREE)} <= {*found}
    assert not {("block", TREE), ("token-level", TREE), ("k-seq", CHAIN), ("greedy", CHAIN)} & {*found}


def test_efficiency_is_tokens_a_row_and_step_and_a_run_repeats():
    fast = emssd_compile.optimize(Small(), Small(), max_batch=2, max_length=64, backend="eager", layout="packed")
    first, second = (acceptance.draw(fast, [[1, 2], [3]], 21, {"do_sample": True, "top_k": 0}) for _ in range(2))
    assert first.efficiency == second.efficiency > 4  # the target itself drafts: 4 drafts and a bonus, but for the ends
    assert first.num_tokens == 42
    assert first.num_steps in (5, 6)  # the first token comes with the prompts


def test_ratios_leave_the_warm_up_out_and_are_within_a_repeat():
    runs = {"greedy": [Drawn(9, 8, 1, 1), Drawn(1, 8, 1, 1), Drawn(2, 8, 1, 1)]}
    runs["draw"] = [Drawn(99, 8, 1, 1), Drawn(3, 8, 2, 1), Drawn(6, 8, 2, 1)]
    assert acceptance.step_ratios(runs) == {"greedy": 1, "draw": 1.5}
    (_, row) = acceptance.summed_up({("none", ""): runs["greedy"], ("match", CHAIN): runs["draw"]})
    assert row.rule == "match"
    assert row.tokens_per_second == pytest.approx(2)
    assert row.speedup == pytest.approx(1 / 3)


def test_a_model_with_rounded_weights_drafts_much_of_what_it_would_say():
    model = shapes.build("tiny-llama")
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    rounded = dict(acceptance.rounded(model, 4).named_parameters())
    changed = {name for name in before if not rounded[name].equal(before[name])}
    assert {name.split(".")[-2] for name in changed} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    }
    for name in changed:
        unit = before[name].abs().amax(1, keepdim=True) / 7
        assert ((rounded[name] - before[name]).abs() <= unit / 2 * 1.001).all()
