"""Whether a compiled model is still the user's model: what changed since it was compiled is followed or refused.

A step holds the user's own tensors, so what is written into them is seen. What else can change is compared when a
`generate` begins:

- another tensor in the place of one that the step holds (`load_state_dict(assign=True)`): taken over;
- the values of a tensor that a pass has looked at, such as a mask in a buffer: refused;
- the modules themselves, their hooks, attributes and configuration, which the capture has read: refused.

The comparison does not run the model. It takes a fraction of a millisecond for a model of a few hundred modules, and
reads those tensors of which the step holds something derived.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import CellType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as nn_module

from emssd_compile.errors import StaleModelError
from emssd_compile.ops import fingerprint, follow_packed, packed_linear

_HARMLESS_OF_MODULES = frozenset(
    {
        *("generation_config", "name_or_path", "_compiled_call_impl"),
        *("_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook", "_state_dict_hooks"),
        *("_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
    }
)
"""Attributes of modules that no forward computes with: names, and hooks that a forward does not call."""

_HARMLESS_OF_CONFIGS = frozenset(
    {
        *("generation_config", "name_or_path", "_name_or_path", "_commit_hash", "transformers_version"),
        *("architectures", "id2label", "label2id", "use_cache"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id"),
    }
)
"""Attributes of a transformers configuration that no forward computes with: those of generation, and names."""

_OWN_CHECK = frozenset({"_parameters", "_buffers"})
"""Parts of a module whose values are compared as tensors."""

_OWN_NAMES_OF_CLASSES = frozenset({"__annotations__", "__abstractmethods__", "_abc_impl"})
"""Attributes of classes that Python itself writes."""

_DEPTH = 6
_NOT_ENTERED = frozenset({"torch", "emssd_compile", "numpy", "builtins", "functools", "threading", "_thread"})


class Freshness:
    """Remembers a model as it was compiled.

    Args:
        structure: of the model and the drafter, as they were captured.
        graph_modules: the graphs that hold the weights; where a weight is replaced, it is replaced in all of them.
        looked_at: tensors whose values went into the graphs.
    """

    def __init__(
        self, structure: Structure, graph_modules: Iterable[fx.GraphModule], looked_at: Iterable[Tensor]
    ) -> None:
        self._structure = structure
        self._graph_modules = tuple(graph_modules)
        find = _PlaceFinder(structure.modules)
        held: dict[int, _Weight] = {}
        for graph_module in self._graph_modules:
            stores: list[dict[str, Any]] = [graph_module._parameters, graph_module._buffers]
            for store in stores:
                for name, tensor in store.items():
                    place = None if tensor is None else find(tensor)
                    if place is not None:
                        weight = held.setdefault(id(place), _Weight(place))
                        weight.attributes.append((store, name))
                        store[name] = place.tensor
        self._weights = tuple(held.values())
        known = [place for tensor in looked_at if (place := find(tensor)) is not None]
        known += [_Place(name, [], tensor) for name, tensor in structure.tensors.items()]
        self._looked_at = [(place, int(fingerprint(place.tensor))) for place in known]
        self._packed = [[str(n.target) for n in site] for site in _packed_sites(self._graph_modules[0])]

    def follow(self) -> bool:
        """Take over what can be taken over; returns whether a weight now lies elsewhere in memory.

        Raises:
            StaleModelError: something else changed; says what. Nothing is taken over then.
        """
        changed = self._structure.change()
        if changed:
            raise StaleModelError(changed)
        found = [weight.place.found() for weight in self._weights]  # all of them before any is replaced
        for place, bits in self._looked_at:
            if int(fingerprint(place.found())) != bits:
                raise StaleModelError(f"the values of {place.name} are others, and the step holds what they meant")
        moved = [weight.take_over(tensor) for weight, tensor in zip(self._weights, found, strict=True)]
        for names in self._packed:
            follow_packed([getattr(self._graph_modules[0], name) for name in names])
        return any(moved)


@dataclass(frozen=True)
class _Layout:
    """What compiled code takes for granted about a tensor."""

    kind: type
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> _Layout:
        kind = Tensor if isinstance(tensor, nn.Parameter) and type(tensor) is nn.Parameter else type(tensor)
        return cls(kind, tensor.shape, tensor.stride(), tensor.dtype, tensor.device)

    def difference(self, other: _Layout) -> str:
        """What `other` has become, in words."""
        for name in ("dtype", "device", "shape", "stride", "kind"):
            before, after = getattr(self, name), getattr(other, name)
            if before != after:
                return f"its {name} is {after}, and was {before}"
        return ""


class _Place:
    """Where the user's modules hold a tensor.

    Args:
        name: for messages.
        stores: dicts of modules, and the key in each: one, or several if it is tied.
        tensor: it, as compiled.
    """

    def __init__(self, name: str, stores: list[tuple[dict[str, Any], str]], tensor: Tensor) -> None:
        self.name, self.stores, self.tensor = name, stores, tensor
        self._layout = _Layout.of(tensor)

    def found(self) -> Tensor:
        """What is there now. Raises StaleModelError if that cannot be taken for the tensor that was compiled."""
        held = [store.get(key) for store, key in self.stores] or [self.tensor]
        first = held[0]
        if not isinstance(first, Tensor):
            raise StaleModelError(f"{self.name} is gone")
        if any(other is not first for other in held):
            raise StaleModelError(f"{self.name} was one tensor in several places, and is several now")
        difference = self._layout.difference(_Layout.of(first))
        if difference:
            raise StaleModelError(f"{self.name} is another tensor: {difference}")
        return first


class _Weight:
    """A tensor of the user's that the step holds.

    Attributes:
        place: where it is from.
        attributes: dicts of graph modules, and its name in each.
    """

    def __init__(self, place: _Place) -> None:
        self.place = place
        self.attributes: list[tuple[dict[str, Any], str]] = []
        self._tensor, self._address = place.tensor, place.tensor.data_ptr()

    def take_over(self, found: Tensor) -> bool:
        """Hold `found`; returns whether it lies elsewhere than before."""
        if found is not self._tensor:
            self._tensor = found
            for store, name in self.attributes:
                store[name] = found
        moved, self._address = found.data_ptr() != self._address, found.data_ptr()
        return moved


def _places(modules: Iterable[nn.Module]) -> Iterable[_Place]:
    """Every parameter and buffer, once."""
    found: dict[int, _Place] = {}
    for root in modules:
        for path, module in root.named_modules():
            for store in (module._parameters, module._buffers):
                for key, tensor in store.items():
                    if tensor is not None:
                        name = f"{path}.{key}" if path else key
                        found.setdefault(id(tensor), _Place(name, [], tensor)).stores.append((store, key))
    return found.values()


class _PlaceFinder:
    """Finds the place of a tensor that a graph holds. Of modules that are not registered a capture holds aliases."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        places = list(_places(modules))
        self._by_identity = {id(place.tensor): place for place in places}
        self._by_memory = {self._memory(place.tensor): place for place in places}

    def __call__(self, tensor: Tensor) -> _Place | None:
        """None if the tensor is none of the modules'."""
        place = self._by_identity.get(id(tensor))
        return place if place is not None or not tensor.numel() else self._by_memory.get(self._memory(tensor))

    @staticmethod
    def _memory(tensor: Tensor) -> tuple[object, ...]:
        return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _packed_sites(graph_module: fx.GraphModule) -> Iterator[list[fx.Node]]:
    for node in graph_module.graph.nodes:
        if node.target == packed_linear:
            parameters, num_weights = node.args[1:]
            assert isinstance(parameters, (list, tuple))
            assert isinstance(num_weights, int)
            yield [weight for weight in parameters[:num_weights] if isinstance(weight, fx.Node)]


