"""Sessions: requests come and go while others decode, and each gets what `generate` gives it alone."""

import asyncio
import random
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from emssd_compile.errors import CapacityError, InvalidInputError, OptionError, QueueFullError
from emssd_compile.stream import Stream
from tests.export.subjects import prompt
from tests.sessions import LENGTH, NEW, ROWS, SAMPLED, WAIT, alone, fast, held, optimized, twin


def _orders(count: int, seed: int) -> list[tuple[list[int], dict[str, Any]]]:
    """Prompts of many lengths, greedy ones beside sampled ones and some with penalties."""
    draw = random.Random(seed)
    kinds = [{}, {}, SAMPLED | {"seed": draw.randrange(99)}, {"repetition_penalty": 1.3}]
    return [
        (prompt(draw.randint(1, 30)), {"max_new_tokens": draw.randint(1, 20), **draw.choice(kinds)})
        for _ in range(count)
    ]


@pytest.mark.parametrize("seed", range(3))
def test_each_request_gets_what_generate_gives_it_alone_whenever_it_comes_and_whoever_leaves(seed):
    draw = random.Random(seed)
    with fast().session(max_queue=100) as session:
        streams = []
        for ids, options in _orders(25, seed):
            stream = session.submit(ids, **options)
            streams.append((stream, ids, options, draw.random() < 0.25))
            time.sleep(draw.choice([0, 0, 0.01]))
            leaver, *_, leaves = draw.choice(streams)
            if leaves:
                leaver.cancel()
    for stream, ids, options, leaves in streams:
        whole = alone(ids, **options)
        assert stream.finish_reason == "length" or (leaves and stream.finish_reason == "cancelled")
        assert stream.result() == [*ids, *stream.tokens] == whole[: len(ids) + len(stream.tokens)]
        assert stream.finish_reason == "cancelled" or stream.result() == whole
    assert fast().generate([prompt(9)], max_new_tokens=NEW) == [alone(prompt(9))], "generate works as before"


def test_threads_and_event_loops_submit_and_read_together():
    orders = _orders(24, 7)

    async def read(session, ids, options):
        return [*ids, *[token async for token in session.submit(ids, **options)]]

    async def gather(session, some):
        return await asyncio.gather(*(read(session, *order) for order in some))

    def loop(session, some):
        return asyncio.run(gather(session, some))

    def iterate(session, some):
        return [[*ids, *session.submit(ids, **options)] for ids, options in some]

    with fast().session(max_queue=100) as session, ThreadPoolExecutor(4) as pool:
        parts = [orders[i::4] for i in range(4)]
        jobs = [pool.submit(way, session, part) for way, part in zip([loop, iterate] * 2, parts, strict=True)]
        found = [job.result(WAIT) for job in jobs]
    assert found == [[alone(ids, **options) for ids, options in part] for part in parts]


def test_every_reader_gets_all_tokens():
    expected = alone(prompt(7))
    with fast().session() as session, ThreadPoolExecutor(3) as pool:
        with held(session):
            stream = session.submit(prompt(7), max_new_tokens=NEW)
            jobs = [
                pool.submit(list, stream),
                pool.submit(asyncio.run, _read(stream)),
                pool.submit(stream.result, WAIT),
            ]
            with pytest.raises(TimeoutError, match="it goes on"):
                stream.result(0.05)
            assert not any(job.done() for job in jobs)
        assert [job.result(WAIT) for job in jobs] == [expected[7:], expected[7:], expected]
        assert list(stream) == expected[7:], "also afterwards"


async def _read(stream: Stream) -> list[int]:
    return [token async for token in stream]


def test_requests_start_in_the_order_they_came_and_a_free_row_does_not_stay_empty():
    started: list[int] = []

    class Notes:
        def __init__(self, number: int) -> None:
            self.number, self.is_prompt = number, True

        def put(self, value: torch.Tensor) -> None:
            if self.is_prompt:
                started.append(self.number)
            self.is_prompt = False

        def end(self) -> None:
            started.append(-self.number)

    with fast().session() as session, held(session, max_new_tokens=1):
        long = session.submit(prompt(3), max_new_tokens=50, streamer=Notes(1))
        for number in range(2, 6):
            session.submit(prompt(number), max_new_tokens=2, streamer=Notes(number))
    assert long.done
    assert [number for number in started if number > 0] == [1, 2, 3, 4, 5]
    assert started[-1] == -1, "short requests came and went beside the long one"


