"""What every worker does besides decoding: converts a model, or answers requests, one line of JSON each.

    python -m <worker> convert SOURCE TARGET DTYPE [SITE]
    python -m <worker> serve FOLDER OPTIONS

`serve` says `{"ready": version}`, then answers `{"prompts": [[id, ...], ...], "new_tokens": n}` with
`{"tokens": [[id, ...], ...], "seconds": s, "peak_bytes": b}`, until its input ends. What fails is `{"error": text}`.
A worker runs in an environment of its own: no file in this folder imports another package of this project.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Tokens = list[list[int]]
Generate = Callable[[Tokens, int], Tokens]
Convert = Callable[[Path, Path, str], object]
Load = Callable[[Path, dict[str, Any]], tuple[str, Generate]]


def main(convert: Convert, load: Load) -> None:
    """Do what the command line says.

    Args:
        convert: makes of a folder with a model of transformers in float32 what `load` reads, in another folder. Both
            get the name of a dtype.
        load: of that folder and options, a version to print, and what decodes prompts greedily to so many new tokens.
            Options are `dtype`, `threads`, `max_batch`, `max_length` (prompt and new tokens), `unused_token` (an id in
            no prompt), `lookup` (drafts of a step, or 0) and `max_ngram` (the longest n-gram that is looked up).
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    action, *rest = sys.argv[1:]
    try:
        if action == "convert":
            source, target, dtype, *site = rest
            sys.path += site  # torch and transformers, where a converter needs them
            convert(Path(source), Path(target), dtype)
            return
        version, generate = load(Path(rest[0]), json.loads(rest[1]))
        _answer(answers, ready=version)
        for line in sys.stdin:
            request = json.loads(line)
            started = time.perf_counter()
            tokens = generate(request["prompts"], request["new_tokens"])
            seconds = time.perf_counter() - started
            _answer(answers, tokens=tokens, seconds=seconds, peak_bytes=_peak())
    except Exception as error:
        _answer(answers, error=f"{type(error).__name__}: {error}")
        raise


def _peak() -> int:
    """Bytes of the most memory that this process had; what `getrusage` says begins with that of its parent."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) * 1024


def _answer(answers: Any, **fields: object) -> None:
    answers.write(json.dumps(fields) + "\n")
    answers.flush()
