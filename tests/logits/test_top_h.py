import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation.logits_process import TopHLogitsWarper

from emssd_compile.logits import TopH
from tests.logits.filters import applied, assert_filters_as, dtypes, rows

values = st.floats(0.01, 0.999)


@given(batch=st.lists(st.tuples(rows, values), min_size=1, max_size=4), dtype=dtypes)
def test_tokens_are_those_of_transformers(batch, dtype):
    logits = torch.stack([row.logits(dtype) for row, _ in batch])
    found = applied(TopH(), logits, {"top_h": [value for _, value in batch]})
    for line, given_logits, (_, value) in zip(found, logits, batch, strict=True):
        assert_filters_as(TopHLogitsWarper, value, given_logits, line, least=0.001, most=1)


def test_the_whole_entropy_is_that_of_the_hundred_likeliest():
    logits = torch.randn(4, 130)
    found = applied(TopH(), logits, {"top_h": [1.0, 1.0, 0.0, 0.999]})
    assert found.isfinite().sum(1).tolist()[:3] == [100, 100, 130]
    assert 90 < found[3].isfinite().sum() < 100
    assert found[0].isfinite()[logits[0].topk(100).indices].all()


def test_equal_logits_are_kept_all_or_none():
    logits = torch.tensor([[3.0, 2.0, 2.0, 0.0]])
    lone, pair = applied(TopH(), logits.repeat(2, 1), {"top_h": [0.3, 0.7]}).tolist()
    assert lone == [3, -torch.inf, -torch.inf, -torch.inf]
    assert pair == [3, 2, 2, -torch.inf]
