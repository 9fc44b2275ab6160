"""lm-evaluation-harness with a compiled model: its results are those that the harness has with the model itself."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", reason="the harness is what is tested")

import lm_eval
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import emssd_compile
from emssd_compile.errors import OptionError
from emssd_compile.lm_eval import CompiledLM

TARGET = Path(__file__).parents[1] / "examples" / "demo_model" / "target"
LAYERS = 2
QUESTIONS = [
    ("def add(a, b):", "    return a + b", "    raise KeyError"),
    ("import os\n", "import sys", "a b c d"),
    ("class Node:\n    def __init__(self, value):\n", "        self.value = value", "x"),
    ("for i in range(10):\n    print(", "i)", "else"),
    ("    try:\n        return self", "._value", "1"),
    ("x = [", "]", "pass"),
]
TASKS = {
    "local_texts": """
output_type: generate_until
doc_to_target: "{{choices[0]}}"
generation_kwargs:
  until: ["\\n\\n", "("]
  max_gen_toks: 24
  do_sample: false
  temperature: 0.0
  top_p: 0.9
metric_list:
  - metric: exact_match
""",
    "local_short_texts": """
output_type: generate_until
doc_to_target: "{{choices[0]}}"
generation_kwargs:
  max_gen_toks: 9
metric_list:
  - metric: exact_match
""",
    "local_choices": """
output_type: multiple_choice
doc_to_choice: choices
doc_to_target: 0
metric_list:
  - metric: acc
  - metric: acc_norm
""",
    "local_rolling": """
output_type: loglikelihood_rolling
doc_to_target: "{{question}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
""",
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of tasks on a local data set."""
    folder = tmp_path_factory.mktemp("tasks")
    lines = [json.dumps({"question": question, "choices": choices}) for question, *choices in QUESTIONS]
    (folder / "data.jsonl").write_text("\n".join(lines))
    data = json.dumps({"data_files": {"test": str(folder / "data.jsonl")}, "cache_dir": str(folder / "cache")})
    for name, task in TASKS.items():
        common = f"task: {name}\ndataset_path: json\ndataset_kwargs: {data}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(f'{common}doc_to_text: "{{{{question}}}}"\n{task.lstrip()}')
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The demo model without most of its layers, to be quick."""
    model = transformers.AutoModelForCausalLM.from_pretrained(TARGET, dtype="float32", num_hidden_layers=LAYERS)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(TARGET).save_pretrained(folder)
    return folder


def _evaluate(model: Any, tasks: Path, names: list[str]) -> tuple[Any, Any]:
    """Scores, and what the model answered to each request."""
    found = lm_eval.simple_evaluate(
        model, tasks=names, task_manager=TaskManager(include_path=str(tasks), include_defaults=False), bootstrap_iters=0
    )
    answers = {
        name: [(sample["arguments"], sample["resps"]) for sample in sorted(samples, key=lambda one: one["doc_id"])]
        for name, samples in found["samples"].items()
    }
    return found["results"], answers


@pytest.mark.parametrize("batch_size", [1, 4])
def test_results_are_those_of_the_model_itself(tasks, folder, batch_size):
    common = {"pretrained": str(folder), "batch_size": batch_size, "device": "cpu"}
    fast = CompiledLM(**common, compile_backend="eager", layout="packed")
    (scores, answers), (expected, plain) = (_evaluate(each, tasks, [*TASKS]) for each in (fast, HFLM(**common)))
    assert scores == expected
    assert answers == plain
    texts = [resps[0][0] for _, resps in answers["local_texts"]]
    assert len({*texts}) > 3
    assert not any("(" in text or "\n\n" in text for text in texts)


@pytest.fixture(scope="module")
def pair(folder):
    """The harness's own model of one row, and ours of three, which has compiled what `optimize` was told to."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    fast = emssd_compile.optimize(model, max_batch=3, max_length=80, backend="eager", layout="packed")
    common: dict[str, Any] = {"tokenizer": transformers.AutoTokenizer.from_pretrained(folder), "think_end_token": 13}
    return HFLM(model, max_length=80, **common), CompiledLM(fast, batch_size=3, **common)


def _requests(*given: tuple[str, dict[str, Any]]) -> list[Instance]:
    return [Instance("generate_until", {}, each, index) for index, each in enumerate(given)]


