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
from emssd_compile.runtime.assembly import assemble
from emssd_compile.runtime.buckets import StepSizes


def load(folder: str | Path, device: str | torch.device | None = None) -> LoadedModel:
    """Load an artifact that `export_onnx`, `export_tensorrt` or `export_aot` wrote; the model is not needed.

    Args:
        folder: the artifact.
        device: where it is to run; default: the kind of device that it was exported on.

    Raises:
        ArtifactError: it is damaged, incomplete, or was made for something other than what is loading it.
        OptionError: there is no such device, or its target does not run on one.
        CapacityError: its KV caches do not fit into memory.
    """
    manifest, where, step = open_artifact(folder, device)
    if manifest.kind != "step":
        raise ArtifactError(
            f"{folder} holds a verify-only graph, which does not decode by itself; open it with "
            "emssd_compile.export.open_graph"
        )
    return LoadedModel(manifest, where, step)


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
                step,
                manifest.signature,
                device,
                LAYOUTS[manifest.layout],
                prefill_chunk=manifest.chunk,
                deterministic=manifest.deterministic,
                buckets=tuple(StepSizes(*b) for b in manifest.buckets)
                if find_target(manifest.target).is_captured
                else (),
            ),
            lossless=manifest.lossless,
        )

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
        """What each pass did when the artifact was made; prints as tables."""
        return Explanation.from_dict(self.manifest.explanation)
