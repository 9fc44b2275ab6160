"""Sizes of Medusa's heads."""

from __future__ import annotations

from dataclasses import dataclass

from emssd_compile.drafters.sparse_tree import SparseTree
from emssd_compile.drafters.tree_shape import MOST_NODES
from emssd_compile.errors import OptionError
from emssd_compile.numeric import INT64_MAX, flag, integer


@dataclass(frozen=True)
class MedusaConfig:
    """Sizes of a `Medusa`.

    Attributes:
        hidden_size: H, of the target's hidden states.
        vocabulary: V, of the target.
        num_heads: D, tokens that are predicted.
        num_layers: residual blocks of each head.
        num_lm_heads: D for an LM head of each head's own, 1 for one that all of them share, 0 for the target's; None
            stands for D.
        draft_vocabulary: Vd, tokens that the LM heads of its own know; None for all V.
        bias: whether the residual blocks have a bias.
        tree: that is drafted where the option of the head says none: paths of ranks.

    Raises:
        OptionError: one of them is out of range.
    """

    hidden_size: int
    vocabulary: int
    num_heads: int = 5
    num_layers: int = 1
    num_lm_heads: int | None = None
    draft_vocabulary: int | None = None
    bias: bool = True
    tree: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        for size, most in (
            ("hidden_size", INT64_MAX),
            ("vocabulary", INT64_MAX),
            ("num_heads", MOST_NODES),
            ("num_layers", 64),
        ):
            integer(f"MedusaConfig {size}", getattr(self, size), least=1, most=most)
        flag("MedusaConfig bias", self.bias)
        if self.num_lm_heads is None:
            object.__setattr__(self, "num_lm_heads", self.num_heads)
        if self.num_lm_heads not in (0, 1, self.num_heads):
            raise OptionError(
                f"MedusaConfig num_lm_heads={self.num_lm_heads!r} is out of range; pass {self.num_heads} (one for each "
                "head), 1 (shared) or 0 (the target's)"
            )
        if self.draft_vocabulary is not None:
            integer("MedusaConfig draft_vocabulary", self.draft_vocabulary, least=1, most=self.vocabulary)
            if not self.num_lm_heads:
                raise OptionError("MedusaConfig draft_vocabulary is for LM heads of its own; set num_lm_heads, too")
        if self.tree is not None:
            object.__setattr__(self, "tree", SparseTree.of("MedusaConfig tree", self.tree).paths)
