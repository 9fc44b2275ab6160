import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation.logits_process import TypicalLogitsWarper

from emssd_compile import ops
from emssd_compile.logits import TypicalP
from tests.logits.filters import applied, assert_filters_as, dtypes, rows

values = st.floats(0.01, 0.999)


@pytest.fixture(autouse=True, scope="module")
def _kernels():
    assert ops.load_cpu_kernels()


@given(batch=st.lists(st.tuples(rows, values), min_size=1, max_size=4), dtype=dtypes)
def test_tokens_are_those_of_transformers(batch, dtype):
    logits = torch.stack([row.logits(dtype) for row, _ in batch])
    found = applied(TypicalP(), logits, {"typical_p": [value for _, value in batch]})
    for line, given_logits, (_, value) in zip(found, logits, batch, strict=True):
        assert_filters_as(TypicalLogitsWarper, value, given_logits, line, least=0.001, most=0.9999)
