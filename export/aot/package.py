"""Write and open a package of machine code that AOTInductor makes of a graph."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, fx

from emssd_compile.errors import ArtifactError
from emssd_compile.export.folder import Files
from emssd_compile.export.schema import KEY, text
from emssd_compile.lowering.unbacked import OPTIONS, SizeTakenError, unbacked
from emssd_compile.ops import load_cpu_kernels, source_hash
from emssd_compile.ops.cpu_library import CannotBuildError, standalone_library
from emssd_compile.passes.fuse_projections import FuseProjections
from emssd_compile.passes.group_linears import GroupLinears
from emssd_compile.passes.manager import Pass
from emssd_compile.runtime.buckets import StepSizes
from emssd_compile.step.signature import Binding, Signature

PACKAGE, OPS_LIBRARY, BINDINGS = "step.pt2", "libemssd_ops.so", "bindings.txt"


def require(options: object, device: torch.device, runs: bool) -> None:
    """Refuse what would fail later, or worse.

    Raises:
        ArtifactError: the library of ops for a CPU cannot be built: there is no C++ compiler, or it fails. Or the
            package is for a GPU: it compiles, and then torch's loader ends the process (2.11.0, on an H200).
    """
    if device.type != "cpu":
        raise ArtifactError(
            f"a package for {device.type} ends the process that loads it, by a segmentation fault in torch's loader; "
            "export the model on the CPU, or for this device to ONNX or TensorRT"
        )
    try:
        standalone_library()
    except (CannotBuildError, OSError) as error:
        raise ArtifactError(f"a package cannot be compiled here: {error}") from error


def passes(sizes: Sequence[StepSizes], options: object) -> tuple[Pass, ...]:
    """As for Inductor, products on a CPU are our own. Layers elsewhere the pass leaves alone; they are merged."""
    return (GroupLinears(), FuseProjections())


def write_package(
    graph_module: fx.GraphModule, folder: Path, sizes: Sequence[StepSizes], options: object, signature: Signature
) -> dict[str, Any]:
    """Compile a graph for this machine, weights included.

    Writes `step.pt2`, one package for all sizes, with the signature in its metadata; `bindings.txt`, a line
    `input|output name dtype first dims...` for each tensor in order, with what it holds at first, and `*` for a size
    that may differ from call to call; and `libemssd_ops.so`, which gives the ops of this project to a process without
    Python.

    Args:
        graph_module: level L3 or L2, with a dict of results.
        folder: where to write.
        sizes: of the steps that will run; not needed, since one function serves them all.
        options: there are none.
        signature: of the graph.

    Raises:
        ArtifactError: there is no C++ compiler, or it fails.
    """
    from torch._inductor import aot_compile
    from torch._inductor.exc import InductorError
    from torch._inductor.package.package import package_aoti

    graph = unbacked(graph_module)
    try:
        (folder / OPS_LIBRARY).write_bytes(standalone_library())
        # Inductor would leave all it builds, weights included, in its cache.
        with tempfile.TemporaryDirectory(dir=folder) as work, graph.compiling():
            settings = {
                **OPTIONS,
                "aot_inductor.package": True,
                "aot_inductor.output_path": work,
                "aot_inductor.metadata": {KEY: text(signature)},
            }
            files = cast("list[Any]", aot_compile(graph.graph_module, graph.inputs, options=settings))
            package_aoti(str(folder / PACKAGE), files)
    except (CannotBuildError, InductorError, SizeTakenError) as error:
        raise ArtifactError(f"the graph cannot be compiled to a package: {error}") from error
    (folder / BINDINGS).write_text(_bindings(signature))
    return {"versions": {"torch": str(torch.__version__)}}


def _bindings(signature: Signature) -> str:
    named = [("input", binding) for binding in signature.inputs] + [("output", b) for b in signature.results]
    return "".join(f"{kind} {_layout(binding)}\n" for kind, binding in named)


def _layout(binding: Binding) -> str:
    dims = ["*" if isinstance(size, str) else str(size) for size in binding.shape]
    first = 0 if binding.option is None else binding.option.default
    return " ".join([binding.name, str(binding.dtype).removeprefix("torch."), f"{first:g}", *dims])


def environment(details: dict[str, Any], device: torch.device) -> dict[str, str]:
    """The torch and the ops that the code calls, and the instruction set that it was compiled for.

    The ops of the process that loads it are called, not those of the one that wrote it: others may mean something else.
    """
    here = {"device": device.type, "torch": str(torch.__version__), "ops of emssd_compile": source_hash()[:16]}
    # Beyond its three levels of vector width, Inductor uses what it finds of these.
    extensions = {
        "VNNI": torch.cpu._is_vnni_supported(),
        "BF16": torch.cpu._is_avx512_bf16_supported(),
        "AMX": torch.cpu._is_amx_tile_supported(),
    }
    found = [name for name, is_there in extensions.items() if is_there]
    return {**here, "instruction set": " ".join([torch.backends.cpu.get_cpu_capability(), *found])}


class PackageStep:
    """What runs a package: neither the model nor a compiler of Python code is needed.

    Threads may call it at once: each waits for the others.

    Args:
        path: the package.
        signature: what its bindings must be: the code reads and writes as far as they go, whatever it is given.

    Raises:
        ArtifactError: they are others.
    """

    def __init__(self, path: Path, signature: Signature) -> None:
        # Not by `aoti_load_package`: that looks for other things in a package, pickles among them.
        loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", True, 1, -1)
        if loader.get_metadata().get(KEY) != text(signature):
            raise ArtifactError("the package was compiled with other bindings than its manifest has; export again")
        self._run = loader.boxed_run
        self._names = tuple(binding.name for binding in signature.results)
        self._lock = threading.Lock()

    def __call__(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Inputs in the order of the signature; results by name. KV caches are written in place."""
        with self._lock:
            return dict(zip(self._names, self._run(list(inputs)), strict=True))


def open_package(files: Files, details: Mapping[str, Any], signature: Signature, device: torch.device) -> PackageStep:
    """Open what `write_package` wrote.

    Raises:
        ArtifactError: torch cannot load it, or it has other bindings.
    """
    try:
        load_cpu_kernels(prebuilt=partial(files.read, OPS_LIBRARY), origin=files.folder / OPS_LIBRARY)
        return PackageStep(files.path(PACKAGE), signature)
    except (RuntimeError, OSError) as error:
        raise ArtifactError(
            f"{files.folder / PACKAGE} cannot be loaded: {str(error).splitlines()[0]}; export again"
        ) from error
