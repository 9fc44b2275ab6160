import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation.logits_process import EpsilonLogitsWarper

from emssd_compile.logits import EpsilonCutoff
from tests.logits.filters import applied, assert_filters_as, dtypes, rows

values = st.floats(2.0**-14, 0.999)


@given(batch=st.lists(st.tuples(rows, values), min_size=1, max_size=4), dtype=dtypes)
def test_tokens_are_those_of_transformers(batch, dtype):
    logits = torch.stack([row.logits(dtype) for row, _ in batch])
    found = applied(EpsilonCutoff(), logits, {"epsilon_cutoff": [value for _, value in batch]})
    for line, given_logits, (_, value) in zip(found, logits, batch, strict=True):
        assert_filters_as(EpsilonLogitsWarper, value, given_logits, line, least=1e-09, most=0.9999999)
