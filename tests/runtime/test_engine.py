"""The loop around the step: rows start, overlap, end and make room; steps hold what their rows want."""

import functools
import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emssd_compile.runtime.admission import Admission
from emssd_compile.runtime.buckets import StepSizes, decode_buckets
from emssd_compile.runtime.engine import Engine
from emssd_compile.runtime.requests import Request
from tests.exactness.compiled import LENGTHS, K, rechunked, target
from tests.exactness.models import prompt
from tests.runtime.engines import ObservedStep, graph_engine, watch
from tests.runtime.tape import TapeDevice

ROWS, NEW = 2, 9


@pytest.fixture(scope="module")
def fast():
    compiled = target("llama", ROWS)
    return compiled.optimize(compiled.drafter("sometimes-wrong"))


@pytest.fixture(params=["lag=0", "lag=1", "graphs"])
def engine(request, fast) -> Engine:
    """Host in step with the device, one step behind it, and one behind with steps captured."""
    if request.param == "graphs":
        return graph_engine(fast, 24, TapeDevice())
    engine = rechunked(fast, 24)._engine
    engine.lag = int(request.param == "lag=1")
    return engine


def _requests(*lengths: int, most: int = NEW) -> list[Request]:
    return [Request(index, torch.tensor(prompt(n)), most) for index, n in enumerate(lengths)]


def _expected(*lengths: int) -> list[list[int]]:
    return [target("llama", ROWS).reference(prompt(n), NEW) for n in lengths]


def test_rows_are_refilled_as_others_end(engine):
    lengths = (5, 33, 1, 70, 17, 2, 40)
    requests = _requests(*lengths)
    for _ in engine.run(requests):
        assert sum(bool(r.output) and not r.finished for r in requests) <= ROWS
    assert [r.output for r in requests] == _expected(*lengths)


def test_the_host_reads_a_step_after_it_launched_as_many_as_it_lags(engine):
    launch, launched = engine.launcher.launch, 0

    def counted(sizes):
        nonlocal launched
        launched += 1
        return launch(sizes)

    engine.launcher.launch = counted
    next(engine.run(_requests(5)))
    assert launched == 1 + engine.lag


def test_every_token_is_handed_out_once_and_in_order(engine):
    (request,) = _requests(33)
    seen: list[int] = []
    for handed in engine.run([request]):
        assert handed is request
        assert len(seen) < len(handed.output) <= len(seen) + K + 1
        assert handed.output[: len(seen)] == seen
        seen = list(handed.output)
    assert [seen] == _expected(33)


def test_a_row_that_the_caller_ends_makes_room(engine):
    lengths = (40, 5, 17)
    requests = _requests(*lengths)
    for request in engine.run(requests):
        if request.index == 0:
            request.finished = True
    assert requests[0].output == _expected(40)[0][: len(requests[0].output)]
    assert len(requests[0].output) < NEW
    assert [r.output for r in requests[1:]] == _expected(*lengths[1:])


def test_a_run_that_is_broken_off_leaves_no_row_behind(engine):
    run = engine.run(_requests(5, 17))
    next(run)
    run.close()
    assert not engine.tensors["active"].any()
    requests = _requests(33, 2)
    list(engine.run(requests))
    assert [r.output for r in requests] == _expected(33, 2)


def test_no_step_is_larger_than_the_chunk(engine):
    requests = _requests(70, 64, 1)
    list(engine.run(requests))
    assert max(sizes.token_range for sizes in engine.sizes_used) <= engine.chunk == 24
    assert [r.output for r in requests] == _expected(70, 64, 1)


def test_sizes_are_exact_where_the_host_is_in_step(fast):
    engine = rechunked(fast, 512)._engine
    assert engine.lag == 0
    list(engine.run(_requests(40, 5, 17)))
    counts, _ = engine.counters()
    assert counts["num_padding_tokens"] == 0


def test_counters_are_reset_when_they_are_read(engine):
    list(engine.run(_requests(5)))
    counts, histogram = engine.counters()
    assert counts["num_emitted_tokens"] == NEW
    assert sum(histogram) == counts["num_spec_steps"] > 0
    counts, histogram = engine.counters()
    assert not any(counts.values())
    assert not any(histogram)


