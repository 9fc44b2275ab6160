"""Each level's verifier lets a good graph pass and catches a broken one."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from emssd_compile import passes
from emssd_compile.acceptance import GreedyMatch
from emssd_compile.capture import capture
from emssd_compile.drafters import NoDrafter
from emssd_compile.errors import UnsupportedModelError
from emssd_compile.ops import append_kv, attention, ragged_attention
from emssd_compile.passes.fuse_step import FuseStep
from emssd_compile.passes.graph import aten, call, inputs, output, placeholder, results
from emssd_compile.passes.levels import verify_canonical, verify_captured, verify_unpadded
from emssd_compile.policies import AllDrafts
from tests.passes.graphs import BATCH, canonical, model_with_attention, returned, unpadded


def _first(graph_module: fx.GraphModule, target: object) -> fx.Node:
    return next(n for n in graph_module.graph.nodes if n.target == target)


def _submodule_call(graph_module: fx.GraphModule) -> None:
    graph_module.add_module("extra", nn.Identity())
    with graph_module.graph.inserting_before(output(graph_module.graph)):
        graph_module.graph.call_module("extra", (_first(graph_module, aten.linear.default),))


def _another_input_first(graph_module: fx.GraphModule) -> None:
    with graph_module.graph.inserting_before(placeholder(graph_module.graph, "input_ids")):
        graph_module.graph.placeholder("attention_mask")


def _fixed_length(graph_module: fx.GraphModule) -> None:
    ids = placeholder(graph_module.graph, "input_ids")
    ids.meta["val"] = torch.empty(1, 11, dtype=torch.int64)


CAPTURED = {
    "a submodule": (_submodule_call, "a call that is not an op"),
    "another input": (
        _another_input_first,
        r"inputs are \['attention_mask', .*begins with \['input_ids', 'positions'\]",
    ),
    "a fixed length": (_fixed_length, "the number of tokens is fixed"),
}


@pytest.mark.parametrize(("break_it", "reason"), CAPTURED.values(), ids=CAPTURED)
def test_l0(break_it, reason):
    graph_module = capture(model_with_attention())
    verify_captured(graph_module)
    break_it(graph_module)
    with pytest.raises(UnsupportedModelError, match=reason):
        verify_captured(graph_module)


RANDOM = {
    "dropout": (lambda x: functional.dropout(x, 0.1, training=True), "aten.dropout"),
    "noise": (lambda x: x + torch.rand_like(x), "rand_like"),
    "a table of noise": (lambda x: x + torch.randn(x.shape[-1]), "randn"),
    "noise written in place": (lambda x: x + torch.empty_like(x).exponential_(), "exponential"),
    "an order": (lambda x: x[..., torch.randperm(x.shape[-1])], "randperm"),
    "rrelu": (lambda x: functional.rrelu(x, training=True), "rrelu"),
    "attention": (lambda x: functional.scaled_dot_product_attention(x, x, x, dropout_p=0.5), "scaled_dot_product"),
}


class _Then(nn.Module):
    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(x)


def _with(change: Callable[[Tensor], Tensor]) -> nn.Module:
    return nn.Sequential(nn.Embedding(20, 8), _Then(change), nn.Linear(8, 20)).eval()


@pytest.mark.parametrize(("draw", "op"), RANDOM.values(), ids=RANDOM)
def test_a_forward_that_draws_is_refused_by_the_op_and_its_module(draw, op):
    with pytest.raises(UnsupportedModelError, match="draws random numbers") as caught:
        verify_captured(capture(_with(draw)))
    assert op in str(caught.value.op)
    assert caught.value.module == "1 (_Then)"


@pytest.mark.parametrize(
    "change",
    [
        lambda x: functional.dropout(x, 0.1, training=False),
        lambda x: functional.rrelu(x),
        lambda x: functional.scaled_dot_product_attention(x, x, x),
    ],
    ids=["dropout", "rrelu", "attention"],
)
def test_an_op_that_could_draw_and_does_not_is_taken(change):
    verify_captured(capture(_with(change)))


def _replace(graph_module: fx.GraphModule, node: fx.Node, target: object, *args: object) -> None:
    with graph_module.graph.inserting_after(node):
        new = call(graph_module.graph, target, node, *args)  # type: ignore[arg-type]
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    graph_module.recompile()


def _tokens_against_tokens(graph_module: fx.GraphModule) -> None:
    site = _first(graph_module, attention)
    with graph_module.graph.inserting_before(site):
        call(
            graph_module.graph,
            aten.matmul.default,
            site.args[0],
            call(graph_module.graph, aten.transpose.int, site.args[0], 2, 3),
        )


def _reversed_tokens(graph_module: fx.GraphModule) -> None:
    _replace(graph_module, _first(graph_module, aten.embedding.default), aten.flip.default, [1])


def _running_sum(graph_module: fx.GraphModule) -> None:
    _replace(graph_module, _first(graph_module, aten.embedding.default), aten.cumsum.default, 1)


def _cut_by_values(graph_module: fx.GraphModule) -> None:
    ids = placeholder(graph_module.graph, "input_ids")
    with graph_module.graph.inserting_before(output(graph_module.graph)):
        call(graph_module.graph, aten.nonzero.default, ids)


CANONICAL = {
    "a shape of values": (_cut_by_values, "the shape of a tensor depends on values"),
    "T x T left": (_tokens_against_tokens, "a relation of tokens to tokens is left"),
    "tokens reversed": (_reversed_tokens, "it works along the token dimension"),
    "a running sum over tokens": (_running_sum, "it works along the token dimension"),
}


@pytest.mark.parametrize(("break_it", "reason"), CANONICAL.values(), ids=CANONICAL)
def test_l1(break_it, reason):
    graph_module, _ = canonical(model_with_attention())
    verify_canonical(graph_module)
    break_it(graph_module)
    with pytest.raises(UnsupportedModelError, match=reason) as caught:
        verify_canonical(graph_module)
    assert caught.value.node in {n.name for n in graph_module.graph.nodes}


def _append_removed(graph_module: fx.GraphModule) -> None:
    graph_module.graph.erase_node(_first(graph_module, append_kv))


def _append_after_attention(graph_module: fx.GraphModule) -> None:
    _first(graph_module, ragged_attention).append(_first(graph_module, append_kv))


def _caches_swapped(graph_module: fx.GraphModule) -> None:
    site = _first(graph_module, ragged_attention)
    site.args = (site.args[0], site.args[2], site.args[1], *site.args[3:])


def _cache_of_another_layer(graph_module: fx.GraphModule) -> None:
    first, second = (n for n in graph_module.graph.nodes if n.target == ragged_attention)
    second.args = (second.args[0], *first.args[1:3], *second.args[3:])


def _no_cache(graph_module: fx.GraphModule) -> None:
    site = _first(graph_module, ragged_attention)
    with graph_module.graph.inserting_after(site):
        graph_module.graph.call_function(attention, (site, site, site), {"scale": 1.0})


def _one_result(graph_module: fx.GraphModule) -> None:
    result = output(graph_module.graph)
    result.args = (results(graph_module.graph)[0],)


UNPADDED = {
    "no append": (_append_removed, "reads a KV cache before this step's tokens are written"),
    "append too late": (_append_after_attention, "reads a KV cache before this step's tokens are written"),
    "keys taken for values": (_caches_swapped, "reads a KV cache before this step's tokens are written"),
    "the cache of another layer": (_cache_of_another_layer, "reads a KV cache before this step's tokens are written"),
    "attention without cache": (_no_cache, "an attention has no KV cache"),
    "no hidden states": (_one_result, "must return hidden states and logits"),
}


class _TwoLayers(nn.Module):
    """A model with two attentions."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = model_with_attention()

    def forward(self, input_ids: Tensor) -> Tensor:
        model = self.inner
        hidden = model.embed(input_ids)
        for _ in range(2):
            q = model.q(hidden).unflatten(-1, (4, -1)).transpose(1, 2)
            mixed = nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
            hidden = hidden + mixed.transpose(1, 2).flatten(2)
        return model.lm_head(hidden)


