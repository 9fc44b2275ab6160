"""The code that a forward may run: what its functions name, and what those name, as far as packages go.

Nothing is run to find it, so more is followed than is needed: a method counts if anything that counts names something
like it. Functions of torch and of Python are told, but not followed: there the version says what is within.
"""

from __future__ import annotations

import enum
import functools
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType

import torch
from torch import Tensor, nn

PLAIN = (bool, int, float, complex, str, bytes, type(None), enum.Enum, torch.dtype, torch.device, torch.layout)
"""What is told by how it prints."""
_FIRST = frozenset({"forward"})
"""Names of the methods that are followed whether anything names them or not; so are those between underscores."""
REGISTERED = frozenset({"_parameters", "_buffers", "_modules"})
"""Attributes of a module that are told as the model's tensors and modules."""
_NOT_FOLLOWED = frozenset({"torch", "numpy", "emssd_compile", *sys.stdlib_module_names})
_PARTS: dict[type, tuple[str, ...]] = {
    staticmethod: ("__func__",),
    classmethod: ("__func__",),
    property: ("fget",),
    functools.cached_property: ("func",),
    functools.partial: ("func", "args", "keywords"),
    functools.partialmethod: ("func", "args", "keywords"),
    MethodType: ("__self__", "__func__"),
    type(functools.cache(id)): ("__wrapped__",),
}
"""Of what is called in the end."""
_DEPTH = 30
"""Of containers within one another; no data that is met so far is as deep."""
_MOST_ELEMENTS = 1024


class UnknownError(Exception):
    """There is something of which it cannot be told what it is."""


class ReachedCode:
    """What may run when modules are called.

    Args:
        modules: all of a model's.
        folders: of packages whose code is installed, beside those of this Python.

    Attributes:
        told: what was found, in an order that is the same each time.

    Raises:
        UnknownError: some of it is of no installed package, or is what no code is.
    """

    def __init__(self, modules: Iterable[nn.Module], folders: tuple[str, ...]) -> None:
        self.told: list[object] = []
        self._installed = (*_installed(), *folders)
        self._modules = {id(module): module for module in modules}
        self._names: set[str] = set(_FIRST)
        self._spaces: list[tuple[str, Mapping[str, object]]] = []
        self._followed: dict[int, object] = {}  # kept alive, so that no other object gets its id
        self._described: dict[tuple[int, bool], object] = {}
        self._new_names: list[str] = []
        self._functions: list[FunctionType] = []
        kinds = {kind: None for module in self._modules.values() for kind in type(module).__mro__}
        if lost := [kind for kind in kinds if kind.__module__ not in sys.modules]:
            raise UnknownError(f"{lost[0].__qualname__} is of no module")
        # the globals of the modules' classes: functions beside them are followed, of torch, too
        self._beside = {id(vars(sys.modules[kind.__module__])) for kind in kinds}
        for kind in (*kinds, Tensor):
            self._follow_class(kind)
        for module in self._modules.values():
            for name, value in vars(module).items():
                if name not in REGISTERED and not isinstance(value, Tensor):
                    self._tell(name, value)
        self._follow()

    def _follow(self) -> None:
        """All functions and names that are not followed yet, until there are none."""
        while self._functions or self._new_names:
            while self._functions:
                self._follow_function(self._functions.pop())
            if self._new_names:
                name = self._new_names.pop()
                for holder, space in self._spaces[:]:
                    if name in space:
                        self._tell(f"{holder}.{name}", space[name])

    def _follow_function(self, function: FunctionType) -> None:
        names = sorted(_names(function.__code__))
        for name in names:
            if name in function.__globals__:
                self._tell(f"{function.__module__}.{name}", function.__globals__[name])
            if name not in self._names:
                self._names.add(name)
                self._new_names.append(name)

    def _tell(self, where: str, value: object) -> None:
        if described := self._describe(value, 0, has_data=False):
            self.told.append((where, described))

    def _describe(self, value: object, depth: int, has_data: bool) -> object:
        """The code that a value holds, which is told on its own and followed; and its data, if that is to count."""
        if isinstance(value, PLAIN):
            return (type(value).__name__, repr(value)) if has_data else None
        if isinstance(value, FunctionType):
            return self._describe_function(value)
        if isinstance(value, type):
            if not _is_foreign(value):
                self._follow_class(value)
            return f"{value.__module__}.{value.__qualname__}"
        if isinstance(value, ModuleType):
            self._follow_space(value.__name__, value)
            return value.__name__
        if isinstance(value, Tensor):
            return _constant(value) if has_data else None
        if isinstance(value, BuiltinFunctionType) or id(value) in self._modules:
            return type(value).__name__, getattr(value, "__qualname__", "")
        if (id(value), has_data) in self._described or depth > _DEPTH:
            return None
        self._described[id(value), has_data] = value
        deeper = functools.partial(self._describe, depth=depth + 1, has_data=has_data)
        for kind, parts in _PARTS.items():
            if isinstance(value, kind):
                return kind.__name__, [self._describe(getattr(value, part), depth + 1, True) for part in parts]
        held: Iterable[tuple[str, object]] = _items(value)
        if not _is_foreign(type(value)):
            held = ("", type(value)), *sorted(getattr(value, "__dict__", {}).items()), *held
        found = [(name, told) for name, each in held if (told := deeper(each))]
        return (type(value).__name__, found) if found or has_data else None

    def _describe_function(self, function: FunctionType) -> str:
        """The name of a function; its body is told once, with all that it was made with, wrapped ones, too."""
        name = f"{function.__module__}.{function.__qualname__}"
        if id(function) in self._followed:
            return name
        self._followed[id(function)] = function
        code = function.__code__
        is_foreign = _is_foreign_file(code.co_filename)
        if not (is_foreign or code.co_filename.startswith(self._installed)):
            raise UnknownError(f"{function.__qualname__} was not installed")
        made_with = (function.__defaults__, function.__kwdefaults__, [*map(content, function.__closure__ or ())])
        self.told.append((name, _body(code), [self._describe(each, 1, has_data=True) for each in made_with]))
        if (inner := getattr(function, "__wrapped__", None)) is not None:
            self._tell(f"{name} wraps", inner)
        if not is_foreign or id(function.__globals__) in self._beside:
            self._functions.append(function)
        return name

    def _follow_class(self, kind: type) -> None:
        if kind is not object:
            for base in kind.__mro__[1:]:
                if not _is_foreign(base):
                    self._follow_space(f"{base.__module__}.{base.__qualname__}", base)
            self._follow_space(f"{kind.__module__}.{kind.__qualname__}", kind)

    def _follow_space(self, holder: str, owner: type | ModuleType) -> None:
        """Tell of what a class or a module holds what anything names."""
        package, is_class = holder.partition(".")[0], isinstance(owner, type)
        if id(owner) in self._followed or (package != "torch" and package in _NOT_FOLLOWED and not is_class):
            return
        self._followed[id(owner)] = owner
        space: Mapping[str, object] = vars(owner)
        if package == "torch" and not is_class:  # of which the data is its own
            space = {name: value for name, value in space.items() if type(value) in (FunctionType, ModuleType)}
        self._spaces.append((holder, space))
        for name in [*space]:
            if name in self._names or (is_class and name.startswith("__") and callable(space[name])):
                self._tell(f"{holder}.{name}", space[name])


