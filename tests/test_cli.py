import io
import json
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the command line loads Hugging Face models")

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import emssd_compile
from emssd_compile import cli
from emssd_compile.cli import main
from emssd_compile.cli.models import PROGRAM
from emssd_compile.cli.prompts import read_prompts
from emssd_compile.cli.target_options import target_options
from emssd_compile.drafters.mlp_speculator import MLPSpeculator, MLPSpeculatorConfig
from emssd_compile.drafters.recurrent import RecurrentConfig, RecurrentDrafter
from emssd_compile.errors import InvalidInputError, OptionError
from emssd_compile.export import find_target
from emssd_compile.export.tensorrt import BuildOptions
from tests.export import toy
from tests.test_session_docs import COMMANDS
from tests.zoo import toy_model

TOKENIZER = Path(__file__).parents[1] / "examples" / "demo_model" / "target"
NEW_TOKENS = 9
PROMPTS = ["def add(a, b):\n\treturn", "import os, sys\n\n\nclass Path:\n", "x = 1"]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A toy target and a toy draft model, with the demo model's tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(["target", "draft"]):
        toy_model("llama", seed=seed, vocab_size=4096, num_hidden_layers=1).save_pretrained(folder / name)
        for file in TOKENIZER.glob("tokenizer*"):
            shutil.copy(file, folder / name)
    return folder


