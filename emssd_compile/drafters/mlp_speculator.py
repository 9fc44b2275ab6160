"""MLP speculators: a small network for each draft, that reads the state and the token before it (2404.19124)."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emssd_compile.checkpoints import Checkpoint
from emssd_compile.drafters.decoder_layer import normalized
from emssd_compile.drafters.guesses import Guess, drawn_from, guess, in_eighths
from emssd_compile.drafters.head import DraftHead, Features, Recipe
from emssd_compile.drafters.layout_checks import configured, refused
from emssd_compile.drafters.speculators import TYPE, InSpeculators
from emssd_compile.drafters.tree_shape import MOST_NODES, TreeShape
from emssd_compile.errors import DrafterError, OptionError
from emssd_compile.numeric import flag, integer
from emssd_compile.step.drafting import Draft, DraftContext, TargetSizes
from emssd_compile.step.proposals import DETERMINISTIC, SAMPLED, WITHOUT_REPLACEMENT

EPSILON = 1e-6


@dataclass(frozen=True)
class MLPSpeculatorConfig:
    """Sizes of an `MLPSpeculator`.

    Attributes:
        hidden_size: H, of the target's hidden states.
        vocabulary: V, of the target.
        num_heads: n, tokens that are predicted.
        inner_size: I, of its own states; 0 stands for H.
        tie_weights: whether all heads have the same weights, but for the first projection.
        scale_input: whether the target's hidden state is normalized before it is read.
        speculative_tokens: drafts of a chain, if nothing else is said; 0 stands for n.

    Raises:
        OptionError: one of them is out of range.
    """

    hidden_size: int
    vocabulary: int
    num_heads: int = 3
    inner_size: int = 0
    tie_weights: bool = False
    scale_input: bool = False
    speculative_tokens: int = 0

    def __post_init__(self) -> None:
        for size, least in (("hidden_size", 1), ("vocabulary", 1), ("inner_size", 0)):
            integer(f"MLPSpeculatorConfig {size}", getattr(self, size), least=least)
        integer("MLPSpeculatorConfig num_heads", self.num_heads, least=1, most=MOST_NODES)
        for switch in ("tie_weights", "scale_input"):
            flag(f"MLPSpeculatorConfig {switch}", getattr(self, switch))
        integer("MLPSpeculatorConfig speculative_tokens", self.speculative_tokens, least=0, most=self.num_heads)
        object.__setattr__(self, "inner_size", self.inner_size or self.hidden_size)
        object.__setattr__(self, "speculative_tokens", self.speculative_tokens or self.num_heads)


class IbmLayout:
    """That of IBM's speculators, which vLLM reads, too: the head's own names behind `speculator.`.

    Weights that are tied are stored once, or as often as they are used. How many tokens each head is to draft
    (`top_k_tokens_per_head`) is an option of the head here, and is written as 1.
    """

    name = "IBM"
    model_type = "mlp_speculator"
    prefix = "speculator."

    def matches(self, config: Mapping[str, Any], names: Collection[str]) -> bool:
        """By the type that the config names."""
        return config.get("model_type") == self.model_type and TYPE not in config

    def read(self, checkpoint: Checkpoint) -> tuple[MLPSpeculatorConfig, dict[str, Tensor]]:
        """Sizes, and the tensors without their prefix.

        Raises:
            CheckpointError: an entry is missing or makes no sense, or weights that are said to be tied differ.
        """
        weights = {name.removeprefix(self.prefix): value for name, value in checkpoint.tensors.items()}
        config = configured(
            checkpoint,
            MLPSpeculatorConfig,
            hidden_size=checkpoint.get("emb_dim", int),
            vocabulary=checkpoint.get("vocab_size", int),
            num_heads=checkpoint.get("n_predict", int),
            inner_size=checkpoint.get("inner_dim", int, 0),
            tie_weights=checkpoint.get("tie_weights", bool, False),
            scale_input=checkpoint.get("scale_input", bool, False),
            speculative_tokens=checkpoint.get("speculative_tokens", int, 0),
        )
        for name in list(weights) if config.tie_weights else ():
            kind, _, rest = name.partition(".")
            number, _, tensor = rest.partition(".")
            kept = 1 if kind == "proj" else 0
            first = f"{kind}.{kept}.{tensor}"
            if number.isdecimal() and kept < int(number) < config.num_heads and first in weights:
                if not torch.equal(weights[name], weights[first]):
                    raise refused(checkpoint, f"tie_weights is true, and {name} is not the same as {first}")
                del weights[name]
        return config, weights

    def write(
        self, config: MLPSpeculatorConfig, weights: Mapping[str, Tensor]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The way back."""
        entries = {
            "model_type": self.model_type,
            "architectures": ["MLPSpeculatorPreTrainedModel"],
            "emb_dim": config.hidden_size,
            "vocab_size": config.vocabulary,
            "n_predict": config.num_heads,
            "inner_dim": config.inner_size,
            "top_k_tokens_per_head": [1] * config.num_heads,
            "tie_weights": config.tie_weights,
            "scale_input": config.scale_input,
            "speculative_tokens": config.speculative_tokens,
        }
        return entries, {self.prefix + name: value for name, value in weights.items()}


