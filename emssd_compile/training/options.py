"""Options of a training run, checked where they are made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from emssd_compile.drafters.head import Recipe
from emssd_compile.errors import OptionError
from emssd_compile.lowering import BACKENDS
from emssd_compile.numeric import flag, integer, number
from emssd_compile.training.loss import LOSSES

_LEAST = dict.fromkeys(("epochs", "batch", "accumulate", "prompt_tokens", "checkpoint_every"), 1)
_LEAST |= {"window": 4, "continued_epochs": 0}


@dataclass(frozen=True)
class TrainingOptions:
    """What a run is to do; its curve depends on all of it but `checkpoint_every` and `backend`.

    Attributes:
        epochs: times that the windows are gone through.
        learning_rate: the highest, after the warm-up.
        batch: B, windows of a process that go through the target together.
        window: S, tokens of a window.
        accumulate: batches of a process in one step of the optimizer.
        tokens: most tokens that are read of the data; None for all.
        loss: `"tokens"`: cross-entropy with the words of the text; `"distribution"`: with the target's distribution;
            `"acceptance"`: how far the head's distribution is from it, and a little of the tokens (DSpark's).
        distil: learn from the target's own continuations of prompts cut from the data, not from the data.
        continued_epochs: times that, after the data, such continuations are gone through, at a tenth of the rate.
        prompt_tokens: P, tokens of such a prompt, and of those that acceptance is measured on.
        temperature: at which continuations are sampled; 0: the likeliest token is taken.
        held_out_share: part of the windows that is never trained on, where there are no files for that.
        seed: of the fresh weights, the order of windows, and all that is drawn.
        sizes: of the head, by the fields of its configuration.
        checkpoint_every: steps between checkpoints.
        backend: what continuations and the acceptance length are decoded with.
    """

    epochs: int
    learning_rate: float
    batch: int = 4
    window: int = 512
    accumulate: int = 1
    tokens: int | None = None
    loss: str = "tokens"
    distil: bool = False
    continued_epochs: int = 0
    prompt_tokens: int = 64
    temperature: float = 0.0
    held_out_share: float = 0.05
    seed: int = 0
    sizes: Mapping[str, Any] = field(default_factory=dict)
    checkpoint_every: int = 100
    backend: str = "inductor"

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            integer(name, getattr(self, name), least=least)
        if self.tokens is not None:
            integer("tokens", self.tokens, least=self.window)
        integer("seed", self.seed, least=0, most=(1 << 31) - 1)
        if not 0 < number("learning_rate", self.learning_rate) < math.inf:
            raise OptionError(f"learning_rate={self.learning_rate} is out of range; pass more than 0, such as 1e-3")
        if not 0 <= number("temperature", self.temperature) < math.inf:
            raise OptionError(f"temperature={self.temperature} is out of range; pass 0 or more")
        if not 0 < number("held_out_share", self.held_out_share) < 1:
            raise OptionError(f"held_out_share={self.held_out_share} is out of range; pass more than 0, less than 1")
        if self.loss not in LOSSES:
            raise OptionError(f"unknown loss {self.loss!r}; choose one of {list(LOSSES)}")
        if self.backend not in BACKENDS:
            raise OptionError(f"unknown backend {self.backend!r}; choose one of {list(BACKENDS)}")
        if flag("distil", self.distil) and self.continued_epochs:
            raise OptionError("continued_epochs come after those on the data; with distil, all are on continuations")
        if not (self.distil or self.continued_epochs) and self.temperature:
            raise OptionError(
                "temperature is that of continuations, and none are made; pass distil or continued_epochs, too, or "
                "leave it"
            )
        if self.prompt_tokens >= self.window:
            raise OptionError(
                f"prompt_tokens={self.prompt_tokens} leaves nothing of a window of {self.window} tokens to go on in; "
                "pass fewer, or a longer window"
            )

    @classmethod
    def of(cls, recipe: Recipe, **given: Any) -> TrainingOptions:
        """What is given; where it is None or missing, what the recipe of the head says, or the default here."""
        prescribed: dict[str, Any] = {
            "epochs": recipe.epochs,
            "learning_rate": recipe.learning_rate,
            "loss": LOSSES[recipe.distils],
            "distil": recipe.continues,
            "continued_epochs": recipe.continued_epochs if given.get("distil") is None else 0,
        }
        return cls(**prescribed | {name: value for name, value in given.items() if value is not None})
