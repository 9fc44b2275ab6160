"""The step as a network of TensorRT: ONNX's part through the parser, the rest through the network's own interface."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import fx

from emssd_compile.errors import ArtifactError, UnsupportedModelError
from emssd_compile.export.onnx.exporter import translated
from emssd_compile.export.tensorrt.cut import Cut, Site
from emssd_compile.ops import update_kv
from emssd_compile.passes.graph import output


def write_onnx(graph_module: fx.GraphModule, path: Path) -> None:
    """Write a graph of ATen ops to an ONNX file, its weights beside it; inputs and results keep their names.

    Raises:
        UnsupportedModelError: ONNX has no operators for an op; says which.
    """
    from emssd_compile.export.tensorrt.translate import TABLE

    results = list(dict(output(graph_module.graph).args[0]))  # type: ignore[arg-type]
    translated(graph_module, results, TABLE).save(path, external_data=True)


def parse(trt: Any, log: Any, network: Any, path: Path) -> None:
    """Parse an ONNX file into an empty network.

    Raises:
        UnsupportedModelError: the parser refuses an op; names the node, the op, and the module it came from.
    """
    parser = trt.OnnxParser(network, log)
    if parser.parse_from_file(str(path)):
        return
    if not parser.num_errors:
        raise ArtifactError(f"TensorRT's parser fails: {log.explain()}")
    error = parser.get_error(0)
    raise UnsupportedModelError(
        f"TensorRT's parser refuses the op: {error.desc()}",
        node=error.node_name() or None,
        op=error.node_operator() or None,
        module=_module(path, error.node_name()),
        remedy="export to another target",
    )


def _module(path: Path, node_name: str) -> str | None:
    """The module that a node of an ONNX file came from: the exporter notes it as `path: Class/.../node: op`."""
    import onnx

    nodes = onnx.load(path, load_external_data=False).graph.node
    notes = {note.key: note.value for node in nodes if node.name == node_name for note in node.metadata_props}
    scopes = notes.get("namespace", "").split("/")[:-1]
    return scopes[-1] if scopes else None


def splice(trt: Any, log: Any, network: Any, cut: Cut) -> None:
    """Put TensorRT's layers at the sites of a parsed network; its outputs are what the step returns and writes."""
    splicer = _Splicer(trt, log, network)
    for site in cut.sites:
        splicer.add(site)
    splicer.close(list(dict.fromkeys([*cut.results.values(), *cut.caches])))


class _Splicer:
    """Adds layers to a network whose stand-ins are marked as outputs."""

    def __init__(self, trt: Any, log: Any, network: Any) -> None:
        self.trt, self.log, self.network = trt, log, network
        self.layers = [network.get_layer(index) for index in range(network.num_layers)]
        given = [network.get_input(index) for index in range(network.num_inputs)]
        self.parsed = {t.name: t for t in (network.get_output(index) for index in range(network.num_outputs))}
        self.tensors: dict[str, Any] = {**{t.name: t for t in given}, **self.parsed}
        self.spliced: dict[str, Any] = {}

    def add(self, site: Site) -> None:
        """Add the layer of a site, and make all that read its stand-in read the layer."""
        operands = {role: self.tensors[name] for role, name in site.operands.items()}
        result = self._update(**operands) if site.op == str(update_kv) else self._attention(**operands)
        for layer in self.layers:
            for index in range(layer.num_inputs):
                tensor = layer.get_input(index)
                if tensor is not None and tensor.name == site.result:
                    layer.set_input(index, result)
        self.tensors[site.result] = self.spliced[site.result] = result

    def close(self, results: list[str]) -> None:
        """Mark the tensors of these names as outputs, and no others."""
        for name, tensor in self.parsed.items():
            if name not in results or name in self.spliced:
                self.network.unmark_output(tensor)
        for name in filter(self.spliced.__contains__, results):
            self.parsed[name].name = f"stand_in_{name}"  # nothing reads it any more; names are unique
            self.spliced[name].name = name
            self.network.mark_output(self.spliced[name])

    def _update(self, cache: Any, new: Any, starts: Any, ends: Any) -> Any:
        """The cache after token t of row b was written to slot `starts[b] + t - ends[b]`, in place."""
        layer = self._made(self.network.add_kv_cache_update(cache, new, starts, self.trt.KVCacheMode.LINEAR))
        layer.name = f"update_kv_{cache.name}"
        layer.update_form = self.trt.AttentionIOForm.PACKED_NHD
        layer.update_lengths = ends
        return layer.get_output(0)

    def _attention(self, q: Any, k: Any, v: Any, kv_lengths: Any, mask: Any = None) -> Any:
        """Attention of a tile of right-aligned queries."""
        kind, softmax = self.trt.CausalMaskKind, self.trt.AttentionNormalizationOp.SOFTMAX
        causal = kind.LOWER_RIGHT if mask is None else kind.NONE
        layer = self._made(self.network.add_attention_v2(q, k, v, softmax, causal))
        layer.name = f"attention_{q.name}"
        layer.decomposable = False
        layer.key_value_lengths = kv_lengths
        if mask is not None:
            layer.mask = self._copy(mask)
        return layer.get_output(0)

    def _copy(self, mask: Any) -> Any:
        """The same mask: TensorRT-RTX names what it makes of one after it, and fails where two layers share one."""
        kind = self.trt.ElementWiseOperation
        same = kind.AND if mask.dtype == self.trt.bool else kind.MAX  # a mask with ALiBi in it is a number
        return self._made(self.network.add_elementwise(mask, mask, same)).get_output(0)

    def _made(self, layer: Any) -> Any:
        if layer is None:
            raise ArtifactError(f"TensorRT does not make a layer: {self.log.explain()}")
        return layer
