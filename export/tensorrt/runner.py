"""Run an engine on torch's tensors."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from emssd_compile.errors import ArtifactError, CapacityError
from emssd_compile.export.folder import Files
from emssd_compile.export.manifest import fits
from emssd_compile.export.tensorrt.build import ENGINE, NAME_PREFIX, engine_name
from emssd_compile.export.tensorrt.library import check_capability, load_runtime, make_log
from emssd_compile.export.tensorrt.profiles import choose
from emssd_compile.step.signature import Binding, Signature

_DTYPES = {
    "bool": torch.bool,
    "int32": torch.int32,
    "int64": torch.int64,
    "half": torch.float16,
    "bf16": torch.bfloat16,
    "float": torch.float32,
}


def open_step(files: Files, details: dict[str, Any], signature: Signature, device: torch.device) -> EngineStep:
    """Read the engine of an artifact onto a CUDA device.

    Args:
        files: `step.engine` is one of them.
        details: what `write` returned.
        signature: of the step.
        device: a CUDA device.

    Raises:
        ArtifactError: there is no such device, or it is not one of those built for; there is no TensorRT, or it cannot
            read the engine; or the engine has other bindings than it should; says why.
    """
    folder = files.folder
    check_details(details, signature)
    if device.type != "cuda" or not torch.cuda.is_available():
        raise ArtifactError(f"{folder} holds a TensorRT engine, which runs on a CUDA device; there is none here")
    if details["options"]["hardware_compatibility"] == "none":
        check_capability(details["compute_capabilities"], device, f"export again to use {folder} on it")
    trt = load_runtime(details["runtime"])
    log = make_log(trt)
    with torch.cuda.device(device):
        runtime = trt.Runtime(log)
        engine = runtime.deserialize_cuda_engine(files.read(ENGINE))
        if engine is None:
            raise ArtifactError(
                f"{details['runtime']} {trt.__version__} cannot read {folder / ENGINE}: {log.explain()}"
            )
        check_engine(engine, details, signature)
        if details["options"]["weights"] == "streamed":
            engine.weight_streaming_budget_v2 = engine.get_weight_streaming_automatic_budget()
        names = [binding.name for binding in signature.inputs]
        return EngineStep(Loaded(trt, log, runtime, engine), details, names, device)


def check_details(details: Mapping[str, Any], signature: Signature) -> None:
    """Compare the parts of a manifest with one another. Raises ArtifactError if they do not agree; says where."""
    inputs, caches = {b.name: b for b in signature.inputs}, signature.with_role("cache")
    bound = {binding.name: binding for binding in map(_binding, details["bindings"])}
    owned = {name: caches.get(owner) for name, owner in details["caches"].items()}
    said = {name: inputs.get(name) for name, b in bound.items() if b.role == "input"} | owned
    said |= {details["results"].get(b.name, b.name): b for b in signature.results}
    wrong = sorted(name for name in {*bound, *said} if not _agree(bound.get(name), said.get(name), inputs.get(name)))
    wrong += sorted({b.name for b in signature.results} - details["results"].keys())
    wrong += sorted(details["results"].keys() - {b.name for b in signature.results} - caches.keys())
    open_ended = {name for name, b in inputs.items() if any(isinstance(size, str) for size in b.shape)}
    if not details["profiles"] or not all(_is_profile(profile, open_ended) for profile in details["profiles"]):
        wrong.append("profiles")
    if wrong:
        raise ArtifactError(f"the manifest of an engine does not agree with itself about {', '.join(wrong)}")


def check_engine(engine: Any, details: Mapping[str, Any], signature: Signature) -> None:
    """Compare an engine with what is said of it. Raises ArtifactError if it is another; says where."""
    named = engine.name.startswith(NAME_PREFIX)  # a runtime may keep no names
    if named and engine.name != engine_name(signature, details["results"], details["caches"]):
        raise ArtifactError("the engine was built with other bindings than its manifest has; export again")
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    own = {
        name: (
            engine.get_tensor_mode(name).name.lower(),
            engine.get_tensor_dtype(name).name.lower(),
            list(engine.get_tensor_shape(name)),
        )
        for name in names
    }
    said = {b["name"]: (b["direction"], b["dtype"], b["shape"]) for b in details["bindings"]}
    if own != said:
        differing = ", ".join(sorted(name for name in own.keys() | said if own.get(name) != said.get(name)))
        raise ArtifactError(f"the engine has other bindings than its manifest says: {differing}; export again")


def _is_profile(profile: Mapping[str, list[list[int]]], names: set[str]) -> bool:
    """Whether this is the least, usual and largest shape of each of some inputs."""
    return profile.keys() == names and all(
        len(shapes) == 3 and len({len(shape) for shape in shapes}) == 1 for shapes in profile.values()
    )


def _binding(entry: Mapping[str, Any]) -> Binding:
    """A tensor of an engine, as `write` describes it; its role is its direction."""
    shape, dtype = entry.get("shape"), _DTYPES.get(str(entry.get("dtype")))
    if not isinstance(entry.get("name"), str) or dtype is None or not fits(shape, list[int]):
        raise ArtifactError(f"{entry} in the manifest is no tensor of an engine")
    if entry.get("direction") not in ("input", "output"):
        raise ArtifactError(f"{entry} in the manifest is neither an input nor an output")
    return Binding(entry["name"], tuple(shape or ()), dtype, entry["direction"])


def _agree(bound: Binding | None, said: Binding | None, given: Binding | None) -> bool:
    """Whether a tensor is what the signature says of it; a result may be one of the inputs that are given."""
    bound = bound or given
    if bound is None or said is None or bound.dtype != said.dtype or len(bound.shape) != len(said.shape):
        return False
    return all(
        a == b or (isinstance(b, str) and (a == -1 or isinstance(a, str)))
        for a, b in zip(bound.shape, said.shape, strict=True)
    )


@dataclass(frozen=True)
class Loaded:
    """An engine, and what must live as long as it does: the runtime's Python module, its log, the runtime."""

    trt: Any
    log: Any
    runtime: Any
    engine: Any


