"""On local Ray with two workers: the tokens are those of `generate`, also where a worker is killed in the middle."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray.data", reason="not installed: pip install 'emssd_compile[ray]'")

import ray
import ray.data

from emssd_compile.batch.lines import Line, parse_line
from emssd_compile.errors import InvalidInputError
from emssd_compile.ray import Generate, continued
from tests.export.subjects import prompt
from tests.sessions import NEW, SAMPLED, alone, optimized, twin
from tests.test_session_docs import RAY

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module", autouse=True)
def _cluster():
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": environment})
    yield
    ray.shutdown()


def _read(entry: Any, where: str) -> tuple[Any, list[int]]:
    return entry, prompt(entry["length"])


def _lines(count: int) -> list[Line]:
    texts = [json.dumps({"id": f"p{n}", "length": 1 + n % 30}) for n in range(count)]
    lines = [parse_line(text.encode(), n + 1, n, _read) for n, text in enumerate(texts)]
    return [*lines, Line(count + 1, count, "", "bad", error="bad")]


class Mortal:
    """A stopping criterion that kills its process, once in all of them, at a prompt in the middle."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __call__(self, ids: Any, scores: Any) -> bool:
        if ids[0, :17].tolist() == prompt(17) and not self.file.exists():
            self.file.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return False


def test_a_worker_that_is_killed_loses_no_prompt_and_doubles_none(tmp_path):
    pending, killed, count = tmp_path / "pending", tmp_path / "killed", 60
    found = [
        (line, now)
        for line, now in continued(
            _lines(count),
            _read,
            optimized,
            pending,
            workers=2,
            at_a_time=8,
            seed=5,
            max_new_tokens=NEW,
            stopping_criteria=[Mortal(killed)],
            **SAMPLED,
        )
    ]
    assert killed.exists()
    assert not pending.exists()
    assert sorted(line.number for line, _ in found) == [*range(1, count + 2)]
    by_index = {line.index: (line, now) for line, now in found}
    (bad, said) = by_index.pop(count)
    assert (bad.id, said.error, said.finish_reason) == ("bad", "bad", "error")
    prompts = [prompt(1 + n % 30) for n in range(count)]
    expected = twin().generate(prompts, max_new_tokens=NEW, seed=5, **SAMPLED)
    assert [prompts[n] + by_index[n][1].tokens for n in range(count)] == expected
    assert by_index[7][0].prompt == by_index[7][0].entry == {"id": "p7", "length": 8}


def test_the_example_of_the_docs_gives_the_tokens_of_generate():
    (example,) = RAY
    prompts = {f"{n}": prompt(n) for n in range(1, 9)}
    variables: dict[str, Any] = {"prompts": prompts, "make": optimized}
    exec(example, variables)
    texts = {name: [*ids, *variables["texts"][name]] for name, ids in prompts.items()}
    assert texts == {name: alone(ids) for name, ids in prompts.items()}
    assert {*variables["rows"].schema().names} == {"name", "input_ids", "completion_ids", "finish_reason"}


def test_a_batch_without_prompts_is_refused():
    with pytest.raises(InvalidInputError, match='has the columns text; it needs "input_ids"'):
        Generate(optimized)({"text": ["x"]})