def test_a_cancelled_request_frees_its_row_for_the_next_step():
    with fast().session() as session, held(session, max_new_tokens=40) as first:
        second = session.submit(prompt(3), max_new_tokens=40)
        third = session.submit(prompt(4), max_new_tokens=2)
        first.cancel()
        second.cancel()
    assert (first.finish_reason, second.finish_reason, third.finish_reason) == ("cancelled", "cancelled", "length")
    assert len(first.tokens) <= 5, "what the step under way gave"
    assert third.result() == alone(prompt(4), max_new_tokens=2)


def test_a_full_queue_refuses_or_waits_for_room():
    with fast().session(max_queue=1) as session:
        with held(session) as first:
            others = [session.submit(prompt(2), max_new_tokens=NEW) for _ in range(ROWS)]
            with pytest.raises(QueueFullError, match="1 requests wait for a row already"):
                session.submit(prompt(3), max_new_tokens=1)
            began = time.monotonic()
            with pytest.raises(QueueFullError):
                session.submit(prompt(3), max_new_tokens=1, timeout=0.2)
            assert time.monotonic() - began >= 0.2
            others[-1].cancel()
        assert session.submit(prompt(3), max_new_tokens=1, timeout=WAIT).result(WAIT) == alone(
            prompt(3), max_new_tokens=1
        )
    assert first.result() == alone(prompt(5))


def test_what_ended_it_and_what_it_took_is_told():
    ids, whole = prompt(6), alone(prompt(6))
    with fast().session() as session:
        by_eos = session.submit(ids, max_new_tokens=NEW, eos_token_id=whole[8])
        by_length = session.submit(ids, max_new_tokens=NEW)
        by_stop = session.submit(ids, max_new_tokens=NEW, stopping_criteria=[lambda ids, scores: ids.shape[1] == 9])
        by_time = session.submit(ids, max_new_tokens=NEW, max_time=0)
    assert by_eos.result() == alone(ids, eos_token_id=whole[8]) == whole[: whole.index(whole[8], 6) + 1]
    assert by_stop.result() == whole[:9]
    assert by_time.result() == whole[:7]
    assert [s.finish_reason for s in (by_eos, by_length, by_stop, by_time)] == ["eos", "length", "stop", "deadline"]
    stats = by_length.stats
    assert stats.num_tokens == NEW
    assert stats.time_to_first_token is not None
    assert stats.seconds is not None
    assert 0 < stats.time_to_first_token <= stats.seconds < WAIT
    twin_stats = _stats_alone(ids)
    assert stats.num_steps == twin_stats.num_row_steps
    assert stats.num_draft_tokens == twin_stats.num_draft_tokens
    assert 0 <= twin_stats.num_accepted_draft_tokens - stats.num_accepted_draft_tokens <= 1
    assert stats.mean_acceptance_length == 1 + stats.num_accepted_draft_tokens / stats.num_steps


def _stats_alone(ids: list[int]) -> Any:
    fast().stats.reset()
    fast().generate([ids], max_new_tokens=NEW)
    return fast().stats


def test_a_deadline_is_noticed_while_nobody_asks_for_anything():
    def slow(ids: object, scores: object) -> bool:
        time.sleep(0.01)
        return False

    with fast().session() as session:
        time.sleep(0.05)  # its thread waits for the first request
        stream = session.submit(prompt(4), max_new_tokens=50, stopping_criteria=[slow], deadline=0.1)
        assert stream.result(WAIT) == alone(prompt(4), max_new_tokens=50)[: 4 + len(stream.tokens)]
    assert (stream.finish_reason, len(stream.tokens) < 50) == ("deadline", True)


