"""The contract of a drafter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from emssd_compile.errors import DrafterError, OptionError
from emssd_compile.step.fields import STATIC, WRITABLE, holds_tensors
from emssd_compile.step.pack import Packed, of_first_rows
from emssd_compile.step.parts import Part
from emssd_compile.step.proposals import DETERMINISTIC, DRAWINGS
from emssd_compile.step.tensor_spec import TensorSpec


@holds_tensors
@dataclass
class DraftContext:
    """What a drafter sees, after the step's tokens are committed.

    Attributes:
        history: int64 `[B, C]`, prompt and generated tokens of each row; only the first `known[b]` mean something.
        known: int64 `[B]`; the root token, whose continuation is to be drafted, is `history[b, known[b] - 1]`.
        hidden: float `[B, H]`, the target's last hidden state where it predicted the root token.
        active: bool `[B]`, rows being decoded.
        can_draft: bool `[B]`, rows whose drafts will be verified in the next step.
        max_drafts: int64 `[B]`, 0 to D: more drafts on a path would run past the row's limit.
        draft_range: int64 `[S]`, `arange(S)`: budget of packed tokens for a drafter that reads the text with a model
            of its own.
        row_range: int64, `arange` of the most of these that one row may take, and of any that the drafter packs itself;
            at least K + 1 where drafts are trees.
        seeds: int64 `[B]`, seed of each request, for drafters that draw (see `randomness.uniforms`).
        groups: int64 `[B]`, rows of one prompt have the same number.
        read: the tokens whose KV this step has committed, of prompts too, packed; as many places as the step had. A
            prompt that another row had read is never among them: a drafter that needs it finds it in `history`.
        source: int64 `[T]`, where each of them lay among the tokens of the step.
        taps: what the target computed of each token of the step, float `[T, H]` each: `"hidden"`, the input of its LM
            head, and the outputs of the layers in `Drafter.taps`, by the numbers given there.
        caches: the target's KV caches by name, if `Drafter.writes_kv`; else none. They may be written to, K + 1 slots
            from that of the root token on: the next step writes there in any case.
        logits: float `[B, V]`, the target's processed logits where it predicted the root token, if
            `Drafter.reads_logits`; else None. Rubbish for rows that emitted nothing.
        options: the options that the drafter declares, `[B]` each, by name.
        state: the drafter's own tensors, as declared by `Drafter.tensors`.
        drawn: how the drafts of rows that sample are to be drawn, one of `Drafter.proposes`.
        vocabulary: V, of the target.
    """

    history: Tensor
    known: Tensor
    hidden: Tensor
    active: Tensor
    can_draft: Tensor
    max_drafts: Tensor
    draft_range: Tensor
    row_range: Tensor
    seeds: Tensor
    groups: Tensor
    read: Packed
    source: Tensor
    taps: dict[str | int, Tensor]
    caches: dict[str, Tensor] = field(default_factory=dict, metadata=WRITABLE)
    logits: Tensor | None = None
    options: dict[str, Tensor] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)
    drawn: str = field(default=DETERMINISTIC, metadata=STATIC)
    vocabulary: int = field(default=0, metadata=STATIC)

    def of_first_rows(self, rows: Tensor) -> DraftContext:
        """What is to be seen of the first rows, where no other row is decoded; but for `state`.

        Args:
            rows: int64 `[A]`, `arange` of how many.
        """
        names = ("history", "known", "hidden", "active", "can_draft", "max_drafts", "seeds", "groups")
        return replace(
            self,
            read=of_first_rows(self.read, rows),
            logits=None if self.logits is None else self.logits[rows],
            options={name: value[rows] for name, value in self.options.items()},
            **{name: getattr(self, name)[rows] for name in names},
        )


@holds_tensors
@dataclass
class Draft:
    """What a drafter answers.

    Attributes:
        tokens: int64 `[B, K]`; a draft whose id is outside the vocabulary is left out, with all that follow it.
        lengths: int64 `[B]`, how many of them to verify; those deeper than `max_drafts` are left out.
        state: new values of the tensors in `Drafter.tensors`, but for those written in place.
        grades: int64 `[B, K]`, 0 to `num_grades - 1`: how sure the drafter is of each draft, in whatever way it knows.
            A policy learns what each grade is worth, so it need not be calibrated. None grades all alike; grades
            out of range count as the nearest.
        parents: int64 `[B, K]`, of a drafter of trees: the node that each draft follows, 0 for the root token, i for
            the i-th draft, one before it in any case; what follows nothing of that kind is left out. None for chains.
        proposal: float32 `[B, K + 1, V]`, where drafts are drawn (`DraftContext.drawn`): line n is the very
            distribution that those behind node n were drawn from, siblings in the order drawn; rubbish where none
            follow. `lengths` and `parents` must then not depend on what was drawn: drafts that are chosen by what they
            are do not follow q. None where nothing is drawn.
        scores: float32 `[B]`, how many of a row's drafts the drafter expects to be accepted, for whoever chooses among
            drafters; None if it cannot tell.
    """

    tokens: Tensor = field(metadata={"shape": "BK"})
    lengths: Tensor = field(metadata={"shape": "B"})
    state: dict[str, Tensor] = field(default_factory=dict)
    grades: Tensor | None = field(default=None, metadata={"shape": "BK", "optional": True})
    parents: Tensor | None = field(default=None, metadata={"shape": "BK", "of": "tree"})
    proposal: Tensor | None = field(default=None, metadata={"shape": "BNV", "of": "proposal", "dtype": torch.float32})
    scores: Tensor | None = field(default=None, metadata={"shape": "B", "optional": True, "dtype": torch.float32})


class PackedModel(Protocol):
    """A causal LM compiled to run on packed rows, for drafters that hold one."""

    @property
    def vocabulary(self) -> int:
        """V."""
        ...

    @property
    def capacity(self) -> int:
        """Tokens that a row of its KV caches can hold: C, or less where the model has fewer positions."""
        ...

    @property
    def ancestor_words(self) -> int:
        """W, words of `Packed.ancestors`; 0 where it was compiled for chains."""
        ...

    @property
    def cache_shapes(self) -> dict[str, TensorSpec]:
        """Its KV caches by name; written in place."""
        ...

    def __call__(
        self, packed: Packed, lengths: Tensor, logit_index: Tensor, caches: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Hidden states `[T, H]` and logits `[R, V]`; writes the KV of the packed tokens into `caches`."""
        ...


