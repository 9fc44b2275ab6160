"""`network`: what the parser made and what was put in its gaps are one network."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from emssd_compile.errors import UnsupportedModelError
from emssd_compile.export.tensorrt.build import define
from emssd_compile.export.tensorrt.cut import cut
from emssd_compile.export.tensorrt.library import load_runtime, make_log
from emssd_compile.export.tensorrt.network import parse, write_onnx
from emssd_compile.passes.graph import aten, call, inputs
from tests.export.tensorrt.steps import tiled_step


@pytest.fixture(scope="module")
def trt():
    return load_runtime("tensorrt-rtx")


@pytest.fixture(scope="module")
def defined(trt, tmp_path_factory):
    """The tiny step, its parts, and its network with what keeps it alive."""
    step = tiled_step()
    parts = cut(step)
    return step, parts, *define(trt, parts, tmp_path_factory.mktemp("scratch"))


def _layers(network, kind):
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    return [layer for layer in layers if layer.type.name == kind]


def _operands(layer):
    return [layer.get_input(index) for index in range(layer.num_inputs)]


def test_inputs_and_outputs_are_the_steps(defined):
    step, parts, network, *_ = defined
    given = [network.get_input(index) for index in range(network.num_inputs)]
    assert [tensor.name for tensor in given] == [node.target for node in inputs(step.graph)]
    assert not any(tensor.is_shape_tensor for tensor in given), "no size is computed from values on the host"
    made = {network.get_output(index).name for index in range(network.num_outputs)}
    assert made == set(parts.results.values()) == {f"new_{name}" for name in parts.results}


def test_caches_are_updated_from_input_to_output(defined, trt):
    *_, network, _, _ = defined
    layers = _layers(network, "KV_CACHE_UPDATE")
    assert len(layers) == 2
    for layer, name in zip(layers, ("k_cache_0", "v_cache_0"), strict=True):
        cache, new, starts, ends = _operands(layer)
        assert (cache.name, layer.get_output(0).name) == (name, f"new_{name}")
        assert cache.is_network_input
        assert layer.get_output(0).is_network_output
        assert tuple(new.shape)[1:] == (2, 4), "packed tokens"
        assert (starts.dtype, ends.dtype) == (trt.int32, trt.int32)
        layer.__class__ = trt.IKVCacheUpdateLayer  # the bindings' way to cast
        assert layer.update_form == trt.AttentionIOForm.PACKED_NHD
        assert layer.update_lengths.name == ends.name


def test_attention_reads_the_updated_caches_and_what_follows_reads_attention(defined, trt):
    *_, network, _, _ = defined
    ((begin,), (end,)) = _layers(network, "ATTENTION_INPUT"), _layers(network, "ATTENTION_OUTPUT")
    assert [tensor.name for tensor in _operands(begin)[1:3]] == ["new_k_cache_0", "new_v_cache_0"]
    begin.__class__ = trt.IAttentionInputLayer
    attention = begin.attention
    assert attention.causal_kind == trt.CausalMaskKind.LOWER_RIGHT
    assert not attention.decomposable
    assert attention.mask is None
    assert tuple(attention.key_value_lengths.shape) == (3,)
    result = end.get_output(0).name
    readers = [network.get_layer(i) for i in range(network.num_layers)]
    assert any(tensor is not None and tensor.name == result for layer in readers for tensor in _operands(layer))


def test_no_one_reads_a_stand_in(defined):
    _, parts, network, *_ = defined
    for index in range(network.num_layers):
        for tensor in _operands(network.get_layer(index)):
            assert tensor is None or tensor.name not in {f"stand_in_{site.result}" for site in parts.sites}


def _graph_of(op, *arguments):
    """A graph of one op, on an input of three numbers."""
    graph = fx.Graph()
    given = graph.placeholder("given")
    with FakeTensorMode():
        given.meta["val"] = torch.zeros(3, dtype=torch.int64)
    result = call(graph, op, given, *(arguments or (given,)))
    result.meta["nn_module_stack"] = {"": ("model.layers.0.odd", "Odd")}
    graph.output({"result": result})
    return fx.GraphModule({}, graph)


def test_an_op_that_the_parser_refuses_is_named(trt, tmp_path):
    log = make_log(trt)
    write_onnx(_graph_of(aten.bitwise_and.Scalar, 2), tmp_path / "odd.onnx")
    network = trt.Builder(log).create_network(0)
    with pytest.raises(UnsupportedModelError, match=r"TensorRT's parser refuses the op: .*BitwiseAnd") as caught:
        parse(trt, log, network, tmp_path / "odd.onnx")
    assert (caught.value.op, caught.value.module) == ("BitwiseAnd", "model.layers.0.odd: Odd")
    assert caught.value.node


def test_an_op_that_the_exporter_does_not_know_is_named(tmp_path):
    """As by the ONNX target, which the exporter is shared with."""
    with pytest.raises(UnsupportedModelError, match=r"ONNX's operators do not express it: .*gcd") as caught:
        write_onnx(_graph_of(aten.gcd.default), tmp_path / "odd.onnx")
    assert (caught.value.op, caught.value.module) == ("aten.gcd.default", "layers.0.odd (Odd)")
    assert caught.value.node == "gcd_default"


def test_what_the_exporter_says_of_its_own_workings_is_not_passed_on(tmp_path, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_onnx(cut(tiled_step()).graph_module, tmp_path / "step.onnx")
    assert capfd.readouterr() == ("", "")
