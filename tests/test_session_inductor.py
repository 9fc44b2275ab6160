"""A session on compiled code: requests join and leave, and each gets what `generate` gives it alone."""

import random
import time

import pytest

from tests.export.subjects import prompt
from tests.sessions import WAIT, alone, optimized


@pytest.mark.long  # compiles for a minute
def test_requests_join_and_leave_compiled_steps():
    draw, fast = random.Random(0), optimized(backend="inductor")
    fast.warmup()
    orders = [(1 + number * 5 % 30, draw.choice([1, 3, 8, 20])) for number in range(24)]
    with fast.session(max_queue=len(orders)) as session:
        streams = []
        for number, (length, count) in enumerate(orders):
            streams.append(session.submit(prompt(length), max_new_tokens=count))
            if number % 6 == 5:
                streams[-1].cancel()
            if number % 5 == 4:
                streams[number - 2].result(WAIT)  # rows fall empty before others come
                time.sleep(0.01)
    for stream, (length, count) in zip(streams, orders, strict=True):
        whole = alone(prompt(length), max_new_tokens=count)
        if stream.finish_reason == "cancelled":
            assert stream.result() == whole[: len(stream.result())]
        else:
            assert stream.result() == whole
    assert {stream.finish_reason for stream in streams} == {"length", "cancelled"}
    lengths = [length for length, _ in orders]
    assert fast.generate([prompt(n) for n in lengths], max_new_tokens=5) == [
        alone(prompt(n), max_new_tokens=5) for n in lengths
    ]
