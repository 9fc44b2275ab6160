"""What an EAGLE-3 head is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Self

from emssd_compile.drafters.decoder_layer import LayerSizes
from emssd_compile.drafters.own_tables import check_borrowing
from emssd_compile.drafters.taps import choose_taps, listed
from emssd_compile.errors import OptionError
from emssd_compile.numeric import flag, integer, shown

MOST_LAYERS = 64
_SWITCHES = (
    *("owns_embedding", "owns_head", "adds_normalised"),
    *("normalises_features", "normalises_taps", "feeds_on_normalised"),
)


@dataclass(frozen=True)
class Eagle3Config:
    """Sizes of the head, and which of its versions it is.

    Attributes:
        hidden_size: Ht, of the target.
        vocabulary: V, of the target.
        layer: sizes of its layers, which may be of another width than the target's; by default they are as wide.
        taps: layers of the target whose outputs are read, from 0 on; None where nothing is said.
        num_taps: how many they are; 3 where nothing is said.
        num_layers: of the head.
        draft_vocabulary: Vd, tokens that it can draft; V by default.
        owns_embedding, owns_head: whether it has an embedding and an LM head of its own, or reads the target's.
        adds_normalised: whether the first layer adds to the features normalised (`norm_before_residual`).
        normalises_features: whether the taps are normalised, side by side, before they are projected
            (`norm_before_fc`).
        normalises_taps: whether each tap is normalised by itself (EAGLE-3.1).
        feeds_on_normalised: whether normalised outputs are its own features (EAGLE-3.1).
        speculative_tokens: drafts of a chain that it was trained for.
    """

    hidden_size: int
    vocabulary: int
    layer: LayerSizes = field(default=None)  # type: ignore[assignment]  # never None once it is made
    taps: tuple[int, ...] | None = None
    num_taps: int = 0
    num_layers: int = 1
    draft_vocabulary: int = 0
    owns_embedding: bool = False
    owns_head: bool = False
    adds_normalised: bool = False
    normalises_features: bool = False
    normalises_taps: bool = False
    feeds_on_normalised: bool = False
    speculative_tokens: int = 4

    def __post_init__(self) -> None:
        """Raises OptionError if something is out of range, or parts of it do not go together."""
        if self.layer is not None and not isinstance(self.layer, LayerSizes):
            raise OptionError(f"Eagle3Config layer={shown(self.layer)} is no LayerSizes; pass one, or leave it out")
        for name, least in (("hidden_size", 1), ("vocabulary", 1), ("num_taps", 0), ("draft_vocabulary", 0)):
            integer(f"Eagle3Config {name}", getattr(self, name), least=least)
        integer("Eagle3Config num_layers", self.num_layers, least=1, most=MOST_LAYERS)
        integer("Eagle3Config speculative_tokens", self.speculative_tokens, least=1)
        for name in _SWITCHES:
            flag(f"Eagle3Config {name}", getattr(self, name))
        taps = None if self.taps is None else listed("Eagle3Config taps", self.taps)
        open_sizes = {
            "taps": taps,
            "layer": self.layer or LayerSizes.as_wide_as(self.hidden_size),
            "num_taps": self.num_taps or len(taps or ()) or 3,
            "draft_vocabulary": self.draft_vocabulary or self.vocabulary,
        }
        for name, value in open_sizes.items():
            object.__setattr__(self, name, value)
        integer("Eagle3Config draft_vocabulary", self.draft_vocabulary, least=1, most=self.vocabulary)
        check_borrowing("an Eagle3", self.layer.width, self)
        if self.normalises_features and self.normalises_taps:
            raise OptionError("an Eagle3 normalises taps one by one or side by side, not both")

    @property
    def num_norms(self) -> int:
        """Norms of single taps."""
        return self.num_taps if self.normalises_taps else 0

    def reading(self, taps: Sequence[int] | None) -> Self:
        """The same, with the layers given, if any are. Raises OptionError as `choose_taps`."""
        advice = (
            "pass taps=(1, n // 2 - 1, n - 4) for a target of n layers, as EAGLE-3 has it, or what it was trained with"
        )
        return replace(self, taps=choose_taps("Eagle3", self.taps, taps, self.num_taps, advice))


def default_taps(num_layers: int) -> tuple[int, ...]:
    """The layers that EAGLE-3 reads, of a target of so many: those before layers 2, n // 2 and n - 3; each once."""
    taps = (1, num_layers // 2 - 1, num_layers - 4)
    return tuple(sorted({min(max(tap, 0), num_layers - 1) for tap in taps}))
