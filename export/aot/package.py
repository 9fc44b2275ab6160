"""Write and open a package of machine code that AOTInductor makes of a graph."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, fx

from emssd_compile.errors import ArtifactError
from emssd_compile.lowering.unbacked import OPTIONS, unbacked
from emssd_compile.ops import load_cpu_kernels, load_kernels, source_hash
from emssd_compile.ops.cpu_library import CannotBuildError, standalone_library
from emssd_compile.passes.fuse_projections import FuseProjections
from emssd_compile.passes.graph import inputs, output
from emssd_compile.passes.manager import Pass
from emssd_compile.passes.pack_linears import PackLinears
from emssd_compile.runtime.buckets import StepSizes

PACKAGE, OPS_LIBRARY, BINDINGS = "step.pt2", "libemssd_ops.so", "bindings.txt"


def require(options: object, device: torch.device, runs: bool) -> None:
    """Raises ArtifactError if the library of ops for a CPU cannot be built: there is no C++ compiler, or it fails."""
    if device.type == "cpu":
        try:
            standalone_library()
        except (CannotBuildError, OSError) as error:
            raise ArtifactError(f"a package cannot be compiled here: {error}") from error


def passes(sizes: Sequence[StepSizes], options: object) -> tuple[Pass, ...]:
    """As for Inductor, weights on a CPU are packed. Those elsewhere the pass leaves alone; they are merged."""
    return (PackLinears(), FuseProjections())


def write_package(
    graph_module: fx.GraphModule, folder: Path, sizes: Sequence[StepSizes], options: object
) -> dict[str, Any]:
    """Compile a graph for this machine, weights included.

    Writes `step.pt2`, one package for all sizes; `bindings.txt`, a line `input|output name dtype dims...` for each
    tensor in order, `*` for a size that may differ from call to call; and on a CPU `libemssd_ops.so`, which gives the
    ops of this project to a process without Python.

    Args:
        graph_module: level L3 or L2, with a dict of results.
        folder: where to write.
        sizes: of the steps that will run; not needed, since one function serves them all.
        options: there are none.

    Raises:
        ArtifactError: there is no C++ compiler, or it fails.
    """
    from torch._inductor import aot_compile
    from torch._inductor.exc import InductorError
    from torch._inductor.package.package import package_aoti

    graph = unbacked(graph_module)
    try:
        if graph.inputs[0].device.type == "cpu":
            shutil.copyfile(standalone_library(), folder / OPS_LIBRARY)
        # Inductor would leave all it builds, weights included, in its cache.
        with tempfile.TemporaryDirectory(dir=folder) as work, graph.compiling():
            options = {**OPTIONS, "aot_inductor.package": True, "aot_inductor.output_path": work}
            files = cast("list[Any]", aot_compile(graph.graph_module, graph.inputs, options=options))
            package_aoti(str(folder / PACKAGE), files)
    except (CannotBuildError, InductorError) as error:
        raise ArtifactError(f"the graph cannot be compiled to a package: {error}") from error
    (folder / BINDINGS).write_text(_bindings(graph_module))
    return {"results": list(graph.result_names), "versions": {"torch": str(torch.__version__)}}


def _bindings(graph_module: fx.GraphModule) -> str:
    results = output(graph_module.graph).args[0]
    assert isinstance(results, dict)
    named = [("input", str(node.target), node) for node in inputs(graph_module.graph)]
    named += [("output", name, node) for name, node in results.items()]
    return "".join(f"{kind} {name} {_layout(node.meta['val'])}\n" for kind, name, node in named)


def _layout(value: Tensor) -> str:
    dims = ["*" if isinstance(size, torch.SymInt) else str(size) for size in value.shape]
    return " ".join([str(value.dtype).removeprefix("torch."), *dims])


def environment(details: dict[str, Any], device: torch.device) -> dict[str, str]:
    """The torch and the ops that the code calls, and the instruction set or GPU that it was compiled for.

    The ops of the process that loads it are called, not those of the one that wrote it: others may mean something else.
    """
    here = {"device": device.type, "torch": str(torch.__version__), "ops of emssd_compile": source_hash()[:16]}
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return {**here, "GPU capability": f"{major}.{minor}"}
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

    Args:
        path: the package.
        result_names: what it returns, in order.
        device: where it runs.
    """

    def __init__(self, path: Path, result_names: Sequence[str], device: torch.device) -> None:
        index = -1 if device.index is None else device.index
        # One thread calls a step at a time; what would keep several apart gets in the way of CUDA graphs.
        package = torch._inductor.aoti_load_package(str(path), run_single_threaded=True, device_index=index)
        self._run = package.loader.boxed_run  # its own call flattens arguments and results by name
        self._names = tuple(result_names)

    def __call__(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Inputs in the order of the graph's; results by name. KV caches are written in place."""
        return dict(zip(self._names, self._run(list(inputs)), strict=True))


def open_package(
    folder: Path, details: dict[str, Any], input_names: Sequence[str], device: torch.device
) -> PackageStep:
    """Open what `write_package` wrote. Raises ArtifactError if torch cannot load it."""
    try:
        if device.type == "cpu":
            load_cpu_kernels(folder / OPS_LIBRARY)
        else:
            load_kernels(device.type)
        return PackageStep(folder / PACKAGE, details["results"], device)
    except (RuntimeError, OSError) as error:
        raise ArtifactError(
            f"{folder / PACKAGE} cannot be loaded: {str(error).splitlines()[0]}; export again"
        ) from error
