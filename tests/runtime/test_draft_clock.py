"""The drafter runs where tokens come faster with it, and what it costs to find out is bounded."""

import itertools
from typing import Any

import pytest
import torch

import emssd_compile
from emssd_compile.drafters import Drafter, DraftModel, Hybrid, NoDrafter, without
from emssd_compile.layouts import PackedLayout
from emssd_compile.ops import move_kv, ragged_attention
from emssd_compile.optimized_model import OptimizedModel
from emssd_compile.runtime.draft_clock import (
    LONG_WINDOW,
    LONGEST_PAUSE,
    PROBE,
    SHORTEST_PAUSE,
    WINDOW,
    DraftClock,
)
from emssd_compile.runtime.requests import Request
from emssd_compile.runtime.step_times import DISTURBED, StepTimes
from emssd_compile.step.logits import LogitContext, LogitsProcessor, Processed
from emssd_compile.step.parts import PartSizes
from emssd_compile.step.tensor_spec import TensorSpec
from tests.exactness.compiled import NEW_TOKENS, K, target
from tests.exactness.drafters import Oracle
from tests.exactness.models import prompt
from tests.exactness.trained_heads import learn, make_head
from tests.passes.graphs import model_with_attention

ROWS, PLAIN = 4, 0.010
LENGTHS = (5, 33, 1, 70, 17, 2, 40)
REMEMBER = [
    *("block-tree", "mtp-modules"),
    *(pytest.param(case, marks=pytest.mark.long) for case in ("block", "eagle3", "eagle3-tree", "mtp-tree", "peagle")),
]


TURNS = pytest.mark.parametrize(
    ("lag", "tree"),
    [
        pytest.param(
            lag, tree, marks=pytest.mark.long if lag != bool(tree) else (), id=f"{lag}-{'tree' if tree else 'chain'}"
        )
        for lag, tree in itertools.product((0, 1), (None, (2, 2)))
    ],
)


def _clock(**options: bool) -> DraftClock:
    """Plain steps take 10 ms, whatever the rows."""
    plain = StepTimes(ROWS)
    plain.calibrate({1: PLAIN, ROWS: PLAIN})
    return DraftClock(plain, **options)


def _drafting(
    clock: DraftClock, steps: int, *, emitted: int, seconds: float, plain: float = PLAIN, whole: int = ROWS
) -> list[bool]:
    """Whether the drafter ran in each of so many steps, each with this outcome where it did."""
    ran = []
    for _ in range(steps):
        drafted = clock.is_drafting
        ran.append(drafted)
        count, took = (emitted, seconds) if drafted else (ROWS, plain)
        clock.observe(drafted=drafted, num_rows=ROWS, num_whole=whole, worth=count, seconds=took)
    return ran


def test_a_drafter_that_pays_is_never_left_out():
    assert all(_drafting(_clock(), 500, emitted=2 * ROWS, seconds=1.5 * PLAIN))


@pytest.mark.parametrize("cost", [1.1, 1.4, 2.0, 4.0])
def test_a_drafter_that_does_not_pay_is_tried_now_and_then_and_costs_little(cost):
    ran = _drafting(_clock(), 8000, emitted=ROWS, seconds=cost * PLAIN)
    pauses = [len([*group]) for drafted, group in itertools.groupby(ran) if not drafted]
    assert pauses[0] >= PROBE + SHORTEST_PAUSE, "what was seen is judged again by the plain steps, without more of it"
    assert max(pauses) == LONGEST_PAUSE
    assert sum(ran[:4000]) < 0.04 * 4000
    lost = [(cost - 1) * drafted for drafted in itertools.accumulate(ran)]  # in plain steps
    trial = (cost - 1) * (WINDOW + 1)
    assert all(total <= 2 * trial + 0.07 * steps for steps, total in enumerate(lost))
    assert lost[-1] < 0.04 * len(ran)


