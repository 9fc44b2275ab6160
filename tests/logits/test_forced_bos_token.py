"""`ForcedBOSToken`: what transformers does, where a text has one token."""

from hypothesis import given
from hypothesis import strategies as st
from transformers import ForcedBOSTokenLogitsProcessor

from emssd_compile.logits import ForcedBOSToken
from tests.logits.against_transformers import VOCABULARY, Subject, assert_like_transformers, subjects


@given(subject=subjects(), data=st.data())
def test_it_is_that_of_transformers(subject: Subject, data: st.DataObject):
    values = [data.draw(st.none() | st.integers(0, VOCABULARY - 1)) for _ in subject.rows]

    def theirs(row: int):
        return None if values[row] is None else ForcedBOSTokenLogitsProcessor(values[row])

    assert_like_transformers(ForcedBOSToken(), subject, theirs, tolerance=0, forced_bos_token_id=values)