class EngineStep:
    """A step that an engine runs, in place on the KV caches, on torch's current stream.

    Each set of captured sizes has an execution context of its own, since a CUDA graph holds on to the context it was
    captured from; all other sizes share one for each profile. All contexts share their scratch memory: steps run one
    after the other. So threads may call it at once, if all of them use the same stream.

    Args:
        loaded: the engine.
        details: what `write` returned.
        input_names: inputs of the step, in order.
        device: where the engine is.
    """

    def __init__(
        self, loaded: Loaded, details: dict[str, Any], input_names: Sequence[str], device: torch.device
    ) -> None:
        self._loaded, self._device = loaded, device
        self._names = tuple(input_names)
        self._profiles = details["profiles"]
        named = self._profiles[0].keys()
        self._captured = {tuple(sorted((n, s) for n, s in b.items() if n in named)) for b in details["buckets"]}
        self._caches: dict[str, str] = details["caches"]
        self._results: dict[str, str] = {
            name: tensor for name, tensor in details["results"].items() if tensor not in self._caches
        }
        outputs = [binding for binding in details["bindings"] if binding["direction"] == "output"]
        self._outputs = {b["name"]: (b["shape"], _DTYPES[b["dtype"]]) for b in outputs if b["name"] not in self._caches}
        self._contexts: dict[object, Any] = {}
        self._lock = threading.Lock()
        self._scratch = torch.empty(max(1, loaded.engine.device_memory_size_v2), dtype=torch.uint8, device=device)
        # An address has to be given for a tensor of no elements, too.
        self._nothing = torch.empty(256, dtype=torch.uint8, device=device)

    def __call__(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Inputs in order; results by name, without the caches.

        Raises:
            CapacityError: the engine was not built for steps of such sizes.
            ArtifactError: TensorRT refuses the call; says why.
        """
        with self._lock:
            return self._run(dict(zip(self._names, inputs, strict=True)))

    def _run(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        context = self._context(given)
        for name in self._profiles[0]:
            self._check(context.set_input_shape(name, tuple(given[name].shape)), name)
        outputs = {
            # -1 stands for a size that depends on those of the inputs, as in the results of a verify-only graph.
            name: torch.empty(
                tuple(context.get_tensor_shape(name)) if -1 in shape else shape, dtype=dtype, device=self._device
            )
            for name, (shape, dtype) in self._outputs.items()
        }
        caches = {name: given[cache] for name, cache in self._caches.items()}
        for name, tensor in {**given, **outputs, **caches}.items():
            self._check(context.set_tensor_address(name, tensor.data_ptr() or self._nothing.data_ptr()), name)
        self._check(context.execute_async_v3(torch.cuda.current_stream(self._device).cuda_stream), "the step")
        held = {**given, **outputs}
        return {name: held[tensor] for name, tensor in self._results.items()}

    def _context(self, given: dict[str, Tensor]) -> Any:
        """The execution context for the sizes of the inputs."""
        shapes = {name: tuple(given[name].shape) for name in self._profiles[0]}
        index = choose(self._profiles, shapes)
        if index is None:
            most = {name: most for name, (_, _, most) in self._profiles[-1].items()}
            raise CapacityError(f"the engine was built for shapes up to {most}; this step has {shapes}")
        sizes = tuple(sorted((name, shape[0]) for name, shape in shapes.items()))
        is_captured = sizes in self._captured
        key = sizes if is_captured else index
        if key not in self._contexts:
            self._contexts[key] = self._new_context(index, is_captured=is_captured)
        return self._contexts[key]

    def _new_context(self, index: int, *, is_captured: bool) -> Any:
        config = self._loaded.engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(
            self._loaded.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        if is_captured and hasattr(config, "dynamic_shapes_kernel_specialization_strategy"):  # TensorRT-RTX
            # A capture has to hold the kernels for its sizes, not those that stand in until they are compiled.
            strategies = self._loaded.trt.DynamicShapesKernelSpecializationStrategy
            config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
        context = self._loaded.engine.create_execution_context(config)
        if context is None:
            raise ArtifactError(f"TensorRT makes no execution context: {self._loaded.log.explain()}")
        context.set_device_memory(self._scratch.data_ptr(), self._scratch.numel())
        stream = torch.cuda.current_stream(self._device)
        self._check(context.set_optimization_profile_async(index, stream.cuda_stream), f"profile {index}")
        stream.synchronize()
        return context

    def _check(self, is_done: bool, what: str) -> None:
        if not is_done:
            raise ArtifactError(f"TensorRT refuses {what}: {self._loaded.log.explain()}")
