"""`decompose_attention`: the same numbers from matrix products and a softmax, capped scores and sinks included."""

import torch

from emssd_compile.ops import tiled_attention
from emssd_compile.passes.decompose_attention import DecomposeAttention
from tests.export.tensorrt.steps import example, tiled_step


def test_it_computes_what_the_op_does():
    step = tiled_step()
    (site,) = step.graph.find_nodes(op="call_function", target=tiled_attention)
    step.register_buffer("sinks", torch.tensor([0.5, -2.0, 9.0, 0.0]))
    with step.graph.inserting_before(site):
        node = step.graph.get_attr("sinks")
    node.meta["val"] = site.meta["val"].fake_mode.from_tensor(step.sinks, static_shapes=True)
    site.kwargs = {**site.kwargs, "softcap": 0.1, "sinks": node}
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
