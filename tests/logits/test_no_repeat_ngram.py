"""`NoRepeatNGram`: what transformers does, along every path, for each row by its own n."""

from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import NoRepeatNGramLogitsProcessor

from emssd_compile.logits import NoRepeatNGram
from tests.logits.against_transformers import Subject, assert_like_transformers, subjects


@settings(max_examples=200)
@given(subject=subjects(), data=st.data())
def test_it_is_that_of_transformers(subject: Subject, data: st.DataObject):
    values = [data.draw(st.sampled_from([None, 1, 2, 2, 3, 4, 9, 16])) for _ in subject.rows]

    def theirs(row: int):
        return None if values[row] is None else NoRepeatNGramLogitsProcessor(values[row])

    assert_like_transformers(NoRepeatNGram(), subject, theirs, no_repeat_ngram_size=values)
