"""What drafters, acceptance rules, length policies, logits processors and probes have in common."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Self, TypeVar

import torch
from torch import Tensor, nn

from emssd_compile.errors import OptionError, PartError
from emssd_compile.step.options import OPTION_DTYPES, RowOption
from emssd_compile.step.readers import READERS, can_read
from emssd_compile.step.tensor_spec import TensorSpec

T = TypeVar("T")
PartT = TypeVar("PartT", bound="Part")

_BETWEEN = "__"  # the name of a part within a part, and the name that the inner part gave


@dataclass(frozen=True)
class PartSizes:
    """Sizes of the step that a part is traced into.

    Attributes:
        rows: B.
        capacity: C, tokens that a row can hold.
        vocabulary: V.
        num_draft_tokens: K.
        num_grades: G, grades that the drafter tells apart.
        max_depth: D, most drafts on a path; None where drafts are chains, whose paths are as long as they are: K.
        has_proposal: whether the step holds what drafts are drawn from (`Nodes.proposal`).
    """

    rows: int
    capacity: int
    vocabulary: int
    num_draft_tokens: int
    num_grades: int = 1
    max_depth: int | None = None
    has_proposal: bool = False

    @property
    def depth(self) -> int:
        """D, of chains too."""
        return self.num_draft_tokens if self.max_depth is None else self.max_depth


class Part(nn.Module):
    """What is traced into the step around the model: a drafter, a rule, a policy, a processor, a probe.

    `forward` maps a context to an answer, both dataclasses of tensors. It holds tensor operations only: no host read,
    no shape that depends on data. The context is read only, and so are the part's own weights; what is to last from
    step to step is declared by `tensors`, found in `context.state`, and returned in the answer's `state`. Shapes and
    dtypes of the answer are checked when the part is traced.

    Attributes:
        reads_options: names of options that other parts declare: `context.options` holds those that are honoured in
            the step that the part is traced into, by parts that come before it. Processors come first, then the rule,
            probes, the drafter and the policy.
        host_attributes: names of its attributes that `ended` and `host_tensors` use and `forward` does not: they may
            change without the compiled step being out of date.
    """

    reads_options: tuple[str, ...] = ()
    host_attributes: tuple[str, ...] = ()

    def tensors(self, sizes: PartSizes) -> dict[str, TensorSpec]:
        """Tensors that last from step to step, by names that need be unique within the part only."""
        return {}

    def options(self) -> dict[str, RowOption]:
        """Values that each request may set, by name; `context.options` holds them, `[B]` each, or `[B, *shape]`."""
        return {}

    def suited(self, used: Collection[str]) -> Self:
        """What stands for the part in a step whose requests set these options only, all others being as by default.

        It has the same tensors. The forms of a step differ in what is compiled into them: what nobody asked for is
        best left out.
        """
        return self

    def host_tensors(self) -> Mapping[str, Tensor]:
        """What the tensors with `kept="host"` are now, on the CPU; those that are left out stay as they are.

        Asked when a run of requests begins, and when some have ended. On a CPU steps read the very tensors that are
        returned, so the part may go on writing into them; on a GPU they are copied. Steps under way, and those of a
        loaded artifact, which has no parts, may read what was given before, or zeros.
        """
        return {}

    def ended(self, tokens: Tensor, prompt_length: int, options: Mapping[str, float | Tensor]) -> None:
        """A request has ended, on the host. Not called where sizes of steps are to depend on the call alone.

        Args:
            tokens: int64 `[S]` on the CPU, prompt and output.
            prompt_length: how many of them are the prompt.
            options: what the request set for the parts of the step, by name; the others have their defaults.
        """

    def notes(self) -> tuple[str, ...]:
        """What a user should know of the part as it was prepared, a sentence each; `explain()` shows them."""
        return ()


def in_use(parts: Iterable[PartT], used: Collection[str]) -> dict[int, PartT]:
    """Those of the parts that do something where requests set these options, in order, by their places among all.

    The places name their tensors, which the forms of a step share. A part without options is always in use.
    """
    options = [(place, part, part.options().keys()) for place, part in enumerate(parts)]
    return {place: part.suited(used) for place, part, own in options if not own or not own.isdisjoint(used)}


def check_given(
    keyword: str, given: object, kind: type[Part], methods: Mapping[str, str], error: type[PartError]
) -> None:
    """Check parts of a user's own.

    Args:
        keyword: by which they were given.
        given: what was.
        kind: what each has to be an instance of.
        methods: those that each has to define, and how it is told to.
        error: what is raised where one does not.

    Raises:
        OptionError: what is given is no sequence of such parts.
        PartError: of the type `error`: a method is missing.
    """
    if not isinstance(given, (list, tuple)):
        raise OptionError(f"{keyword}={type(given).__name__} is no list; pass {keyword}=[...]")
    for each in given:
        name = each.__name__ if isinstance(each, type) else type(each).__name__
        if isinstance(each, type) or not isinstance(each, kind):
            raise OptionError(f"{keyword} holds {name}; make instances of a {kind.__name__}: {keyword}=[{name}()]")
        for method, how in methods.items():
            if getattr(getattr(each, method), "__func__", None) is getattr(kind, method):
                raise error(f"{name} has no {method} of its own; define {how}")


def gather_tensors(parts: Mapping[str, Mapping[str, T]]) -> dict[str, T]:
    """Specs or tensors of parts within a part, by names that tell the parts apart: for a part that holds parts.

    Args:
        parts: what each inner part declares or returns, by a name for that part.

    Raises:
        PartError: a part's name holds the separator, so names could meet.

    Example:
        `{"first": {"lengths": x}, "second": {"lengths": y}}` gives `{"first__lengths": x, "second__lengths": y}`.
    """
    for part in parts:
        if _BETWEEN in part or part.endswith("_"):
            raise PartError(
                f"a part within a part cannot be called {part!r}: {_BETWEEN!r} ends its name; choose another"
            )
    return {f"{part}{_BETWEEN}{name}": value for part, own in parts.items() for name, value in own.items()}


def tensors_of(part: str, gathered: Mapping[str, T]) -> dict[str, T]:
    """What belongs to one inner part, by the names that it gave: the way back from `gather_tensors`."""
    prefix = f"{part}{_BETWEEN}"
    return {name.removeprefix(prefix): value for name, value in gathered.items() if name.startswith(prefix)}


def check_tensors(part: Part, declared: object, sizes: PartSizes, error: type[PartError]) -> dict[str, TensorSpec]:
    """What `part.tensors` declared, if it makes sense. Raises `error` saying which tensor does not, and why."""
    name = type(part).__name__
    if not isinstance(declared, dict):
        raise error(f"{name}.tensors returned a {type(declared).__name__}; return a dict of TensorSpecs by name")
    for tensor, spec in declared.items():
        reason = _fault(tensor, spec, sizes)
        if reason:
            raise error(f"{name}.tensors declares {tensor!r}: {reason}")
    return dict(declared)


def check_options(part: Part, declared: object, error: type[PartError]) -> dict[str, RowOption]:
    """What `part.options` declared, if it makes sense. Raises `error` saying which option does not."""
    name = type(part).__name__
    if not isinstance(declared, dict):
        raise error(f"{name}.options returned a {type(declared).__name__}; return a dict of RowOptions by name")
    for option, what in declared.items():
        if not (isinstance(option, str) and option.isascii() and option.isidentifier()):
            raise error(f"{name}.options declares {option!r}; an option is named as a keyword argument is")
        if not isinstance(what, RowOption):
            raise error(f"{name}.options declares {option!r}: a {type(what).__name__} is no RowOption")
        if what.dtype not in OPTION_DTYPES:
            raise error(f"{name}.options declares {option!r} of {what.dtype}; options are of {OPTION_DTYPES}")
        reason = _fault_of_option(what)
        if reason:
            raise error(f"{name}.options declares {option!r}: {reason}")
        try:
            what.check("default", what.default)
        except OptionError as fault:
            raise error(f"{name}.options declares {option!r} as {what}: {fault}") from fault
    return dict(declared)


def merge_options(parts: Iterable[Part], error: type[PartError]) -> dict[str, RowOption]:
    """The options of all parts, each of them checked. Raises `error` naming the part whose option is another's, too."""
    found: dict[str, RowOption] = {}
    for part in parts:
        for name, option in check_options(part, part.options(), error).items():
            if found.setdefault(name, option) != option:
                raise error(clash(part, name, option, found[name]))
    return found


