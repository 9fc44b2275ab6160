"""Which graphs were compared with their models before, on this machine."""

from __future__ import annotations

import functools
import hashlib
import inspect
import platform
import re
import sys
import sysconfig
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import CodeType, FunctionType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx, nn

from emssd_compile.files import cache_folder, hash_of_sources, write_whole
from emssd_compile.freshness import plain_tensors

if TYPE_CHECKING:
    from emssd_compile.compiler import CompiledModel


def name_of(model: nn.Module, compiled: CompiledModel, how: object) -> str | None:
    """A name that is another one if anything changes that may tell the graph from its model, but for what weights say.

    That is: the graph and its sizes, the tensors that passes have looked at, what the model's modules are and hold
    beside tensors, the code of their classes and of the functions beside those, the versions of the packages that all
    of it is from, the kind of processor. None if some of the code is of no installed package, or was put there at run
    time.

    Args:
        model, compiled: that are compared.
        how: they are.
    """
    packages = _packages(model)
    if packages is None:
        return None
    code = [*_code({kind for module in model.modules() for kind in type(module).__mro__}, packages)]
    if None in code:
        return None
    digest = hashlib.sha256()
    for part in (_own_sources(), how, packages, *code, *_machine(compiled), *_graph(compiled), *_modules(model)):
        digest.update(repr(part).encode() + b"\0")
    for name, tensor in sorted(compiled.looked_at.items()):
        for plain in plain_tensors(tensor):
            flat = plain.detach().cpu().contiguous().reshape(-1)
            digest.update(f"{name} {flat.dtype} {plain.shape}".encode() + flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def tested_length(name: str) -> int:
    """Tokens of the longest row that a graph of that name was compared with; 0 if it never was."""
    try:
        return int((_folder() / name).read_text())
    except (OSError, ValueError):
        return 0


def remember(name: str, length: int) -> None:
    """Keep that a graph of that name was compared; where nothing can be kept it will be compared again."""
    try:
        _folder().mkdir(parents=True, exist_ok=True)
        write_whole(_folder() / name, str(length).encode())
    except OSError:
        pass


def _folder() -> Path:
    return cache_folder() / "tested_graphs"


def _packages(model: nn.Module) -> dict[str, tuple[str, str]] | None:
    """The versions and folders of the packages that a model's classes are from."""
    hooks = vars(torch.nn.modules.module).items()
    if any(held for name, held in hooks if name.startswith("_global_forward") and isinstance(held, dict)):
        return None
    names = set[str]()
    for module in model.modules():
        if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:
            return None
        names |= {kind.__module__.partition(".")[0] for kind in type(module).__mro__} - {"builtins", "typing", "abc"}
    try:
        return {name: _package(name) for name in sorted(names)}
    except (metadata.PackageNotFoundError, LookupError):
        return None


def _package(name: str) -> tuple[str, str]:
    distribution, folder = metadata.distribution(name), sys.modules[name].__file__
    if folder is None or "editable" in (distribution.read_text("direct_url.json") or ""):
        raise LookupError(f"the version of {name} does not say what it is")
    return distribution.version, str(Path(folder).parent)


def _code(kinds: set[type], packages: dict[str, tuple[str, str]]) -> Iterator[tuple[object, ...] | None]:
    """All functions of these classes and beside them; None for one that was not installed."""
    folders = map(sysconfig.get_path, ("stdlib", "purelib", "platlib"))
    installed = ("<", *folders, *(folder for _, folder in packages.values()))  # what is made by exec has no file
    modules = {kind.__module__ for kind in kinds}
    if not modules <= sys.modules.keys():
        yield None
    beside = (sys.modules[name] for name in modules & sys.modules.keys())
    for holder in sorted((*beside, *kinds), key=repr):
        for name, value in sorted(vars(holder).items()):
            if isinstance(value, FunctionType):
                code = inspect.unwrap(value).__code__
                yield (repr(holder), name, _of(code)) if code.co_filename.startswith(installed) else None


def _of(code: CodeType) -> tuple[object, ...]:
    """What a function does; marshal would tell as well how often its constants are used elsewhere."""
    constants = (
        _of(each) if isinstance(each, CodeType) else sorted(map(repr, each)) if isinstance(each, frozenset) else each
        for each in code.co_consts
    )
    return code.co_filename, code.co_code, code.co_names, *constants


@functools.cache
def _own_sources() -> str:
    return hash_of_sources(Path(__file__).parent)


def _machine(compiled: CompiledModel) -> Iterator[object]:
    yield sys.version, torch.__version__, platform.machine(), torch.backends.cpu.get_cpu_capability()
    for device in sorted({str(tensor.device) for tensor in compiled.graph_module.state_dict().values()}):
        yield device, torch.cuda.get_device_name(device) if device.startswith("cuda") else ""


def _graph(compiled: CompiledModel) -> Iterator[str]:
    symbols: dict[str, str] = {}  # of sizes; their names are not the same each time

    def numbered(found: re.Match[str]) -> str:
        return symbols.setdefault(found[0], f"size{len(symbols)}")

    yield repr((compiled.batch, compiled.vocabulary, compiled.cache_shapes))
    for path, part in compiled.graph_module.named_modules():
        for node in part.graph.nodes if isinstance(part, fx.GraphModule) else ():
            value = node.meta.get("val")
            form = (value.dtype, value.shape, value.stride()) if isinstance(value, Tensor) else None
            told = (path, node.op, node.name, str(node.target), node.args, node.kwargs, form)
            yield re.sub(r"\b[su]\d+\b", numbered, repr(told))


def _modules(model: nn.Module) -> Iterator[object]:
    for path, module in model.named_modules():
        held = {name: value for name, value in vars(module).items() if _is_plain(value)}
        yield path, type(module).__module__, type(module).__qualname__, sorted(held.items())
    yield getattr(model, "config", None)


def _is_plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, (*value.keys(), *value.values())))
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str, bytes))
