"""What the token before a draft says of it, and how sure a draft is (DSpark, 2607.05147)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MarkovHead(nn.Module):
    """Adds to the logits of a draft what follows from the token before it: W2 e, where e is that token's row of W1.

    Args:
        rank: r, of e.
        hidden_size: H, of what the layers say of the draft.
        vocabulary: V, tokens that e is of.
        draft_vocabulary: Vd, tokens that have logits.
    """

    def __init__(self, rank: int, hidden_size: int, vocabulary: int, draft_vocabulary: int) -> None:
        super().__init__()
        self.rank, self.hidden_size = rank, hidden_size
        self.markov_w1 = nn.Embedding(vocabulary, rank)
        self.markov_w2 = nn.Linear(rank, draft_vocabulary, bias=False)

    def row(self, tokens: Tensor) -> Tensor:
        """e, `[..., r]`; an id past the table is read as its last one."""
        e: Tensor = self.markov_w1(tokens.clamp(max=self.markov_w1.num_embeddings - 1))
        return e

    def forward(self, row: Tensor, hidden: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """What is added, `[..., Vd]`, and the state behind the draft, `[..., r]`.

        Args:
            row: e, `[..., r]`.
            hidden: `[..., H]`.
            state: `[..., r]`.
        """
        return self.markov_w2(row), state


class GatedMarkovHead(MarkovHead):
    """Lets through as much of e as the draft wants: W2 (sigmoid(G [h; e]) * e)."""

    def __init__(self, rank: int, hidden_size: int, vocabulary: int, draft_vocabulary: int) -> None:
        super().__init__(rank, hidden_size, vocabulary, draft_vocabulary)
        self.gate_proj = nn.Linear(hidden_size + rank, rank)

    def forward(self, row: Tensor, hidden: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """As for `MarkovHead`."""
        gate = self.gate_proj(torch.cat([hidden, row], -1)).sigmoid()  # [..., r]
        return self.markov_w2(gate * row), state


class RecurrentMarkovHead(MarkovHead):
    """Remembers all drafts before, in s: g, c, o = J [s; e; h]; adds W2 tanh(o).

    Then s is sigmoid(g) s + (1 - sigmoid(g)) tanh(c). At first it is 0.
    """

    def __init__(self, rank: int, hidden_size: int, vocabulary: int, draft_vocabulary: int) -> None:
        super().__init__(rank, hidden_size, vocabulary, draft_vocabulary)
        self.joint_proj = nn.Linear(2 * rank + hidden_size, 3 * rank)

    def forward(self, row: Tensor, hidden: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """As for `MarkovHead`."""
        gate, candidate, output = self.joint_proj(torch.cat([state, row, hidden], -1)).chunk(3, -1)  # [..., r] each
        gate = gate.sigmoid()
        return self.markov_w2(output.tanh()), gate * state + (1 - gate) * candidate.tanh()


MARKOV_HEADS: dict[str, type[MarkovHead]] = {
    "vanilla": MarkovHead,
    "gated": GatedMarkovHead,
    "rnn": RecurrentMarkovHead,
}
"""By the names that checkpoints have for them."""


class ConfidenceHead(nn.Module):
    """How likely a draft is to be accepted if all before it are: sigmoid(w h + b), or sigmoid(w [h; e] + b).

    Args:
        width: of what it reads.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """float32 `[...]` for `x[..., width]`."""
        return self.log_odds(x).sigmoid()

    def log_odds(self, x: Tensor) -> Tensor:
        """What the sigmoid is taken of."""
        result: Tensor = self.proj(x).squeeze(-1).float()
        return result
