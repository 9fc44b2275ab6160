"""What goes into a step and what comes out: names, shapes, dtypes and who owns each tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from emssd_compile.step.options import RowOption
from emssd_compile.step.parts import PartSizes
from emssd_compile.step.probe import ReadingSpec
from emssd_compile.step.state import CONSTANT_FIELDS
from emssd_compile.step.tensor_spec import TensorSpec

SIZE_NAMES = ("token_range", "logit_range", "draft_range", "row_range")
"""Inputs whose length alone matters: the sizes of a step."""

DRAFT_ROWS = "draft_rows"
"""Another such input, of a step that drafts for its first rows only (`passes.fuse_step`)."""

ROLES = {
    "size": "an arange; its length is a size of the step, chosen by the host at each call",
    "setting": "set by the host; the step reads it",
    "option": "a value for each row, set by the host when a request starts in it; the step reads it",
    "state": "state of the rows: the result of the same name replaces it",
    "row": "state of a part, a line a row, zeroed by the host when a request starts in it: the result of the same name "
    "replaces it",
    "memory": "what a part has learned, zeros at first: the result of the same name replaces it",
    "host": "what a part knows of earlier requests, zeros at first: set by the host; the step reads it",
    "cache": "keys and values, `[B, slots, ...]`; the step writes them where they lie, and where rows share a prompt "
    "the host copies its slots",
    "ring": "keys and values of a window, `[B * R, P, ...]`: R blocks for each row, which the step writes around where "
    "they lie, and where rows share a prompt the host copies them",
    "pool": "keys and values of all rows, `[blocks, P, ...]`; the step writes them where they lie",
    "table": "int32 `[B, M]`, which block of the pools each row's m-th is, -1 for none; set by the host as rows grow",
    "input": "given anew at each call",
    "result": "for the host to read",
    "reading": "what a probe tells of each token that the step emits, `[B, D + 1, ...]`, for the host to read",
}
"""Roles of bindings, and what each means for whoever drives a step."""

KV_ROLES = ("cache", "ring", "pool")
"""Those of keys and values, which the step writes where they lie."""


def role_of_state(name: str) -> str:
    """The role of a field of `StepState`."""
    return "setting" if name in CONSTANT_FIELDS else "state"


@dataclass(frozen=True)
class Binding:
    """An input or a result of a step.

    Attributes:
        name: of the tensor.
        shape: sizes; a string stands for a size that may differ from call to call, equal strings for equal sizes.
        dtype: element type.
        role: a key of `ROLES`.
        option: of an option, its default and the values that it may have.
        reading: of a reading, what it is for one token.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: torch.dtype
    role: str
    option: RowOption | None = None
    reading: ReadingSpec | None = None

    @property
    def spec(self) -> TensorSpec:
        """Shape and dtype of a tensor of fixed size."""
        return TensorSpec(tuple(int(size) for size in self.shape), self.dtype)


@dataclass(frozen=True)
class Signature:
    """All bindings of a step, in order.

    Attributes:
        inputs: as they are passed.
        results: what comes back, by name; caches that are written in place are not among them.
    """

    inputs: tuple[Binding, ...]
    results: tuple[Binding, ...]

    @classmethod
    def of(
        cls,
        graph: fx.Graph,
        roles: Mapping[str, str],
        options: Mapping[str, RowOption] | None = None,
        readings: Mapping[str, ReadingSpec] | None = None,
    ) -> Signature:
        """Read off a graph with named inputs and a dict of results.

        Args:
            graph: of a step.
            roles, options: those of the inputs.
            readings: which results are what probes tell.
        """
        told = readings or {}
        symbols: dict[str, str] = {}

        def bind(name: str, node: fx.Node, role: str) -> Binding:
            value = node.meta["val"]
            shape = tuple(_size(size, name, symbols) for size in value.shape)
            return Binding(name, shape, value.dtype, role, (options or {}).get(name), told.get(name))

        placeholders = {str(node.target): node for node in graph.nodes if node.op == "placeholder"}
        (results,) = next(node for node in graph.nodes if node.op == "output").args
        kept = {name: node for name, node in results.items() if roles.get(name) not in KV_ROLES}
        return cls(
            tuple(bind(name, node, roles[name]) for name, node in placeholders.items()),
            tuple(bind(n, node, "reading" if n in told else roles.get(n, "result")) for n, node in kept.items()),
        )

    @property
    def readings(self) -> dict[str, ReadingSpec]:
        """What probes tell of each token, by the names of the results."""
        return {binding.name: binding.reading for binding in self.results if binding.reading is not None}

    @property
    def sizes(self) -> PartSizes:
        """Sizes of a step with these inputs."""
        shapes = {b.name: b.spec.shape for b in self.inputs if b.role in ("state", "setting")}
        (rows, capacity), (vocabulary,), (_, most) = shapes["history"], shapes["is_eos"], shapes["draft_tokens"]
        depth = shapes["histogram"][0] - 1 if "draft_parents" in shapes else None
        has_proposal = "draft_proposal" in shapes
        return PartSizes(rows, capacity, vocabulary, most, max_depth=depth, has_proposal=has_proposal)

    def specs(self, *roles: str) -> dict[str, TensorSpec]:
        """The tensors to hold for the inputs that have one of these roles, whole also where a step takes some rows."""
        rows = self.sizes.rows
        return {
            name: TensorSpec(tuple(rows if size == DRAFT_ROWS else int(size) for size in found.shape), found.dtype)
            for name, found in self.with_role(*roles).items()
        }

    def with_role(self, *roles: str) -> dict[str, Binding]:
        """The inputs that have one of these roles, by name."""
        return {binding.name: binding for binding in self.inputs if binding.role in roles}


def _size(size: int | torch.SymInt, name: str, symbols: dict[str, str]) -> int | str:
    """A size, or the name of the first binding that has this symbolic one."""
    return size if isinstance(size, int) else symbols.setdefault(str(size), name)
