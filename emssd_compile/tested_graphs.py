"""Which graphs were compared with their models before, on this machine."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx, nn

from emssd_compile import identity
from emssd_compile.files import cache_folder, write_whole
from emssd_compile.freshness import plain_tensors

if TYPE_CHECKING:
    from emssd_compile.compiler import CompiledModel


def name_of(model: nn.Module, compiled: CompiledModel, how: object, code: identity.Told | None = None) -> str | None:
    """A name that is another one if anything changes that may tell the graph from its model, but for what weights say.

    That is: the graph and its sizes, the tensors that passes have looked at, what the model's modules are and hold
    beside tensors, the code of their classes and of the functions beside those, the versions of the packages that all
    of it is from, the kind of processor. None if some of the code is of no installed package, or was put there at run
    time.

    Args:
        model, compiled: that are compared.
        how: they are.
        code: the model's (`identity.code_of`), if it was told before.
    """
    code = code or identity.if_known(identity.code_of, model)
    if code is None:
        return None
    devices = {tensor.device for tensor in compiled.graph_module.state_dict().values()}
    told = (identity.own_sources(), how, *code, *identity.machine(devices), *_graph(compiled), *_modules(model))
    digest = identity.digest_of(told)
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
