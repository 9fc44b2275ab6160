"""What the README shows is true: its quickstart runs, and its graphs are those of the compiler."""

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the quickstart loads a Hugging Face model")

import emssd_compile

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PLACEHOLDER = re.compile(r"\b(\w+): \"?(\w+\[[^]]*])\"?[,)]")
OP = re.compile(r": \"?(\w+\[[^]]*])\"? = (?:torch\.ops\.)?(\w+\.\w+)")


def fences(language: str) -> list[str]:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
    return [content for of, content in blocks if of == language]


def facts(code: str) -> set[tuple[str, str]]:
    """Inputs with their shapes and shapes with the op that makes them; every symbolic size is called S."""
    code = re.sub(r"\b(s\d+|T|R)\b", "S", code)
    return {*PLACEHOLDER.findall(code), *OP.findall(code)}


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """Runs the quickstart: its variables, what it printed, and the folder of its dumped graphs."""
    folder = tmp_path_factory.mktemp("stages")
    (code,) = fences("python")
    printed: list[str] = []
    variables = {"print": lambda *values: printed.append(" ".join(map(str, values)))}
    with pytest.MonkeyPatch.context() as patch, emssd_compile.dump(folder):
        patch.chdir(ROOT)
        exec(code, variables)
    return variables, printed, folder


def test_quickstart_prints_the_models_own_text(quickstart):
    variables, printed, _ = quickstart
    model, tokenizer = variables["model"], variables["tokenizer"]
    for prompt, text in zip(variables["prompts"], printed, strict=False):
        alone = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=32)
        assert text == tokenizer.decode(alone[0])
    assert re.fullmatch(r"\d\.\d\d tokens a row and step", printed[-1])
    assert len(printed) == len(variables["prompts"]) + 1


def test_no_token_is_fed_for_nobody_where_the_readme_says_so(quickstart):
    variables, _, _ = quickstart
    packed = emssd_compile.optimize(variables["model"], max_batch=8, layout="packed", backend="eager")
    packed.generate(variables["prompts"], max_new_tokens=32)
    assert packed.stats.num_padding_tokens == 0


@pytest.mark.parametrize(
    ("index", "stage"), [(0, "unpad_tokens.before.py"), (1, "unpad_kv_cache.after.py")], ids=["before", "after"]
)
def test_graphs_are_the_compilers(quickstart, index, stage):
    shown = [block for block in fences("") if block.startswith("forward(")][index]
    (file,) = quickstart[2].glob(f"*_{stage}")
    assert len(facts(shown)) >= 4
    assert facts(shown) <= facts(file.read_text())


def test_quickstart_is_short():
    (code,) = fences("python")
    assert len([line for line in code.splitlines() if line]) <= 10
