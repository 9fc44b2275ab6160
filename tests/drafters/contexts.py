"""What a drafter sees, for the tests of drafters."""

from typing import Any

import torch
from torch import Tensor

from emssd_compile.step.drafting import DraftContext, Target, TokenTables
from emssd_compile.step.pack import pack


def target_of(
    compile_model: Any,
    rows: int,
    capacity: int,
    vocabulary: int,
    hidden_size: int = 4,
    tables: TokenTables | None = None,
) -> Target:
    """A target of these sizes, in float32."""
    sizes = (rows, capacity, vocabulary, hidden_size, 8)
    device = torch.device("cpu")
    return Target(*sizes, torch.float32, device, compile_model, lambda layers: None, lambda: tables or TokenTables())  # type: ignore[arg-type, return-value]


def context(texts: list[list[int]], limit: int, capacity: int = 24, filler: int = 0) -> DraftContext:
    """Rows that hold `texts`, with `filler` behind them, each free to draft `limit` tokens."""
    history = torch.full((len(texts), capacity), filler)
    for row, text in enumerate(texts):
        history[row, : len(text)] = torch.tensor(text)
    rows = torch.ones(len(texts), dtype=torch.bool)
    known: Tensor = torch.tensor([len(text) for text in texts])
    places = torch.arange(8)
    return DraftContext(
        history=history,
        known=known,
        hidden=torch.zeros(len(texts), 4),
        active=rows,
        can_draft=rows,
        max_drafts=torch.full_like(known, limit),
        draft_range=places,
        row_range=places,
        seeds=torch.zeros_like(known),
        groups=torch.arange(len(texts)),
        read=pack(history, known, known - 1, rows, places, places, share=1),
        source=places,
        taps={"hidden": torch.zeros(len(places), 4)},
    )