def test_what_requests_may_ask_for(pair):
    plain, fast = pair
    long = "def add(a, b):\n    return a + b\n" * 20  # the beginning gives way
    requests = _requests(
        (QUESTIONS[0][0], {"until": "return", "max_gen_toks": 20}),
        (long, {"until": [], "max_gen_toks": 12}),
        (
            QUESTIONS[2][0],
            {"until": ["\n"], "max_new_tokens": 30, "top_p": 0.5, "do_sample": False},
        ),
        (QUESTIONS[3][0], {"max_gen_toks": 40, "repetition_penalty": 1.3}),
        (QUESTIONS[4][0], {"until": ["\n\n"], "max_gen_toks": 8, "max_length": 30}),
    )
    assert len(fast.tok_encode(long)) > 80
    found = fast.generate_until(requests, disable_tqdm=True)
    assert found == plain.generate_until(requests, disable_tqdm=True)
    assert len({*found}) == len(found)


def test_sampled_texts_are_those_of_the_compiled_model(pair):
    _, lm = pair
    how: dict[str, Any] = {"do_sample": True, "temperature": 0.8, "top_p": 0.9}
    requests = _requests(*((question, {"max_gen_toks": 10, **how}) for question, *_ in QUESTIONS[:3]))
    texts = []
    for _ in range(2):
        torch.manual_seed(5)
        texts.append(lm.generate_until(requests, disable_tqdm=True))
    assert texts[0] == texts[1]
    torch.manual_seed(5)
    for (question, *_), text in zip(QUESTIONS, texts[0], strict=False):
        ids = lm.tok_encode(question)
        seed = int(torch.randint(-(2**63), 2**63 - 1, ()))
        (row,) = lm._fast.generate([ids], max_new_tokens=10, seed=seed, **how)
        assert text == lm._text(row[len(ids) :], [])


def test_the_documented_example_runs(pair, tasks):
    _, lm = pair
    text = (Path(__file__).parents[1] / "docs" / "embedding.md").read_text()
    (example,) = re.findall(r"^```python\n(lm = CompiledLM.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    variables: dict[str, Any] = {"CompiledLM": CompiledLM, "TaskManager": TaskManager, "lm_eval": lm_eval}
    exec(example, {**variables, "fast": lm._fast, "tokenizer": lm.tokenizer, "folder_of_tasks": str(tasks)}, variables)
    assert variables["found"]["results"].keys() == {"local_texts", "local_choices"}


def test_what_cannot_be_decoded_is_refused(pair):
    _, fast = pair
    assert fast.generate_until([]) == []
    with pytest.raises(OptionError, match="a text may have 80 tokens"):
        fast.generate_until(_requests(("x", {"max_gen_toks": 80})))
    with pytest.raises(NotImplementedError, match="num_beams"):
        fast.generate_until(_requests(("x", {"max_gen_toks": 8, "num_beams": 3})))
    with pytest.raises(OptionError, match="use --model hf"):
        CompiledLM(fast.model, tokenizer=fast.tokenizer, backend="seq2seq")


def test_the_documented_command_runs(tasks, folder, tmp_path, monkeypatch):
    text = (Path(__file__).parents[1] / "docs" / "embedding.md").read_text()
    (command,) = re.findall(r"^python -m emssd_compile.lm_eval (.*)$", text, flags=re.MULTILINE)
    given = command.replace("gsm8k", "local_short_texts").replace(
        "llama/", f"{folder},compile_backend=eager,layout=packed"
    )
    more = ["--include_path", str(tasks), "--output_path", str(tmp_path), "--log_samples", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *shlex.split(given), *more])
    lm_eval.__main__.cli_evaluate()
    (samples,) = tmp_path.rglob("samples_local_short_texts*.jsonl")
    texts = {line["doc_id"]: line["resps"][0][0] for line in map(json.loads, samples.read_text().splitlines())}
    _, answers = _evaluate(HFLM(pretrained=str(folder), device="cpu"), tasks, ["local_short_texts"])
    assert [texts[index] for index in sorted(texts)] == [resps[0][0] for _, resps in answers["local_short_texts"]]


@pytest.mark.long  # another process takes a while to start
def test_the_command_knows_the_model(tasks, folder, tmp_path):
    command = [sys.executable, "-m", "emssd_compile.lm_eval", "run", "--model", "emssd", "--tasks", "local_texts"]
    command += ["--model_args", f"pretrained={folder},compile_backend=eager", "--device", "cpu", "--batch_size", "4"]
    command += ["--include_path", str(tasks), "--output_path", str(tmp_path), "--log_samples"]
    subprocess.run(command, check=True, capture_output=True)
    (samples,) = tmp_path.rglob("samples_local_texts*.jsonl")
    texts = {line["doc_id"]: line["resps"][0][0] for line in map(json.loads, samples.read_text().splitlines())}
    _, answers = _evaluate(HFLM(pretrained=str(folder), device="cpu"), tasks, ["local_texts"])
    assert [texts[index] for index in sorted(texts)] == [resps[0][0] for _, resps in answers["local_texts"]]
