"""`LogitBias`: a number on some logits of a row, wherever its text is."""

import math

from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from emssd_compile.logits import LogitBias
from tests.logits.against_transformers import VOCABULARY, Subject, assert_like_transformers, subjects

BIAS = st.sampled_from([-100.0, -0.5, 1, 100.0, -math.inf])
BIASES = st.dictionaries(st.integers(0, VOCABULARY - 1), BIAS, min_size=1)


@given(subject=subjects(), data=st.data())
def test_each_token_gets_its_bias(subject: Subject, data: st.DataObject):
    values = [data.draw(st.none() | BIASES) for _ in subject.rows]

    def theirs(row: int):
        def change(ids: Tensor, scores: Tensor) -> Tensor:
            for token, bias in (values[row] or {}).items():
                scores[0, token] += bias
            return scores

        return change

    assert_like_transformers(LogitBias(), subject, theirs, tolerance=0, logit_bias=values)