class Compile(Protocol):
    """Compiles a causal LM for as many rows as the target has."""

    def __call__(self, model: nn.Module, /, *, tree_nodes: int = 0) -> PackedModel:
        """With `tree_nodes`, for steps in which a row is a tree of so many tokens, its root included."""
        ...


@dataclass(frozen=True)
class TokenTables:
    """The weights that turn token ids into vectors, and vectors into logits. They are the target's own: read only.

    Attributes:
        embedding: `[V, H]`; None where the model does not look token ids up in just one table.
        head: `[V, H]`, the weight of the LM head; None where it is not a weight of that shape.
        head_bias: `[V]`; None without.
    """

    embedding: Tensor | None = None
    head: Tensor | None = None
    head_bias: Tensor | None = None


@dataclass(frozen=True)
class TargetSizes:
    """What a model may say of itself before anything of it is captured.

    Attributes:
        rows: B.
        capacity: C, tokens that a row can hold.
        vocabulary: V.
        hidden_size: H, of `DraftContext.hidden` and of taps.
        num_layers: decoder layers that attend.
    """

    rows: int
    capacity: int
    vocabulary: int
    hidden_size: int
    num_layers: int


@dataclass(frozen=True)
class Target(TargetSizes):
    """The model that a drafter drafts for, as `Drafter.prepare` meets it.

    Attributes:
        dtype, device: of its hidden states.
        compile_model: compiles a causal LM of the drafter's own.
        with_layers: the target itself with some of its decoder layers only, by number, layer 0 among them, as a model
            over the caches in `DraftContext.caches`. Raises OptionError, or UnsupportedModelError where layers cannot
            be told.
        read_tables: gives its weights at both ends, as they are when it is called: they may be replaced.
    """

    dtype: torch.dtype
    device: torch.device
    compile_model: Compile
    with_layers: Callable[[tuple[int, ...]], PackedModel]
    read_tables: Callable[[], TokenTables] = TokenTables

    @property
    def tables(self) -> TokenTables:
        """Its weights at both ends, as they are now."""
        return self.read_tables()


