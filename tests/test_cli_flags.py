"""Errors on the command line name flags, not arguments of Python."""

import argparse

import pytest

from emssd_compile.cli import build_parser, main
from emssd_compile.cli.flags import in_flags

NAMES = vars(build_parser().parse_args(["generate", "--model", "llama"]))


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("max_length=9999 is more than the 64 positions", "--max-length 9999 is more than the 64 positions"),
        ("compile with a smaller max_length or max_batch", "compile with a smaller --max-length or --max-batch"),
        (
            "pass max_new_tokens=5 or less, or compile with optimize(model, max_length=70)",
            "pass --max-new-tokens 5 or less, or compile with --max-length 70",
        ),
        ("What to do: pass max_length=64 or less", "What to do: pass --max-length 64 or less"),
        ("layout='auto' is measured; the layout of a step", "--layout 'auto' is measured; the layout of a step"),
        ("a smaller max_batch.", "a smaller --max-batch."),
        ("prefix_cache=True is for memory='paged'", "--prefix-cache is for --memory 'paged'"),
        ("on the call, and deterministic=True on it alone", "on the call, and --deterministic on it alone"),
        ("prefill_chunk=3 is too small", "prefill_chunk=3 is too small"),
        ("--prompt-file max_length.json: no such file", "--prompt-file max_length.json: no such file"),
        ("--max-length 3 is less than 5", "--max-length 3 is less than 5"),
    ],
)
def test_what_has_a_flag_is_called_by_it(message, told):
    assert in_flags(message, NAMES) == told


def _defaults(command: str) -> dict[str, str]:
    """Flags of a command that say how a model is compiled, each with its default, or something if there is none."""
    given = vars(build_parser().parse_args([command, "--model", "llama", *OTHERS[command]]))
    found = {"--num-draft-tokens": "1", "--max-length": "64", "--kv-tokens": "64"}
    for name in ("drafter", "dtype", "max_batch", "layout", "memory", "backend"):
        found["--" + name.replace("_", "-")] = str(given[name])
    return found | ({"--warmup": "temperature"} if command == "serve" else {})


OTHERS = {"generate": ["--prompt", "x"], "batch": ["--input", "in.jsonl", "--output", "out.jsonl"], "serve": []}


@pytest.mark.parametrize("command", OTHERS)
def test_a_flag_that_means_nothing_for_an_artifact_is_refused_with_its_default_too(command, tmp_path, capsys):
    (tmp_path / "manifest.json").write_text("{}")
    common = [command, "--model", str(tmp_path), *OTHERS[command]]
    flags = [[flag, value] for flag, value in _defaults(command).items()] + [["--deterministic"], ["--prefix-cache"]]
    for flag in flags:
        assert main([*common, *flag]) == 1
        assert f"{flag[0]} was chosen when" in capsys.readouterr().err.replace("\n", " ")


def test_what_was_given_is_known_and_values_are_as_ever():
    parsed: argparse.Namespace = build_parser().parse_args(["generate", "--model", "llama", "--max-batch", "8"])
    assert parsed.given == {"model", "max_batch"}
    assert (parsed.max_batch, parsed.chat, parsed.prefix_cache) == (8, False, False)
    again = build_parser().parse_args(["generate", "--model", "llama", "--chat", "--prefix-cache"])
    assert (again.given, again.chat, again.prefix_cache) == ({"model", "chat", "prefix_cache"}, True, True)
