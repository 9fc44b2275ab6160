"""A target, a tokenizer and texts that are learnt in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from emssd_compile.training.data import Windows, encode
from emssd_compile.training.features import FrozenTarget
from emssd_compile.training.loop import Trainer
from emssd_compile.training.options import TrainingOptions
from emssd_compile.training.processes import Accelerator, accelerator
from emssd_compile.training.work import WorkFolder
from tests.training.tiny_head import TinyHead
from tests.zoo import toy_model

WINDOW, BATCH, DEPTH = 24, 3, 2
TEXT = "the cat sat on the mat; the dog ran to the red barn. " * 12


class Characters:
    """A tokenizer: one id a character."""

    eos_token_id = 2

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [*text.encode("ascii")]}


def toy_target() -> nn.Module:
    return toy_model("llama", num_hidden_layers=2)


def options(**given: Any) -> TrainingOptions:
    sizes = {"width": 16, "depth": DEPTH}
    defaults: dict[str, Any] = {
        "epochs": 2,
        "learning_rate": 1e-2,
        "window": WINDOW,
        "batch": BATCH,
        "prompt_tokens": 8,
    }
    return TrainingOptions(**defaults | {"sizes": sizes, "checkpoint_every": 3, "backend": "eager"} | given)


def trainer(target: FrozenTarget, out: Path, processes: Accelerator | None = None, **given: Any) -> Trainer:
    """A trainer with a fresh head, as `train` makes it."""
    chosen = options(**given)
    windows = Windows.cut(encode([TEXT], Characters(), None), WINDOW).split(0.1, chosen.seed)
    target.tap(TinyHead.taps)
    head = TinyHead.for_target(target.as_target(), **chosen.sizes)
    head.prepare(target.as_target())
    return Trainer(head, target, windows, chosen, processes or accelerator(), WorkFolder(out))
