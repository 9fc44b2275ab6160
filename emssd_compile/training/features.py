"""What the target computes of windows, with the graph that serves it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from emssd_compile.ambient import compiling, neutral
from emssd_compile.compiler import CompiledModel, compile_model
from emssd_compile.drafters.head import Features
from emssd_compile.pipeline import compile_compared
from emssd_compile.runtime.memory import allocate
from emssd_compile.step.batch import BatchShape
from emssd_compile.step.drafting import Target, TokenTables
from emssd_compile.step.pack import pack


class FrozenTarget:
    """A target that reads whole windows, and learns nothing.

    It is the captured graph of the model, on a packed batch: hidden states and taps mean what they mean to a drafter
    in serving, for any model.

    Args:
        model: in eval mode.
        batch: B, most windows at a time.
        window: S, tokens of each.

    Raises:
        InvalidInputError, UnsupportedModelError, CapacityError: as `optimize`.
    """

    def __init__(self, model: nn.Module, batch: int, window: int) -> None:
        self._shape = BatchShape(batch, window)
        with compiling, neutral(torch.get_default_dtype()):
            self._compiled = self._tapped = compile_compared(model, self._shape)
        self.device = self.as_target().device
        self._caches = allocate(self._compiled.cache_shapes, self.device)

    def tap(self, layers: tuple[int, ...]) -> None:
        """Give the outputs of these layers, too. Raises OptionError if there is no such layer."""
        with compiling, neutral(torch.get_default_dtype()):
            self._tapped = self._compiled.tapped(layers) if layers else self._compiled

    @property
    def vocabulary(self) -> int:
        """V."""
        return self._compiled.vocabulary

    def as_target(self) -> Target:
        """The model as a head in training meets it: it computes in float32, and the model's tables take no gradient."""

        def compile_one(model: nn.Module, /, *, tree_nodes: int = 0) -> CompiledModel:
            return compile_model(model, replace(self._shape, tree_nodes=tree_nodes))

        target = self._compiled.target(compile_one)
        tables = target.tables
        each = (tables.embedding, tables.head, tables.head_bias)
        frozen = TokenTables(*(None if table is None else table.detach() for table in each))
        return replace(target, dtype=torch.float32, read_tables=lambda: frozen)

    def read(self, tokens: Tensor, *, with_logits: bool = False) -> tuple[Features, Tensor | None]:
        """What is computed of windows `[B, S]`; the logits `[B, S, V]` only if they are asked for."""
        tokens = tokens.to(self.device)
        number, window = tokens.shape
        rows = torch.arange(self._shape.rows, device=self.device)
        active = rows < number  # [rows]
        history = tokens.new_zeros(self._shape.rows, window)  # [rows, S]
        history[:number] = tokens
        places = torch.arange(number * window, device=self.device)  # [T]
        lengths = torch.zeros_like(rows)
        packed = pack(history, lengths + window, lengths, active, places, places[:window], share=window)
        wanted = places if with_logits else places[:1]  # [R]
        with neutral(torch.get_default_dtype()):
            hidden, logits, taps = self._tapped.with_taps(packed, lengths, wanted, self._caches)
        by_window = (number, window, -1)
        features = Features(
            tokens, hidden.float().view(by_window), {tap: value.float().view(by_window) for tap, value in taps.items()}
        )
        return features, logits.view(by_window) if with_logits else None