def test_a_deadline_ends_what_waits_and_what_runs_with_what_it_has():
    with fast().session() as session, held(session, deadline=0.1) as running:
        beside = session.submit(prompt(2), max_new_tokens=50)
        waiting = session.submit(prompt(9), max_new_tokens=NEW, deadline=0.1)
        patient = session.submit(prompt(9), max_new_tokens=NEW, deadline=1000)
        time.sleep(0.15)
    assert (running.finish_reason, waiting.finish_reason, patient.finish_reason) == ("deadline", "deadline", "length")
    assert waiting.result() == prompt(9)
    assert running.result() == alone(prompt(5))[: len(running.result())]
    assert 0 < len(running.tokens) < NEW
    assert beside.result() == alone(prompt(2), max_new_tokens=50)


@pytest.mark.parametrize(
    ("ids", "options", "error", "message"),
    [
        (prompt(60), {"max_new_tokens": 10}, CapacityError, "60 prompt tokens and 10 new ones"),
        (prompt(LENGTH), {"max_new_tokens": 1}, CapacityError, "no room"),
        ([], {"max_new_tokens": 1}, InvalidInputError, "empty prompt"),
        ([[1, 2]], {"max_new_tokens": 1}, InvalidInputError, "2 dimensions"),
        ([1], {"max_new_tokens": 1, "max_new_token": 1}, OptionError, "no option 'max_new_token'"),
        ([1], {"max_new_tokens": 1, "progress": True}, OptionError, "no option 'progress'"),
        ([1], {"max_new_tokens": 1, "deadline": -1}, OptionError, "deadline"),
        ([1], {"max_new_tokens": 1, "timeout": "soon"}, OptionError, "timeout"),
        ([1], {"max_new_tokens": 1, **SAMPLED, "num_return_sequences": 2}, OptionError, "a stream is one text"),
        ([1], {"max_new_tokens": 1, "num_beams": 2}, NotImplementedError, "num_beams"),
    ],
)
def test_what_generate_would_refuse_is_refused_at_once(ids, options, error, message):
    with fast().session() as session, pytest.raises(error, match=message):
        session.submit(ids, **options)


def test_a_warning_points_at_the_submit():
    with fast().session() as session, pytest.warns(UserWarning, match="no length was asked for") as warned:
        session.submit([1])
    assert [warning.filename for warning in warned] == [__file__]


def test_the_prompts_kind_and_what_probes_told_come_back():
    ids = torch.tensor(prompt(5))
    with fast().session() as session:
        tensor = session.submit(ids, max_new_tokens=NEW)
        array = session.submit(ids.numpy(), max_new_tokens=NEW)
        told = session.submit(prompt(5), max_new_tokens=NEW, logprobs=True, return_dict_in_generate=True)
    assert torch.equal(tensor.result(), torch.tensor(alone(prompt(5))))
    assert array.result().tolist() == alone(prompt(5))
    assert told.result().sequences == [alone(prompt(5))]
    expected = fast().generate([prompt(5)], max_new_tokens=NEW, logprobs=True, return_dict_in_generate=True)
    torch.testing.assert_close(told.result()["logprobs"], expected["logprobs"], rtol=1e-5, atol=1e-5)


def test_python_that_changes_logits_sees_its_own_request_alone():
    def allowed(own: int) -> Any:
        def ids(batch_id: int, text: torch.Tensor) -> list[int]:
            assert batch_id == 0
            assert text[: len(prompt(own))].tolist() == prompt(own)
            return [token for token in range(48) if (token + int(text.sum()) + own) % 3]

        return ids

    def hook(context: Any) -> torch.Tensor:
        assert set(context.row_ids.tolist()) == {0}
        assert context.history.shape[0] == 1
        return context.logits.flip(1)

    lengths = (4, 9, 3, 11)
    with fast().session() as session:
        plain = session.submit(prompt(8), max_new_tokens=30)
        streams = [session.submit(prompt(n), max_new_tokens=NEW, prefix_allowed_tokens_fn=allowed(n)) for n in lengths]
        flipped = session.submit(prompt(6), max_new_tokens=NEW, logits_hook=hook)
    assert plain.result() == alone(prompt(8), max_new_tokens=30)
    for n, stream in zip(lengths, streams, strict=True):
        assert [stream.result()] == fast().generate(
            [prompt(n)], max_new_tokens=NEW, prefix_allowed_tokens_fn=allowed(n)
        )
    assert [flipped.result()] == fast().generate(
        [prompt(6)], max_new_tokens=NEW, logits_hook=lambda context: context.logits.flip(1)
    )


