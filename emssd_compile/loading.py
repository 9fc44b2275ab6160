"""`load(folder)`: from an exported artifact to the same `generate`."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch

from emssd_compile.decoder import Decoder
from emssd_compile.errors import ArtifactError
from emssd_compile.export import find_target
from emssd_compile.export.manifest import Manifest
from emssd_compile.export.opening import open_artifact
from emssd_compile.layouts import LAYOUTS
from emssd_compile.lowering import StepFunction
from emssd_compile.report import Explanation
from emssd_compile.runtime.assembly import assemble, make_variant
from emssd_compile.runtime.buckets import StepSizes
from emssd_compile.step.options import RowOption
from emssd_compile.step.probe import ReadingSpec


def load(folder: str | Path, device: str | torch.device | None = None, *, target: str | None = None) -> LoadedModel:
    """Load an artifact that `export_onnx`, `export_tensorrt` or `export_aot` wrote; the model is not needed.

    An AOTInductor artifact is native code, and so is what a TensorRT engine becomes: whoever wrote it can do on this
    machine what you can. The hashes show damage, they are no signature. Load only what you trust, and where you expect
    data alone say so: `load(folder, target="onnx")` opens nothing else.

    Args:
        folder: the artifact.
        device: where it is to run; default: the kind of device that it was exported on.
        target: what it must be for, `"onnx"`, `"aot"` or `"tensorrt"`; default: whatever it is for.

    Raises:
        ArtifactError: it is damaged, incomplete, for another target, or was made for something other than what is
            loading it.
        OptionError: there is no such device or target, or the artifact's target does not run on such a device.
        CapacityError: its KV caches do not fit into memory.
    """
    return LoadedModel(*open_artifact(folder, device, target=target, kind="step"))


class LoadedModel(Decoder):
    """An exported model. Made by `load`.

    Attributes:
        manifest: what is known of it.
        stats: what decoding did since `stats.reset()`.
        generation_config, device, dtype: those of the model when it was exported.
    """

    def __init__(self, manifest: Manifest, device: torch.device, step: StepFunction) -> None:
        self.manifest = manifest
        self._generation_config = SimpleNamespace(**manifest.generation_config)
        super().__init__(
            assemble(
                make_variant(step, manifest.signature, deterministic=manifest.deterministic),
                device,
                LAYOUTS[manifest.layout],
                prefill_chunk=manifest.chunk,
                deterministic=manifest.deterministic,
                buckets=tuple(StepSizes(*b) for b in manifest.buckets)
                if find_target(manifest.target).is_captured
                else (),
            ),
            guarantee=manifest.guarantee,
        )

    @property
    def row_options(self) -> dict[str, RowOption]:
        """What each request may set for the parts of the step, by the keyword of `generate`."""
        bindings = self.manifest.signature.with_role("option").items()
        return {name.removeprefix("option_"): b.option for name, b in bindings if b.option is not None}

    @property
    def readings(self) -> dict[str, ReadingSpec]:
        """What probes may tell of each token, by the names of results."""
        return self.manifest.signature.readings

    @property
    def generation_config(self) -> SimpleNamespace:
        """The defaults that the model had for the options of `generate`."""
        return self._generation_config

    @property
    def dtype(self) -> torch.dtype:
        """Element type of the weights."""
        dtype: torch.dtype = getattr(torch, self.manifest.dtype)
        return dtype

    def explain(self) -> Explanation:
        """What each pass did when the artifact was made; prints as tables. Raises ArtifactError if it says nothing."""
        try:
            explanation = Explanation.from_dict(self.manifest.explanation)
            str(explanation)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(f"the manifest's explanation cannot be read: {error!r}; export again") from error
        return explanation
