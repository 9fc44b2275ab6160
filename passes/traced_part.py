"""Trace a part (drafter, acceptance rule, length policy) into a step, and hold it to its contract."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils._python_dispatch import TorchDispatchMode

from emssd_compile.errors import EmssdError, PartError
from emssd_compile.passes.graph import inputs
from emssd_compile.passes.splice import Tensors, add_input, inline_function
from emssd_compile.step.fields import mapped, named, spelled
from emssd_compile.step.parts import Part, PartSizes, check_options, check_tensors, clash
from emssd_compile.step.probe import Probe, ReadingSpec, check_readings
from emssd_compile.step.signature import DRAFT_ROWS

_SPELLED = {"P": "D + 1", "N": "K + 1"}  # a size in the metadata of a field that no single letter says
_CHAINS = "return None, or let the drafter set `max_depth`"
_NO_PROPOSAL = "where a drafter is to draw (`DraftContext.drawn`), it says what from"


class TracedPart:
    """A part in a step. Its tensors are inputs and results called `<kind>_<name>`, so no two parts' names can meet.

    Args:
        kind: `"drafter"`, `"rule"`, `"policy"`, `"processor_<n>"` or `"probe_<n>"`.
        part: the part.
        answer: the dataclass that its `forward` returns; each field's metadata holds the letters of its shape.
        error: what is raised where the part breaks its contract.
        sizes: of the step.

    Raises:
        PartError: its `tensors` make no sense; of the type `error`, as all errors here.
    """

    def __init__(self, kind: str, part: Part, answer: type[Any], error: type[PartError], sizes: PartSizes) -> None:
        self.kind, self.part, self.answer, self.error, self.sizes = kind, part, answer, error, sizes
        self.name, self.word = type(part).__name__, kind.split("_")[0]
        with self._blamed("`tensors` failed", "It is to return a dict of TensorSpecs by name"):
            declared = part.tensors(sizes)
        self.specs = check_tensors(part, declared, sizes, error)
        with self._blamed("`options` failed", "It is to return a dict of RowOptions by name"):
            self.options = check_options(part, part.options(), error)
        self.readings: dict[str, ReadingSpec] = {}
        if isinstance(part, Probe):
            with self._blamed("`readings` failed", "It is to return a dict of ReadingSpecs by name"):
                self.readings = check_readings(part, part.readings(sizes))
        self._read = self._names_read()
        self._returned = {n: spec for n, spec in self.specs.items() if not spec.in_place and spec.kept != "host"}

    def _names_read(self) -> tuple[str, ...]:
        names = self.part.reads_options
        if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
            raise self.error(f"{self.name}.reads_options = {names!r}; set it to a tuple of the names of options")
        return names

    def inline(
        self, into: fx.GraphModule, context: Any, fake_mode: FakeTensorMode, *, few_rows: fx.Node | None = None
    ) -> tuple[Any, dict[str, fx.Node]]:
        """Trace the part to the insertion point of `into`.

        Args:
            into: grows by the part's ops and inputs.
            context: what `forward` takes, nodes in the place of tensors, and without its `state`.
            fake_mode: of the graph.
            few_rows: `arange(A)`: the part is to look at the first A rows. Its caches are `[A, slots, ...]` then.

        Returns:
            The answer without its state, and the new values of the part's tensors by the step's names.
        """
        known: Any = next(iter(named(context).values()))  # a node
        device = known.meta["val"].device
        rows = self.sizes.rows if few_rows is None else few_rows.meta["val"].shape[0]
        state = self._add_inputs(into.graph, device, fake_mode, rows)
        options = self._add_options(into.graph, device, fake_mode)
        rule = f"A {self.word}'s forward may hold tensor operations only"
        if few_rows is not None:
            rule += "; one with `any_rows` reads the number of rows from shapes, and never as a number of Python's"
        with self._blamed("failed while it was traced", rule):
            given = replace(context, state=state, options=options)
            few = {} if few_rows is None else {DRAFT_ROWS: few_rows}
            answer = inline_function(into, self._run, (given, few), fake_mode)
        own = {f"{self.kind}_{name}": node for name, node in answer.state.items()}
        return replace(answer, state={}), own

    @contextlib.contextmanager
    def _blamed(self, what: str, rule: str) -> Iterator[None]:
        """Whatever goes wrong inside is the part's fault."""
        try:
            yield
        except EmssdError:
            raise
        except Exception as error:
            reason = (str(error).strip() or "no message").splitlines()[0]
            raise self.error(f"{self.name} {what}: {type(error).__name__}: {reason}. {rule}") from error

    def _add_inputs(
        self, graph: fx.Graph, device: torch.device, fake_mode: FakeTensorMode, rows: int
    ) -> dict[str, fx.Node]:
        """An input for each of the part's tensors, by the part's own names; `rows` is how many of a cache it takes."""
        state = {}
        for name, spec in self.specs.items():
            shape = (rows, *spec.shape[1:]) if spec.in_place else spec.shape
            with fake_mode:
                value = torch.zeros(shape, dtype=spec.dtype, device=device)
            role = "cache" if spec.in_place else "memory" if spec.kept == "forever" else spec.kept
            state[name] = add_input(graph, f"{self.kind}_{name}", value, role)
        return state

    def _add_options(self, graph: fx.Graph, device: torch.device, fake_mode: FakeTensorMode) -> dict[str, fx.Node]:
        """An input for each option, which parts that declare the same one share."""
        found = {}
        for name, option in self.options.items():
            known = next((n for n in inputs(graph) if n.meta.get("option_name") == name), None)
            if known is None:
                with fake_mode:
                    value = torch.zeros((self.sizes.rows, *option.shape), dtype=option.dtype, device=device)
                known = add_input(graph, f"option_{name}", value, "option")
                known.meta |= {"option_name": name, "option": option}
            elif known.meta["option"] != option:
                raise self.error(clash(self.part, name, option, known.meta["option"]))
            found[name] = known
        return found | {n.meta["option_name"]: n for n in inputs(graph) if n.meta.get("option_name") in self._read}

    def _run(self, every: Any, few: Tensors) -> Any:
        """Call the part for all rows, or for `few`; its answer, checked."""
        context, rows, first = every, self.sizes.rows, few.get(DRAFT_ROWS)
        if first is not None:
            context, rows = self._of_first_rows(every, first), first.shape[0]
        written = {f"context.state[{name!r}]" for name, spec in self.specs.items() if spec.in_place}
        for given in fields(context):
            if given.metadata.get("writable"):
                written |= {f"context.{given.name}[{name!r}]" for name in getattr(context, given.name)}
        read_only = {name: value for name, value in spelled(context, "context").items() if name not in written}
        device = next(iter(read_only.values())).device
        own = {
            f"its own {name!r}": value for name, value in [*self.part.named_parameters(), *self.part.named_buffers()]
        }
        with _NoWrites(self, read_only | own), self._keeps_nothing():
            answer = self.part(replace(context, state=dict(context.state)))
        if not isinstance(answer, self.answer):
            found = "Tensor" if isinstance(answer, Tensor) else type(answer).__name__
            raise self.error(f"{self.name} returned a {found}; expected a {self.answer.__name__}")
        self._check(answer, context, device, rows)
        # A result takes the input's place in the next step, where compiled code reads it as contiguous memory.
        kept = {name: answer.state[name].contiguous() for name in self._returned}
        # A weight that is returned as it is would be none of the graph's values.
        answer = mapped(lambda v: v if isinstance(v, FakeTensor) else v.clone(), replace(answer, state=kept))
        return answer if first is None else self._with_all_rows(answer, every, first)

    def _of_first_rows(self, context: Any, rows: Tensor) -> Any:
        by_row = {name for name, spec in self.specs.items() if spec.kept == "row"}
        state = {name: value[rows] if name in by_row else value for name, value in context.state.items()}
        return replace(context.of_first_rows(rows), state=state)

    def _with_all_rows(self, answer: Any, context: Any, rows: Tensor) -> Any:
        """The answer for B rows: zeros for those behind the first, whose state stays what it was."""
        count, every = rows.shape[0], torch.arange(self.sizes.rows, device=rows.device)  # [B]

        def widened(values: Tensor, others: Tensor | int = 0) -> Tensor:  # [A, ...] -> [B, ...]
            is_first = (every < count).view(-1, *(1 for _ in values.shape[1:]))  # [B, ...]
            return torch.where(is_first, values[every.clamp(max=count - 1)], others)

        by_row = [f.name for f in fields(answer) if f.metadata.get("shape", "")[:1] == "B"]
        told = {name: widened(value) for name in by_row if (value := getattr(answer, name)) is not None}
        kept = {
            name: widened(value, context.state[name]) if self.specs[name].kept == "row" else value
            for name, value in answer.state.items()
        }
        return replace(answer, **told, state=kept)

    @contextlib.contextmanager
    def _keeps_nothing(self) -> Iterator[None]:
        """What a forward puts into the part would be a value of the trace, not of each step."""
        stores = [s for m in self.part.modules() for s in (m.__dict__, m._parameters, m._buffers)]
        before = [dict(store) for store in stores]
        yield
        for store, kept in zip(stores, before, strict=True):
            changed = [n for n, v in store.items() if isinstance(v, FakeTensor) and v is not kept.get(n)]
            if changed:
                store.clear()
                store.update(kept)
                raise self.error(
                    f"{self.name}.forward keeps {changed[0]!r} in itself; what lasts from step to step is declared by "
                    "`tensors`, read from context.state, and returned in the answer's state"
                )

    def _check(self, answer: Any, context: Any, device: torch.device, rows: int) -> None:
        for field in fields(self.answer):
            if field.metadata.get("declared") == "readings":
                self._check_readings(getattr(answer, field.name), device)
            if "like" in field.metadata:
                self._expect_like(field.name, getattr(answer, field.name), getattr(context, field.metadata["like"]))
            value, letters = getattr(answer, field.name), field.metadata.get("shape")
            if letters is None or (value is None and field.metadata.get("optional")):
                continue
            if field.metadata.get("of") == "tree" and self.sizes.max_depth is None:
                if value is not None:
                    raise self.error(f"{self.name} returned {field.name}, but the drafts are chains: {_CHAINS}")
                continue
            if field.metadata.get("of") == "proposal":
                if not self.sizes.has_proposal:
                    continue
                if value is None:
                    raise self.error(f"{self.name} returned no {field.name}: {_NO_PROPOSAL}")
            expected = tuple(rows if letter == "B" else self._size(letter) for letter in letters)
            words = f"[{', '.join(_SPELLED.get(letter, letter) for letter in letters)}] = {list(expected)}"
            self._expect(field.name, value, expected, field.metadata.get("dtype", torch.int64), device, words)
        if not isinstance(answer.state, dict) or answer.state.keys() != self._returned.keys():
            found = sorted(map(str, answer.state)) if isinstance(answer.state, dict) else type(answer.state).__name__
            raise self.error(f"{self.name} returned state {found}; it declares {sorted(self._returned)}")
        for name, spec in self._returned.items():
            where = f"state {name!r}"
            expected = (rows, *spec.shape[1:]) if spec.kept == "row" else spec.shape
            self._expect(where, answer.state[name], expected, spec.dtype, device, f"{list(spec.shape)}, as declared")

    def _check_readings(self, values: object, device: torch.device) -> None:
        if not isinstance(values, dict) or values.keys() != self.readings.keys():
            found = sorted(map(str, values)) if isinstance(values, dict) else type(values).__name__
            raise self.error(f"{self.name} returned values {found}; it declares {sorted(self.readings)}")
        for name, spec in self.readings.items():
            expected = (self.sizes.rows, self.sizes.depth + 1, *spec.shape)
            words = f"[B, D + 1, *shape] = {list(expected)}"
            self._expect(f"value {name!r}", values[name], expected, spec.dtype, device, words)

    def _expect_like(self, what: str, value: object, like: Tensor) -> None:
        """A tensor of the shape, dtype and device of another, sizes that differ from step to step included."""
        same = isinstance(value, Tensor) and [str(n) for n in value.shape] == [str(n) for n in like.shape]
        if not isinstance(value, Tensor) or not same or (value.dtype, value.device) != (like.dtype, like.device):
            found = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise self.error(
                f"{self.name} returned {what} = {found}; expected them as they came: {like.dtype} {list(like.shape)}"
            )

    def _size(self, letter: str) -> int:
        sizes, drafts = self.sizes, self.sizes.num_draft_tokens
        return {"K": drafts, "N": drafts + 1, "P": sizes.depth + 1, "V": sizes.vocabulary}[letter]

    def _expect(
        self, what: str, value: object, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, words: str
    ) -> None:
        """A tensor of this shape, dtype and device; `words` say the shape."""
        if not isinstance(value, Tensor):
            raise self.error(f"{self.name} returned {what} = {value!r}; expected a tensor")
        if list(map(str, value.shape)) != list(map(str, shape)):  # a size that differs from step to step is a name
            raise self.error(f"{self.name} returned {what} of shape {tuple(value.shape)}; expected {words}")
        if value.dtype != dtype:
            raise self.error(f"{self.name} returned {what} of dtype {value.dtype}; expected {dtype}")
        if value.device != device:
            raise self.error(f"{self.name} returned {what} on {value.device}; expected it on {device}")


