"""What a capture of modules has read beside their weights: classes, hooks, attributes and configuration.

They are remembered as they were and compared container by container; no tensor is read.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from types import CellType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from emssd_compile.step.parts import Part

HARMLESS_OF_MODULES = frozenset(
    {
        *("generation_config", "generate_batch", "name_or_path", "_compiled_call_impl", "_emssd_compiled"),
        *("_compiled_call", "_last_compile_config", "_previous_max_cache_length"),  # of transformers' generate
        *("_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook", "_state_dict_hooks"),
        *("_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
        *("_require_grads_hooks", "_require_grads_hook", "gradient_checkpointing", "_gradient_checkpointing_func"),
    }
)
"""Attributes of modules that change no value of a forward: names, hooks that it does not call, and what is kept for the
backward pass."""

HARMLESS_OF_CONFIGS = frozenset(
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
        of_host = module.host_attributes if isinstance(module, Part) else ()
        harmless = HARMLESS_OF_MODULES | _recomputed(module) | {*of_host}
        self._containers.append(_Container(path, partial(vars, module), harmless))
        for store in ("_parameters", "_buffers"):
            self._containers.append(_Names(f"{path} (its tensors)", partial(getattr, module, store)))
        for name, value in module.__dict__.items():
            if name not in harmless and name not in _OWN_CHECK:
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
        harmless = HARMLESS_OF_CONFIGS if hasattr(value, "model_type") else frozenset()
        self._seen.add(id(value))
        if not isinstance(value, tuple):  # those never change
            self._containers.append(_Container(path, read, harmless))
        for key, item in pairs:
            if key not in harmless:
                self._note(f"{path}.{key}", item, depth + 1)


def _recomputed(module: nn.Module) -> frozenset[str]:
    """Attributes that `torch.nn.utils` computes anew from the weights in each forward, before a module reads them."""
    hooks = module._forward_pre_hooks.values()
    normalised = {hook.name for hook in hooks if isinstance(hook, (WeightNorm, SpectralNorm))}
    return frozenset(normalised | {hook._tensor_name for hook in hooks if isinstance(hook, BasePruningMethod)})


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
        every = {**self.copy, **live}
        keys = [k for k, value in every.items() if k not in self.harmless and not _only_asks_for_gradients(value)]
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
    if isinstance(a, torch.dtype) or isinstance(b, torch.dtype):  # transformers' save_pretrained writes its name
        return str(a).removeprefix("torch.") == str(b).removeprefix("torch.")
    try:
        return bool(a == b)
    except (RuntimeError, ValueError, TypeError):
        return False


def _only_asks_for_gradients(hook: Any) -> bool:
    """Whether it is the hook of transformers that trainers set and remove again and again, for checkpointing."""
    name: str = getattr(hook, "__qualname__", "")
    return name.endswith("enable_input_require_grads.<locals>.make_inputs_require_grads")


def _values(before: Any, after: Any) -> str:
    plain = (bool, int, float, str, type(None), torch.dtype, torch.device)
    return f" from {before!r} to {after!r}" if isinstance(before, plain) and isinstance(after, plain) else ""
