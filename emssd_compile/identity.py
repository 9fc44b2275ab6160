"""What a model is beside the values of its weights: the code that it runs, and what its modules hold.

Two models that are the same by all of this have the same forward. Where it cannot be told, nothing is guessed.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import platform
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from emssd_compile.files import hash_of_sources
from emssd_compile.reached_code import PLAIN, REGISTERED, ReachedCode, UnknownError, content
from emssd_compile.structure import HARMLESS_OF_CONFIGS, HARMLESS_OF_MODULES

_DEPTH = 6
_logger = logging.getLogger(__name__)
Told = tuple[object, ...]


def code_of(model: nn.Module) -> Told:
    """The versions of the packages that the model's classes are of, and all code that their forwards may reach.

    Raises:
        UnknownError: some of the code is of no installed package, or was put there at run time.
    """
    hooks = vars(torch.nn.modules.module).items()
    if any(held for name, held in hooks if name.startswith("_global_forward") and isinstance(held, dict)):
        raise UnknownError("hooks of all modules")
    kinds = set[type]()
    for module in model.modules():
        if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:
            raise UnknownError("a hook")
        kinds |= {*type(module).__mro__}
    names = {kind.__module__.partition(".")[0] for kind in kinds} - {"builtins", "typing", "abc"}
    packages = {name: package(name) for name in sorted(names)}
    return packages, *ReachedCode(model.modules(), tuple(folder for _, folder in packages.values())).told


def if_known(tell: Callable[[nn.Module], Told], model: nn.Module) -> Told | None:
    """What `code_of` or `held_by` tell; None if it cannot be told, such as of what does not let itself be looked at."""
    try:
        return tell(model)
    except Exception as error:
        _logger.debug("what a graph of %s follows from cannot be told: %s", type(model).__name__, error)
        return None


def digest_of(parts: Iterable[object]) -> hashlib._Hash:
    """SHA-256 of what was told, part by part."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(repr(part).encode() + b"\0")
    return digest


def machine(devices: Iterable[torch.device]) -> tuple[object, ...]:
    """The versions of Python and torch, and the processors."""
    gpus = [(str(d), torch.cuda.get_device_name(d) if d.type == "cuda" else "") for d in sorted(devices, key=str)]
    return sys.version, torch.__version__, platform.machine(), torch.backends.cpu.get_cpu_capability(), gpus


@functools.cache
def own_sources() -> str:
    """A hash of this package's code."""
    return hash_of_sources(Path(__file__).parent)


def package(name: str) -> tuple[str, str]:
    """Version and folder of an installed package. Raises UnknownError if its version does not say what it is."""
    try:
        distribution, folder = metadata.distribution(name), sys.modules[name].__file__
    except (metadata.PackageNotFoundError, LookupError) as error:
        raise UnknownError(f"{name} is of no package") from error
    source = distribution.read_text("direct_url.json") or ""  # of what no index gave: the commit, or the hash
    if folder is None or "dir_info" in source:
        raise UnknownError(f"the version of {name} does not say what it is")
    return distribution.version + source, str(Path(folder).parent)


def held_by(model: nn.Module) -> Told:
    """What a model's modules hold, and what its tensors are, but for their values.

    Raises:
        UnknownError: something that is held is not of a kind that is known here, such as a tensor that no module has
            registered.
    """
    registered: dict[int, str] = {}
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    first = [registered.setdefault(id(tensor), path) for path, tensor in tensors]
    describe = _Describer(registered | {id(module): path for path, module in model.named_modules()})
    layouts = [(path, describe.layout(tensor)) for path, tensor in tensors]
    modules = [
        (path, describe.kind(type(module)), describe.attributes(vars(module), HARMLESS_OF_MODULES | REGISTERED, 0))
        for path, module in model.named_modules(remove_duplicate=False)
    ]
    kinds = {kind for module in model.modules() for kind in type(module).__mro__}
    classes = [(describe.kind(kind), describe.constants(vars(kind))) for kind in sorted(kinds, key=repr)]
    sources = sorted({type(module).__module__ for module in model.modules()})
    beside = [(name, describe.constants(vars(sys.modules[name]))) for name in sources]
    return first, layouts, modules, classes, beside


