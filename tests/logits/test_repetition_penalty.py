"""`RepetitionPenalty`: what transformers does, along every path."""

from hypothesis import given
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor

from emssd_compile.logits import RepetitionPenalty
from tests.logits.against_transformers import Subject, assert_like_transformers, subjects


@given(subject=subjects(), data=st.data())
def test_it_is_that_of_transformers(subject: Subject, data: st.DataObject):
    penalty = st.sampled_from([None, 0.5, 1.1, 1.8, 30.0])
    values = [data.draw(penalty) for _ in subject.rows]

    def theirs(row: int):
        return None if values[row] is None else RepetitionPenaltyLogitsProcessor(values[row])

    assert_like_transformers(RepetitionPenalty(), subject, theirs, repetition_penalty=values)
