"""`BadWords`: what transformers does, along every path; an EOS alone is no word."""

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import NoBadWordsLogitsProcessor

from emssd_compile.logits import BadWords
from tests.logits.against_transformers import EOS, VOCABULARY, Subject, assert_like_transformers, subjects
from tests.logits.contexts import Line, context

WORDS = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), max_size=15).map(lambda words: [[5], *words])


@settings(max_examples=200)
@given(subject=subjects(), data=st.data())
def test_it_is_that_of_transformers(subject: Subject, data: st.DataObject):
    values = [data.draw(st.none() | WORDS) for _ in subject.rows]

    def theirs(row: int):
        return None if values[row] is None else NoBadWordsLogitsProcessor(values[row], EOS)

    assert_like_transformers(BadWords(), subject, theirs, tolerance=0, bad_words_ids=values)


@given(subject=subjects())
def test_all_tokens_but_an_eos_can_be_bad(subject: Subject):
    words = [[token] for token in range(VOCABULARY)]

    def theirs(row: int):
        return NoBadWordsLogitsProcessor(words, EOS)

    assert_like_transformers(BadWords(), subject, theirs, tolerance=0, bad_words_ids=[words] * len(subject.rows))


def test_a_text_that_is_nothing_but_the_rest_of_a_word_is_too_short_for_it_as_in_transformers():
    lines = [Line([2, 4], [], []), Line([5, 2, 4], [], [])]
    subject = Subject(lines, replace(context(lines, 0, trees=False), logits=torch.zeros(2, VOCABULARY)))
    subject.seen.is_eos = torch.zeros(VOCABULARY, dtype=torch.bool)

    def theirs(row: int):
        return NoBadWordsLogitsProcessor([[2, 4, 7]], EOS)

    assert_like_transformers(BadWords(), subject, theirs, tolerance=0, bad_words_ids=[[[2, 4, 7]]] * 2)