class Structure:
    """What a capture of some modules has read beside their weights, compared container by container.

    Args:
        modules: the model, and what else is captured.
    """

    def __init__(self, *modules: nn.Module) -> None:
        self.modules = modules
        self.tensors: dict[str, Tensor] = {}
        """Tensors that are neither parameters nor buffers, by where they are."""
        self._containers: list[_Container] = []
        self._classes: set[type] = set()
        self._registered = {id(module) for root in modules for module in root.modules()}
        self._kinds: list[tuple[str, nn.Module, type]] = []
        self._seen: set[int] = set()
        for hooks in (nn_module._global_forward_hooks, nn_module._global_forward_pre_hooks):
            self._note("the hooks of all modules", hooks, 0)
        for root in modules:
            for path, module in root.named_modules():
                self._note_module(path or type(module).__name__, module)

    def change(self) -> str | None:
        """What is not as it was; None if all is."""
        if self.modules[0].training:
            return f"{type(self.modules[0]).__name__} is in training mode (dropout is on); call model.eval()"
        for path, module, kind in self._kinds:
            if module.__class__ is not kind:
                return f"module {path} is a {type(module).__name__}, and was a {kind.__name__}"
        for container in self._containers:
            changed = container.change()
            if changed:
                return changed
        return None

    def _note_module(self, path: str, module: nn.Module) -> None:
        if id(module) in self._seen:
            return
        self._seen.add(id(module))
        self._kinds.append((path, module, type(module)))
        self._note_classes(type(module))
        self._containers.append(_Container(path, partial(vars, module), _HARMLESS_OF_MODULES))
        for store in ("_parameters", "_buffers"):
            self._containers.append(_Names(f"{path} (its tensors)", partial(getattr, module, store)))
        for name, value in module.__dict__.items():
            if name not in _HARMLESS_OF_MODULES and name not in _OWN_CHECK:
                self._note(f"{path}.{name}", value, 0)

    def _note_classes(self, kind: type) -> None:
        """What a module takes from its class and their bases: methods and attributes."""
        for base in kind.__mro__:
            if base not in self._classes and base.__module__.partition(".")[0] not in _NOT_ENTERED:
                self._classes.add(base)
                name = f"class {base.__name__}"
                self._containers.append(_Container(name, partial(vars, base), _OWN_NAMES_OF_CLASSES))

    def _note_unregistered(self, path: str, root: nn.Module) -> None:
        """A module in a list, say, which its owner does not count among its own."""
        if id(root) not in self._registered:
            self._registered |= {id(module) for module in root.modules()}
            self.modules += (root,)
            for name, module in root.named_modules(prefix=path):
                self._note_module(name, module)

    def _note(self, path: str, value: Any, depth: int) -> None:
        """Remember a container and what is in it."""
        if isinstance(value, Tensor):
            self.tensors[path] = value
            return
        if isinstance(value, nn.Module):
            self._note_unregistered(path, value)
            return
        if depth > _DEPTH or id(value) in self._seen or isinstance(value, (type, str, bytes)):
            return
        items = _items(value)
        if items is None:
            return
        read, pairs = items
        harmless = _HARMLESS_OF_CONFIGS if hasattr(value, "model_type") else frozenset()
        self._seen.add(id(value))
        if not isinstance(value, tuple):  # those never change
            self._containers.append(_Container(path, read, harmless))
        for key, item in pairs:
            if key not in harmless:
                self._note(f"{path}.{key}", item, depth + 1)


