"""`PromptLookup` against a loop that does the same in plain Python."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emssd_compile.drafters import PromptLookup
from emssd_compile.errors import OptionError
from tests.drafters.contexts import context


def _drafts(drafter: PromptLookup, texts: list[list[int]], filler: int = 0) -> list[list[int]]:
    draft = drafter(context(texts, drafter.num_draft_tokens, filler=filler))
    return [row[:length].tolist() for row, length in zip(draft.tokens, draft.lengths.tolist(), strict=True)]


def _look_up(text: list[int], num_draft_tokens: int, max_ngram: int) -> list[int]:
    for size in range(min(max_ngram, len(text) - 1), 0, -1):  # the longest match wins
        for start in range(len(text) - size - 1, -1, -1):  # then the most recent
            if text[start : start + size] == text[-size:]:
                return text[start + size : start + size + num_draft_tokens]
    return []


def test_example_of_the_docstring():
    assert _drafts(PromptLookup(3, 2), [[5, 6, 7, 8, 9, 5, 6]]) == [[7, 8, 9]]


@pytest.mark.parametrize(
    ("text", "draft"),
    [
        ([1, 2, 3, 9, 2, 3, 8, 1, 2, 3], [9, 2]),
        ([2, 3, 7, 2, 3, 8, 2, 3], [8, 2]),
        ([4, 4, 4], [4]),
        ([4, 4], [4]),
        ([1, 2, 3, 4], []),
        ([1], []),
    ],
    ids=["longest match", "most recent match", "only what is known", "repeated token", "no match", "one token"],
)
def test_choice_of_the_match(text, draft):
    assert _drafts(PromptLookup(2, 3), [text]) == [draft]


@given(
    texts=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=20), min_size=1, max_size=4),
    num_draft_tokens=st.integers(1, 6),
    max_ngram=st.integers(1, 5),
    filler=st.integers(0, 3),
)
@settings(max_examples=300)
def test_agrees_with_the_loop_whatever_lies_behind_the_known_text(texts, num_draft_tokens, max_ngram, filler):
    drafter = PromptLookup(num_draft_tokens, max_ngram)
    assert _drafts(drafter, texts, filler) == [_look_up(text, num_draft_tokens, max_ngram) for text in texts]


def test_the_grade_is_the_number_of_tokens_that_matched():
    drafter = PromptLookup(2, 3)
    texts = [[7, 1, 2, 3, 9, 1, 2, 3], [4, 8, 1, 5, 8, 1], [6, 2, 6], [1, 2, 3]]
    grades = drafter(context(texts, 2)).grades
    assert grades is not None
    assert grades.tolist() == [[3, 3], [2, 2], [1, 1], [0, 0]]
    assert drafter.num_grades == 4


@pytest.mark.parametrize("option", ["num_draft_tokens", "max_ngram"])
@pytest.mark.parametrize("value", [0, -1, 2.5, "3"])
def test_refuses_sizes_that_make_no_sense(option, value):
    with pytest.raises(OptionError, match=f"PromptLookup {option}={value!r}"):
        PromptLookup(**{option: value})
