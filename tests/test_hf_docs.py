"""What docs/embedding.md shows behind sessions is true: its examples run, are short, and give what the model gives."""

import functools
import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch

pytest.importorskip("transformers", reason="it is code for transformers that is shown")

import transformers

import emssd_compile
from emssd_compile import hf
from emssd_compile.drafters import DraftModel
from emssd_compile.errors import StaleModelError
from emssd_compile.rollouts import Rollouts
from tests.exactness.models import prompt

_, *SECTIONS = (Path(__file__).parents[1] / "docs" / "embedding.md").read_text().split("\n## ")
EXAMPLES = {
    section.splitlines()[0]: re.findall(r"^```python\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL)
    for section in SECTIONS
}
TARGET = Path(__file__).parents[1] / "examples" / "demo_model" / "target"
PROMPTS = [prompt(n) for n in (7, 3, 12)]


def test_the_examples_are_short():
    assert all(len(example.splitlines()) < 15 for examples in EXAMPLES.values() for example in examples)


def _model() -> Any:
    """The demo model's first layer."""
    return transformers.AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32, num_hidden_layers=1)


@pytest.fixture(scope="module")
def fast():
    return emssd_compile.optimize(_model(), max_batch=3, max_length=96, backend="eager", layout="packed")


def _run(section: str, number: int, **variables: Any) -> dict[str, Any]:
    exec(EXAMPLES[section][number], variables)
    return variables


def test_logits_and_losses(fast):
    ids = torch.tensor([PROMPTS[0]])
    section = "Logits, losses and evaluation harnesses"
    found = _run(section, 0, torch=torch, fast=fast, input_ids=ids, attention_mask=torch.ones_like(ids))
    expected = fast.model(ids, labels=ids)
    assert torch.equal(found["logits"], expected.logits)
    assert torch.equal(found["loss"], expected.loss)


def test_options_of_assisted_decoding(fast):
    optimize = functools.partial(emssd_compile.optimize, max_length=64, backend="eager", layout="packed")
    given = {"optimize": optimize, "DraftModel": DraftModel, "model": fast.model, "assistant": _model()}
    found = _run("transformers' own names", 0, **given, prompts=PROMPTS)
    assert found["texts"] == fast.generate(PROMPTS, max_new_tokens=16)
    assert found["assisted"].stats.num_draft_tokens > 0


def test_a_function_for_generate(fast):
    fast.stats.reset()
    inputs = {"input_ids": torch.tensor([PROMPTS[0]])}
    found = _run("transformers' own names", 1, hf=hf, fast=fast, model=fast.model, inputs=inputs)
    assert fast.stats.num_emitted_tokens == 16
    assert found["texts"].tolist() == fast.generate([PROMPTS[0]], max_new_tokens=16)


def test_a_folder_for_generate(fast, tmp_path):
    write = functools.partial(hf.save_custom_generate, backend="eager")
    given: dict[str, Any] = {"hf": SimpleNamespace(save_custom_generate=write), "folder": str(tmp_path)}
    inputs = {"input_ids": torch.tensor([PROMPTS[0]])}
    found = _run("transformers' own names", 2, **given, model=_model(), inputs=inputs)
    assert found["texts"].tolist() == fast.generate([PROMPTS[0]], max_new_tokens=16)


def test_pipelines_and_streamers(fast):
    tokenizer = transformers.AutoTokenizer.from_pretrained(TARGET)
    printed: list[Any] = []
    given = {"pipeline": transformers.pipeline, "TextIteratorStreamer": transformers.TextIteratorStreamer}
    given |= {"fast": fast, "tokenizer": tokenizer, "prompts": PROMPTS, "print": printed.append}
    _run("transformers' own names", 3, **given)
    (written,), *streamed = printed
    ids = tokenizer("def add(")["input_ids"]
    whole = fast.generate([ids, *PROMPTS], max_new_tokens=16)
    first, *others = (tokenizer.decode(row[len(ids) :]) for row, ids in zip(whole, [ids, *PROMPTS], strict=True))
    assert written["generated_text"] == f"def add({first}"
    assert streamed == others


