"""What a block drafter is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Self

from emssd_compile.drafters.decoder_layer import LayerSizes
from emssd_compile.drafters.markov_head import MARKOV_HEADS
from emssd_compile.drafters.own_tables import check_borrowing
from emssd_compile.drafters.taps import choose_taps, listed
from emssd_compile.drafters.tree_shape import MOST_NODES
from emssd_compile.errors import OptionError
from emssd_compile.numeric import flag, integer, shown

MOST_LAYERS = 64
_LEAST = dict.fromkeys(("hidden_size", "vocabulary", "num_layers", "block_size"), 1)
_LEAST |= dict.fromkeys(("num_taps", "draft_vocabulary", "sliding_window", "markov_rank"), 0)
_SWITCHES = (
    *("sample_from_anchor", "sliding_is_causal", "owns_embedding", "owns_head"),
    *("has_confidence", "confidence_reads_token"),
)


@dataclass(frozen=True)
class BlockConfig:
    """Sizes of the head, and which of its kinds it is.

    Attributes:
        hidden_size: Ht, of the target.
        vocabulary: V, of the target.
        layer: sizes of its layers, which may be of another width than the target's; by default they are as wide.
        taps: layers of the target whose outputs are read, from 0 on; None where nothing is said.
        num_taps: how many they are; 5 where nothing is said.
        num_layers: of the head.
        block_size: b, tokens of a block, its root (the anchor) among them.
        sample_from_anchor: whether each place of the block predicts the token behind its own, so that there are b
            drafts (DSpark); else each predicts its own, and there are b - 1 (DFlash).
        mask_token: what stands where a token is to be drafted; None for a vector of the head's own.
        sliding_window: how many positions back the layers in `sliding_layers` see.
        sliding_layers: their numbers, ascending.
        sliding_is_causal: whether a place of the block sees only those before it in these layers. In all others it
            sees all of them.
        draft_vocabulary: Vd, tokens that it can draft; V by default.
        owns_embedding, owns_head: whether it has an embedding and an LM head of its own, or reads the target's.
        markov_rank: r, of what the token before adds to the logits of a draft (DSpark); 0 for nothing.
        markov_head: how it does: one of `MARKOV_HEADS`.
        has_confidence: whether it tells how likely each draft is to be accepted (DSpark).
        confidence_reads_token: whether for that it looks at the token before, too.
    """

    hidden_size: int
    vocabulary: int
    layer: LayerSizes = field(default=None)  # type: ignore[assignment]  # never None once it is made
    taps: tuple[int, ...] | None = None
    num_taps: int = 0
    num_layers: int = 5
    block_size: int = 8
    sample_from_anchor: bool = False
    mask_token: int | None = None
    sliding_window: int = 0
    sliding_layers: tuple[int, ...] = ()
    sliding_is_causal: bool = True
    draft_vocabulary: int = 0
    owns_embedding: bool = False
    owns_head: bool = False
    markov_rank: int = 0
    markov_head: str = "vanilla"
    has_confidence: bool = False
    confidence_reads_token: bool = False

    def __post_init__(self) -> None:
        """Raises OptionError if something is out of range, or parts of it do not go together."""
        if self.layer is not None and not isinstance(self.layer, LayerSizes):
            raise OptionError(f"BlockConfig layer={shown(self.layer)} is no LayerSizes; pass one, or leave it out")
        most = {"num_layers": MOST_LAYERS, "block_size": MOST_NODES}
        for name, least in _LEAST.items():
            bound = {"most": most[name]} if name in most else {}
            integer(f"BlockConfig {name}", getattr(self, name), least=least, **bound)
        for name in _SWITCHES:
            flag(f"BlockConfig {name}", getattr(self, name))
        taps = None if self.taps is None else listed("BlockConfig taps", self.taps)
        open_sizes = {
            "taps": taps,
            "layer": self.layer or replace(LayerSizes.as_wide_as(self.hidden_size), has_head_norms=True),
            "num_taps": self.num_taps or len(taps or ()) or 5,
            "draft_vocabulary": self.draft_vocabulary or self.vocabulary,
        }
        for name, value in open_sizes.items():
            object.__setattr__(self, name, value)
        integer("BlockConfig draft_vocabulary", self.draft_vocabulary, least=1, most=self.vocabulary)
        if self.mask_token is not None:
            integer("BlockConfig mask_token", self.mask_token, least=0, most=self.vocabulary - 1)
        if not self.depth:
            raise OptionError("BlockConfig block_size=1 drafts nothing unless sample_from_anchor; pass at least 2")
        check_borrowing("a BlockDrafter", self.layer.width, self)
        self._check_windows()
        self._check_heads()

    def _check_windows(self) -> None:
        layers = tuple(sorted(set(listed("BlockConfig sliding_layers", self.sliding_layers))))
        object.__setattr__(self, "sliding_layers", layers)
        for index, layer in enumerate(layers):
            integer(f"BlockConfig sliding_layers[{index}]", layer, most=self.num_layers - 1)
        if self.sliding_layers and self.sliding_window < self.block_size:
            raise OptionError(
                f"BlockConfig sliding_window={self.sliding_window} is less than a block of {self.block_size} tokens; "
                "pass at least as many"
            )

    def _check_heads(self) -> None:
        if self.markov_head not in list(MARKOV_HEADS):  # which takes what cannot be hashed, too
            raise OptionError(
                f"BlockConfig markov_head={shown(self.markov_head)} is unknown; choose one of {list(MARKOV_HEADS)}"
            )
        if self.confidence_reads_token and not (self.has_confidence and self.markov_rank):
            raise OptionError(
                "BlockConfig confidence_reads_token looks tokens up in the Markov head, for the confidence; set "
                "has_confidence and markov_rank, too"
            )

    @property
    def depth(self) -> int:
        """Drafts that a whole block gives."""
        return self.block_size if self.sample_from_anchor else self.block_size - 1

    def reading(self, taps: Sequence[int] | None) -> Self:
        """The same, with the layers given, if any are. Raises OptionError as `choose_taps`."""
        advice = (
            "pass taps=default_taps(n, count) for a target of n layers, as DFlash has it, or what it was trained with"
        )
        return replace(self, taps=choose_taps("BlockDrafter", self.taps, taps, self.num_taps, advice))


def default_taps(num_layers: int, count: int) -> tuple[int, ...]:
    """The layers that DFlash reads, of a target of so many: from the second one to the third last, evenly spaced."""
    if count == 1:
        return (num_layers // 2,)
    step = (num_layers - 4) / (count - 1)
    return tuple(min(max(round(1 + index * step), 0), num_layers - 1) for index in range(count))
