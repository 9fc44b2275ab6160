"""What a form of attention is: a pattern, a check that says why it does not fit, and the one site it becomes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from torch import Tensor, fx

from emssd_compile.passes.mask_family import Probe
from emssd_compile.passes.value_numbers import ValueNumbers

Match = TypeVar("Match")


@dataclass(frozen=True)
class Subject:
    """The graph in which attention is looked for.

    Attributes:
        graph_module: an L0 graph.
        dependent: nodes whose values depend on the token ids.
        numbers: which nodes are computed alike.
    """

    graph_module: fx.GraphModule
    dependent: set[fx.Node]
    numbers: ValueNumbers = field(default_factory=ValueNumbers)

    def varying(self, node: fx.Node) -> list[fx.Node]:
        """Inputs of `node` that depend on the token ids."""
        return [n for n in node.all_input_nodes if n in self.dependent]


@dataclass(frozen=True)
class Miss:
    """Why a form does not fit.

    Attributes:
        node: what it disliked.
        reason: said to the user if no other form came nearer.
        matched: how many nodes of the form had been found: the nearest miss is the one with the most.
    """

    node: fx.Node
    reason: str
    matched: int


@dataclass
class AttentionSite:
    """One attention as the model wrote it, in the layout that the op takes.

    Attributes:
        result: the node that holds its output.
        query: `[1, Hq, T, Dk]`.
        key, value: `[1, heads, T, Dk]` and `[1, heads, T, Dv]`, heads perhaps repeated.
        place: gives what the op computes, `[1, Hq, T, Dv]`, the layout of `result`.
        scale: factor on the products of queries and keys.
        softcap: 0, or c in `c * tanh(scaled / c)`.
        sinks: None, or a logit per head `[Hq]` that joins the softmax's sum and has no value.
        probe: computes its probabilities for given raw scores, as they are without sinks.
        probe_key: equal for sites of a graph whose probes compute the same.
    """

    result: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    place: Callable[[fx.Graph, fx.Node], fx.Node]
    scale: float
    softcap: float
    sinks: fx.Node | Tensor | None
    probe: Probe
    probe_key: Hashable


class Form(ABC, Generic[Match]):
    """One way in which models write attention."""

    @abstractmethod
    def match(self, subject: Subject, node: fx.Node) -> Match | Miss | None:
        """The parts of an attention of this form whose heart is `node`; None if `node` is none.

        A `Miss` says that `node` is the heart of an attention, but not of this form.
        """

    @abstractmethod
    def check(self, subject: Subject, match: Match) -> Miss | None:
        """Why what was matched does not compute what this form stands for; None if it does."""

    @abstractmethod
    def rewrite(self, subject: Subject, match: Match) -> AttentionSite:
        """The site that raise_attention puts the op in place of."""