def _many(session: Any, count: int) -> None:
    for number in range(count):
        ids = prompt(1 + number % 5)
        stream = session.submit(ids, max_new_tokens=1 + number % 3, timeout=None)
        if number % 7 == 0:
            stream.cancel()
        elif number % 50 == 1:
            assert stream.result(WAIT) == alone(ids, max_new_tokens=1 + number % 3)


def test_memory_is_flat_over_many_requests():
    with fast().session(max_queue=8) as session:
        _many(session, 100)
        tracemalloc.start()
        _many(session, 100)
        before = tracemalloc.get_traced_memory()[0]
        _many(session, 300)
        grown = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
    assert grown < 120_000, "bytes; a kept request would be some thousands each"


@pytest.mark.long
def test_ten_thousand_requests():
    with fast().session(max_queue=8) as session:
        _many(session, 10_000)


def test_options_of_a_session_are_in_its_steps_from_the_start():
    fresh = optimized()
    with fresh.session(do_sample=True, repetition_penalty=2.0) as session:
        greedy = session.submit(prompt(6), max_new_tokens=NEW)
        assert greedy.result() == alone(prompt(6))
        forms = len(fresh._forms)
        streams = [session.submit(prompt(n), max_new_tokens=NEW, seed=n, **SAMPLED) for n in (3, 4)]
        penalised = session.submit(prompt(5), max_new_tokens=NEW, repetition_penalty=1.3)
        assert [stream.result() for stream in streams] == [alone(prompt(n), seed=n, **SAMPLED) for n in (3, 4)]
        assert penalised.result() == alone(prompt(5), repetition_penalty=1.3)
        assert len(fresh._forms) == forms, "no other form was compiled"
    for options, message in (({"max_new_tokens": 3}, "asks for no form"), ({"top_p": 0.5}, "without do_sample=True")):
        with pytest.raises(OptionError, match=message):
            fresh.session(**options)
    fresh.generate([prompt(1)], max_new_tokens=1)  # no session was left open


def test_what_probes_tell_comes_with_each_token():
    asked: dict[str, Any] = {
        "logprobs": True,
        "top_logprobs": 2,
        "return_dict_in_generate": True,
        "max_new_tokens": NEW,
    }
    with fast().session() as session:
        stream = session.submit(prompt(5), **asked)
        lines = []
        for count, _ in enumerate(stream):
            if count == 0:
                told = zip(stream.told("logprobs"), stream.told("top_logprobs"), strict=True)
            lines.append(next(told))
        out = stream.result()
    assert len(lines) == NEW
    assert torch.stack([line for line, _ in lines]).equal(out.logprobs[0])
    assert torch.stack([top[:2] for _, top in lines]).equal(out.top_logprobs[0])


def test_a_session_says_how_many_run_and_wait():
    with fast().session() as session:
        assert (session.num_rows, session.capacity, session.num_requests) == (ROWS, LENGTH, (0, 0))
        with held(session):
            for _ in range(3):
                session.submit(prompt(2), max_new_tokens=1)
            assert session.num_requests == (1, 3)
    assert session.num_requests == (0, 0)


def test_how_many_drafts_were_accepted_in_a_step_is_counted():
    ids, bias = prompt(6), {7: 100.0}  # the same token again and again, which prompt lookup drafts
    twin().stats.reset()
    twin().generate([ids], max_new_tokens=NEW, logit_bias=bias)
    with fast().session() as session:
        stream = session.submit(ids, max_new_tokens=NEW, logit_bias=bias)
    stats, own = stream.stats, twin().stats
    histogram = stats.acceptance_histogram
    assert sum(histogram) == own.num_spec_steps
    assert sum(i * count for i, count in enumerate(histogram)) == stats.num_accepted_draft_tokens > 0
    last = {
        i: a - b
        for i, (a, b) in enumerate(zip(own.acceptance_histogram, [*histogram, *[0] * 9], strict=False))
        if a != b
    }
    assert len(last) in (0, 2), "but for a last draft that no token followed"
