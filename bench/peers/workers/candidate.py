"""A way of `bench.candidates`: transformers and ours, in the environment that the command itself runs in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bench import shapes
from bench.candidates import CANDIDATES, Task
from bench.peers.workers.protocol import Generate, Tokens, main


def convert(source: Path, target: Path, dtype: str) -> None:
    """Nothing to convert: `load` reads what transformers saved."""
    (target / "model").symlink_to(source, target_is_directory=True)


def load(folder: Path, options: dict[str, Any]) -> tuple[str, Generate]:
    """The option `way` names it; torch has its number of threads from the environment."""
    model = shapes.pretrained(folder / "model", "cpu", getattr(torch, options["dtype"]))
    task = Task(
        model,
        None,
        max_batch=options["max_batch"],
        max_length=options["max_length"],
        lookup_tokens=options["lookup"],
        max_ngram=options["max_ngram"],
        draft_tokens=0,
        backend=options["backend"],
    )
    run = CANDIDATES[options["way"]](task)

    def generate(prompts: Tokens, new_tokens: int) -> Tokens:
        return run(prompts, max_new_tokens=new_tokens).tokens

    return f"torch {torch.__version__}", generate


if __name__ == "__main__":
    main(convert, load)
