"""`translate`: the part of the step that goes through ONNX computes there what it does in torch."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from emssd_compile import ops
from emssd_compile.export.tensorrt.cut import cut
from emssd_compile.export.tensorrt.network import write_onnx
from emssd_compile.ops._kept_threshold import reference as kept_threshold
from emssd_compile.passes.graph import inputs, output
from emssd_compile.passes.splice import Tensors, trace
from tests.export.tensorrt.steps import example, tiled_step

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def test_onnx_computes_what_torch_does(tmp_path):
    """All but the layers of TensorRT, for which both have the stand-ins."""
    step = cut(tiled_step()).graph_module
    write_onnx(step, tmp_path / "step.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "step.onnx")
    names = [result.name for result in session.get_outputs()]
    assert [given.name for given in session.get_inputs()] == [node.target for node in inputs(step.graph)]
    for length in (1, 8):
        values = example(step, length)
        with torch.no_grad():
            expected = step(*values.values())
        found = session.run(names, {name: value.numpy() for name, value in values.items()})
        assert set(names) == set(expected)
        for name, value in zip(names, found, strict=True):
            torch.testing.assert_close(torch.as_tensor(value), expected[name], msg=name)


def test_kept_threshold_without_a_sort(tmp_path):
    """Of a vocabulary that TensorRT cannot rank; equal keys, keys of all sizes, infinite ones and NaN."""
    most = [0, 1, 5, 69, 70, 99, 0, 3, 5, 0, 2, 3, 9000, 1, 0]
    share = [1.0, 1.0, 0.5, 1.0, 0.9, 0.0, 0.99, 0.25, 0.999, 0.3, 0.7, 0.5, 1.0, 0.999, 0.9]
    keys = torch.randn(len(most), 5000) * 4
    keys[3, 7], keys[4, 1::2], keys[5, 0], keys[6], keys[7, 9] = -torch.inf, -torch.inf, 3e38, 2.0, torch.nan
    keys[8, 3:], keys[9, 2:], keys[10], keys[11, 2:] = -3e38, -torch.inf, keys[10].round(), -1e4
    keys[13, 5], keys[14] = torch.inf, -keys[14].abs() * 1e-3
    weights = torch.where(keys.isfinite(), (keys - keys.amax(1, keepdim=True)).exp(), 0)
    given = {"keys": keys, "weights": weights, "most": torch.tensor(most), "share": torch.tensor(share)}
    fake_mode = FakeTensorMode()
    fakes: Tensors = {name: fake_mode.from_tensor(value) for name, value in given.items()}
    graph_module = trace(lambda given: {"result": ops.kept_threshold(*given.values()) + 0}, fakes, fake_mode)
    (results,) = output(graph_module.graph).args
    output(graph_module.graph).args = (dict(zip(("result",), results, strict=True)),)  # type: ignore[arg-type]
    graph_module.recompile()
    write_onnx(graph_module, tmp_path / "step.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "step.onnx")
    assert not {node.op_type for node in onnx.load(tmp_path / "step.onnx").graph.node} & {"TopK", "NonZero"}
    (found,) = session.run(None, {name: value.numpy() for name, value in given.items()})
    torch.testing.assert_close(torch.as_tensor(found), kept_threshold(*given.values()), rtol=0, atol=0, equal_nan=True)
