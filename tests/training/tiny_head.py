"""A head as small as they come: each draft is made of the target's hidden state and the token before it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from emssd_compile.checkpoints import Checkpoint
from emssd_compile.drafters import Draft, DraftContext, DraftHead
from emssd_compile.drafters.head import Features
from emssd_compile.errors import OptionError


@dataclass(frozen=True)
class TinySizes:
    hidden_size: int
    vocabulary: int
    width: int
    depth: int = 2

    def __post_init__(self) -> None:
        if self.width < 1:
            raise OptionError(f"width={self.width} is out of range; pass at least 1")


class TinyLayout:
    name = "tiny"

    def matches(self, config: Mapping[str, Any], names: Collection[str]) -> bool:
        return config.get("kind") == "tiny"

    def read(self, checkpoint: Checkpoint) -> tuple[TinySizes, dict[str, Tensor]]:
        names = ("hidden_size", "vocabulary", "width", "depth")
        return TinySizes(*(checkpoint.get(name, int) for name in names)), checkpoint.tensors

    def write(self, config: TinySizes, weights: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {"kind": "tiny", **asdict(config)}, dict(weights)


class TinyHead(DraftHead):
    kind = "tiny"
    config_class = TinySizes
    layouts = (TinyLayout(),)
    borrows = ("embedding", "head")
    taps = (0,)

    def __init__(self, config: TinySizes, dropout: float = 0.1) -> None:
        super().__init__(config)
        self.num_draft_tokens = config.depth
        self.down = nn.ModuleList(nn.Linear(2 * config.hidden_size, config.width) for _ in range(config.depth))
        self.up = nn.ModuleList(nn.Linear(config.width, config.hidden_size) for _ in range(config.depth))
        self.dropout = nn.Dropout(dropout)  # it draws, so a resumed run has to draw the same

    def _logits(self, place: int, hidden: Tensor, token: Tensor) -> Tensor:
        assert self.tables.embedding is not None
        assert self.tables.head is not None
        seen = torch.cat([hidden, nn.functional.embedding(token, self.tables.embedding).to(hidden.dtype)], -1)
        made = hidden + self.up[place](self.dropout(self.down[place](seen).tanh()))
        return nn.functional.linear(made, self.tables.head)

    def forward(self, context: DraftContext) -> Draft:
        token = context.history.gather(1, (context.known - 1).clamp(min=0)[:, None])[:, 0]  # [B]
        drafts = []
        for place in range(self.num_draft_tokens):
            token = self._logits(place, context.hidden, token).argmax(-1)  # [B]
            drafts.append(token)
        return Draft(torch.stack(drafts, 1), torch.full_like(context.known, self.num_draft_tokens))

    def rollout(self, features: Features) -> Iterator[Tensor]:
        for place in range(self.num_draft_tokens):
            yield self._logits(place, features.hidden, features.tokens.roll(-1 - place, 1))
