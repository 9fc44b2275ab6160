import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation.logits_process import MinPLogitsWarper

from emssd_compile.logits import MinP
from tests.logits.filters import applied, assert_filters_as, dtypes, rows

values = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0.001, 1))


@given(batch=st.lists(st.tuples(rows, values), min_size=1, max_size=4), dtype=dtypes)
def test_tokens_are_those_of_transformers(batch, dtype):
    logits = torch.stack([row.logits(dtype) for row, _ in batch])
    found = applied(MinP(), logits, {"min_p": [value for _, value in batch]})
    for line, given_logits, (_, value) in zip(found, logits, batch, strict=True):
        assert_filters_as(MinPLogitsWarper, value, given_logits, line, least=0, most=1)
