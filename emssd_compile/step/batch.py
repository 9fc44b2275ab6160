"""The sizes of a batch that never change once a model is compiled."""

from __future__ import annotations

from dataclasses import dataclass

from emssd_compile.ops import WORD_BITS


@dataclass(frozen=True)
class BatchShape:
    """Sizes that are fixed when a model is compiled.

    Attributes:
        rows: B, rows of the KV cache.
        capacity: C, tokens a row can hold.
        tree_nodes: N, most tokens of a row in a step that verifies trees, their root included; 0: there are no trees.
    """

    rows: int
    capacity: int
    tree_nodes: int = 0

    @property
    def slots(self) -> int:
        """Slots of a row's KV cache: a tree may lie in more of them than its positions take."""
        return self.capacity + self.tree_nodes

    @property
    def ancestor_words(self) -> int:
        """W, words of `Packed.ancestors`; 0 where there are no trees."""
        return -(-self.tree_nodes // WORD_BITS)
