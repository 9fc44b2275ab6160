"""`check_against`: what proofs on the graph cannot see shows when the model itself is asked."""

import pytest
import torch
from torch import Tensor

import emssd_compile
from emssd_compile import selfcheck
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_compared_in_float32(dtype):
    model = model_with_attention().to(dtype)
    compiled = compile_model(model, BATCH)
    check_against(model, compiled)
    (note,) = compiled.records[-1].notes
    assert note.startswith("tested: logits of rows of (1, 6, 19, 32) tokens side by side, in float32: ")
    assert float(note.split()[-2]) < 1e-5


def test_a_mistake_as_small_as_rounding_is_found_in_half_precision():
    """One of 1 % would pass where logits may differ by 5 %."""
    model = model_with_attention().bfloat16()
    compiled = compile_model(model, BATCH)
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight * 1.01)
    with pytest.raises(UnsupportedModelError, match=r"logits differ by .*\(allowed 2e-04\)"):
        check_against(model, compiled)


class _Float32Head(TinyModel):
    """A body in bfloat16 and a head in float32."""

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embed(input_ids)
        q, k, v = (part(hidden).unflatten(-1, (4, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        return self.lm_head((hidden + causal(self, q, k, v).transpose(1, 2).flatten(2)).float())


@pytest.mark.parametrize("room", [True, False])
def test_several_dtypes_are_compared_as_the_coarsest_rounds(monkeypatch, room):
    monkeypatch.setattr(selfcheck, "_room_for_float32", lambda model, device: room)
    model = _Float32Head().bfloat16()
    model.lm_head.float()
    compiled = compile_model(model, BATCH)
    check_against(model, compiled)
    assert f"in {'float32' if room else 'bfloat16'}: " in compiled.records[-1].notes[0]


def test_the_long_row_is_as_long_as_memory_allows(monkeypatch):
    model = model_with_attention()
    compiled = compile_model(model, BATCH)
    per_token = 4 * (4 * 2 * 2 * 4 + 2 * 32)  # bytes: 4 rows of keys and values of 2 heads of 4, and logits twice
    monkeypatch.setattr(selfcheck, "available_memory", lambda device: 4 * 21 * per_token)
    check_against(model, compiled)
    assert "rows of (1, 6, 19, 21) tokens" in compiled.records[-1].notes[0]


def test_the_long_row_is_no_longer_than_the_positions_of_a_model_that_is_compiled_for_trees():
    """Its caches have more slots."""
    model = TinyModel(lambda m, x, ids: x + m.table[: x.shape[1]], attend=causal)
    compiled = compile_model(model, BatchShape(rows=2, capacity=LONGEST, tree_nodes=5))
    check_against(model, compiled)
    assert f"rows of (1, 6, 19, {LONGEST}) tokens" in compiled.records[-1].notes[0]
