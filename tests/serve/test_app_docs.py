"""What docs/serving.md shows is true: its examples run, and it names all that there is."""

import re
from pathlib import Path
from typing import Any

import httpx

from emssd_compile.serve.schemas import ChatBody, CompletionBody
from tests.serve.servers import new_tokens, served, spare, text_of, tokenizer

TEXT = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
ASK, MAKE = re.findall(r"^```python\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)


def test_the_examples_run():
    printed: list[str] = []
    variables: dict[str, Any] = {"fast": spare(), "tokenizer": tokenizer()}
    exec(MAKE, variables)
    with served(variables["app"]) as address:
        variables["print"] = lambda text, end="\n": printed.append(text)
        exec(ASK.replace("http://127.0.0.1:8000", address), variables)
    whole, *pieces = printed
    assert whole == text_of(new_tokens("def read(path):", max_new_tokens=32))
    drawn = new_tokens("class Queue:", max_new_tokens=16, do_sample=True, seed=7)
    assert "".join(pieces) == text_of(drawn)


def test_all_fields_and_metrics_are_named(address):
    hidden = {"model", "messages"}
    for body in (CompletionBody, ChatBody):
        assert all(f"`{field}" in TEXT for field in body.model_fields.keys() - hidden)
    for name in re.findall(r"# TYPE vllm:(\w+)", httpx.get(f"{address}/metrics").text):
        assert name.endswith("_created") or name.removeprefix("spec_decode") in TEXT, name
