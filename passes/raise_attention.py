"""Raise every form of attention to one op."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor, fx

from emssd_compile.ops import attention
from emssd_compile.passes.attention_sites import AttentionSite, Subject, find_site
from emssd_compile.passes.graph import (
    Evaluator,
    argument,
    aten,
    call,
    data_dependent,
    inserting_for,
    refuse,
    same_size,
    shape,
    token_dims,
    token_symbol,
)
from emssd_compile.passes.mask_family import MaskFamily, ProbedAttention, UnknownMaskError, recognise
from emssd_compile.passes.sampled_evaluator import UnevaluatedError
from emssd_compile.precision import coarsest

_REPEAT = frozenset(
    {
        aten.reshape.default,
        aten.expand.default,
        aten.unsqueeze.default,
        aten.repeat.default,
        aten.repeat_interleave.self_int,
        aten.flatten.using_ints,
    }
)


class RaiseAttention:
    """Turn every form of attention into `emssd::attention`, with the mask as attributes.

    Attention is the only op that may mix tokens, so it must be found in whatever form the model wrote it
    (`attention_sites`): SDPA with a mask or `is_causal`, eager code or einsums with scaling, fp32 softmax, softcap,
    a bias or sinks, key/value heads repeated by `expand` or by `enable_gqa`. The mask is recognised by evaluating it
    (see `mask_family`), after which its arithmetic is dead.

    Args:
        longest: tokens a row can hold; masks need to be right up to there.

        before:  %m = where(%allowed[1,1,T,T], 0, -inf); %k4 = reshape(expand(unsqueeze(%k[1,2,T,8], 2), ...))
                 %o = scaled_dot_product_attention(%q[1,4,T,8], %k4[1,4,T,8], %v4[1,4,T,8], %m, scale=0.35)
        after:   %o = emssd.attention(%q[1,4,T,8], %k[1,2,T,8], %v[1,2,T,8], scale=0.35, window=0)
    """

    name = "raise_attention"

    def __init__(self, longest: int) -> None:
        self.longest = longest
        self.notes: tuple[str, ...] = ()

    def run(self, graph_module: fx.GraphModule) -> int:
        """Replace each attention; returns how many there were.

        Raises:
            UnsupportedModelError: an attention whose mask is of no known family.
        """
        subject = Subject(graph_module, data_dependent(graph_module.graph))
        known: dict[Hashable, MaskFamily] = {}
        families = [
            self._replace(graph_module, site, known)
            for node in list(graph_module.graph.nodes)
            if (site := find_site(subject, node)) is not None
        ]
        if families:
            fewest = min(family.probed for family in families)
            among = "all" if fewest == self.longest else f"{fewest} of {self.longest}, the last ones included"
            self.notes = (f"tested: masks among positions up to {self.longest} ({among})",)
        return len(families)

    def _replace(
        self, graph_module: fx.GraphModule, site: AttentionSite, known: dict[Hashable, MaskFamily]
    ) -> MaskFamily:
        graph = graph_module.graph
        result_dtype = site.result.meta["val"].dtype
        with inserting_for(site.result):
            key, value = _peel_repeats(graph_module, site.key, site.value)
        family = _family(site, self.longest, known)
        with inserting_for(site.result):
            result = call(
                graph,
                attention,
                site.query,
                key,
                value,
                scale=site.scale,
                window=family.window,
                chunk=family.chunk,
                softcap=site.softcap,
                alibi_slopes=_as_node(graph_module, f"{site.result.name}_alibi_slopes", family.alibi_slopes),
                sinks=_as_node(graph_module, f"{site.result.name}_sinks", site.sinks),
            )
            result.meta = {**site.result.meta, **result.meta}
            if result.meta["val"].dtype != result_dtype:  # queries and keys in float32, values in the model's dtype
                result = call(graph, aten._to_copy.default, result, dtype=result_dtype)
            result = site.place(graph, result)
        site.result.replace_all_uses_with(result)
        graph.erase_node(site.result)  # dead-code elimination keeps SDPA: it could have drawn random numbers
        return family


def _family(site: AttentionSite, longest: int, known: dict[Hashable, MaskFamily]) -> MaskFamily:
    """The family of a site's mask: of layers with the same one, that of the first is evaluated."""
    value = site.query.meta["val"]
    dtype = coarsest(n.meta["val"].dtype for n in (site.query, site.key, site.value, site.result))
    probed = ProbedAttention(site.probe, value.shape[1], site.scale, site.softcap, dtype, value.device)
    key = (site.probe_key, *(getattr(probed, name) for name in ("heads", "scale", "softcap", "dtype", "device")))
    try:
        if key not in known:
            known[key] = recognise(probed, longest)
        return known[key]
    except UnknownMaskError as error:
        raise refuse(site.result, f"the attention mask is not supported: {error}") from error
    except UnevaluatedError as error:
        raise refuse(
            site.result,
            f"the attention mask cannot be evaluated at the end of rows of {longest} tokens: {error}",
            remedy="pass a smaller max_length",
        ) from error
    except KeyError as error:
        raise refuse(site.result, f"the attention mask depends on token ids: {error.args[0]}") from error