class MLPSpeculator(DraftHead):
    """Each draft is predicted from a state that has taken in the draft before it (2404.19124).

    With state_0 the target's hidden state where it predicted the root token, and x_0 the root token,

        state_i = GELU(N_i(P_i state_{i-1} + (w_e / w_s) E_i[x_{i-1}]))    and    logits_i = W_i state_i,

    where N_i divides by the root mean square, then scales and shifts, w_s = 0.5^(1 / 2n), and w_e =
    sqrt((1 - w_s^2) I / 2).

    In a tree the likeliest tokens follow each node, and each has a state of its own. For rows that sample, drafts are
    chosen, or drawn from q, as `DraftModel` does. The grade of a draft is the probability that its head gives it where
    it stands, in eighths.

    Args:
        config: its sizes.
        num_draft_tokens: K, tokens of a chain, 1 to n; as the config says unless there is a `tree`.
        tree: how many tokens to draft behind the root, behind each of those, and so on (IBM's `top_k_tokens_per_head`);
            at most n depths.

    Raises:
        OptionError: an option is out of range, or both are given.
    """

    kind = "mlp"
    config_class: ClassVar[type[MLPSpeculatorConfig]] = MLPSpeculatorConfig
    layouts = (IbmLayout(), InSpeculators("mlp_speculator", IbmLayout()))
    recipe = Recipe(learning_rate=1e-3, continued_epochs=1)
    is_costly = True
    any_rows = True
    num_grades = 8
    config: MLPSpeculatorConfig

    def __init__(
        self, config: MLPSpeculatorConfig, num_draft_tokens: int | None = None, *, tree: Sequence[int] | None = None
    ) -> None:
        super().__init__(config)
        self.shape = _shape(config, num_draft_tokens, tree)
        self.num_draft_tokens = self.shape.num_nodes
        self.proposes = (DETERMINISTIC, SAMPLED)
        if tree is not None:
            self.max_depth = self.shape.depth
            self.proposes = (DETERMINISTIC, WITHOUT_REPLACEMENT, SAMPLED)
        hidden, inner, heads = config.hidden_size, config.inner_size, 1 if config.tie_weights else config.num_heads
        widths = [hidden, *[inner] * (min(config.num_heads, 2) if config.tie_weights else config.num_heads)][:-1]
        self.emb = nn.ModuleList(nn.Embedding(config.vocabulary, inner) for _ in range(heads))
        self.proj = nn.ModuleList(nn.Linear(width, inner, bias=False) for width in widths)
        self.head = nn.ModuleList(nn.Linear(inner, config.vocabulary, bias=False) for _ in range(heads))
        self.ln = nn.ModuleList(_ScaleAndShift(inner) for _ in range(heads))
        for module in (*self.emb, *self.proj, *self.head):  # as fms-extras begins training
            nn.init.trunc_normal_(module.weight, 0, inner**-0.5)
        state_weight = 0.5 ** (0.5 / config.num_heads)
        self.emb_weight = ((1 - state_weight**2) * inner / 2) ** 0.5 / state_weight

    def check(self, sizes: TargetSizes) -> None:
        """See `DraftHead`.

        Raises:
            DrafterError: as for `DraftHead`, or the tree wants more tokens behind one node than there are.
        """
        super().check(sizes)
        most = min(self.config.vocabulary, sizes.vocabulary)
        if (wanted := max(self.shape.branching)) > most:
            raise DrafterError(
                f"the MLPSpeculator drafts {wanted} tokens behind one node, and there are only {most} in the "
                "vocabulary; draft fewer"
            )

    def forward(self, context: DraftContext) -> Draft:
        """Tokens `[B, K]`, lengths `[B]`, grades `[B, K]`, of trees parents `[B, K]`, and q if drafts are drawn."""
        rows, device = context.known.shape[0], context.known.device
        tokens = context.history.gather(1, (context.known - 1).clamp(min=0)[:, None])  # [B, 1], the roots
        state = self._scaled(context.hidden)[:, None]  # [B, 1, H]
        guesses, drafted = list[Guess](), list[Tensor]()
        for depth, width in enumerate(self.shape.branching):
            state = self._advance(depth, state, tokens)  # [B, nodes of the depth, I]
            logits = self._logits(depth, state).flatten(0, 1)  # [B * nodes, V]
            guesses.append(guess(logits, width, depth, sum(one.shape[1] for one in drafted), context))
            tokens = guesses[-1].tokens.view(rows, -1)
            drafted.append(tokens)
            state = state[:, :, None].expand(-1, -1, width, -1).flatten(1, 2)  # [B, nodes of the next depth, I]
        max_drafts = torch.where(context.can_draft, context.max_drafts, 0)  # [B]
        return Draft(
            torch.cat(drafted, 1),
            (self.shape.depths(device) <= max_drafts[:, None]).sum(1),
            grades=in_eighths(torch.cat([one.probabilities.view(rows, -1) for one in guesses], 1)),
            parents=None if self.max_depth is None else self.shape.parents(device).expand(rows, -1),
            proposal=drawn_from(guesses, self.num_draft_tokens),
        )

    def rollout(self, features: Features) -> Iterator[Tensor]:
        """Logits of each head, `[B, S, V]`, behind the text's own tokens."""
        state = self._scaled(features.hidden)
        for depth in range(self.config.num_heads):
            state = self._advance(depth, state, features.tokens.roll(-1 - depth, 1))
            yield self._logits(depth, state)

    def _scaled(self, hidden: Tensor) -> Tensor:
        """What the first projection reads, `[..., H]`."""
        return normalized(hidden, EPSILON) / 2**0.5 if self.config.scale_input else hidden

    def _advance(self, depth: int, state: Tensor, tokens: Tensor) -> Tensor:
        """The states, `[..., I]`, that have taken in the tokens `[...]` behind nodes of a depth."""
        known = tokens.clamp(0, self.config.vocabulary - 1)  # an id past its own is read as the last one
        mixed = _at(self.proj, depth)(state) + self.emb_weight * _at(self.emb, depth)(known)
        return F.gelu(_at(self.ln, depth)(mixed))

    def _logits(self, depth: int, state: Tensor) -> Tensor:
        """`[..., V]`."""
        logits: Tensor = _at(self.head, depth)(state)
        return logits


