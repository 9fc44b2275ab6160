"""Cut the step at the ops that TensorRT has layers for and ONNX cannot say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, fx

from emssd_compile.ops import tiled_attention, update_kv
from emssd_compile.passes.graph import argument, aten, call, output
from emssd_compile.passes.splice import add_input, inline_function


@dataclass(frozen=True)
class Site:
    """A place where a layer of TensorRT goes.

    Attributes:
        op: name of the op that stood here, `"emssd.update_kv.default"` or `"emssd.tiled_attention.default"`.
        result: name of the tensor that stands for the layer's output.
        operands: names of the tensors that it reads, by their role.
    """

    op: str
    result: str
    operands: dict[str, str]


@dataclass
class Cut:
    """A step in two parts: ops that ONNX has, and sites for layers that only TensorRT has.

    Attributes:
        graph_module: the first part; its results are tensors of the network, by name.
        sites: the second part, in the order of execution.
        results: for each result of the step, the name of the network's tensor; an input's where it is passed through.
        caches: for each tensor that is to lie in the memory of a KV cache, the input that has it: results of updates,
            and inputs that the step does not have.
    """

    graph_module: fx.GraphModule
    sites: list[Site] = field(default_factory=list)
    results: dict[str, str] = field(default_factory=dict)
    caches: dict[str, str] = field(default_factory=dict)


def cut(graph_module: fx.GraphModule, *, masked: bool = False) -> Cut:
    """Replace each `update_kv` and `tiled_attention` by a stand-in, and hand out what they read and what they give.

    A stand-in has the shape and dtype of the result, so ONNX can describe all that comes after. Once ONNX's part is a
    network, what reads the stand-in is made to read the real layer. The graph that is given is not changed.

    TensorRT updates a cache that is an input, once. A draft model writes its caches several times in a step: each time
    after the first it gets an input of its own, to be bound to the same memory. They are written in order all the same:
    what one pass over the text writes is computed from what the pass before it read.

        before:  %k_1 = emssd.update_kv(%k_cache_0, %k, %row_ids, %slots, %offsets, %lengths)
                 %o = emssd.tiled_attention(%q, %k_1, %v_1, %kv_lengths, None, scale=0.125, is_causal=True)
                 return {..., k_cache_0: %k_1}
        after:   %k_1 = aten.neg(%k_cache_0);  %o = aten.neg(%q * 0.125)
                 return {..., new_k_cache_0: %k_1, tensor_0: %k, tensor_1: int32(%lengths), ..., tensor_4: %o}

    Args:
        graph_module: after `CheckTensorRTAttention` and `TileAttention`.
        masked: say by a mask what is causal, too.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(graph_module.graph, {}))
    done = Cut(fx.GraphModule(graph_module, graph, class_name=graph_module._get_name()))
    cutter = _Cutter(done, masked=masked)
    for node in list(graph.nodes):
        if node.target == update_kv:
            cutter.update(node)
        elif node.target == tiled_attention:
            cutter.attention(node)
    cutter.finish()
    return done


