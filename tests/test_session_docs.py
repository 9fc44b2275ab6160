"""What docs/embedding.md shows of sessions is true: its examples run, are short, and give the tokens of `generate`."""

import asyncio
import re
from pathlib import Path
from typing import Any

from tests.export.subjects import prompt
from tests.sessions import WAIT, alone, fast

TEXT = (Path(__file__).parents[1] / "docs" / "embedding.md").read_text()
SESSIONS, *_ = TEXT.split("\n## ")
PYTHON = re.compile(r"^```python\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
ALL, EXAMPLES = PYTHON.findall(TEXT), PYTHON.findall(SESSIONS)  # the others are run where what they need is
RAY = [example for example in ALL if "emssd_compile.ray" in example]
COMMANDS = re.findall(r"^```bash\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)


def test_the_examples_are_few_and_short():
    assert (len(EXAMPLES), len(RAY), len(COMMANDS)) == (2, 1, 2)
    assert all(len(example.splitlines()) < 15 for example in (*ALL, *COMMANDS))


def test_the_examples_give_the_tokens_of_generate():
    prompts, printed = [prompt(n) for n in (3, 8, 5)], list[Any]()
    variables: dict[str, Any] = {"fast": fast(), "prompts": prompts, "asyncio": asyncio}
    variables["print"] = lambda *values: printed.append(values)
    for example in EXAMPLES:
        exec(example, variables)
    whole = [alone(ids, max_new_tokens=32) for ids in prompts]
    *tokens, rows, (reason, stats) = printed
    assert [token for (token,) in tokens] == whole[0][3:]
    assert rows == (whole,)
    assert (reason, stats.num_tokens) == ("length", 32)
    assert stats.seconds < WAIT
    sampled = [alone(ids, max_new_tokens=32, do_sample=True, seed=7) for ids in prompts]
    assert variables["texts"] == [text[len(ids) :] for ids, text in zip(prompts, sampled, strict=True)]
