"""Run an exported model with ONNX Runtime, in the memory of torch's tensors."""

from __future__ import annotations

import re
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from emssd_compile.errors import ArtifactError, InvalidInputError
from emssd_compile.export.folder import Files
from emssd_compile.export.installed import load_library
from emssd_compile.export.onnx.model import FILE
from emssd_compile.export.schema import KEY, differences, text
from emssd_compile.export.tokenizer import is_of_tokenizer
from emssd_compile.step.signature import Signature

if TYPE_CHECKING:
    import onnxruntime  # type: ignore[import-untyped]

_ELEMENT_TYPES = {  # `TensorProto.DataType` of ONNX
    torch.float32: 1,
    torch.uint8: 2,
    torch.int8: 3,
    torch.int32: 6,
    torch.int64: 7,
    torch.bool: 9,
    torch.float16: 10,
    torch.float64: 11,
    torch.bfloat16: 16,
}
_DTYPES = {  # as a session names them
    "tensor(float)": torch.float32,
    "tensor(uint8)": torch.uint8,
    "tensor(int8)": torch.int8,
    "tensor(int32)": torch.int32,
    "tensor(int64)": torch.int64,
    "tensor(bool)": torch.bool,
    "tensor(float16)": torch.float16,
    "tensor(double)": torch.float64,
    "tensor(bfloat16)": torch.bfloat16,
}
_OLDEST = (1, 27)  # those before apply softcap behind the mask, and so see what is masked (onnx/onnx#7867)
_EXTRAS = {"cpu": "onnx", "cuda": "onnx-gpu"}
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class OnnxStep:
    """A step that ONNX Runtime runs. Nothing is copied: it reads and writes the tensors where they lie.

    A KV cache and its results are bound to the same memory. A scatter that updates it finds its input where its output
    is to be, and leaves what it does not write alone.

    Threads may call it at once: each waits for the others, since what is bound is bound for all.

    Args:
        session: holds the model, whose bindings are those of the signature.
        signature: its inputs in the order of the call, and its results, each bound as `new_<name>`.
        in_place: the cache to whose memory each other output of the model is bound, by its name without `new_`.
        device: where the tensors are.
    """

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        signature: Signature,
        in_place: Mapping[str, str],
        device: torch.device,
    ) -> None:
        self.session = session
        self._binding = session.io_binding()
        self._names = tuple(binding.name for binding in signature.inputs)
        self._in_place = dict(in_place)
        # Where each size that may differ is found: an input, and its dimension.
        places = {size: (b.name, dim) for b in reversed(signature.inputs) for dim, size in enumerate(b.shape)}
        self._results = {
            b.name: ([size if isinstance(size, int) else places[size] for size in b.shape], b.dtype)
            for b in signature.results
        }
        self._device = device
        self._nothing = torch.empty(1, dtype=torch.uint8, device=device)
        self._used = {value.name for value in session.get_inputs()}
        self._bound: dict[str, tuple[int, torch.Size]] = {}
        self._lock = threading.Lock()

    def __call__(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Inputs in the order of the signature; results by name. Raises InvalidInputError if one is not contiguous."""
        given = dict(zip(self._names, inputs, strict=True))
        for name, value in given.items():
            if not value.is_contiguous():
                raise InvalidInputError(f"{name} is not contiguous")
        results = {}
        for name, (shape, dtype) in self._results.items():
            sizes = [size if isinstance(size, int) else given[size[0]].shape[size[1]] for size in shape]
            results[name] = torch.empty(sizes, dtype=dtype, device=self._device)
        outputs = results | {name: given[cache] for name, cache in self._in_place.items()}
        if self._device.type == "cuda":  # the session has a stream of its own, and ends by waiting for it
            torch.cuda.current_stream(self._device).synchronize()
        with self._lock:
            for name in self._used:
                self._bind(self._binding.bind_input, name, given[name])
            for name, value in outputs.items():
                self._bind(self._binding.bind_output, f"new_{name}", value)
            self.session.run_with_iobinding(self._binding)
        return results

    def _bind(self, bind: Any, name: str, value: Tensor) -> None:
        """Give the session the memory of `value`, unless that is what it has."""
        where = (value.data_ptr(), value.shape)
        if self._bound.get(name) != where:
            kind, index = self._device.type, self._device.index or 0
            # A tensor of no elements has no address, and the session wants one.
            address = value.data_ptr() or self._nothing.data_ptr()
            bind(name, kind, index, _ELEMENT_TYPES[value.dtype], list(value.shape), address)
            self._bound[name] = where


def load_runtime(device: torch.device) -> tuple[Any, str]:
    """ONNX Runtime, and what it calls its support for a device. Of its packages, any that is installed will do.

    Raises:
        ArtifactError: it is not installed, too old, or has no support for the device.
    """
    extra, provider = _EXTRAS[device.type], _PROVIDERS[device.type]
    onnxruntime = load_library("onnxruntime", extra=extra)
    if tuple(map(int, onnxruntime.__version__.split(".")[:2])) < _OLDEST:
        needed = ".".join(map(str, _OLDEST))
        raise ArtifactError(
            f"onnxruntime {onnxruntime.__version__} computes attention otherwise than ONNX has come to define it; "
            f'{needed} or newer is needed: pip install --upgrade "emssd_compile[{extra}]"'
        )
    if provider not in onnxruntime.get_available_providers():
        raise ArtifactError(
            f"this onnxruntime has no {provider}: pip uninstall onnxruntime, then pip install onnxruntime-gpu "
            f'(or "emssd_compile[{extra}]")'
        )
    return onnxruntime, provider


def open_session(files: Files, details: Mapping[str, Any], signature: Signature, device: torch.device) -> OnnxStep:
    """Load a model that `write_model` wrote; see there for `details`.

    Raises:
        ArtifactError: as `load_runtime`, or it cannot run the model, or the model has other bindings than it should.
    """
    onnxruntime, provider = load_runtime(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = torch.get_num_threads()
    # Threads that wait by spinning would take the cores from torch and the host's loop between two steps.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3
    chosen = [(provider, {"device_id": str(device.index)})] if device.type == "cuda" else []
    model = files.read(FILE)
    weights = {name: files.map(name) for name in files.names if name != FILE and not is_of_tokenizer(name)}
    options.add_external_initializers_from_files_in_memory(
        [*weights], [*weights.values()], [*map(len, weights.values())]
    )
    try:
        with tempfile.TemporaryDirectory() as nowhere:  # a file that the model names and the manifest does not
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", nowhere)
            session = onnxruntime.InferenceSession(model, options, providers=[*chosen, _PROVIDERS["cpu"]])
    except Exception as error:  # onnxruntime's errors have no base of their own
        raise ArtifactError(
            f"onnxruntime {onnxruntime.__version__} cannot run {files.folder / FILE}: {error}"
        ) from error
    if provider not in session.get_providers():  # it goes on without one whose libraries it cannot load
        raise ArtifactError(f"onnxruntime {onnxruntime.__version__} cannot start its {provider}; check CUDA and cuDNN")
    _check(files.folder / FILE, session, details["in_place"], signature)
    return OnnxStep(session, signature, details["in_place"], device)


def _check(model: Path, session: Any, in_place: Mapping[str, str], signature: Signature) -> None:
    """Raises ArtifactError unless a model is what its manifest says: anyone may have written both."""
    if session.get_modelmeta().custom_metadata_map.get(KEY) != text(signature):
        raise ArtifactError(f"{model} was written with other bindings than its manifest has; export again")
    caches = signature.with_role("cache")
    wrong = [name for name, cache in in_place.items() if not _is_of(name, cache) or cache not in caches]
    missing = sorted(caches.keys() - set(in_place.values()))
    if wrong or missing:
        raise ArtifactError(
            f"{model}: in_place of its manifest is wrong for {', '.join(wrong + missing)}; export again"
        )
    written = [replace(caches[cache], name=name) for name, cache in in_place.items()]
    results = [replace(b, name=f"new_{b.name}") for b in (*signature.results, *written)]
    inputs, outputs = (
        {v.name: (_DTYPES.get(v.type), [size if isinstance(size, int) else None for size in v.shape]) for v in values}
        for values in (session.get_inputs(), session.get_outputs())
    )
    used = [binding for binding in signature.inputs if binding.name in inputs]
    difference = differences("inputs", used, inputs) or differences("results", results, outputs)
    if difference:
        raise ArtifactError(f"{model} is not what its manifest says: {difference}; export again")


def _is_of(result: str, cache: str) -> bool:
    """Whether this is a name of the value of a cache after it was written, as `write_model` gives them."""
    return result == cache or re.fullmatch(re.escape(cache) + r"_write_\d+", result) is not None