def _body(code: CodeType) -> tuple[object, ...]:
    """What a function does; marshal would tell as well how often its constants are used elsewhere."""
    constants = (
        _body(each) if isinstance(each, CodeType) else sorted(map(repr, each)) if isinstance(each, frozenset) else each
        for each in code.co_consts
    )
    return code.co_filename, code.co_code, code.co_names, code.co_varnames, code.co_flags, *constants


def _names(code: CodeType) -> set[str]:
    """All names that code may look up: of globals and attributes, and texts, which `getattr` may be given."""
    found = {*code.co_names}
    for each in code.co_consts:
        if isinstance(each, CodeType):
            found |= _names(each)
        elif isinstance(each, str) and each.isidentifier():
            found.add(each)
    return found


def _items(value: object) -> Iterable[tuple[str, object]]:
    """What a container holds, by names that are the same each time; no method of its own is asked."""
    if isinstance(value, dict):
        return [item for key, each in dict.items(value) for item in (("key", key), (_shown(key), each))]
    if isinstance(value, (set, frozenset)):
        return [("", each) for each in sorted(value, key=_shown)]
    listed = list.__iter__(value) if isinstance(value, list) else value if isinstance(value, tuple) else ()
    return [("", each) for each in listed]


def _shown(item: object) -> str:
    """By what the items of a set are sorted."""
    return repr(item) if isinstance(item, PLAIN) else f"{type(item)} {getattr(item, '__qualname__', '')}"


def _constant(tensor: Tensor) -> object:
    """All of a small tensor that a function was made with. Raises UnknownError if it is another one."""
    if type(tensor) is not Tensor or tensor.device.type != "cpu" or tensor.numel() > _MOST_ELEMENTS:
        raise UnknownError(f"a {type(tensor).__name__} is reached")
    return str(tensor.dtype), tensor.tolist()


def content(cell: CellType) -> object:
    """What a function has taken from around it; a text, as long as there is nothing."""
    try:
        return cell.cell_contents
    except ValueError:
        return "an empty cell"


def _is_foreign(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in _NOT_FOLLOWED


@functools.cache
def _is_foreign_file(name: str) -> bool:
    """Whether a file holds code that is not followed."""
    library, *packages = map(sysconfig.get_path, ("stdlib", "purelib", "platlib"))
    folders = (Path(sys.modules[each].__file__ or "").parent for each in ("torch", "numpy", "emssd_compile"))
    if name.startswith(tuple(f"{folder}/" for folder in folders)):
        return True
    return name.startswith((library, "<frozen ")) and not name.startswith(tuple(packages))


@functools.cache
def _installed() -> tuple[str, ...]:
    """What the names of files of installed code begin with; what is made by exec has no file."""
    return "<", *map(sysconfig.get_path, ("stdlib", "purelib", "platlib"))
