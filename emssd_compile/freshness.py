"""Whether a compiled model is still the user's model: what changed since it was compiled is followed or refused.

A step holds the user's own tensors, so what is written into them is seen. What else can change is compared when a
`generate` begins:

- another tensor in the place of one that the step holds (`load_state_dict(assign=True)`): taken over;
- the values of a tensor that a pass has looked at, such as a mask in a buffer: refused;
- the modules themselves, their hooks, attributes and configuration, which the capture has read: refused
  (`structure.py`).

The comparison does not run the model. It takes a fraction of a millisecond for a model of a few hundred modules, and
reads those tensors of which the step holds something derived.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from emssd_compile.errors import StaleModelError
from emssd_compile.ops import fingerprint
from emssd_compile.structure import Structure


def fingerprints(modules: Iterable[nn.Module]) -> tuple[int, ...]:
    """What tells whether any parameter or buffer of these modules has other values than before; reads all of them."""
    tensors = {id(t): t for module in modules for t in (*module.parameters(), *module.buffers())}
    return tuple(int(fingerprint(plain)) for tensor in tensors.values() for plain in plain_tensors(tensor))


def plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """It, or of one that is made of others (quantised weights are) those."""
    return (part for part, _ in _with_parts(tensor) if not is_traceable_wrapper_subclass(part))


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
        stores: dicts of modules, the key in each, and the attributes that lead on from there, if what the modules hold
            wraps the tensor, as quantised weights do: one of these, or several if it is tied.
        tensor: it, as compiled.
    """

    def __init__(self, name: str, stores: list[tuple[dict[str, Any], str, tuple[str, ...]]], tensor: Tensor) -> None:
        self.name, self.stores, self.tensor = name, stores, tensor
        self._layout = _Layout.of(tensor)

    def found(self) -> Tensor:
        """What is there now. Raises StaleModelError if that cannot be taken for the tensor that was compiled."""
        held = [_reached(store.get(key), parts) for store, key, parts in self.stores] or [self.tensor]
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
    """Every parameter and buffer, and the tensors that they wrap, each once."""
    found: dict[int, _Place] = {}
    for root in modules:
        for path, module in root.named_modules():
            for store in (module._parameters, module._buffers):
                for key, held in store.items():
                    for tensor, parts in _with_parts(held):
                        name = ".".join((*([path] if path else []), key, *parts))
                        found.setdefault(id(tensor), _Place(name, [], tensor)).stores.append((store, key, parts))
    return found.values()


def _with_parts(held: Tensor | None) -> Iterator[tuple[Tensor, tuple[str, ...]]]:
    """A tensor and those that it wraps, and the attributes that lead to each."""
    if held is not None:
        yield held, ()
    if is_traceable_wrapper_subclass(held):
        for part in held.__tensor_flatten__()[0]:
            yield from ((tensor, (part, *parts)) for tensor, parts in _with_parts(getattr(held, part)))


def _reached(held: object, parts: tuple[str, ...]) -> object:
    """What these attributes lead to; None if one is not there."""
    for part in parts:
        held = getattr(held, part, None)
    return held


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
