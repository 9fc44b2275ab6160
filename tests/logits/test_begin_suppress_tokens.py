"""`BeginSuppressTokens`: what transformers does, behind a forced BOS, too."""

from hypothesis import given
from hypothesis import strategies as st
from transformers import SuppressTokensAtBeginLogitsProcessor

from emssd_compile.logits import BeginSuppressTokens
from tests.logits.against_transformers import VOCABULARY, Subject, assert_like_transformers, processed, subjects


def _begin(prompt: int, forced_bos: int | None) -> int:
    """As `GenerationMixin._get_logits_processor` says where a text begins."""
    return prompt if prompt > 1 or forced_bos is None else prompt + 1


@given(subject=subjects(), data=st.data())
def test_it_is_that_of_transformers(subject: Subject, data: st.DataObject):
    tokens = st.lists(st.integers(0, VOCABULARY - 1), min_size=1)
    values = [data.draw(st.none() | tokens) for _ in subject.rows]
    forced = [data.draw(st.none() | st.just(4)) for _ in subject.rows]

    def theirs(row: int):
        begin = _begin(int(subject.seen.prompt_lengths[row]), forced[row])
        return None if values[row] is None else SuppressTokensAtBeginLogitsProcessor(values[row], begin)

    options = {"begin_suppress_tokens": values, "forced_bos_token_id": forced}
    assert_like_transformers(BeginSuppressTokens(), subject, theirs, tolerance=0, **options)


@given(subject=subjects())
def test_a_forced_token_alone_changes_nothing(subject: Subject):
    found = processed(BeginSuppressTokens(), subject, forced_bos_token_id=[4] * len(subject.rows))
    assert found.equal(subject.seen.logits)