def test_nothing_to_do_launches_nothing(engine):
    engine.launcher.launch = lambda sizes: pytest.fail("launched a step")
    assert list(engine.run([])) == []


class _Later(Admission):
    """Requests that come while others run, and ends."""

    def __init__(self, requests: list[Request], updates: dict[int, Callable[[], object]]) -> None:
        super().__init__(requests)
        self._updates, self._count = updates, 0

    def add(self, *requests: Request) -> None:
        self._requests.extend(requests)

    def update(self) -> None:
        self._updates.get(self._count, lambda: None)()
        self._count += 1


def test_requests_come_in_the_middle_of_a_run_and_an_ended_one_makes_room_in_the_same_step(engine):
    lengths = (40, 5, 17, 33)
    requests = _requests(*lengths)
    rows_of_step: list[tuple[Request | None, ...]] = []
    launch = engine.launcher.launch

    def noted(sizes: StepSizes) -> object:
        rows_of_step.append(engine.requests)
        return launch(sizes)

    engine.launcher.launch = noted
    waiting = _Later(
        requests[:2],
        {3: lambda: requests[0].end(len(requests[0].output), "cancelled"), 4: lambda: waiting.add(requests[3])},
    )
    waiting.add(requests[2])
    list(engine.run(waiting))
    assert [row.index for row in rows_of_step[2] if row] == [0, 1]
    assert [row.index for row in rows_of_step[3] if row] == [2, 1]
    assert [r.output for r in requests[1:]] == _expected(*lengths[1:])
    assert requests[0].output == _expected(40)[0][: len(requests[0].output)]
    assert requests[0].finish_reason == "cancelled"


@pytest.mark.parametrize("lag", [0, 1])
def test_rows_go_on_in_another_form_of_the_step(lag):
    compiled = target("llama", ROWS)
    fast = compiled.optimize(compiled.drafter("sometimes-wrong"))
    fast._engine.lag = lag
    requests = _requests(5, 17, most=20)
    requests[1].options = {"min_new_tokens": 20}
    fast._select({"min_new_tokens"}, hooked=False)  # a row that was busy in it left its own behind
    list(fast._engine.run([Request(0, torch.tensor(prompt(3)), 4, {"min_new_tokens": 4})]))
    fast._select((), hooked=False)
    eos = target("llama", ROWS).reference(prompt(5), 20)[9:10]

    def change() -> None:
        fast._select({"min_new_tokens"}, hooked=False)
        waiting.add(requests[1])

    waiting = _Later(requests[:1], {3: change})
    list(fast._engine.run(waiting, eos))
    reference = target("llama", ROWS).reference
    assert requests[0].output == reference(prompt(5), 20, eos)
    assert requests[1].output == reference(prompt(17), 20, eos, 20)


BATCH = 3


@functools.cache
def _case(layout: str, kind: str, chunk: int, drafter: str = "sometimes-wrong") -> tuple[Engine, list[ObservedStep]]:
    """One engine for many runs, and the steps that it launches."""
    fast = _compiled(layout, drafter)
    if kind == "graphs":
        engine = graph_engine(fast, chunk, TapeDevice())
    else:
        engine = rechunked(fast, chunk)._engine
        engine.lag = int(kind == "lag=1")
    return engine, watch(engine)


@functools.cache
def _compiled(layout: str, drafter: str):
    compiled = target("llama", BATCH)
    return compiled.optimize(compiled.drafter(drafter), layout=layout)


