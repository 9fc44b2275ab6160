"""Write einsums as the matrix products that they are."""

from __future__ import annotations

import math

import torch
from torch import fx

from emssd_compile.passes.attention_sites.products import Terms, einsum_terms, permuted
from emssd_compile.passes.graph import aten, call, inserting_for, same_size, shape


class LowerEinsum:
    """Turn einsums of two tensors into `linear` or `matmul`.

    A projection written as an einsum is a linear layer: only as one is it recognised as the LM head, fused with its
    neighbours, and given a packed weight. What is no matrix product (three operands, a diagonal, a sum within one
    operand) is left as it is.

        before:  %q[1,T,4,8] = einsum("btd,dhk->bthk", [%x[1,T,32], %w[32,4,8]])
        after:   %q = reshape(matmul(%x, reshape(%w, [32, 32])), [1, -1, 4, 8])
    """

    name = "lower_einsum"

    def run(self, graph_module: fx.GraphModule) -> int:
        """Replace each einsum; returns how many there were."""
        changed = 0
        for node in list(graph_module.graph.nodes):
            if node.target == aten.einsum.default and (letters := _Letters.of(node)) is not None:
                with inserting_for(node):
                    new = letters.multiplied(graph_module.graph)
                node.replace_all_uses_with(new)
                graph_module.graph.erase_node(node)
                changed += 1
        return changed


class _Letters:
    """The letters of an einsum of two operands, by what becomes of them.

    Args:
        terms: its equation; the operand that holds tokens first.
    """

    def __init__(self, terms: Terms) -> None:
        (self.left, self.a), (self.right, self.b) = terms.operands
        self.out = terms.out
        self.batch = "".join(c for c in self.out if c in self.a and c in self.b)
        self.rows = "".join(c for c in self.out if c in self.a and c not in self.b)
        self.columns = "".join(c for c in self.b if c in self.out and c not in self.a)
        self.summed = "".join(c for c in self.b if c in self.a and c not in self.out)
        self.sizes: dict[str, int | torch.SymInt] = {}
        for source, letters in terms.operands:
            self.sizes |= dict(zip(letters, shape(source) or (), strict=True))

    @classmethod
    def of(cls, node: fx.Node) -> _Letters | None:
        """Those of `node`; None if it is no matrix product, or shapes alone do not tell."""
        terms = einsum_terms(node)
        if terms is None or len(terms.operands) != 2:
            return None
        weight_first = not any(isinstance(s, torch.SymInt) for s in shape(terms.operands[0][0]) or ())
        found = cls(Terms(terms.operands[::-1], terms.out) if weight_first else terms)
        covered = set(found.batch + found.rows + found.columns + found.summed)
        symbolic = [c for c, size in found.sizes.items() if isinstance(size, torch.SymInt)]
        spread = any(
            not same_size(size, found.sizes[c])
            for source, letters in terms.operands
            for c, size in zip(letters, shape(source) or (), strict=True)
        )
        matrices = found.summed and covered == set(found.a + found.b) and not spread
        return found if matrices and len(symbolic) == 1 and symbolic[0] not in found.summed else None

    def multiplied(self, graph: fx.Graph) -> fx.Node:
        """The product, laid out as the einsum's result."""
        result = self._batched(graph) if self.batch else self._projected(graph)
        letters = self.batch + self.rows + self.columns
        sizes = self._known(letters)
        if list(shape(result) or ()) != [self.sizes[c] for c in letters]:
            result = call(graph, aten.reshape.default, result, sizes)
        return permuted(graph, result, [letters.index(c) for c in self.out])

    def _projected(self, graph: fx.Graph) -> fx.Node:
        """Every row times one matrix."""
        left = self._arranged(graph, self.left, self.a, [*self.rows, self.summed])
        if self.b == self.columns + self.summed:
            return call(
                graph, aten.linear.default, left, self._arranged(graph, self.right, self.b, [self.columns, self.summed])
            )
        return call(
            graph, aten.matmul.default, left, self._arranged(graph, self.right, self.b, [self.summed, self.columns])
        )

    def _batched(self, graph: fx.Graph) -> fx.Node:
        left = self._arranged(graph, self.left, self.a, [*self.batch, self.rows, self.summed])
        right = self._arranged(graph, self.right, self.b, [*self.batch, self.summed, self.columns])
        return call(graph, aten.matmul.default, left, right)

    def _arranged(self, graph: fx.Graph, node: fx.Node, letters: str, groups: list[str]) -> fx.Node:
        """An operand with one dimension for each group of letters."""
        node = permuted(graph, node, [letters.index(c) for group in groups for c in group])
        if all(len(group) == 1 for group in groups):
            return node
        sizes = [self._known(group) for group in groups]
        return call(graph, aten.reshape.default, node, [-1 if -1 in size else math.prod(size) for size in sizes])

    def _known(self, letters: str) -> list[int]:
        """Sizes, -1 for tokens."""
        return [-1 if isinstance(size := self.sizes[c], torch.SymInt) else size for c in letters]