class _NoWrites(TorchDispatchMode):
    """Refuses ops that write to given tensors, or to views of them.

    Args:
        traced: the part that is running.
        read_only: what it must not write to, by what a message calls it. Real tensors, which are weights, are read only
            even if they are not named.
    """

    def __init__(self, traced: TracedPart, read_only: Tensors) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.traced = traced
        self._owners = {_storage(value): name for name, value in read_only.items()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            raise self.traced.error(
                f"{self.traced.name}.forward reads a value to the host, as with .item(). A {self.traced.word} is "
                "traced once: it works with tensors alone"
            )
        for value in _aliased(func, args, kwargs):
            if value.is_write and (owner := self._owner(value.tensor)) is not None:
                raise self.traced.error(
                    f"{self.traced.name}.forward writes to {owner} in place, with {func}. A {self.traced.word} reads "
                    "what it is given and returns new values; it may write to tensors declared with in_place=True"
                )
        result = func(*args, **kwargs)
        if isinstance(result, FakeTensor) and any(map(_depends_on_data, result.shape)):
            raise self.traced.error(
                f"{self.traced.name}.forward makes a shape that depends on values, with {func}. A "
                f"{self.traced.word} works on all rows at once, with masks in place of selections"
            )
        if func is not torch.ops.aten.lift_fresh.default and isinstance(result, FakeTensor):  # that is a new constant
            for value in _aliased(func, args, kwargs):
                if not isinstance(value.tensor, FakeTensor):  # its views are fake ones, with memory of their own
                    self._owners[_storage(result)] = self._owner(value.tensor) or ""
        return result

    def _owner(self, value: Tensor) -> str | None:
        return self._owners.get(_storage(value), None if isinstance(value, FakeTensor) else "a tensor from outside")


class _Aliased(NamedTuple):
    """A tensor that a call writes to or gives a view of."""

    tensor: Tensor
    is_write: bool


def _aliased(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[_Aliased]:
    """What a call changes, or what its result may lie in, as the op's schema says."""
    arguments = func._schema.arguments
    values = [*zip(arguments, args, strict=False), *((a, kwargs[a.name]) for a in arguments if a.name in kwargs)]
    for argument, value in values:
        if argument.alias_info is not None:
            items = value if isinstance(value, (list, tuple)) else [value]
            yield from (_Aliased(item, argument.alias_info.is_write) for item in items if item is not None)


def _depends_on_data(size: int | torch.SymInt) -> bool:
    return isinstance(size, torch.SymInt) and bool(free_unbacked_symbols(size))


def _storage(value: Tensor) -> int:
    """What tells memory apart: equal for a tensor and its views."""
    return int(value.untyped_storage()._cdata)