def test_continuous_batching(fast):
    printed: list[Any] = []
    given = {"GenerationConfig": transformers.GenerationConfig, "print": printed.append}
    _run("transformers' own names", 4, **given, fast=fast, prompts=PROMPTS)
    whole = fast.generate(PROMPTS, max_new_tokens=16)
    new = [row[len(ids) :] for row, ids in zip(whole, PROMPTS, strict=True)]
    assert printed == [new, *new[0], new[0][-1]]  # the last result says that it is the last


def test_generators_of_outlines(fast):
    outlines = pytest.importorskip("outlines", reason="it is its generator that is shown")
    given = {"outlines": outlines, "Literal": Literal, "tokenizer": transformers.AutoTokenizer.from_pretrained(TARGET)}
    answers: list[str] = []
    for model in (fast, fast.model):
        with torch.compiler.set_stance("force_eager"):  # else outlines compiles how it masks
            _run("transformers' own names", 5, **given, fast=model, print=answers.append)
    assert answers[0] == answers[1]
    assert answers[0] in ("red", "green", "blue")


def test_prompts_that_begin_alike():
    printed: list[Any] = []
    given = {"model": _model(), "system": prompt(130), "question": PROMPTS[2]}
    given["print"] = lambda *values: printed.extend(values)
    given["optimize"] = functools.partial(emssd_compile.optimize, backend="eager", layout="packed")
    found = _run("Prompts that begin alike", 0, **given)
    cache, hits = printed
    first, second, asked = found["first"], found["second"], torch.tensor([found["second"]])
    assert hits == len(first) // 64 * 64 == 128
    assert str(cache).endswith(f"of {2 * len(first) - 16 + len(PROMPTS[2])} tokens of prompts {hits} were found)")
    whole = given["model"].generate(asked[:, : len(first) + len(PROMPTS[2])], max_new_tokens=16, do_sample=False)
    assert whole[0].tolist() == second


def test_rollouts():
    given = {"Rollouts": Rollouts, "GRPOTrainer": dict, "model": {}, "reward": None, "args": None, "data": None}
    made = _run("Weights that change", 1, **given)  # tests/examples/test_grpo.py has a trainer
    assert made["trainer"]["rollout_func"] is made["rollouts"]


def test_an_adapter_is_merged_and_the_model_compiled_anew():
    peft = pytest.importorskip("peft", reason="it is peft's adapter that is shown")
    given = {"get_peft_model": peft.get_peft_model, "prompts": PROMPTS, "model": _model()}
    given["LoraConfig"] = functools.partial(peft.LoraConfig, init_lora_weights=False)
    given["optimize"] = functools.partial(emssd_compile.optimize, backend="eager", layout="packed")
    found = _run("Weights that change", 0, **given)
    adapted, fast = found["adapted"], found["fast"]
    for ids, before, after in zip(PROMPTS, found["before"], found["after"], strict=True):
        whole = adapted.generate(input_ids=torch.tensor([ids]), max_new_tokens=16, do_sample=False)[0].tolist()
        assert before == after == whole, "merged or not, it computes the same"
    adapted.unmerge_adapter()
    with pytest.raises(StaleModelError, match="refresh"):
        fast.generate(PROMPTS, max_new_tokens=16)


def test_what_a_notebook_shows(fast, capfd):
    shown: list[str] = []
    fast.stats.reset()
    found = _run(
        "Notebooks and logs", 0, fast=fast, prompts=PROMPTS, display=lambda value: shown.append(value._repr_html_())
    )
    assert found["texts"] == fast.generate(PROMPTS, max_new_tokens=16)
    explained, stats = shown
    assert "raise_attention" in explained
    assert f"<th>num_emitted_tokens</th><td>{16 * len(PROMPTS)}</td>" in stats
    out, err = capfd.readouterr()
    assert out == ""
    assert "tokens: 48/48" in err


def test_logs_are_those_of_the_program(tmp_path, monkeypatch):
    monkeypatch.setattr(logging.root, "handlers", [])
    logger = logging.getLogger("emssd_compile")
    try:
        _run("Notebooks and logs", 1, logging=logging, path=tmp_path / "log")
        logging.getLogger("emssd_compile.ops").info("kernels are built")
    finally:
        logger.setLevel(logging.NOTSET)
    (handler,) = logging.root.handlers
    handler.close()
    assert (tmp_path / "log").read_text() == "INFO:emssd_compile.ops:kernels are built\n"