def test_a_trial_that_lost_little_is_followed_by_a_short_pause():
    """Then a drafter that has just failed, by chance or for a while, is soon back."""
    pauses = {}
    for cost in (1.1, 1.4, 2.0, 4.0):
        ran = _drafting(_clock(), 1000, emitted=ROWS, seconds=cost * PLAIN)
        pauses[cost] = [len([*group]) for drafted, group in itertools.groupby(ran) if not drafted]
    assert pauses[1.1][:3] == [PROBE + SHORTEST_PAUSE, 2 * SHORTEST_PAUSE, 4 * SHORTEST_PAUSE]
    first = [pauses[cost][0] - PROBE for cost in pauses]
    assert first == sorted(first)
    assert first[0] == SHORTEST_PAUSE < first[2] < 2 * SHORTEST_PAUSE < first[3]


def test_a_drafter_that_pays_by_what_plain_steps_take_is_left_out_for_a_few_only():
    """With texts in their rows they take twice what they took without."""
    ran = _drafting(_clock(), 500, emitted=2 * ROWS, seconds=2.5 * PLAIN, plain=2 * PLAIN)
    assert ran.count(False) == PROBE
    assert all(ran[-400:])


def test_the_first_plain_step_after_others_does_not_count():
    """It fetches its weights. Here it takes three times what the others do, by which the drafter does not pay."""
    clock = _clock()
    _drafting(clock, WINDOW + 1, emitted=ROWS, seconds=1.3 * PLAIN)
    assert not clock.is_drafting
    _drafting(clock, 1, emitted=ROWS, seconds=1.3 * PLAIN, plain=3 * PLAIN)
    assert not clock.plain.is_observed
    _drafting(clock, PROBE - 1, emitted=ROWS, seconds=1.3 * PLAIN)
    assert clock.plain.expected(ROWS) == pytest.approx(PLAIN)
    assert not clock.is_drafting


def test_a_slow_drafter_does_not_hide_behind_tokens_that_it_gains():
    ran = _drafting(_clock(), 500, emitted=3 * ROWS, seconds=4 * PLAIN)
    assert ran.count(True) < 60


def test_a_drafter_that_becomes_better_comes_back():
    clock = _clock()
    _drafting(clock, 200, emitted=ROWS, seconds=2 * PLAIN)
    ran = _drafting(clock, 2 * LONGEST_PAUSE, emitted=3 * ROWS, seconds=2 * PLAIN)
    assert all(ran[-WINDOW:])