@pytest.mark.parametrize(("break_it", "reason"), UNPADDED.values(), ids=UNPADDED)
def test_l2(break_it, reason):
    graph_module, _ = unpadded(_TwoLayers().eval())
    verify_unpadded(graph_module)
    break_it(graph_module)
    with pytest.raises(UnsupportedModelError, match=reason):
        verify_unpadded(graph_module)


def _read_to_the_host(step: fx.GraphModule) -> None:
    known = next(n for n in inputs(step.graph) if n.target == "known")
    with step.graph.inserting_before(output(step.graph)):
        step.graph.call_function(aten._local_scalar_dense.default, (known,))


def _state_forgotten(step: fx.GraphModule) -> None:
    result = output(step.graph)
    result.args = ({name: node for name, node in returned(step).items() if name != "lengths"},)


STEP = {
    "host read": (_read_to_the_host, "reads a value back to the host"),
    "state that does not come out": (_state_forgotten, "the step must return at least"),
}


@pytest.mark.parametrize(("break_it", "reason"), STEP.values(), ids=STEP)
def test_l3(break_it, reason):
    graph_module, manager = unpadded(model_with_attention())
    level = passes.step(FuseStep(BATCH, GreedyMatch(), NoDrafter(), AllDrafts(), manager.fake_mode))
    step = manager.apply(graph_module, (level,))
    level.verify(step)
    break_it(step)
    with pytest.raises(UnsupportedModelError, match=reason):
        level.verify(step)
