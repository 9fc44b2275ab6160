"""Workers as processes: what they answer, and what is said of those that fail."""

import os
import sys
from functools import partial
from pathlib import Path

import pytest

from bench.peers.worker import Worker, WorkerError, convert, serving

FAKE = "tests.bench.peers.fake_worker"
python = Path(sys.executable)


@pytest.fixture
def start(tmp_path):
    (tmp_path / "counted").touch()

    def start(way, time_limit=60):
        return Worker(serving(python, FAKE, tmp_path, {"way": way}), dict(os.environ), time_limit)

    return start


def test_a_worker_answers_ids_with_ids_and_what_it_prints_is_no_answer(start):
    ballast = b"x" * 2**28  # memory of this process is none of the worker's
    with start("right") as worker:
        assert worker.version == "fake 1"
        assert worker.ready_seconds > 0
        for _ in range(2):
            answer = worker.decode([[1, 2], [7]], 3)
            assert answer.tokens == [[3, 4, 5], [8, 9, 10]]
            assert answer.seconds > 0
            assert 2**20 < answer.peak < len(ballast)


@pytest.mark.parametrize(
    ("way", "reason"),
    [("dying", "it ended with status 3: out of everything"), ("failing", "RuntimeError: one row only")],
)
def test_a_worker_that_fails_says_why(start, way, reason):
    with start(way) as worker, pytest.raises(WorkerError, match=reason):
        worker.decode([[1], [2]], 2)


def test_one_that_has_ended_is_asked_no_more(start):
    with start("dying") as worker:
        for _ in range(2):
            with pytest.raises(WorkerError, match="ended with status 3"):
                worker.decode([[1]], 2)


@pytest.mark.parametrize(
    ("way", "limit", "reason"),
    [("unready", 60, "RuntimeError: too small a machine"), ("slow", 0.01, r"no answer within 0\.01 s")],
)
def test_one_that_does_not_get_ready_is_ended(start, way, limit, reason):
    with pytest.raises(WorkerError, match=reason):
        start(way, limit)


def test_a_model_is_converted_whole_or_not_at_all(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    (source / "config.json").touch()
    make = partial(convert, python, FAKE, source, target)
    with pytest.raises(WorkerError, match="ValueError: it has no bfloat16"):
        make("bfloat16")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    make("float32")
    assert (target / "counted").read_text() == "['config.json']"
    with pytest.raises(WorkerError, match="No module named absent"):
        convert(python, "absent", source, target, "float32")