class Drafter(Part):
    """Proposes tokens; verification decides. A poor draft costs time, never correctness.

    Attributes:
        num_draft_tokens: K, the most tokens a row may draft; 0 for none.
        max_depth: D, of a drafter of trees: the most drafts on a path, 1 to K. None for chains.
        num_grades: how many grades `Draft.grades` may tell apart; at least 1.
        taps: decoder layers whose outputs the drafter wants to see, by number, negative ones from the last.
        reads_logits: whether it wants to see the target's logits.
        is_costly: whether a step takes clearly longer with the drafter than without. If so, steps without it, or
            without what is costly of it (`cheaper`), are compiled, too, and run where they are faster, if the layout
            measures.
        remembers_features: whether it keeps something of each token that only the target's outputs tell. What it misses
            in steps that it is left out of, it lacks until the row has ended: its drafts are worse then, never the
            tokens. With `prefix_cache=True` it is never left out, since prefixes would lack it for good.
        writes_kv: whether the drafter drafts with the target's own layers, and their KV goes to the target's caches.
        any_rows: whether its `forward` can be traced for a number of rows that differs from step to step, all sizes
            being read from tensors' shapes. Where few of the rows are decoded it then drafts for them only, on a CPU.
            Not where it `writes_kv`, which has all rows.
        reads_ahead: whether the drafter reads the text with a model of its own (it needs `DraftContext.draft_range`).
        proposes: in which ways it can make drafts (`proposals.DRAWINGS`); the rule chooses among them.
    """

    num_draft_tokens: int
    max_depth: int | None = None
    num_grades: int = 1
    taps: tuple[int, ...] = ()
    reads_logits: bool = False
    is_costly: bool = False
    remembers_features: bool = False
    writes_kv: bool = False
    any_rows: bool = False
    reads_ahead: bool = False
    proposes: tuple[str, ...] = (DETERMINISTIC,)

    def check(self, sizes: TargetSizes) -> None:
        """Called before any work, with what the target says of itself, if it does.

        Raises:
            OptionError: the target has not the layers that are asked for.
            DrafterError: the drafter does not fit it in another way.
        """
        for tap in self.taps:
            if not -sizes.num_layers <= tap < sizes.num_layers:
                raise OptionError(
                    f"the output of layer {tap} was asked for; the model has {sizes.num_layers} layers: use a drafter "
                    "that was made for this target"
                )

    def prepare(self, target: Target) -> None:
        """Called before tracing. Raises DrafterError if the drafter does not fit the target.

        A drafter that is prepared for a second target is no longer the first one's, whose `generate` then says so.
        """

    def forward(self, context: DraftContext) -> Draft:
        """Draft all rows at once."""
        raise NotImplementedError

    @property
    def costly_grades(self) -> tuple[range, ...]:
        """The grades of the drafts that make it costly: all that it knows if it is, or none."""
        return (range(self.num_grades),) if self.is_costly else ()

    def cheaper(self) -> Drafter | None:
        """What takes its place in the steps in which it is left out.

        It makes the drafts of all other grades but the costly ones, as this drafter would have made them: with the same
        attributes but for what it costs, and on the same tensors or some of them. None where no drafts would be left.
        """
        return None if self.is_costly else self

    def assisted(self) -> dict[str, object]:
        """What transformers' options of assisted decoding have to be to ask for this drafter, by name."""
        return {}


def check_drafter(drafter: Drafter) -> Drafter:
    """The drafter, if its attributes make sense. Raises DrafterError saying which does not."""
    name = type(drafter).__name__
    for attribute, least in (("num_draft_tokens", 0), ("num_grades", 1)):
        value = getattr(drafter, attribute, None)
        if type(value) is not int or value < least:
            raise DrafterError(f"{name}.{attribute} = {value!r}; set it to an integer of at least {least}")
    most, depth = drafter.num_draft_tokens, drafter.max_depth
    if depth is not None and (type(depth) is not int or not 1 <= depth <= most):
        raise DrafterError(f"{name}.max_depth = {depth!r}; set it to an integer of 1 to {most}, or to None for chains")
    for attribute in ("reads_ahead", "reads_logits", "is_costly", "remembers_features", "writes_kv", "any_rows"):
        value = getattr(drafter, attribute)
        if type(value) is not bool:
            raise DrafterError(f"{name}.{attribute} = {value!r}; set it to True or False")
    if drafter.any_rows and drafter.writes_kv:
        raise DrafterError(f"{name} writes the target's KV, which has all rows; set any_rows to False")
    ways = drafter.proposes
    if not isinstance(ways, tuple) or not ways or not all(way in DRAWINGS for way in ways):
        raise DrafterError(f"{name}.proposes = {ways!r}; set it to a tuple of some of {list(DRAWINGS)}")
    if not isinstance(drafter.taps, tuple) or not all(type(tap) is int for tap in drafter.taps):
        raise DrafterError(f"{name}.taps = {drafter.taps!r}; set it to a tuple of the numbers of layers")
    return drafter


def tree_nodes(drafter: Drafter) -> int:
    """N, tokens of a row in a step where drafts are trees, its root included; 0 where they are chains."""
    return 0 if drafter.max_depth is None else drafter.num_draft_tokens + 1


def most_unread(max_depth: int | None) -> int:
    """Most tokens of a row that decodes which a drafter with a model of its own has not read when it begins to draft.

    Drafts of a chain are read as they are made, all but the last: that is left, and the token after it. Of a tree
    nothing need be kept: the accepted path is left, and the token after it.

    Args:
        max_depth: D, of a drafter of trees; None for chains.
    """
    return 2 if max_depth is None else max_depth + 1