def test_one_that_remembers_comes_back_with_a_new_row():
    """But the few steps that show what plain ones take are not missed: if it pays by those, its rows count as whole."""
    clock = _clock(remembers=True)
    _drafting(clock, LONG_WINDOW // 2 + 1, emitted=ROWS, seconds=2 * PLAIN)
    assert (clock.is_drafting, clock.is_missed) == (False, False), "plain steps are tried"
    assert not any(_drafting(clock, 1000, emitted=ROWS, seconds=2 * PLAIN)), "no row is new"
    assert clock.is_missed
    clock.see_new_row()
    assert (clock.is_drafting, clock.is_missed) == (True, False)
    _drafting(clock, LONG_WINDOW + 2, emitted=ROWS, seconds=2 * PLAIN)
    clock.see_new_row()
    assert not clock.is_drafting, "the pause is not over"
    _drafting(clock, LONGEST_PAUSE, emitted=ROWS, seconds=2 * PLAIN)
    clock.see_new_row()
    assert all(_drafting(clock, 100, emitted=3 * ROWS, seconds=2 * PLAIN))


def test_one_that_remembers_is_judged_by_whole_rows_and_left_out_without_any():
    clock = _clock(remembers=True)
    assert all(_drafting(clock, 200, emitted=2, seconds=1.5 * PLAIN, whole=1))
    assert _drafting(clock, 3, emitted=0, seconds=1.5 * PLAIN, whole=0) == [True, False, False]
    clock.see_new_row()
    assert clock.is_drafting, "it was not the drafter's fault"


def test_one_that_remembers_is_not_left_out_for_a_streak_of_bad_luck():
    """It gains a tenth; every fourth streak of ten steps it gains nothing."""
    clock = _clock(remembers=True)
    for streak in range(40):
        emitted = ROWS if streak % 4 == 3 else 2 * ROWS
        assert all(_drafting(clock, 10, emitted=emitted, seconds=1.6 * PLAIN))


def test_steps_that_were_launched_before_the_last_change_say_nothing():
    clock = _clock()
    _drafting(clock, WINDOW + 2, emitted=ROWS, seconds=2 * PLAIN)
    assert not clock.is_drafting
    for _ in range(LONGEST_PAUSE):
        clock.observe(drafted=True, num_rows=ROWS, num_whole=ROWS, worth=9 * ROWS, seconds=PLAIN)
    assert not clock.is_drafting


def _engine_of(drafter: Drafter) -> OptimizedModel:
    fast = target("llama", ROWS).optimize(drafter, layout="auto")
    fast.warmup()
    return fast


def _take_turns(drafter: Drafter, lag: int) -> None:
    """Steps with the drafter and without it take turns, whatever the clock would say; the tokens stay."""
    fast = _engine_of(drafter)
    engine, turn = fast._engine, itertools.cycle([True] * 3 + [False] * 5)
    engine.lag = lag
    assert engine.clock is not None
    engine.clock.observe = lambda **seen: setattr(engine.clock, "is_drafting", next(turn))  # type: ignore[method-assign]
    requests = [Request(i, torch.tensor(prompt(n)), NEW_TOKENS) for i, n in enumerate(LENGTHS)]
    seen = 0
    for _ in engine.run(requests):
        seen = max(seen, *(row.unseen for row in engine._rows if row))
    assert [r.output for r in requests] == [target("llama", ROWS).reference(prompt(n), NEW_TOKENS) for n in LENGTHS]
    assert seen > 0, "some tokens were fed by steps without the drafter"
    assert fast._engine.counters()[0]["num_accepted_draft_tokens"] > 0, "it drafts again afterwards"


@TURNS
def test_steps_with_and_without_the_drafter_take_turns_and_the_tokens_stay(lag, tree):
    """Rows that came, read their prompts and decoded while the drafter did not run are read by it when it does."""
    model = target("llama", ROWS).model
    _take_turns(DraftModel(model, K) if tree is None else DraftModel(model, tree=tree), lag)


def _texts() -> list[list[int]]:
    return [[*prompt(n), *target("llama", ROWS).reference(prompt(n), NEW_TOKENS)] for n in LENGTHS]


def _hybrid(*, wrong_of_seven: int = 0, tree: tuple[int, ...] | None = None) -> Hybrid:
    """What is for free before a draft model that is always right; it drafts right, or none, or wrong."""
    model, ahead = target("llama", ROWS).model, Oracle(_texts(), 128, 5, wrong_of_seven=wrong_of_seven, ragged=True)
    return Hybrid(ahead, DraftModel(model, K) if tree is None else DraftModel(model, tree=tree), threshold=0)


@TURNS
def test_what_is_cheap_of_a_hybrid_drafts_in_plain_steps_too(lag, tree):
    """The draft model reads afterwards what it has missed, accepted drafts among it, and the tokens stay."""
    _take_turns(_hybrid(tree=tree), lag)


def test_a_hybrid_that_is_left_out_runs_no_op_of_what_is_costly_and_verifies_what_is_not():
    hybrid = _hybrid()
    fast = _engine_of(hybrid)
    clock = fast._engine.clock
    assert clock is not None
    clock.is_drafting = False
    drafted: list[bool] = []
    clock.observe = lambda **step: drafted.append(step["drafted"])  # type: ignore[method-assign]
    assert fast.generate([prompt(n) for n in LENGTHS], max_new_tokens=NEW_TOKENS) == _texts()
    assert fast.stats.num_accepted_draft_tokens == fast.stats.num_draft_tokens > 0
    assert drafted
    assert not any(drafted), "no step ran the draft model"
    undrafted = fast._step.without_drafts(NoDrafter(), PackedLayout().policy())
    assert undrafted is not None
    cheap, none, whole = (
        [node for node in step.graph_module.graph.nodes if node.target == ragged_attention]
        for step in (fast._step.drafting_by(without(hybrid)), undrafted, fast._step)
    )
    assert len(cheap) == len(none) < len(whole), "layers of the target, and of the draft model"


@pytest.mark.parametrize(("wrong", "threshold"), [(0, 0.0), (7, 9.0)], ids=["free", "costly"])
def test_drafts_that_are_free_say_nothing_for_the_drafter(wrong, threshold):
    """Steps that emit by drafts that are free are worth as many plain steps; by others, one for each token."""
    hybrid = _hybrid(wrong_of_seven=wrong)
    hybrid.threshold = threshold
    fast = _engine_of(hybrid)
    assert fast._engine.clock is not None
    seen: list[tuple[float, int]] = []
    fast._engine.clock.observe = lambda **step: seen.append((step["worth"], step["num_whole"]))  # type: ignore[method-assign]
    ids = prompt(5)
    fast.generate([ids], max_new_tokens=NEW_TOKENS)
    assert fast.stats.num_accepted_draft_tokens > 0
    worth = sum(worth for worth, _ in seen)
    assert worth == (NEW_TOKENS if threshold else len(seen))


@pytest.mark.parametrize("case", REMEMBER)
@pytest.mark.parametrize("lag", [0, pytest.param(1, marks=pytest.mark.long)])
def test_heads_that_lack_what_they_missed_change_no_token(lag, case):
    """Their caches have holes then, or what another text left there."""
    head = make_head("llama", case)
    learn(head, "llama")
    assert head.remembers_features
    _take_turns(head, lag)


def test_rows_that_decode_without_a_head_that_remembers_are_not_whole_and_new_ones_bring_it_back():
    head = make_head("llama", "eagle3")
    learn(head, "llama")
    fast = _engine_of(head)
    engine, clock = fast._engine, fast._engine.clock
    assert clock is not None
    clock.is_drafting, clock.is_missed, clock._left = False, True, 1
    clock.observe = lambda **seen: setattr(clock, "_left", 0)  # type: ignore[method-assign]
    requests = [Request(i, torch.tensor(prompt(n)), NEW_TOKENS) for i, n in enumerate(LENGTHS)]
    seen = {(clock.is_drafting, *{row.is_whole for row in engine._rows if row}) for _ in engine.run(requests)}
    assert [r.output for r in requests] == [target("llama", ROWS).reference(prompt(n), NEW_TOKENS) for n in LENGTHS]
    assert seen >= {(False, False), (True, False, True)}
    assert fast._engine.counters()[0]["num_draft_tokens"] > 0


class _Counting(LogitsProcessor):
    """Keeps a tensor as wide as the drafts."""

    def tensors(self, sizes: PartSizes) -> dict[str, TensorSpec]:
        return {"seen": TensorSpec((sizes.rows, sizes.num_draft_tokens + 1), torch.int64)}

    def forward(self, context: LogitContext) -> Processed:
        return Processed(context.logits, {"seen": context.state["seen"] + 1})


def _optimize(drafter: DraftModel | str, **options: Any) -> OptimizedModel:
    torch.manual_seed(0)
    model = model_with_attention()
    return emssd_compile.optimize(model, drafter, max_batch=2, max_length=24, backend="eager", **options)


@pytest.mark.parametrize(
    ("tree", "acceptance"),
    [(None, "token-level"), *(pytest.param((2, 2), rule, marks=pytest.mark.long) for rule in ("match", "rrs"))],
)
def test_a_drafter_that_is_left_out_leaves_the_step_of_a_model_without_one(tree, acceptance):
    """It has no ops for drafts, and gives the same tokens, scores and counts."""
    small = model_with_attention()
    drafter = DraftModel(small, K) if tree is None else DraftModel(small, tree=tree)
    fast, never = _optimize(drafter, acceptance=acceptance), _optimize("none", acceptance=acceptance)
    clock = fast._engine.clock
    assert clock is not None
    clock.is_drafting = False
    clock.observe = lambda **seen: None  # type: ignore[method-assign]
    for options in ({}, {"do_sample": True, "seed": 3}):
        asked: dict[str, Any] = {"max_new_tokens": 5, "output_scores": True, **options}
        given, expected = (
            each.generate([[3, 1, 4], [9], [2, 6, 5, 3]], return_dict_in_generate=True, **asked)
            for each in (fast, never)
        )
        assert given.sequences == expected.sequences
        for mine, theirs in zip(given.scores, expected.scores, strict=True):
            torch.testing.assert_close(mine, theirs)
    assert fast.stats.num_draft_tokens == 0

    undrafted = fast._step.without_drafts(without(drafter), PackedLayout().policy())
    assert undrafted is not None
    ops = [node for node in undrafted.graph_module.graph.nodes if node.op == "call_function"]
    assert not [node for node in ops if node.target == move_kv or node.kwargs.get("ancestors") is not None]
    plain = [node for node in never._step.graph_module.graph.nodes if node.op == "call_function"]
    assert len(ops) <= len(plain) + 20


def test_a_part_whose_tensors_are_as_wide_as_the_drafts_keeps_the_drafter_in():
    prompts, small = [[3, 1, 4], [9]], model_with_attention()
    fast, never = _optimize(DraftModel(small, K), processors=[_Counting()]), _optimize("none")
    assert fast._engine.clock is None
    assert fast.generate(prompts, max_new_tokens=6) == never.generate(prompts, max_new_tokens=6)


def test_what_was_learnt_outlasts_calls_and_other_forms_of_the_step():
    fast, reference = _engine_of(DraftModel(target("llama", ROWS).model, K)), target("llama", ROWS).reference
    clock = fast._engine.clock
    assert clock is not None
    measured = clock.plain.table()
    assert float(measured.max()) < 1.0, "seconds, and not what stands there before anything is measured"
    clock.observe = lambda **seen: setattr(clock, "is_drafting", False)  # type: ignore[method-assign]
    for options in ({}, {}, {"min_new_tokens": 2}, {"logits_hook": lambda context: context.logits}, {}):
        ids = prompt(5)
        assert fast.generate([ids], max_new_tokens=6, **options) == [[*ids, *reference(ids, 6)]]
        if "logits_hook" in options:
            assert fast._engine.clock is None, "this form has no steps without the drafter"
        else:
            assert fast._engine.clock is clock
    assert not clock.is_drafting
    assert torch.equal(clock.plain.table(), measured)


def test_a_step_that_something_else_has_held_up_says_little_against_the_drafter():
    """As it says little against plain steps."""
    fast = _engine_of(DraftModel(target("llama", ROWS).model, K))
    engine, seen = fast._engine, []
    assert engine.clock is not None
    engine.clock.observe = lambda **step: seen.append(step["seconds"])  # type: ignore[method-assign]
    engine.times.expected = lambda tokens: 1e-9  # type: ignore[method-assign]
    fast.generate([prompt(5)], max_new_tokens=6)
    assert seen
    assert set(seen) == {DISTURBED * 1e-9}


def test_layouts_without_a_clock_always_run_the_drafter():
    fast = target("llama", ROWS).optimize(DraftModel(target("llama", ROWS).model, K), layout="packed")
    assert fast._engine.clock is None
