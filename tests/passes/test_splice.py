"""`splice`: what is traced holds for every size."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from emssd_compile.passes.graph import fresh_index
from emssd_compile.passes.splice import trace


def test_a_composite_op_is_traced_for_every_size():
    """In C++, torch 2.11's matmul reads sizes as numbers."""
    fake_mode = FakeTensorMode(shape_env=ShapeEnv())
    weights = torch.randn(1, 8, 1)
    inputs = {"slots": fresh_index(fake_mode, torch.device("cpu"))}
    traced = trace(lambda given: {"result": weights @ given["slots"][None, None].float()}, inputs, fake_mode)
    for length in (1, 7, 12):
        slots = torch.arange(length)
        torch.testing.assert_close(traced(slots), [weights @ slots[None, None].float()])