def _items(value: Any) -> tuple[Callable[[], Any], list[tuple[Any, Any]]] | None:
    """What reads the container that can change in a value, and what is in it by name; None if it is not looked into."""
    if isinstance(value, (list, tuple, deque)):
        return lambda: value, list(enumerate(value))
    if isinstance(value, set):
        return lambda: value, []
    if isinstance(value, dict):
        return lambda: value, list(value.items())
    if isinstance(value, FunctionType):
        return partial(_variables, value), list(_variables(value).items())
    known = type(value).__module__.partition(".")[0] in _NOT_ENTERED or isinstance(value, (enum.Enum, ModuleType))
    slots = () if known else _slots(type(value))
    if known or not (slots or hasattr(value, "__dict__")):
        return None
    if slots:
        return partial(_attributes, value, slots), list(_attributes(value, slots).items())
    return lambda: vars(value), list(vars(value).items())


def _variables(function: FunctionType) -> dict[str, Any]:
    """What a function, such as a hook, closes over."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return {name: cell.cell_contents for name, cell in cells if cell != CellType()}


def _slots(kind: type) -> tuple[str, ...]:
    found = [getattr(base, "__slots__", ()) for base in kind.__mro__]
    return tuple(name for names in found for name in ((names,) if isinstance(names, str) else names))


def _attributes(value: Any, slots: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(value, name) for name in slots if hasattr(value, name)} | getattr(value, "__dict__", {})


class _Container:
    """A dict, list or set as it was; the comparison is Python's own, which is quick where the objects are the same."""

    def __init__(self, path: str, read: Callable[[], Any], harmless: frozenset[str] = frozenset()) -> None:
        self.path, self.read, self.harmless = path, read, harmless
        self.copy = read().copy()

    def change(self) -> str | None:
        """What is not as it was."""
        live = self.read()
        try:
            if live == self.copy:
                return None
        except (RuntimeError, ValueError, TypeError):  # tensors and arrays do not say whether they are equal
            pass
        if not isinstance(live, Mapping):
            return None if _same(live, self.copy) else f"{self.path} has changed"
        keys = [k for k in {**self.copy, **live} if k not in self.harmless]
        for key in keys:
            if key not in live:
                return f"{self.path}.{key} is gone"
            if key not in self.copy:
                return f"{self.path}.{key} is new"
            if not _same(live[key], self.copy[key]):
                return f"{self.path}.{key} has changed{_values(self.copy[key], live[key])}"
        return None


class _Names(_Container):
    """Which tensors a module has: those that the step holds are compared as such."""

    def change(self) -> str | None:
        different = _tensors(self.read()) ^ _tensors(self.copy)
        return f"{self.path}: {', '.join(sorted(different))} came or went" if different else None


def _tensors(store: dict[str, Any]) -> set[str]:
    return {name for name, tensor in store.items() if tensor is not None}


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    try:
        return bool(a == b)
    except (RuntimeError, ValueError, TypeError):
        return False


def _values(before: Any, after: Any) -> str:
    plain = (bool, int, float, str, type(None), torch.dtype, torch.device)
    return f" from {before!r} to {after!r}" if isinstance(before, plain) and isinstance(after, plain) else ""