def own_text(folder: Path, prompt: str) -> str:
    """What the model itself makes of one prompt."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    new = model.generate(ids, do_sample=False, max_new_tokens=NEW_TOKENS)[0, ids.shape[1] :]
    return prompt + tokenizer.decode(new, skip_special_tokens=True)


def generate(models: Path, *arguments: str) -> list[str]:
    common = ["--model", str(models / "target"), "--backend", "eager", "--max-new-tokens", str(NEW_TOKENS)]
    return ["generate", *common, *arguments]


def test_text_and_nothing_else_goes_to_standard_output(models, capsys):
    assert main(generate(models, "--prompt", PROMPTS[0])) == 0
    captured = capsys.readouterr()
    assert captured.out == own_text(models / "target", PROMPTS[0]) + "\n"
    assert "tokens/s" in captured.err


@pytest.fixture(scope="module")
def head(models, tmp_path_factory):
    """A folder with a draft head of the target."""
    config = json.loads((models / "target" / "config.json").read_text())
    folder = tmp_path_factory.mktemp("heads") / "mlp"
    made = MLPSpeculatorConfig(config["hidden_size"], config["vocab_size"], num_heads=2)
    MLPSpeculator(made).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("drafter", ["none", "suffix", "a model", "a head"])
def test_several_prompts_through_few_rows(models, head, tmp_path, capsys, drafter):
    (tmp_path / "rest.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in PROMPTS[1:]))
    drafting = {
        "none": ["none"],
        "suffix": ["suffix", "--num-draft-tokens", "2"],
        "a model": [str(models / "draft"), "--num-draft-tokens", "2"],
        "a head": [str(head)],
    }[drafter]
    prompts = ["--prompt", PROMPTS[0], "--prompt-file", str(tmp_path / "rest.jsonl"), "--max-batch", "2"]
    assert main(generate(models, *prompts, "--drafter", *drafting)) == 0
    expected = [
        f"=== prompt {i} ===\n{own_text(models / 'target', prompt)}\n" for i, prompt in enumerate(PROMPTS, start=1)
    ]
    assert capsys.readouterr().out == "".join(expected)


def test_a_head_that_drafts_trees_takes_no_number_of_tokens(models, tmp_path, capsys):
    RecurrentDrafter(RecurrentConfig(8, 16)).save_pretrained(tmp_path)
    assert main(generate(models, "--prompt", "x", "--drafter", str(tmp_path), "--num-draft-tokens", "2")) == 1
    assert "holds a RecurrentDrafter, which takes none" in capsys.readouterr().err


def test_explain_names_the_passes_and_dumps_the_stages(models, tmp_path, capsys):
    assert main(["explain", "--model", str(models / "target"), "--dump", str(tmp_path / "stages")]) == 0
    out = capsys.readouterr().out
    assert "raise_attention" in out
    assert "1 ragged_attention, 1 append_kv, 0 padding ops" in out
    before = next((tmp_path / "stages").glob("*_raise_attention.before.py")).read_text()
    assert "emssd.attention" not in before
    assert "emssd.attention" in next((tmp_path / "stages").glob("*_raise_attention.after.py")).read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate", "--model", "{none}", "--prompt", "x"], "no such folder"),
        (["explain", "--model", "{empty}"], "no config.json"),
        (["explain", "--model", "{broken}"], "AutoModelForCausalLM cannot load it"),
        (["generate", "--model", "{unread}", "--prompt", "x"], "cannot load it: KeyError: 'added_tokens'"),
        (["generate", "--model", "{unfit}", "--prompt", "x"], "cannot load it: Exception: Model missing"),
        (["generate", "--model", "{target}"], "no prompt: pass --prompt"),
        (["generate", "--model", "{target}", "--prompt", "x", "--drafter", "oracle"], "none, prompt-lookup"),
        (["explain", "--model", "{target}", "--drafter", "none", "--num-draft-tokens", "3"], "leave one of them out"),
        (
            ["generate", "--model", "{target}", "--prompt", "x", "--max-length", "9999"],
            "--max-length 9999 is more than the 2048 positions the model was made for",
        ),
    ],
)
def test_errors_say_what_to_do(models, tmp_path, capsys, arguments, said):
    folders = {name: tmp_path / name for name in ["none", "empty", "broken"]} | {"target": models / "target"}
    folders["empty"].mkdir()
    folders["broken"].mkdir()
    (folders["broken"] / "config.json").write_text('{"model_type": "no such type"}')
    whole = json.loads((models / "target" / "tokenizer.json").read_text())
    for name, tokenizer in {"unread": {}, "unfit": {k: v for k, v in whole.items() if k != "model"}}.items():
        folders[name] = tmp_path / name
        shutil.copytree(models / "target", folders[name], ignore=shutil.ignore_patterns("*.safetensors"))
        (folders[name] / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert main([argument.format(**folders) for argument in arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err.replace("\n", " ")


def test_missing_transformers_names_the_extra(models, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(generate(models, "--prompt", "x")) == 1
    assert 'pip install "emssd_compile[hf]"' in capsys.readouterr().err


@pytest.mark.parametrize("value", ["0", "-1", "many"])
def test_sizes_are_positive_integers(models, capsys, value):
    with pytest.raises(SystemExit) as exit:
        main(generate(models, "--prompt", "x", "--max-batch", value))
    assert exit.value.code == 2
    assert "--max-batch" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999"])
def test_a_temperature_is_a_finite_number(models, capsys, value):
    with pytest.raises(SystemExit) as exit:
        main(generate(models, "--prompt", "x", f"--temperature={value}"))
    assert exit.value.code == 2
    assert f"{value} is no finite number" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "prompts"),
    [
        ("p.json", '["one", {"text": "two", "module": "m.py"}]', ["one", "two"]),
        ("p.jsonl", '"one"\n\n{"text": "two"}\n', ["one", "two"]),
        ("p.jsonl", '[1, 2]\n{"input_ids": [3]}\n', ["", ""]),
        ("p.txt", '["one"]\ntwo\n', ['["one"]\ntwo\n']),
    ],
)
def test_prompt_files(tmp_path, name, content, prompts):
    (tmp_path / name).write_text(content)
    assert [prompt.text for prompt in read_prompts(["zero"], [tmp_path / name])] == ["zero", *prompts]


@pytest.mark.parametrize(
    ("name", "content", "error", "said"),
    [
        ("p.json", "[", OptionError, "cannot be read"),
        ("p.json", '{"text": "one"}', InvalidInputError, "holds no list"),
        ("p.json", '["one", {"prompt": "two"}]', InvalidInputError, "entry 1"),
        ("p.jsonl", '{"messages": ["hello"]}', InvalidInputError, "entry 0"),
        ("p.jsonl", '"one"\n\n{"text": \n', OptionError, "line 3: "),
        ("p.jsonl", '{"text": "one", "score": -Infinity}', OptionError, "line 1: JSON has no -Infinity"),
        ("p.json", '[{"text": "one", "score": 1e999}]', OptionError, "1e999 is more than a float can be"),
        ("p.txt", "", InvalidInputError, "prompt 1 of 1 is empty"),
        ("p.jsonl", '"one"\n"\\ud83d"\n', InvalidInputError, "prompt 2 of 2 is no text"),
    ],
)
def test_bad_prompt_files(tmp_path, name, content, error, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(error, match=said):
        read_prompts([], [tmp_path / name])


def test_standard_input_is_read_once():
    with pytest.raises(OptionError, match="--prompt-file - is given twice"):
        read_prompts([], [Path("-"), Path("-")])


def test_json_lines_come_back_with_all_that_was_in_them(models, tmp_path, capsys, monkeypatch):
    lines = [{"id": 7, "text": PROMPTS[0]}, {"text": PROMPTS[1], "tags": ["é"]}]
    given = "".join(json.dumps(line) + "\n" for line in lines)
    monkeypatch.setattr(sys, "stdin", io.StringIO(given))
    assert main(generate(models, "--prompt-file", "-", "--format", "jsonl")) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [{name: value for name, value in each.items() if name in ("id", "text", "tags")} for each in found] == lines
    for each in found:
        assert each["text"] + each["completion"] == own_text(models / "target", each["text"])
        assert each["num_new_tokens"] == NEW_TOKENS


def test_the_command_of_the_docs(models, tmp_path, capsys, monkeypatch):
    command = next(each for each in COMMANDS if " generate " in each)
    flags, given, found = re.fullmatch(r"emssd-compile (.*) < (.*) > (.*)\n", command).groups()  # type: ignore[union-attr]
    assert (given, found) == ("prompts.jsonl", "out.jsonl")
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{json.dumps(PROMPTS[0])}\n"))
    (tmp_path / "llama").symlink_to(models / "target")
    monkeypatch.chdir(tmp_path)
    assert main([*shlex.split(flags), "--backend", "eager", "--max-new-tokens", str(NEW_TOKENS)]) == 0
    assert PROMPTS[0] + json.loads(capsys.readouterr().out)["completion"] == own_text(models / "target", PROMPTS[0])


def test_a_chat_is_answered_and_streamed(models, tmp_path, capsys):
    folder = shutil.copytree(models / "target", tmp_path / "chat")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}Q: {{ m['content'] }} A:{% endfor %}"
    tokenizer.save_pretrained(folder)
    said = f"Q: {PROMPTS[2]} A:"
    expected = own_text(folder, said).removeprefix(said)
    (tmp_path / "chat.json").write_text(json.dumps([{"messages": [{"role": "user", "content": PROMPTS[2]}]}]))
    options = ["--model", str(folder), "--backend", "eager", "--max-new-tokens", str(NEW_TOKENS)]
    for given in (["--chat", "--prompt", PROMPTS[2]], ["--prompt-file", str(tmp_path / "chat.json"), "--stream"]):
        assert main(["generate", *options, *given]) == 0
        assert capsys.readouterr().out == expected + "\n"


def test_tokens_are_drawn_and_texts_end_at_a_stop(models, capsys):
    drawing = ["--temperature", "2.0", "--top-k", "50", "--top-p", "0.95", "--seed", "3"]
    command = generate(models, "--prompt", PROMPTS[0])
    texts = []
    for options in (drawing, drawing, [*drawing[:-1], "4"]):
        assert main([*command, *options]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    whole = own_text(models / "target", PROMPTS[0])
    stop = whole[len(PROMPTS[0]) + 4 : len(PROMPTS[0]) + 7]
    assert main([*command, "--stop", stop]) == 0
    text = capsys.readouterr().out.removesuffix("\n")
    assert whole.startswith(text)
    assert stop in text[len(PROMPTS[0]) :]
    assert len(text) < len(whole)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--prompt", "x", "--top-p", "0.9"], "--top-p is for tokens that are drawn; pass --temperature"),
        (["--prompt", "x", "--prompt", "y", "--stream"], "--stream prints one prompt's text"),
        (["--prompt", "x", "--chat"], "no chat template"),
        (["--prompt", "x", "--max-length", "3"], "--max-length 3 is less than the 1 tokens of prompt 1 and 9 new"),
    ],
)
def test_what_does_not_fit_is_said_before_the_model_is_loaded(models, capsys, monkeypatch, options, said):
    monkeypatch.setattr("emssd_compile.cli.models.load_model", None)
    assert main(generate(models, *options)) == 1
    assert said in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize("epilog", [command.EXAMPLES for command in cli.COMMANDS.values()])
def test_examples_in_the_help_parse(epilog):
    lines = [line.strip() for line in epilog.splitlines() if line.startswith(f"  {PROGRAM}")]
    assert len(lines) >= 2
    for line in lines:
        cli.build_parser().parse_args(shlex.split(line.removeprefix(PROGRAM)))


def test_runs_as_a_module(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["emssd_compile", "generate", "--help"])
    with pytest.raises(SystemExit) as exit:
        runpy.run_module("emssd_compile", run_name="__main__")
    assert exit.value.code == 0
    assert "examples:" in capsys.readouterr().out


def test_an_export_is_an_artifact_and_inspect_says_what_is_in_it(models, tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    out = tmp_path / "artifact"
    command = ["export", "--model", str(models / "target"), "--to", "onnx", "--out", str(out)]
    assert main([*command, "--drafter", "none", "--max-batch", "2", "--max-length", "48"]) == 0
    rows = emssd_compile.load(out).generate([[5, 6, 7]], max_new_tokens=4)
    model = AutoModelForCausalLM.from_pretrained(models / "target", dtype=torch.float32)
    assert rows == model.generate(torch.tensor([[5, 6, 7]]), do_sample=False, max_new_tokens=4).tolist()
    capsys.readouterr()
    assert main(["inspect", str(out)]) == 0
    shown = capsys.readouterr().out
    for entry in ("onnx: step", "NoDrafter", "history", "[2, 48]", "cache", "step.onnx", "tokenizer/tokenizer.json"):
        assert entry in shown
    prompt = ["generate", "--model", str(out), "--prompt", PROMPTS[0], "--max-new-tokens", str(NEW_TOKENS)]
    assert main(prompt) == 0
    assert capsys.readouterr().out == own_text(models / "target", PROMPTS[0]) + "\n"
    assert main([*prompt, "--max-batch", "4"]) == 1
    assert "--max-batch was chosen when" in capsys.readouterr().err.replace("\n", " ")
    here = (str(models), str(tmp_path), sys.prefix, str(Path(__file__).parents[1]))
    for file in filter(Path.is_file, out.rglob("*")):
        assert not [place for place in here if place.encode() in file.read_bytes()], file
    (out / "step.onnx").write_bytes(b"")
    assert main(["inspect", str(out)]) == 1
    assert "0 bytes" in capsys.readouterr().err.replace("\n", " ")


def test_a_folder_that_is_taken_is_refused_before_the_work(models, tmp_path, capsys, monkeypatch):
    (tmp_path / "mine.txt").write_text("mine")
    monkeypatch.setattr("emssd_compile.cli.export.load_model", None)
    assert main(["export", "--model", str(models / "target"), "--to", "onnx", "--out", str(tmp_path)]) == 1
    assert "exists; pass another folder" in capsys.readouterr().err.replace("\n", " ")


def test_an_option_of_another_target_is_refused(models, tmp_path, capsys):
    command = ["export", "--model", str(models / "target"), "--to", "onnx", "--out", str(tmp_path / "artifact")]
    assert main([*command, "--compute-capability", "8.9"]) == 1
    assert "--compute-capability is for --to tensorrt, not for --to onnx" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


TENSORRT: dict[str, dict[str, object]] = {
    "--runtime tensorrt-rtx": {"runtime": "tensorrt-rtx"},
    "--compute-capability 8.0 --compute-capability 8.9": {"compute_capabilities": ["8.0", "8.9"]},
    "--attention decomposed": {"attention": "decomposed"},
    "--weights streamed": {"weights": "streamed"},
    "--version-compatible": {"version_compatible": True},
    "--hardware-compatibility ampere-plus": {"hardware_compatibility": "ampere-plus"},
    "--timing-cache timings": {"timing_cache": "timings"},
    "--profile-per-bucket": {"profile_per_bucket": True},
}


@pytest.mark.parametrize(("given", "options"), [*TENSORRT.items(), ("", {})])
def test_options_of_a_target_are_those_it_has_in_python(given, options):
    command = ["export", "--model", "llama", "--to", "tensorrt", "--out", "llama.trt"]
    found = target_options(cli.build_parser().parse_args([*command, *given.split()]))
    assert found == options
    find_target("tensorrt").choose(found)


def test_every_option_of_tensorrt_is_on_the_command_line():
    assert {name for options in TENSORRT.values() for name in options} == set(BuildOptions.__dataclass_fields__)


def test_a_target_brings_its_own_options(monkeypatch, capsys):
    toy.install(monkeypatch)
    command = ["export", "--model", "llama", "--to", "toy", "--out", "llama.toy", "--label", "red"]
    assert target_options(cli.build_parser().parse_args(command)) == {"label": "red"}


def test_what_a_target_cannot_do_is_said_before_the_model_is_loaded(models, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("emssd_compile.cli.export.load_model", None)
    command = ["export", "--model", str(models / "target"), "--out", str(tmp_path / "artifact")]
    rtx = ["--to", "tensorrt", "--runtime", "tensorrt-rtx", "--compute-capability", "9.0"]
    assert main([*command, *rtx]) == 1
    assert "compute_capabilities must be of" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert main([*command, "--to", "onnx"]) == 1
    assert 'pip install "emssd_compile[onnx]"' in capsys.readouterr().err


@pytest.mark.parametrize(("flags", "check"), [([], True), (["--no-check"], False)])
def test_an_export_is_checked_unless_that_is_declined(models, tmp_path, monkeypatch, flags, check):
    seen: list[dict[str, object]] = []
    monkeypatch.setattr(emssd_compile.OptimizedModel, "export_aot", lambda *given, **named: seen.append(named))
    command = ["export", "--model", str(models / "target"), "--to", "aot", "--out", str(tmp_path / "artifact")]
    names = ["repetition_penalty", "logit_bias"]
    assert main([*command, "--drafter", "none", "--max-length", "32", *flags, "--row-options", *names]) == 0
    (named,) = seen
    tokenizer = named.pop("tokenizer")
    assert named == {"progress": True, "verify_only": False, "check": check, "row_options": names}
    assert isinstance(tokenizer, PreTrainedTokenizerBase), "that beside the model"
