"""What draft heads have in common: weights of their own, that read what the target has computed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor

from emssd_compile.checkpoints import Checkpoint, read_checkpoint, write_checkpoint
from emssd_compile.drafters.vocabularies import difference
from emssd_compile.errors import CheckpointError, DrafterError, OptionError
from emssd_compile.numeric import shown
from emssd_compile.step.drafting import Drafter, Target, TargetSizes, TokenTables


class HeadSizes(Protocol):
    """What the configuration of any head says."""

    @property
    def hidden_size(self) -> int:
        """H, of the target's hidden states."""
        ...

    @property
    def vocabulary(self) -> int:
        """V, of the target."""
        ...


class Layout(Protocol):
    """How a checkpoint writes a kind of head down: names of entries and tensors."""

    @property
    def name(self) -> str:
        """Whose layout it is."""
        ...

    def matches(self, config: Mapping[str, Any], names: Collection[str]) -> bool:
        """Whether a checkpoint with this config and tensors of these names is of this layout."""
        ...

    def read(self, checkpoint: Checkpoint) -> tuple[HeadSizes, dict[str, Tensor]]:
        """The head's configuration, and its weights by the head's own names.

        Raises:
            CheckpointError: an entry is missing or makes no sense, or asks for what the head does not do.
        """
        ...

    def write(self, config: Any, weights: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The way back."""
        ...


@dataclass(frozen=True)
class Recipe:
    """How a kind of head is trained if nothing else is said, as published.

    Attributes:
        learning_rate: the highest.
        decay: the loss of the k-th draft counts `decay ** (k - 1)`.
        distils: learn the target's distribution (cross-entropy with it), rather than the text's tokens.
        continues: learn from the target's own continuations of prompts cut from the text, rather than from the text.
        epochs: times that the text is read.
        continued_epochs: times that, after the text, the target's own continuations of it are read, too.
    """

    learning_rate: float = 1e-3
    decay: float = 1.0
    distils: bool = False
    continues: bool = False
    epochs: int = 2
    continued_epochs: int = 0


@dataclass(frozen=True)
class Features:
    """What a target has computed of whole texts: what a head learns from.

    Attributes:
        tokens: int64 `[B, S]`.
        hidden: float `[B, S, H]`, the input of the LM head; `hidden[:, t]` predicted `tokens[:, t + 1]`.
        taps: float `[B, S, H]` each, by the numbers in `Drafter.taps`.
    """

    tokens: Tensor
    hidden: Tensor
    taps: dict[int, Tensor]


class DraftHead(Drafter):
    """A drafter with weights of its own that reads what the target has computed; made for one target.

    To add one: a configuration (`HeadSizes`), `forward`, `rollout` for training, and `layouts`.

    Attributes:
        kind: what `train-drafter --kind` calls it.
        config_class: the dataclass of its configuration.
        layouts: of checkpoints that it reads; the first one is written.
        recipe: how it is trained by default.
        borrows: the target's own tables that it reads (`TokenTables`), where it has none of its own.
        needs_teacher: whether it cannot be trained without the target's distribution.
        drafts_ranks: whether it drafts a tree of ranks, which `calibrate` chooses.
        config: its sizes.
    """

    kind: ClassVar[str]
    config_class: ClassVar[type[Any]]
    layouts: ClassVar[tuple[Layout, ...]]
    recipe: ClassVar[Recipe] = Recipe()
    borrows: tuple[str, ...] = ()
    needs_teacher = False
    drafts_ranks = False
    reads_options = ("do_sample", "temperature", "top_k", "top_p")

    def __init__(self, config: HeadSizes) -> None:
        super().__init__()
        self.config = config
        self._read_tables: Callable[[], TokenTables] = TokenTables

    @classmethod
    def for_target(cls, target: TargetSizes, **sizes: Any) -> Self:
        """A head with fresh weights; `sizes` are the fields of its configuration that the target leaves open.

        Raises:
            OptionError: there is no such size, one is missing, or out of range.
        """
        given = {"hidden_size": target.hidden_size, "vocabulary": target.vocabulary}
        known = {field.name: field for field in fields(cls.config_class) if field.init and field.name not in given}
        for name in sizes:
            if name not in known:
                raise OptionError(f"a {cls.__name__} has no size {shown(name)}; choose from {', '.join(known)}")
        for name, field in known.items():
            if name not in sizes and field.default is MISSING and field.default_factory is MISSING:
                raise OptionError(f"a {cls.__name__} needs the size {name}; say how much it is to be")
        return cls(cls.config_class(**given, **sizes))

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> Self:
        """Load a checkpoint in any of the `layouts`; `options` go to the head, the weights' dtype stays.

        Raises:
            CheckpointError: it is damaged, of another kind, or tensors are missing, unexpected or of the wrong shape.
            OptionError: an option is out of range.
        """
        checkpoint = read_checkpoint(folder)
        if cls.layout_of(checkpoint.config, checkpoint.tensors.keys()) is None:
            known = ", ".join(layout.name for layout in cls.layouts)
            raise CheckpointError(f"{folder} is no checkpoint of a {cls.__name__}; these layouts are read: {known}")
        return cls.of(checkpoint, **options)

    @classmethod
    def layout_of(cls, config: Mapping[str, Any], names: Collection[str]) -> Layout | None:
        """The layout of a checkpoint with this config and tensors of these names; None if it is not of this kind."""
        return next((layout for layout in cls.layouts if layout.matches(config, names)), None)

    @classmethod
    def of(cls, checkpoint: Checkpoint, **options: Any) -> Self:
        """The head that a checkpoint of this kind holds; see `from_pretrained`."""
        layout = cls.layout_of(checkpoint.config, checkpoint.tensors.keys())
        assert layout is not None, "it is of another kind"
        config, weights = layout.read(checkpoint)
        with torch.device("meta"):  # before memory is taken: a config that lacks a size may mean a large one
            _check(cls(config, **options), weights, f"{checkpoint.folder} ({layout.name})")
        head = cls(config, **options)
        _load(head, weights)
        return head

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a checkpoint in the first of the `layouts`."""
        write_checkpoint(folder, *self.layouts[0].write(self.config, self.state_dict()))

    def check(self, sizes: TargetSizes) -> None:
        """Raises DrafterError if the head was made for another size or vocabulary; else as for `Drafter`."""
        if self.config.hidden_size != sizes.hidden_size:
            raise DrafterError(
                f"the {type(self).__name__} was made for hidden states of size {self.config.hidden_size}; the target's "
                f"have {sizes.hidden_size}: use the head that was trained for this target"
            )
        difference(self.config.vocabulary, sizes.vocabulary)
        super().check(sizes)

    def prepare(self, target: Target) -> None:
        """See the target, and move to its device and dtype.

        Raises:
            DrafterError, OptionError: as `check`, now that the target's sizes are known.
            DrafterError: the head reads a table that the target lacks.
        """
        self.check(target)
        name = type(self).__name__
        missing = [table for table in self.borrows if getattr(target.tables, table) is None]
        if missing:
            raise DrafterError(
                f"the {name} reads the target's {missing[0]}, and the target has none that could be found; use a head "
                "with one of its own"
            )
        self._read_tables = target.read_tables
        self.to(device=target.device, dtype=target.dtype)

    def begin(self, counts: Tensor) -> None:
        """For training: called once, after `prepare`, on a head with fresh weights, to choose where it begins.

        Args:
            counts: int64 `[V]`, how often the text to learn from says each token.
        """

    @property
    def open_ranks(self) -> int:
        """After training, of how many of the likeliest tokens of each draft it is measured how often they are right."""
        return 0

    def calibrate(self, accuracies: Tensor, num_nodes: int | None = None) -> None:
        """Draft the tree of so many nodes that is best for the accuracies `[D, ranks]` of each draft's tokens."""
        raise NotImplementedError

    @property
    def tables(self) -> TokenTables:
        """The target's, as they are now; empty until `prepare`."""
        return self._read_tables()

    def rollout(self, features: Features) -> Iterator[Tensor]:
        """For training: the logits of the first draft behind each token, of the second one, and so on.

        Yields:
            float `[B, S, V]` for k = 1, 2, ...: entry t is the k-th draft behind the root `tokens[:, t + 1]`, made of
            `hidden[:, t]` and what lies before it, so it predicts `tokens[:, t + 1 + k]`. Entries whose token lies
            past the end are rubbish.
        """
        raise NotImplementedError

    def graded_rollout(self, features: Features) -> Iterator[tuple[Tensor, Tensor | None]]:
        """For training: `rollout`, and with the logits of each draft how sure the head is of it.

        Yields:
            The logits, and float `[B, S]`, the log-odds that the draft is accepted; None from heads that say nothing.
        """
        return ((logits, None) for logits in self.rollout(features))


def _check(head: DraftHead, weights: Mapping[str, Tensor], where: str) -> None:
    """Raises CheckpointError unless there are all weights, by the head's own names, in the shapes that it has."""
    own = head.state_dict()
    if missing := sorted(own.keys() - weights.keys()):
        raise CheckpointError(f"{where} lacks {len(missing)} tensors of a {type(head).__name__}: {_few(missing)}")
    if unexpected := sorted(weights.keys() - own.keys()):
        raise CheckpointError(
            f"{where} holds {len(unexpected)} tensors that a {type(head).__name__} does not know: {_few(unexpected)}"
        )
    for name, value in weights.items():
        if value.shape != own[name].shape:
            raise CheckpointError(f"{where}: {name} is {list(value.shape)}; expected {list(own[name].shape)}")


def _load(head: DraftHead, weights: Mapping[str, Tensor]) -> None:
    """Load weights that fit, in the dtype that they have in common, or float32."""
    dtypes = {value.dtype for value in weights.values() if value.is_floating_point()}
    head.to(dtype=next(iter(dtypes)) if len(dtypes) == 1 else torch.float32)
    head.load_state_dict(dict(weights))


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