@pytest.mark.parametrize("kind", ["lag=0", "lag=1", "graphs"])
@pytest.mark.parametrize("layout", ["packed", "padded", "auto"])
@settings(max_examples=10)
@given(data=st.data())
def test_every_step_holds_what_its_rows_want(layout, kind, data):
    """Requests come in the middle, prompts are read in chunks, rows are ended by EOS, by the caller and by limits."""
    engine, steps = _case(layout, kind, data.draw(st.sampled_from([1, 24, 512]), label="prefill_chunk"))
    orders = st.tuples(st.sampled_from(LENGTHS), st.integers(1, NEW), st.integers(1, 2 * NEW))
    drawn = data.draw(st.lists(orders, min_size=1, max_size=2 * BATCH + 1), label="length, most, patience")
    eos = data.draw(st.sampled_from([[], target("llama", BATCH).reference(prompt(17), NEW)[3:5]]), label="eos")
    requests = [Request(index, torch.tensor(prompt(n)), most) for index, (n, most, _) in enumerate(drawn)]
    device = getattr(engine.launcher, "_device", None)
    if isinstance(device, TapeDevice):
        device.reports = 0
    steps.clear()

    for request in engine.run(requests, eos):
        if len(request.output) >= drawn[request.index][2]:
            request.finished = True

    for request, (length, most, _) in zip(requests, drawn, strict=True):
        expected = target("llama", BATCH).reference(prompt(length), most, eos)
        assert request.output == expected[: len(request.output)]
    for step in steps:
        assert step.verified == step.drafts, "no draft that was chosen is cut"
        assert step.idle == 0, "every row reads on"
        assert step.sizes.token_range >= min(step.pending + step.drafts, engine.chunk)
        assert sum(min(count, step.sizes.row_range) for count in step.wanted) >= min(
            sum(step.wanted), engine.chunk, step.sizes.token_range
        ), "the budget of a row leaves no place of the step empty"
        assert step.sizes.logit_range >= min(step.active + step.drafts, step.sizes.token_range)
    prefill = sum(-(-n // engine.chunk) for n, _, _ in drawn)
    assert len(steps) <= prefill + sum(min(most, patience) for _, most, patience in drawn) + 2 * len(drawn)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_step_is_as_large_as_its_layout_says_where_the_host_is_in_step(layout):
    engine, steps = _case(layout, "lag=0", 512)
    steps.clear()
    engine.counters()
    list(engine.run(_requests(40, 5, 17, 2)))
    counts, _ = engine.counters()
    for step in steps:
        drafts = step.drafts if layout == "packed" else step.active * K
        assert step.sizes.token_range == step.pending + drafts
    assert counts["num_padding_tokens"] == sum(s.sizes.token_range - s.pending - s.drafts for s in steps)
    assert (counts["num_padding_tokens"] == 0) == (layout == "packed")


@pytest.mark.parametrize("kind", ["lag=1", "graphs"])
def test_with_steps_under_way_there_is_room_for_all_drafts_that_keep_coming(kind):
    """Also in the first steps of a run: that rows which ended drafted nothing must not be taken for a wish."""
    exact, exact_steps = _case("packed", "lag=0", 24, "always-right")
    engine, steps = _case("packed", kind, 24, "always-right")
    for lengths in ((5, 7, 3), (33, 5, 17), (40, 33, 23, 2)):
        for each, seen in ((exact, exact_steps), (engine, steps)):
            seen.clear()
            list(each.run(_requests(*lengths, most=17)))  # one token is left, and none to draft, at the end
        assert sum(step.drafts for step in steps) == sum(step.drafts for step in exact_steps)


def test_a_request_inherits_nothing_that_was_learnt_of_the_one_before_it():
    engine, _ = _case("auto", "lag=0", 512)
    list(engine.run(_requests(5, 33, 17)))
    names = ("policy_row_tried", "policy_row_accepted")
    assert all(engine.tensors[name].any() for name in names)
    engine._admit(Admission(_requests(5, 2)))
    assert all(not engine.tensors[name][:2].any() and engine.tensors[name][2:].any() for name in names)
    engine._clear()


@pytest.mark.parametrize("kind", ["lag=1", "graphs"])
def test_a_prompt_that_was_read_makes_no_later_step_larger(kind):
    engine, steps = _case("packed", kind, 512)
    steps.clear()
    list(engine.run(_requests(5, 33, 17, 70, 2)))
    for before, step in itertools.pairwise(steps):
        if step.pending == step.active and before.active == BATCH:
            assert step.sizes.token_range <= BATCH * (K + 1)


def test_a_warm_up_is_no_larger_than_steps_can_be():
    """One row without drafts never wants two logits: an engine of TensorRT is built for the sizes of decoding."""
    engine = target("llama", 1).optimize(target("llama", 1).drafter("none"), prefill_chunk=16)._engine
    steps = watch(engine)
    engine.warmup()
    assert [step.sizes for step in steps] == [StepSizes(1, 1, 2, 1)] == [*decode_buckets(1, 0)]