def _peel_repeats(graph_module: fx.GraphModule, key: fx.Node, value: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Keys and values before their heads were repeated, if both were repeated alike."""
    peeled = _peel_repeat(graph_module, key), _peel_repeat(graph_module, value)
    for keys, values in (peeled, (key, value)):
        if _num_heads(keys) == _num_heads(values):
            return keys, values
    most = max(_num_heads(key), _num_heads(value))  # keys for every query head beside values for a group, or reversed
    return _repeated(key, most), _repeated(value, most)


def _num_heads(node: fx.Node) -> int:
    return int((shape(node) or ())[1])


def _repeated(node: fx.Node, heads: int) -> fx.Node:
    if _num_heads(node) == heads:
        return node
    return call(node.graph, aten.repeat_interleave.self_int, node, heads // _num_heads(node), 1)


def _peel_repeat(graph_module: fx.GraphModule, node: fx.Node) -> fx.Node:
    """Keys or values [1, Hkv, T, D] before their heads were repeated to [1, Hq, T, D]; `node` if they were not."""
    found, current = node, node
    symbol = token_symbol(graph_module.graph)
    heads_first = token_dims(node, symbol) == (len(shape(node) or ()) - 2,)
    while heads_first and current.target in _REPEAT and isinstance(current.args[0], fx.Node):
        current = argument(current, 0)
        if _is_repeat(graph_module, current, node):
            found = current
    return found


def _is_repeat(graph_module: fx.GraphModule, source: fx.Node, repeated: fx.Node) -> bool:
    """Whether `repeated` holds each head of `source` several times in a row, found by evaluating the nodes between."""
    a, b = shape(source), shape(repeated)
    if a is None or b is None or len(a) != 4 or len(b) != 4:
        return False
    if not (isinstance(a[1], int) and isinstance(b[1], int) and b[1] % a[1] == 0 and b[1] > a[1]):
        return False
    if not (same_size(a[0], 1) and same_size(a[2], b[2]) and same_size(a[3], b[3])):
        return False
    evaluator = Evaluator(graph_module, 3)
    size = evaluator.concrete_shape(source)
    labels = torch.arange(torch.Size(size).numel(), device=evaluator.device).reshape(size)
    evaluator.values[source] = labels
    return torch.equal(evaluator(repeated), labels.repeat_interleave(b[1] // a[1], dim=1))


def _as_node(graph_module: fx.GraphModule, name: str, value: fx.Node | Tensor | None) -> fx.Node | None:
    """A tensor as a buffer of the graph; what is a node already, or None, as it is."""
    if not isinstance(value, Tensor):
        return value
    graph_module.register_buffer(name, value, persistent=False)
    node = graph_module.graph.get_attr(name)
    fake = next(n.meta["val"] for n in graph_module.graph.nodes if "val" in n.meta)
    node.meta["val"] = fake.fake_mode.from_tensor(value, static_shapes=True)
    return node
