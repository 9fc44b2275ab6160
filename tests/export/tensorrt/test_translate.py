"""`translate`: the part of the step that goes through ONNX computes there what it does in torch."""

import pytest
import torch

from emssd_compile.export.tensorrt.cut import cut
from emssd_compile.export.tensorrt.network import write_onnx
from emssd_compile.passes.graph import inputs
from tests.export.tensorrt.steps import example, tiled_step

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
