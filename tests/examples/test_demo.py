"""`make demo` runs, and its claim that tokens are identical is a comparison."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="the demo models are Hugging Face models")

from bench import timing
from bench.baselines.common import BaselineResult

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "01_demo.py"


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("demo", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo"] = module  # where its dataclass looks itself up
    spec.loader.exec_module(module)
    return module


def test_demo_runs_and_our_tokens_are_the_models_own(tmp_path):
    command = [sys.executable, str(SCRIPT), "--backend", "eager", "--tokens", "12", "--batch", "3", "--repeats", "1"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "COLUMNS": "120", "PYTHONPATH": str(ROOT)},
        check=True,
        capture_output=True,
        text=True,
        timeout=600,
    )
    rows = re.findall(r"│ (ours, [\w ]+?) +│.*│ +(\d+) │ +(yes|NO) +│", done.stdout)
    assert [row[0] for row in rows] == ["ours, without drafts", "ours, prompt lookup", "ours, draft model"]
    assert [row[2] for row in rows] == ["yes"] * 3


def test_one_wrong_token_shows_in_the_table(demo):
    def run(tokens: list[list[int]]) -> BaselineResult:
        return BaselineResult(tokens, seconds=1.0, stats={"num_padding_tokens": 0})

    expected = [[1, 2, 3], [4, 5, 6]]
    wrong = iter([expected, [[1, 2, 3], [4, 5, 7]], expected])  # in the second of three runs only
    candidates = {
        "right": demo.Checked(lambda: run(expected), expected),
        "wrong": demo.Checked(lambda: run(next(wrong)), expected),
    }
    table = demo.results_table(timing.compare(candidates, repeats=2), candidates)
    assert list(table.columns[-1].cells) == ["yes", "NO"]


def test_prompts_are_spread_over_the_held_out_modules(demo):
    assert len(set(demo.read_prompts(8))) == 8
    assert set(demo.read_prompts(8)) < set(demo.read_prompts(32))
    with pytest.raises(SystemExit, match="1 to 32"):
        demo.read_prompts(33)
