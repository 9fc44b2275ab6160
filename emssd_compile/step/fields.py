"""Dataclasses of tensors as pytrees, and the names of the tensors in them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any, TypeVar

from torch.utils import _pytree as pytree

T = TypeVar("T")

STATIC = {"static": True}
"""Metadata of a field that holds no tensor."""

WRITABLE = {"writable": True}
"""Metadata of a field of a context whose tensors a part may write to in place."""


def holds_tensors(cls: type[T]) -> type[T]:
    """Make a pytree of a dataclass whose fields are tensors, None, dicts of tensors or other such dataclasses.

    Fields with `metadata=STATIC` are no tensors: they stay as they are, whatever is done to the others.
    """

    def flatten(value: T) -> tuple[list[tuple[Any, Any]], Any]:
        held = {f.name: getattr(value, f.name) for f in fields(cls)}  # type: ignore[arg-type]
        static = {name: held.pop(name) for name in statics}
        present = {name: item for name, item in held.items() if item is not None}
        return [(pytree.GetAttrKey(name), item) for name, item in present.items()], (tuple(present), static)

    def unflatten(items: Iterable[Any], context: Any) -> T:
        names, static = context
        absent = dict.fromkeys((f.name for f in fields(cls)), None)  # type: ignore[arg-type]
        return cls(**(absent | static | dict(zip(names, items, strict=True))))

    statics = [f.name for f in fields(cls) if f.metadata.get("static")]  # type: ignore[arg-type]
    pytree.register_pytree_node(
        cls,
        lambda value: ([item for _, item in flatten(value)[0]], flatten(value)[1]),
        unflatten,
        flatten_with_keys_fn=flatten,
    )
    return cls


def named(value: object) -> dict[str, Any]:
    """The tensors in a dataclass by name; the name of one in a dataclass within is joined to its field's with `_`."""
    return {"_".join(map(key_name, path)): leaf for path, leaf in pytree.tree_flatten_with_path(value)[0]}


def with_named(value: T, tensors: Mapping[str, Any]) -> T:
    """The same dataclass with these in the places of its tensors, by the names that `named` gives."""
    leaves, spec = pytree.tree_flatten_with_path(value)
    rebuilt: T = pytree.tree_unflatten([tensors["_".join(map(key_name, path))] for path, _ in leaves], spec)
    return rebuilt


def spelled(value: object, root: str) -> dict[str, Any]:
    """What is in a dataclass by the expression that reads it, `root` being the whole: for messages."""
    return {root + pytree.keystr(path): leaf for path, leaf in pytree.tree_flatten_with_path(value)[0]}


def mapped(function: Callable[[Any], Any], value: T) -> T:
    """The same dataclass with `function` of each of its tensors."""
    result: T = pytree.tree_map(function, value)
    return result


def key_name(key: Any) -> str:
    """The name of a field, the key of a dict, or the place in a list."""
    return str(next(getattr(key, name) for name in ("name", "key", "idx") if hasattr(key, name)))
