"""`check_tensorrt_attention`: what TensorRT has no kernel for is refused before any rewriting, with what to do."""

import pytest
import torch
from torch import fx

from emssd_compile.errors import OptionError, UnsupportedModelError
from emssd_compile.export.tensorrt import BuildOptions, passes
from emssd_compile.ops import ragged_attention
from emssd_compile.passes.check_tensorrt_attention import CheckTensorRTAttention
from emssd_compile.runtime.buckets import StepSizes
from tests.passes.graphs import Scripted, step_of

SIZES = (StepSizes(48, 9, 51, 48),)


def half_step() -> tuple[fx.GraphModule, fx.Node]:
    """A step as of a model in half precision, and its attention."""
    step = step_of(Scripted([7, 8]))
    (site,) = step.graph.find_nodes(op="call_function", target=ragged_attention)
    site.meta["val"] = site.meta["val"].half()
    return step, site


def test_what_there_is_a_kernel_for_is_left_as_it_is():
    step, _ = half_step()
    assert CheckTensorRTAttention().run(step) == 0


def test_float32_is_refused_with_what_to_do():
    with pytest.raises(OptionError, match=r"no kernel for torch.float32: convert .* or .*attention='decomposed'"):
        CheckTensorRTAttention().run(step_of(Scripted([7, 8])))


@pytest.mark.parametrize(
    ("attribute", "message"),
    [({"softcap": 2.0}, "scores are capped"), ({"sinks": torch.zeros(4)}, "attention has sinks")],
    ids=str,
)
def test_what_changes_scores_otherwise_than_a_mask_is_refused(attribute, message):
    step, site = half_step()
    site.kwargs = {**site.kwargs, **attribute}
    with pytest.raises(UnsupportedModelError, match=rf"{message}.*\n.*attention='decomposed'") as raised:
        CheckTensorRTAttention().run(step)
    assert raised.value.node == site.name


def test_what_masks_can_say_is_left_as_it_is():
    step, site = half_step()
    site.kwargs = {**site.kwargs, "window": 4, "chunk": 8, "alibi_slopes": torch.ones(4)}
    assert CheckTensorRTAttention().run(step) == 0


def test_values_of_another_size_are_refused():
    step, site = half_step()
    site.meta["val"] = torch.cat([site.meta["val"]] * 2, -1)
    with pytest.raises(UnsupportedModelError, match=r"keys and values differ in size"):
        CheckTensorRTAttention().run(step)


@pytest.mark.parametrize(
    ("attention", "names"),
    [
        ("fused", ["fuse_projections", "check_tensorrt_attention", "tile_attention"]),
        ("masked", ["fuse_projections", "check_tensorrt_attention", "tile_attention"]),
        ("decomposed", ["fuse_projections", "tile_attention", "decompose_attention"]),
    ],
)
def test_nothing_is_refused_that_is_decomposed(attention, names):
    assert [each.name for each in passes(SIZES, BuildOptions(attention=attention))] == names
