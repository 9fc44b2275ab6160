"""`check_against`: what proofs on the graph cannot see shows when the model itself is asked."""

import pytest
from torch import Tensor

import emssd_compile
from emssd_compile.compiler import compile_model
from emssd_compile.errors import UnsupportedModelError
from emssd_compile.selfcheck import check_against
from emssd_compile.step.batch import BatchShape
from tests.passes.graphs import LONGEST, TinyModel, causal, model_with_attention

BATCH = BatchShape(rows=2, capacity=32)


def test_a_faithful_graph_passes():
    model = model_with_attention()
    check_against(model, compile_model(model, BATCH))


def _scaled_by_length(m: TinyModel, x: Tensor, ids: Tensor) -> Tensor:
    return x * x.shape[1]


def _shifted_by_length(m: TinyModel, x: Tensor, ids: Tensor) -> Tensor:
    return x.roll(x.shape[1], -1)


def _bounded_by_length(m: TinyModel, x: Tensor, ids: Tensor) -> Tensor:
    return x + m.dense(x) / x.shape[1]


def _short_texts_are_special(m: TinyModel, x: Tensor, ids: Tensor) -> Tensor:
    return x * 2 if x.shape[1] > 8 else x


@pytest.mark.parametrize("local", [_scaled_by_length, _shifted_by_length, _bounded_by_length])
def test_a_forward_that_computes_with_the_length_is_refused_by_the_passes_already(local):
    model = TinyModel(local, attend=causal)
    with pytest.raises(UnsupportedModelError, match="half of the tokens alone gave other outputs"):
        emssd_compile.optimize(model, max_batch=2, max_length=32, backend="eager")


def test_a_forward_that_branches_on_the_length_is_refused():
    model = TinyModel(_short_texts_are_special, attend=causal)
    with pytest.raises(UnsupportedModelError, match="TinyModel computes something else on packed rows") as caught:
        emssd_compile.optimize(model, max_batch=2, max_length=32, backend="eager")
    assert "without compiling" in str(caught.value)


def test_a_forward_that_changes_beyond_some_length_is_refused_for_longer_rows():
    model = TinyModel(lambda m, x, ids: x * 2 if x.shape[1] > 24 else x, attend=causal)
    with pytest.raises(UnsupportedModelError, match=r"max_length=32, but the forward .* ends at 24 tokens") as caught:
        compile_model(model, BATCH)
    assert caught.value.remedy == "pass max_length=24 or less"
    compile_model(model, BatchShape(rows=2, capacity=24))


def test_a_table_of_positions_limits_the_length():
    model = TinyModel(lambda m, x, ids: x + m.table[: x.shape[1]], attend=causal)
    with pytest.raises(UnsupportedModelError, match=f"ends at {LONGEST} tokens"):
        compile_model(model, BatchShape(rows=2, capacity=LONGEST + 1))


def test_a_changed_weight_is_noticed():
    model = model_with_attention()
    compiled = compile_model(model, BATCH)
    other = model_with_attention()
    with pytest.raises(UnsupportedModelError, match="logits differ by"):
        check_against(other, compiled)
