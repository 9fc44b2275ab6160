"""`SequenceBias`: what transformers does, along every path."""

import math

from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import SequenceBiasLogitsProcessor

from emssd_compile.logits import SequenceBias
from tests.logits.against_transformers import Subject, assert_like_transformers, subjects

SEQUENCE = st.lists(st.integers(0, 3), min_size=1, max_size=5).map(tuple)
BIASES = st.dictionaries(SEQUENCE, st.sampled_from([-3.5, -0.1, 0.7, 10.0, -math.inf]), min_size=1, max_size=20)


@settings(max_examples=200)
@given(subject=subjects(), data=st.data())
def test_it_is_that_of_transformers(subject: Subject, data: st.DataObject):
    values = [data.draw(st.none() | BIASES) for _ in subject.rows]

    def theirs(row: int):
        return None if values[row] is None else SequenceBiasLogitsProcessor(values[row])

    assert_like_transformers(SequenceBias(), subject, theirs, tolerance=2e-6, sequence_bias=values)
