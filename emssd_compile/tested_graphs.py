"""Which graphs were compared with their models before, on this machine."""

from __future__ import annotations

import functools
import hashlib
import platform
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx, nn

from emssd_compile.files import cache_folder, write_whole

if TYPE_CHECKING:
    from emssd_compile.compiler import CompiledModel

_PLAIN = (bool, int, float, str, bytes, tuple, type(None))


def name_of(model: nn.Module, compiled: CompiledModel, how: object) -> str | None:
    """A name that is another one if anything changes that may tell the graph from its model, but for what weights say.

    That is: the graph and its sizes, the tensors that passes have looked at, what the model's modules are and hold
    beside tensors, the versions of what both consist of, the kind of processor. None if part of the model's code has no
    version: it is not of an installed package, or was put there at run time.

    Args:
        model, compiled: that are compared.
        how: they are.
    """
    versions = _versions(model)
    if versions is None:
        return None
    digest = hashlib.sha256(_own_sources())
    for part in (how, versions, *_machine(compiled), *_graph(compiled), *_modules(model)):
        digest.update(repr(part).encode() + b"\0")
    for name, tensor in sorted(compiled.looked_at.items()):
        digest.update(name.encode() + b"\0" + tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def is_known(name: str) -> bool:
    """Whether a graph of that name was compared."""
    return (_folder() / name).exists()


def remember(name: str) -> None:
    """Keep that a graph of that name was compared; where nothing can be kept it will be compared again."""
    try:
        _folder().mkdir(parents=True, exist_ok=True)
        write_whole(_folder() / name, b"")
    except OSError:
        pass


def _folder() -> Path:
    return cache_folder() / "tested_graphs"


def _versions(model: nn.Module) -> dict[str, str] | None:
    """Of the packages that the classes of a model are from."""
    packages = set[str]()
    for module in model.modules():
        if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:
            return None
        packages |= {kind.__module__.partition(".")[0] for kind in type(module).__mro__} - {"builtins"}
    try:
        return {package: metadata.version(package) for package in sorted(packages)}
    except metadata.PackageNotFoundError:
        return None


@functools.cache
def _own_sources() -> bytes:
    """A digest of this package."""
    digest = hashlib.sha256()
    folder = Path(__file__).parent
    tops = [folder, folder / "passes", folder / "export"]  # those are links in a checkout, which rglob does not follow
    for path in sorted({path for top in tops for path in top.rglob("*") if path.suffix in {".py", ".cpp", ".h"}}):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.digest()


def _machine(compiled: CompiledModel) -> Iterator[object]:
    yield sys.version, torch.__version__, platform.machine(), torch.backends.cpu.get_cpu_capability()
    for device in sorted({str(tensor.device) for tensor in compiled.graph_module.state_dict().values()}):
        yield device, torch.cuda.get_device_name(device) if device.startswith("cuda") else ""


def _graph(compiled: CompiledModel) -> Iterator[object]:
    yield compiled.batch, compiled.vocabulary, compiled.cache_shapes
    for path, part in compiled.graph_module.named_modules():
        for node in part.graph.nodes if isinstance(part, fx.GraphModule) else ():
            value = node.meta.get("val")
            form = (value.dtype, value.shape, value.stride()) if isinstance(value, Tensor) else None
            yield path, node.op, node.name, str(node.target), node.args, node.kwargs, form


def _modules(model: nn.Module) -> Iterator[object]:
    for path, module in model.named_modules():
        held = {name: value for name, value in vars(module).items() if isinstance(value, _PLAIN)}
        yield path, type(module).__module__, type(module).__qualname__, sorted(held.items())
    yield getattr(model, "config", None)
