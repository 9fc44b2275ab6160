"""Run an exported model with ONNX Runtime, in the memory of torch's tensors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from emssd_compile.errors import ArtifactError, InvalidInputError
from emssd_compile.export.installed import load_library
from emssd_compile.export.onnx.model import FILE

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
_OLDEST = (1, 27)  # those before apply softcap behind the mask, and so see what is masked (onnx/onnx#7867)
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class OnnxStep:
    """A step that ONNX Runtime runs. Nothing is copied: it reads and writes the tensors where they lie.

    A KV cache and its results are bound to the same memory. A scatter that updates it finds its input where its output
    is to be, and leaves what it does not write alone.

    Args:
        session: holds the model.
        input_names: the model's inputs in the order of the call.
        details: what `write_model` returned.
        device: where the tensors are.
    """

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        input_names: list[str],
        details: dict[str, Any],
        device: torch.device,
    ) -> None:
        self.session = session
        self._binding = session.io_binding()
        self._names = tuple(input_names)
        self._outputs: dict[str, str] = details["outputs"]
        self._in_place: dict[str, str] = details["in_place"]
        self._results = {
            name: (result["shape"], getattr(torch, result["dtype"])) for name, result in details["results"].items()
        }
        self._device = device
        self._nothing = torch.empty(1, dtype=torch.uint8, device=device)
        self._used = {value.name for value in session.get_inputs()}
        self._bound: dict[str, tuple[int, torch.Size]] = {}

    def __call__(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Inputs in the order of `input_names`; results by name. Raises InvalidInputError if one is not contiguous."""
        given = dict(zip(self._names, inputs, strict=True))
        for name, value in given.items():
            if not value.is_contiguous():
                raise InvalidInputError(f"{name} is not contiguous")
            if name in self._used:
                self._bind(self._binding.bind_input, name, value)
        for name, cache in self._in_place.items():
            self._bind(self._binding.bind_output, self._outputs[name], given[cache])
        results = {}
        for name, (shape, dtype) in self._results.items():
            sizes = [size if isinstance(size, int) else given[size[0]].shape[size[1]] for size in shape]
            results[name] = torch.empty(sizes, dtype=dtype, device=self._device)
            self._bind(self._binding.bind_output, self._outputs[name], results[name])
        if self._device.type == "cuda":  # the session has a stream of its own, and ends by waiting for it
            torch.cuda.current_stream(self._device).synchronize()
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
    """ONNX Runtime, and what it calls its support for a device.

    Raises:
        ArtifactError: it is not installed, too old, or has no support for the device.
    """
    onnxruntime, provider = load_library("onnxruntime", extra="onnx"), _PROVIDERS[device.type]
    if tuple(map(int, onnxruntime.__version__.split(".")[:2])) < _OLDEST:
        needed = ".".join(map(str, _OLDEST))
        raise ArtifactError(
            f"onnxruntime {onnxruntime.__version__} computes attention otherwise than ONNX has come to define it; "
            f'{needed} or newer is needed: pip install --upgrade "emssd_compile[onnx]"'
        )
    if provider not in onnxruntime.get_available_providers():
        raise ArtifactError(f"this onnxruntime has no {provider}: pip install onnxruntime-gpu in place of onnxruntime")
    return onnxruntime, provider


def open_session(folder: Path, details: dict[str, Any], input_names: list[str], device: torch.device) -> OnnxStep:
    """Load a model that `write_model` wrote; see there for `details`.

    Raises:
        ArtifactError: as `load_runtime`, or it cannot run the model.
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
    try:
        session = onnxruntime.InferenceSession(folder / FILE, options, providers=[*chosen, _PROVIDERS["cpu"]])
    except Exception as error:  # onnxruntime's errors have no base of their own
        raise ArtifactError(f"onnxruntime {onnxruntime.__version__} cannot run {folder / FILE}: {error}") from error
    if provider not in session.get_providers():  # it goes on without one whose libraries it cannot load
        raise ArtifactError(f"onnxruntime {onnxruntime.__version__} cannot start its {provider}; check CUDA and cuDNN")
    return OnnxStep(session, input_names, details, device)
