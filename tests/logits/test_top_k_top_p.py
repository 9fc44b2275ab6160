import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation.logits_process import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

from emssd_compile import ops
from emssd_compile.logits import TopKTopP, filtered
from tests.logits.filters import SIZE, applied, assert_filters_as, dtypes, rows

shares = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0.01, 0.999))
counts = st.one_of(st.sampled_from([0, 1, SIZE - 1, SIZE, 2**40]), st.integers(1, SIZE))


@pytest.fixture(autouse=True, scope="module")
def _kernels():
    assert ops.load_cpu_kernels()


def _transformers(top_k):
    """Their top-p, behind their top-k if that is on."""

    def make(top_p):
        first = [TopKLogitsWarper(top_k)] if top_k else []
        return LogitsProcessorList([*first, *([TopPLogitsWarper(top_p)] if top_p < 1 else [])])

    return make


@given(batch=st.lists(st.tuples(rows, counts, shares), min_size=1, max_size=4), dtype=dtypes)
def test_tokens_are_those_of_transformers(batch, dtype):
    logits = torch.stack([row.logits(dtype) for row, _, _ in batch])
    _, top_k, top_p = zip(*batch, strict=True)
    found = applied(TopKTopP(), logits, {"top_k": top_k, "top_p": top_p})
    for line, given_logits, (_, count, share) in zip(found, logits, batch, strict=True):
        most = 1 - 1e-9 if share < 1 else 1
        assert_filters_as(_transformers(count), share, given_logits, line, least=0, most=most)


def test_equal_logits_are_kept_all_or_none():
    logits = torch.tensor([[1.0, 2.0, 3.0, 2.0, 2.0]] * 3)
    found = filtered(logits, torch.tensor([2, 1, 0]), torch.tensor([1.0, 1.0, 0.5]))
    barred = -torch.inf
    assert found.tolist() == [[barred, 2, 3, 2, 2], [barred, barred, 3, barred, barred], [barred, 2, 3, 2, 2]]
