"""`ForcedEOSToken`: what transformers does, where a row reaches its limit with the next token."""

from hypothesis import given
from hypothesis import strategies as st
from transformers import ForcedEOSTokenLogitsProcessor

from emssd_compile.logits import ForcedEOSToken
from tests.logits.against_transformers import VOCABULARY, Subject, assert_like_transformers, subjects

TOKEN = st.integers(0, VOCABULARY - 1)


@given(subject=subjects(), data=st.data())
def test_it_is_that_of_transformers(subject: Subject, data: st.DataObject):
    values = [data.draw(st.none() | TOKEN | st.lists(TOKEN, min_size=1, max_size=3)) for _ in subject.rows]

    def theirs(row: int):
        limit = int(subject.seen.limits[row])
        return None if values[row] is None else ForcedEOSTokenLogitsProcessor(limit, values[row])

    assert_like_transformers(ForcedEOSToken(), subject, theirs, tolerance=0, forced_eos_token_id=values)