def clash(part: Part, name: str, option: RowOption, other: RowOption) -> str:
    """What is said of an option that two parts declare as different ones."""
    return (
        f"{type(part).__name__} declares the option {name!r} as {option}, another part as {other}; parts share options "
        "of one name, so give it another"
    )


def _fault_of_option(option: RowOption) -> str:
    """What is wrong with the shape of an option, or with who reads it; empty if nothing is."""
    if not isinstance(option.shape, tuple) or not all(type(size) is int and size > 0 for size in option.shape):
        return f"shape {option.shape!r} is no tuple of integers of at least 1"
    if not can_read(option.reader, option.shape):
        known = {name: reader.dims for name, reader in READERS.items()}
        return f"reader={option.reader!r} reads no shape of {len(option.shape)} sizes; readers and their sizes: {known}"
    return ""


def _fault(tensor: object, spec: object, sizes: PartSizes) -> str:
    """What is wrong with a declared tensor; empty if nothing is."""
    if not (isinstance(tensor, str) and tensor.isascii() and f"_{tensor}".isidentifier()):
        return "a tensor's name is made of letters, digits and underscores"
    if not isinstance(spec, TensorSpec):
        return f"a {type(spec).__name__} is no TensorSpec"
    if not isinstance(spec.shape, tuple) or not all(type(size) is int and size >= 0 for size in spec.shape):
        return f"shape {spec.shape!r} is no tuple of integers of at least 0"
    if not isinstance(spec.dtype, torch.dtype):
        return f"dtype {spec.dtype!r} is no torch.dtype"
    if spec.kept not in ("row", "forever", "host"):
        return f"kept={spec.kept!r} is neither 'row' nor 'forever' nor 'host'"
    if type(spec.in_place) is not bool:
        return f"in_place={spec.in_place!r} is neither True nor False"
    if spec.in_place and spec.kept != "forever":
        return "a tensor that is written in place is kept='forever': nobody zeroes its rows"
    if spec.in_place and (len(spec.shape) < 2 or spec.shape[0] != sizes.rows):
        return (
            f"a tensor that is written in place is [B, slots, ...]; shape {spec.shape} does not begin with {sizes.rows}"
        )
    if spec.kept == "row" and spec.shape[:1] != (sizes.rows,):
        return f"shape {list(spec.shape)} has no line a row, which kept='row' needs; its first size is B = {sizes.rows}"
    return ""