class _ScaleAndShift(nn.Module):
    """Divides by the root mean square, then scales and shifts, `[..., I]`; IBM calls it a layer norm."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size))

    def forward(self, values: Tensor) -> Tensor:
        """The same shape."""
        return self.weight * normalized(values, EPSILON) + self.bias


def _at(modules: nn.ModuleList, depth: int) -> nn.Module:
    """That of a depth, where the last one may be for all deeper ones, too."""
    return modules[min(depth, len(modules) - 1)]


def _shape(config: MLPSpeculatorConfig, num_draft_tokens: int | None, tree: Sequence[int] | None) -> TreeShape:
    """What to draft; a chain is a tree of one branch. Raises OptionError."""
    if tree is None:
        length = config.speculative_tokens if num_draft_tokens is None else num_draft_tokens
        return TreeShape(
            (1,) * integer("MLPSpeculator num_draft_tokens", length, least=1, most=config.num_heads),
        )
    if num_draft_tokens is not None:
        raise OptionError(
            f"MLPSpeculator num_draft_tokens={num_draft_tokens!r} is for chains, and tree={tree!r} says how many "
            "drafts there are; pass one of them"
        )
    shape = TreeShape.of("MLPSpeculator tree", tree)
    if shape.depth > config.num_heads:
        raise OptionError(
            f"MLPSpeculator tree={shape.branching} is {shape.depth} deep, and there are {config.num_heads} heads; "
            "draft less deep"
        )
    return shape
