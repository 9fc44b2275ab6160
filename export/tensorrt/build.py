"""From the step graph to an engine on disk."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import fx

from emssd_compile.errors import ArtifactError
from emssd_compile.export.onnx.exporter import require_exporter
from emssd_compile.export.schema import text
from emssd_compile.export.tensorrt.cut import Cut, cut
from emssd_compile.export.tensorrt.library import check_capability, find_runtime, load_runtime, make_log
from emssd_compile.export.tensorrt.network import parse, splice, write_onnx
from emssd_compile.export.tensorrt.options import BuildOptions
from emssd_compile.export.tensorrt.profiles import Profile, make_profiles
from emssd_compile.files import write_whole
from emssd_compile.runtime.buckets import StepSizes
from emssd_compile.step.signature import Signature

ENGINE = "step.engine"
NAME_PREFIX = "emssd_compile "
_KEPT = ("attention", "weights", "version_compatible", "hardware_compatibility", "profile_per_bucket")


def require(options: BuildOptions, device: torch.device, runs: bool) -> None:
    """What building an engine takes, and running it on a CUDA device.

    Raises:
        OptionError: the runtime that is here cannot do what the options ask for.
        ArtifactError: no runtime is installed, or the exporter to ONNX is not.
    """
    runtime = find_runtime(options.runtime)
    require_exporter(runtime)
    options.check(runtime)
    capabilities = options.capabilities(_known_capabilities(load_runtime(runtime), runtime))
    if runs and options.hardware_compatibility == "none":
        check_capability(capabilities, device, "it cannot be checked here; pass check=False")


def write(
    graph_module: fx.GraphModule, folder: Path, sizes: Sequence[StepSizes], options: BuildOptions, signature: Signature
) -> dict[str, Any]:
    """Build an engine and write it to `folder`.

    Args:
        graph_module: the step, or a model on packed rows, after `passes`.
        folder: where `step.engine` goes.
        sizes: of the steps that will be captured, ascending, and last of the largest step.
        options: what to build.
        signature: of the graph; the engine's name holds a hash of it.

    Raises:
        OptionError: as `require`.
        UnsupportedModelError: TensorRT has nothing that does what an op does; says which, and where it comes from.
        ArtifactError: as `require`; or the runtime fails to build, and says why.
    """
    runtime = find_runtime(options.runtime)
    trt = load_runtime(runtime)
    known = _known_capabilities(trt, runtime)
    capabilities = options.capabilities(known)
    profiles = make_profiles(graph_module.graph, sizes, per_bucket=options.profile_per_bucket)
    parts = cut(graph_module, masked=options.attention == "masked")
    network, builder, log = define(trt, parts, folder)
    network.name = engine_name(signature, parts.results, parts.caches)
    config = _configure(trt, builder, options, capabilities, known, profiles)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        reason = log.explain()
        raise ArtifactError(f"{runtime} cannot build the engine: {reason}{_hint(reason, options)}")
    (folder / ENGINE).write_bytes(memoryview(plan))
    if options.timing_cache is not None:
        write_whole(Path(options.timing_cache), bytes(memoryview(config.get_timing_cache().serialize())))
    return {
        "runtime": runtime,
        "versions": {name: version(name) for name in ("torch", "onnx", "onnxscript")} | {runtime: trt.__version__},
        "compute_capabilities": list(capabilities),
        "options": {name: getattr(options, name) for name in _KEPT},
        "profiles": profiles,
        "buckets": [size._asdict() for size in sizes[:-1]],
        "results": parts.results,
        "caches": parts.caches,
        "bindings": _bindings(network),
        "layers": _count_layers(network),
    }


def engine_name(signature: Signature, results: Mapping[str, str], caches: Mapping[str, str]) -> str:
    """The name of an engine: what it was built from can be compared where it is loaded."""
    content = json.dumps([text(signature), dict(results), dict(caches)], sort_keys=True)
    return NAME_PREFIX + hashlib.sha256(content.encode()).hexdigest()


def _hint(reason: str, options: BuildOptions) -> str:
    """What to do where there is no kernel for, say, a head size: TensorRT names a setting that is not the user's."""
    no_kernel = options.attention != "decomposed" and "dedicated kernel" in reason
    return "; export with attention='decomposed', which needs no such kernel" if no_kernel else ""


def define(trt: Any, parts: Cut, folder: Path) -> tuple[Any, Any, Any]:
    """The network of a step, with the builder and the log that it belongs to; `folder` is used and left as it was."""
    log = make_log(trt)
    builder = trt.Builder(log)
    network = builder.create_network(_strongly_typed(trt))
    with tempfile.TemporaryDirectory(dir=folder) as scratch:  # as large as the weights, which the parser copies
        path = Path(scratch) / "step.onnx"
        write_onnx(parts.graph_module, path)
        parse(trt, log, network, path)
    splice(trt, log, network, parts)
    return network, builder, log


def _strongly_typed(trt: Any) -> int:
    """Flags of a network that keeps the dtypes it is given; from version 11 on, each does."""
    return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def _known_capabilities(trt: Any, runtime: str) -> dict[str, Any]:
    """What a runtime can build for without a GPU: compute capabilities by name, as in `"8.0"`."""
    if runtime == "tensorrt":
        return {}
    members = trt.ComputeCapability.__members__.items()
    return {f"{name[2:-1]}.{name[-1]}": value for name, value in members if name.startswith("SM")}


def _configure(
    trt: Any,
    builder: Any,
    options: BuildOptions,
    capabilities: Sequence[str],
    known: Mapping[str, Any],
    profiles: Sequence[Profile],
) -> Any:
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if known:
        config.num_compute_capabilities = len(capabilities)
        for index, name in enumerate(capabilities):
            config.set_compute_capability(known[name], index)
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.hardware_compatibility != "none":
        name = options.hardware_compatibility.replace("-", "_").upper()
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.__members__[name]
    if options.weights == "streamed":
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    if options.timing_cache is not None:
        file = Path(options.timing_cache)
        cache = config.create_timing_cache(file.read_bytes() if file.exists() else b"")
        if cache is None or not config.set_timing_cache(cache, False):
            raise ArtifactError(f"timing_cache={str(file)!r} is none of this runtime's, or damaged; remove it")
    for ranges in profiles:
        profile = builder.create_optimization_profile()
        for name, shapes in ranges.items():
            profile.set_shape(name, *shapes)
        config.add_optimization_profile(profile)
    return config


def _bindings(network: Any) -> list[dict[str, Any]]:
    """What has to be bound to the engine: name, direction, dtype and shape (-1 where it may differ)."""
    ends = [("input", network.get_input(i)) for i in range(network.num_inputs)]
    ends += [("output", network.get_output(i)) for i in range(network.num_outputs)]
    return [
        {"name": t.name, "direction": direction, "dtype": t.dtype.name.lower(), "shape": list(t.shape)}
        for direction, t in ends
    ]


def _count_layers(network: Any) -> dict[str, int]:
    """How many layers of each kind a network has."""
    kinds = Counter(network.get_layer(index).type.name.lower() for index in range(network.num_layers))
    return dict(sorted(kinds.items()))
