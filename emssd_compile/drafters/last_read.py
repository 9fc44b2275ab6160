"""What a draft head keeps of the tokens that it read last, to read them again when it is known what follows them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from emssd_compile.drafters.autoregressive_head import first_positions
from emssd_compile.step.drafting import DraftContext
from emssd_compile.step.tensor_spec import TensorSpec


@dataclass(frozen=True)
class Window:
    """The n positions of each row that are read again.

    Attributes:
        positions: int64 `[B, n]`, consecutive: up to the first one that is new, or from the first one that is kept.
            New ones among them, and any behind them, are read after these, and so written again.
        features: `[B, n, H]`, the target's of those that are not new; rubbish for the others.
    """

    positions: Tensor
    features: Tensor


@dataclass(frozen=True)
class LastRead:
    """The target's features of the last n positions that each row has read.

    Attributes:
        count: n, at least 1.
    """

    count: int

    def tensors(self, rows: int, width: int, dtype: torch.dtype) -> dict[str, TensorSpec]:
        """Features `[B, n, H]`, and of each row 1 + the first position that it has read itself, `[B]`; 0 for none."""
        return {
            "last_features": TensorSpec((rows, self.count, width), dtype),
            "begun": TensorSpec((rows,), torch.int64),
        }

    def window(self, context: DraftContext) -> Window:
        """What is to be read again before the new tokens."""
        return Window(self._positions(context, first_positions(context.read)), context.state["last_features"])

    def after(self, context: DraftContext, window: Window, new: Tensor) -> dict[str, Tensor]:
        """The tensors for the next step.

        Args:
            context: of this step.
            window: of this step.
            new: `[T, H]`, the features of the tokens that are new.
        """
        read, first = context.read, first_positions(context.read)[:, None]  # [B, 1]
        positions = self._positions(context, first.squeeze(1) + read.fed)  # [B, n], the next step's
        kept = (positions - window.positions[:, :1]).clamp(0, self.count - 1)[:, :, None]  # [B, n, 1]
        kept = window.features.gather(1, kept.expand(-1, -1, new.shape[1]))
        place = (read.offsets[:-1, None] + positions - first).clamp(0, new.shape[0] - 1)
        features = torch.where((positions < first)[:, :, None], kept, new[place])
        has_read = read.fed > 0
        return {
            "last_features": torch.where(has_read[:, None, None], features, window.features),
            "begun": torch.where(has_read, self._begun(context), context.state["begun"]),
        }

    def _begun(self, context: DraftContext) -> Tensor:
        """1 + the first position that each row has read itself, now at the latest, int64 `[B]`."""
        begun = context.state["begun"]
        return torch.where(begun > 0, begun, first_positions(context.read) + 1)

    def _positions(self, context: DraftContext, end: Tensor) -> Tensor:
        """The n positions before `end[B]`, or from the first one that the row has read itself, int64 `[B, n]`."""
        start = torch.maximum(end - self.count, self._begun(context) - 1)
        return start[:, None] + torch.arange(self.count, device=end.device)
