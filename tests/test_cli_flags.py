"""Errors on the command line name flags, not arguments of Python."""

import pytest

from emssd_compile.cli import build_parser
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
        ("prefill_chunk=3 is too small", "prefill_chunk=3 is too small"),
        ("--prompt-file max_length.json: no such file", "--prompt-file max_length.json: no such file"),
        ("--max-length 3 is less than 5", "--max-length 3 is less than 5"),
    ],
)
def test_what_has_a_flag_is_called_by_it(message, told):
    assert in_flags(message, NAMES) == told