class _Describer:
    """Turns values into what says all that a forward may read of them.

    Args:
        known: names of objects that are described elsewhere, by their ids.
    """

    def __init__(self, known: dict[int, str]) -> None:
        self._known = known
        self._package = functools.cache(package)

    def layout(self, tensor: Tensor) -> object:
        """All about a tensor but its values; of one that wraps others, what it says of them too."""
        told = tensor.shape, tensor.stride(), tensor.dtype, str(tensor.device), tensor.requires_grad
        if type(tensor) in (Tensor, nn.Parameter):
            return type(tensor).__name__, told, tensor.storage_offset()
        if not is_traceable_wrapper_subclass(tensor):
            raise UnknownError(f"a {type(tensor).__name__} is registered")
        names, context = tensor.__tensor_flatten__()
        within = [(name, self.layout(getattr(tensor, name))) for name in names]
        return self._of_package(type(tensor)), told, within, self.value(context, 0)

    def kind(self, kind: type) -> str:
        """A class, by name."""
        return f"{kind.__module__}.{kind.__qualname__}"

    def attributes(self, held: Mapping[str, object], harmless: frozenset[str], depth: int) -> list[tuple[str, object]]:
        """Values by name, without those that no forward reads."""
        return [(name, self.value(held[name], depth)) for name in sorted(held) if name not in harmless]

    def constants(self, namespace: Mapping[str, object]) -> list[tuple[str, object]]:
        """Numbers, texts, containers and tensors of a class or a module; functions are told by `code_of`."""
        kinds = (*PLAIN, Mapping, list, tuple, set, frozenset, Tensor)
        held = {name: value for name, value in namespace.items() if not name.startswith("__")}
        return [(name, self.value(held[name], 0)) for name in sorted(held) if isinstance(held[name], kinds)]

    def value(self, value: object, depth: int) -> object:
        """Anything that a module may hold. Raises UnknownError if it is of another kind."""
        if id(value) in self._known:
            return self._known[id(value)]
        if isinstance(value, PLAIN):
            return type(value).__name__, repr(value)
        if depth < _DEPTH:
            deeper = functools.partial(self.value, depth=depth + 1)
            if isinstance(value, (set, frozenset)):
                return type(value).__name__, sorted(repr(deeper(item)) for item in value)
            if isinstance(value, (list, tuple)):
                return self.kind(type(value)), [deeper(item) for item in value]
            if isinstance(value, Mapping):
                return self.kind(type(value)), [(deeper(key), deeper(item)) for key, item in value.items()]
            if isinstance(value, functools.partial):
                return "partial", deeper(value.func), deeper(value.args), deeper(value.keywords)
            if isinstance(value, MethodType):
                return "method", deeper(value.__self__), deeper(value.__func__)
            if isinstance(value, FunctionType):
                cells = [deeper(content(cell)) for cell in value.__closure__ or ()]
                return value.__qualname__, cells, deeper(value.__defaults__), deeper(value.__kwdefaults__)
            if isinstance(value, type):
                return self._of_package(value)
            if isinstance(value, BuiltinFunctionType) and value.__self__ is torch._C._nn:
                return "builtin", value.__name__
            if hasattr(value, "model_type") or hasattr(value, "__dataclass_fields__"):  # a configuration
                return self._of_package(type(value)), self.attributes(vars(value), HARMLESS_OF_CONFIGS, depth + 1)
        raise UnknownError(f"a {type(value).__name__} is held")

    def _of_package(self, kind: type) -> object:
        name = kind.__module__.partition(".")[0]
        return self.kind(kind), name in sys.stdlib_module_names or self._package(name)
