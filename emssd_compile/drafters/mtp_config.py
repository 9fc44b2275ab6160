"""What the modules for multi-token prediction are made of."""

from __future__ import annotations

from dataclasses import dataclass, field

from emssd_compile.drafters.decoder_layer import LayerSizes
from emssd_compile.errors import OptionError
from emssd_compile.numeric import integer, shown

MOST_MODULES = 64


@dataclass(frozen=True)
class MTPConfig:
    """Sizes of an `MTP`.

    Attributes:
        hidden_size: H, of the target.
        vocabulary: V, of the target.
        layer: sizes of the layers, which are as wide as the target.
        speculative_tokens: drafts of a chain, if nothing else is said; 0 stands for 3 of one module, and for the number
            of several.
        num_modules: 1 for one that makes all drafts; more for one each.
    """

    hidden_size: int
    vocabulary: int
    layer: LayerSizes = field(default=None)  # type: ignore[assignment]  # never None once it is made
    speculative_tokens: int = 0
    num_modules: int = 1

    def __post_init__(self) -> None:
        """Raises OptionError if something is out of range, or the layers are of another width."""
        if self.layer is not None and not isinstance(self.layer, LayerSizes):
            raise OptionError(f"MTPConfig layer={shown(self.layer)} is no LayerSizes; pass one, or leave it out")
        for name in ("hidden_size", "vocabulary"):
            integer(f"MTPConfig {name}", getattr(self, name), least=1)
        integer("MTPConfig num_modules", self.num_modules, least=1, most=MOST_MODULES)
        integer("MTPConfig speculative_tokens", self.speculative_tokens, least=0)
        open_sizes = {
            "layer": self.layer or LayerSizes.as_wide_as(self.hidden_size),
            "speculative_tokens": self.speculative_tokens or (3 if self.num_modules == 1 else self.num_modules),
        }
        for name, value in open_sizes.items():
            object.__setattr__(self, name, value)
        if self.layer.width != self.hidden_size:
            raise OptionError(f"an MTP of width {self.layer.width} cannot read a target of width {self.hidden_size}")
        if 1 < self.num_modules < self.speculative_tokens:
            raise OptionError(
                f"MTPConfig speculative_tokens={self.speculative_tokens} is out of range: each of {self.num_modules} "
                "modules makes one draft"
            )