class _Cutter:
    """One run of `cut`: the names that tensors have got so far, and what sites share."""

    def __init__(self, done: Cut, *, masked: bool) -> None:
        self.done = done
        self.masked = masked
        self.graph = done.graph_module.graph
        self.names: dict[fx.Node, str] = {}
        self.shared: dict[object, fx.Node] = {}
        self.written: dict[fx.Node, str] = {}
        results = _results(self.graph)
        for name, node in results.items():
            if node.op != "placeholder":
                self.names.setdefault(node, f"new_{name}")

    def update(self, node: fx.Node) -> None:
        """Cut at an `update_kv`."""
        cache, new, _, _, offsets, lengths = (argument(node, index) for index in range(6))
        owner = str(cache.target) if cache.op == "placeholder" else self.written[cache]
        if cache.op != "placeholder":
            cache = add_input(self.graph, f"{owner}_{len(self.written)}", cache.meta["val"])
            self.done.caches[str(cache.target)] = owner
        with self.graph.inserting_before(node):
            starts = self._once(_to_int32, {"value": lengths})
            ends = self._once(_ends, {"offsets": offsets, "new": new}, key=(_ends, offsets))
            new = self._once(_finite, {"value": new})
            stand_in = call(self.graph, aten.neg.default, cache)
        self.written[stand_in] = owner
        result = self._replace(node, stand_in, cache=cache, new=new, starts=starts, ends=ends)
        self.done.caches[result] = owner

    def attention(self, node: fx.Node) -> None:
        """Cut at a `tiled_attention`."""
        query, k_cache, v_cache, kv_lengths = (argument(node, index) for index in range(4))
        mask, scale = node.args[4], node.kwargs["scale"]
        assert isinstance(scale, float)
        with self.graph.inserting_before(node):
            scaled = self._once(partial(_scale, scale=scale), {"q": query}, key=node)
            visible = self._once(_to_int32, {"value": kv_lengths})
            if mask is None and self.masked:
                given = {"kv_lengths": kv_lengths, "query": query, "cache": k_cache}
                mask = self._once(_causal, given, key=(_causal, kv_lengths))
            stand_in = call(self.graph, aten.neg.default, scaled)
        masks = {"mask": mask} if isinstance(mask, fx.Node) else {}
        self._replace(node, stand_in, q=scaled, k=k_cache, v=v_cache, kv_lengths=visible, **masks)

    def finish(self) -> None:
        """Hand out every named tensor, and nothing else."""
        results = _results(self.graph)
        self.done.results.update({name: self._name(node) for name, node in results.items()})
        output(self.graph).args = ({name: node for node, name in self.names.items()},)
        self.graph.eliminate_dead_code()
        self.done.graph_module.recompile()

    def _replace(self, node: fx.Node, stand_in: fx.Node, **operands: fx.Node) -> str:
        if node in self.names:
            self.names[stand_in] = self.names.pop(node)
        names = {role: self._name(operand) for role, operand in operands.items()}
        result = self._name(stand_in)
        self.done.sites.append(Site(str(node.target), result, names))
        node.replace_all_uses_with(stand_in)
        self.graph.erase_node(node)
        return result

    def _name(self, node: fx.Node) -> str:
        if node.op == "placeholder":
            return str(node.target)
        return self.names.setdefault(node, f"tensor_{len(self.names)}")

    def _once(self, function: Callable[..., Tensor], given: dict[str, fx.Node], key: object = None) -> fx.Node:
        """What a function of tensors gives, as a node; all layers share it."""
        key = key or (function, *given.values())
        if key not in self.shared:
            fake_mode = next(iter(given.values())).meta["val"].fake_mode
            traced = inline_function(self.done.graph_module, lambda tensors: function(**tensors), (given,), fake_mode)
            self.shared[key] = traced
        return self.shared[key]


def _results(graph: fx.Graph) -> dict[str, fx.Node]:
    return dict(output(graph).args[0])  # type: ignore[arg-type]


def _finite(value: Tensor) -> Tensor:
    """Zeros where `value` is not finite.

    What TensorRT's kernels do with a key or value that they mask is not said, and 0 * NaN is NaN: so none is ever in a
    cache. A request that overflows gets NaN for the token that does, and something for those behind it.
    """
    return torch.where(value.abs() < torch.inf, value, 0)


def _to_int32(value: Tensor) -> Tensor:
    """TensorRT's layers take no other lengths."""
    return value.to(torch.int32)


def _ends(offsets: Tensor, new: Tensor) -> Tensor:
    """Jagged offsets `[B + 1]` that end with T, as TensorRT demands: the inert tail goes to the last row.

    There it lies behind the row's own tokens, where `TileAttention` has left room for it, and nothing reads it.
    """
    total = torch.full((1,), new.shape[0], dtype=torch.int32, device=new.device)
    return torch.cat([offsets[:-1].to(torch.int32), total])


def _causal(kv_lengths: Tensor, query: Tensor, cache: Tensor) -> Tensor:
    """Bool `[B, 1, S, C]`: the slots that each query of a tile of right-aligned rows sees."""
    queries, slots = (torch.arange(x.shape[2], device=x.device) for x in (query, cache))
    last = kv_lengths[:, None] - query.shape[2] + queries
    return (slots <= last[:, :, None])[:, None]


def _scale(q: Tensor, scale: float) -> Tensor:
    """Queries times the scale, rounded once: TensorRT's attention has no scale of its own."""
    return (q.float() * scale).to(q.dtype)
