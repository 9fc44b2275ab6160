"""The loop around the step: rows start, overlap, end and make room."""

import pytest
import torch

from emssd_compile.runtime.engine import Engine, Request
from tests.exactness.compiled import K, rechunked, target
from tests.exactness.models import prompt
from tests.runtime.engines import graph_engine
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
    for given in engine.run([request]):
        assert given is request
        assert len(seen) < len(given.output) <= len(seen) + K + 1
        assert given.output[: len(seen)] == seen
        seen = list(given.output)
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
    assert max(tokens for tokens, _, _ in engine.sizes_used) <= engine.chunk == 24
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
