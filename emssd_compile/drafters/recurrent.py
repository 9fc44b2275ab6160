"""ReDrafter: a recurrent head drafts by beam search (2403.09919)."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emssd_compile.checkpoints import CONFIG, Checkpoint
from emssd_compile.drafters.beams import prefix_tree
from emssd_compile.drafters.drawing import likeliest, shaped
from emssd_compile.drafters.guesses import in_eighths
from emssd_compile.drafters.head import DraftHead, Features, Recipe
from emssd_compile.drafters.tree_shape import MOST_NODES
from emssd_compile.errors import CheckpointError, DrafterError, OptionError
from emssd_compile.numeric import flag, integer
from emssd_compile.step.drafting import Draft, DraftContext, Target


@dataclass(frozen=True)
class RecurrentConfig:
    """Sizes of a `RecurrentDrafter`.

    Attributes:
        hidden_size: H, of the target's hidden states and of its embedding.
        vocabulary: V, of the target.
        exit_size: E, of the layers before the LM head; 0 stands for 2 H, which is what they read.
        num_layers: residual layers before the LM head.
        rnn: whether the state is a recurrent network's; otherwise it is the sum of the embeddings.

    Raises:
        OptionError: one of them is out of range.
    """

    hidden_size: int
    vocabulary: int
    exit_size: int = 0
    num_layers: int = 2
    rnn: bool = True

    def __post_init__(self) -> None:
        name = type(self).__name__
        for size, least in (("hidden_size", 1), ("vocabulary", 1), ("exit_size", 0), ("num_layers", 0)):
            integer(f"{name} {size}", getattr(self, size), least=least)
        flag(f"{name} rnn", self.rnn)
        object.__setattr__(self, "exit_size", self.exit_size or 2 * self.hidden_size)


class AppleLayout:
    """That of apple/ml-recurrent-drafter. Tensors have the head's own names."""

    name = "ml-recurrent-drafter"
    model_type = "recurrent_drafting_drafter"

    def matches(self, config: Mapping[str, Any], names: Collection[str]) -> bool:
        """By the type that the config names."""
        return config.get("model_type") == self.model_type

    def read(self, checkpoint: Checkpoint) -> tuple[RecurrentConfig, dict[str, Tensor]]:
        """Sizes and weights. Raises CheckpointError: a size is missing or out of range."""
        try:
            config = RecurrentConfig(
                hidden_size=checkpoint.get("hidden_size", int),
                vocabulary=checkpoint.get("vocab_size", int),
                exit_size=checkpoint.get("exit_dim", int),
                num_layers=checkpoint.get("num_draft_layers", int),
                rnn=checkpoint.get("rnn", bool, False),
            )
        except OptionError as error:
            raise CheckpointError(f"{checkpoint.folder / CONFIG}: {error}") from error
        return config, checkpoint.tensors

    def write(self, config: RecurrentConfig, weights: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The same, the other way."""
        entries = {
            "architectures": ["Drafter"],
            "model_type": self.model_type,
            "hidden_size": config.hidden_size,
            "vocab_size": config.vocabulary,
            "exit_dim": config.exit_size,
            "num_draft_layers": config.num_layers,
            "rnn": config.rnn,
        }
        return entries, dict(weights)


class RecurrentDrafter(DraftHead):
    """A small recurrent network drafts beams behind the target's last hidden state (ReDrafter, 2403.09919).

    Behind the root token x_0 and drafts x_1 .. x_{t-1} it expects

        s_t = SiLU(W e(x_{t-1}) + U s_{t-1} + b),  s_0 = 0
        logits_t = LM(Res(.. Res([h ; s_t]))),  Res(x) = x + SiLU(A x + a)

    where e is the target's own embedding, and h its hidden state that predicted the root token, the same for all
    drafts. Where E is not 2 H, a linear layer comes before the residual ones.

    A beam search finds the likeliest paths: behind each of at most W beams the W likeliest tokens, and of all these the
    W likeliest beams. They become a tree, in which what beams have in common stands, and is verified, once (dynamic
    tree attention). The paper normalises over the 50 likeliest tokens, and here all of them count. The grade of a draft
    is the probability that the head gives it where it stands, in eighths.

    For rows that sample, the noise with which the target draws is added to the logits first, shaped as the target's
    are: how likely a token is then says how likely it is to be drawn (see `drawing.likeliest`). Only rules that need no
    q go with it.

    Args:
        config: sizes. The weights of a new head are PyTorch's defaults, from its global generator.
        width: W, beams.
        length: D, drafts of a beam: the root token is not counted, so a step has at most 1 + W * D tokens of a row, and
            K = W * D.

    Raises:
        OptionError: an option is out of range.
    """

    kind = "recurrent"
    config_class = RecurrentConfig
    layouts = (AppleLayout(),)
    recipe = Recipe(learning_rate=1e-3, continues=True)
    borrows = ("embedding",)
    is_costly = True
    any_rows = True
    num_grades = 8
    config: RecurrentConfig

    def __init__(self, config: RecurrentConfig, *, width: int = 4, length: int = 5) -> None:
        super().__init__(config)
        self.width = integer("RecurrentDrafter width", width, least=1, most=MOST_NODES)
        self.length = integer("RecurrentDrafter length", length, least=1, most=MOST_NODES // self.width)
        self.num_draft_tokens, self.max_depth = self.width * self.length, self.length
        hidden, exit_size = config.hidden_size, config.exit_size
        if config.rnn:
            self.rnn_u = nn.Linear(hidden, hidden)
            self.rnn_w = nn.Linear(hidden, hidden, bias=False)
        self.input_proj = nn.Linear(2 * hidden, exit_size) if exit_size != 2 * hidden else nn.Identity()
        layers = [_Residual(exit_size) for _ in range(config.num_layers)]
        self.lm_head = nn.Sequential(*layers, nn.Linear(exit_size, config.vocabulary, bias=False))

    def prepare(self, target: Target) -> None:
        """See the target.

        Raises:
            DrafterError: the head does not fit it, or it has fewer tokens than there are beams.
        """
        super().prepare(target)
        wide = self._embedding.shape[1]
        if wide != self.config.hidden_size:
            raise DrafterError(
                f"the RecurrentDrafter reads embeddings of the size of hidden states, {self.config.hidden_size}; the "
                f"target's are of size {wide}: use another drafter"
            )
        if self.width > (tokens := self._count_tokens(target.vocabulary)):
            raise DrafterError(
                f"the RecurrentDrafter drafts {self.width} tokens behind the root, and there are only {tokens} in the "
                "vocabulary; make width smaller"
            )

    def forward(self, context: DraftContext) -> Draft:
        """Search the beams of all rows. Tokens, grades and parents `[B, K]`, lengths `[B]`."""
        hidden = context.hidden[:, None]  # [B, 1, H]
        tokens = context.history.gather(1, (context.known - 1).clamp(min=0)[:, None])[:, :, None]  # [B, 1, 1], the root
        log_probs = torch.zeros_like(tokens, dtype=torch.float32)  # [B, beams, 1 + depth], of each token
        state = torch.zeros_like(hidden)  # [B, beams, H]
        for depth in range(self.length):
            state = self._advance(state, self._embed(tokens[:, :, -1], hidden.dtype))
            logits = self._predict(hidden.expand_as(state), state).flatten(0, 1)  # [B * beams, V]
            logits = shaped(logits[:, : self._count_tokens(context.vocabulary)].float(), context)
            found, found_log_probs = (
                values.unflatten(0, tokens.shape[:2]) for values in likeliest(logits, self.width, depth, context)
            )  # [B, beams, W]
            totals = log_probs.sum(2)[:, :, None] + found_log_probs  # [B, beams, W]
            chosen = totals.flatten(1).topk(self.width, 1).indices  # [B, W], of all that were found
            origin = chosen // self.width  # [B, W], the beams that go on
            newest, sure = (new.flatten(1).gather(1, chosen)[:, :, None] for new in (found, found_log_probs))
            tokens = torch.cat([_of_beams(tokens, origin), newest], 2)
            log_probs = torch.cat([_of_beams(log_probs, origin), sure], 2)
            state = _of_beams(state, origin)
        # A beam that is impossible stands where a filter leaves fewer than W possible ones.
        is_possible = log_probs.sum(2) > -torch.inf  # [B, W]
        drafts = prefix_tree(tokens[:, :, 1:], in_eighths(log_probs[:, :, 1:].exp()), is_possible)
        return Draft(drafts.tokens, drafts.lengths, grades=drafts.grades, parents=drafts.parents)

    def rollout(self, features: Features) -> Iterator[Tensor]:
        """The logits of each of the D drafts of a beam, `[B, S, V]`, if all before it are the text's own tokens."""
        hidden = features.hidden
        embedded = self._embed(features.tokens, hidden.dtype).detach()  # [B, S, H]; the embedding is not trained
        state = torch.zeros_like(hidden)
        for draft in range(1, self.length + 1):
            state = self._advance(state, embedded.roll(-draft, 1))  # entry t reads the token t + draft
            yield self._predict(hidden, state)

    def _advance(self, state: Tensor, embedded: Tensor) -> Tensor:
        """The state after another token, `[..., H]`."""
        return F.silu(self.rnn_w(embedded) + self.rnn_u(state)) if self.config.rnn else embedded + state

    def _predict(self, hidden: Tensor, state: Tensor) -> Tensor:
        """Logits `[..., V]`."""
        logits: Tensor = self.lm_head(self.input_proj(torch.cat([hidden, state], -1)))
        return logits

    def _embed(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        return F.embedding(tokens, self._embedding).to(dtype)

    @property
    def _embedding(self) -> Tensor:
        assert self.tables.embedding is not None, "prepare comes first"
        return self.tables.embedding

    def _count_tokens(self, vocabulary: int) -> int:
        """How many tokens both models can predict and the embedding holds; what only one of them has is padding."""
        return min(self.config.vocabulary, vocabulary, len(self._embedding))


class _Residual(nn.Module):
    """`x + SiLU(A x + a)`."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.silu(self.linear(x))


def _of_beams(values: Tensor, beams: Tensor) -> Tensor:
    """What belongs to the beams `[B, W]`, of values `[B, any, n]`: `[B, W, n]`."""
    return values.gather(1, beams[:, :, None].expand(-1, -1, values.shape[2]))
