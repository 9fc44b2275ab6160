"""`decompose_attention`: the same numbers from matrix products and a softmax, capped scores included."""

import torch

from emssd_compile.export.tensorrt.decompose import DecomposeAttention
from emssd_compile.ops import tiled_attention
from tests.export.tensorrt.steps import example, tiled_step


def test_it_computes_what_the_op_does():
    step = tiled_step()
    (site,) = step.graph.find_nodes(op="call_function", target=tiled_attention)
    site.kwargs = {**site.kwargs, "softcap": 0.1}
    step.recompile()
    values = example(step)
    with torch.no_grad():
        expected = step(*values.values())
        assert DecomposeAttention().run(step) == 1
        step.recompile()
        found = step(*values.values())
    assert not step.graph.find_nodes(op="call_function", target=tiled_attention)
    assert found["report"].tolist() == expected["report"].tolist()
    assert found["report"][0, 0] == 1
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)
    assert DecomposeAttention().run(step) == 0
