"""`SuffixLookup` against a vote in plain Python, and whole models that decode with it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import emssd_compile
from emssd_compile.drafters import Corpus, Draft, SuffixLookup
from emssd_compile.drafters.suffix_lookup import PLACES
from emssd_compile.errors import OptionError
from tests.drafters.contexts import context
from tests.exactness.models import Reference
from tests.export.subjects import Small, prompt

NEW = 24
PROMPTS = [prompt(n) for n in (1, 2, 7, 30, 61)]  # more than there are rows


def _draft(drafter: SuffixLookup, texts: list[list[int]], ids: list[int] | None = None, filler: int = 0) -> Draft:
    seen = context(texts, drafter.num_draft_tokens, filler=filler)
    options = {"corpus_id": torch.tensor(ids or [0] * len(texts))}
    return drafter(replace(seen, options=options, state=dict(drafter.host_tensors())))


def _drafts(draft: Draft) -> list[list[int]]:
    return [row[:length].tolist() for row, length in zip(draft.tokens, draft.lengths.tolist(), strict=True)]


def _match(text: list[int], place: int, newest: list[int], most: int) -> int:
    """How many of the newest tokens lie before a place of a text."""
    count = 0
    while count < min(most, place, len(newest)) and text[place - 1 - count] == newest[-1 - count]:
        count += 1
    return count


def _found(texts: list[list[int]], newest: list[int], most: int) -> tuple[int, list[list[int]]]:
    """The longest match, and what follows it, the newest text and the last place first."""
    places = [(text, place) for text in reversed(texts) for place in range(len(text) - 1, 0, -1)]
    matches = [_match(text, place, newest, most) for text, place in places]
    longest = max(matches, default=0)
    return longest, [text[place:] for (text, place), m in zip(places, matches, strict=True) if m == longest > 0]


def _vote(following: list[list[int]], most: int, cap: int, threshold: float) -> tuple[list[int], float]:
    """Token by token: the one with most votes among those who agree so far; who lead together stay until some fall."""
    votes = Counter(tuple(text[: n + 1]) for text in following for n in range(min(most, len(text))))
    ahead = following
    for count in range(1, most + 1):
        best = max(votes[tuple(text[:count])] if len(text) >= count else 0 for text in ahead)
        ahead = [text for text in ahead if (votes[tuple(text[:count])] if len(text) >= count else 0) == best]
    parts = [votes[tuple(ahead[0][:count])] / len(following) for count in range(1, min(cap, most, len(ahead[0])) + 1)]
    worth = [part for part in parts if part >= threshold]
    return ahead[0][: len(worth)], float(sum(worth))


def _expected(text: list[int], corpus: list[list[int]], drafter: SuffixLookup) -> tuple[list[int], float]:
    """The draft and its score."""
    match, following = _found([text], text, drafter.max_match)
    other, elsewhere = _found(corpus, text, drafter.max_match)
    if other > max(match, 1):
        match, following = other, elsewhere
    if match < drafter.min_match or not following:
        return [], 0.0
    return _vote(following[:PLACES], drafter.num_draft_tokens, match, drafter.threshold)


def test_example_of_the_docstring():
    draft = _draft(SuffixLookup(4), [[1, 2, 7, 8, 1, 2, 7, 9, 1, 2, 7, 8, 5, 1, 2]])
    assert _drafts(draft) == [[7, 8]]
    assert draft.scores is not None
    torch.testing.assert_close(draft.scores, torch.tensor([1 + 2 / 3]))


TEXTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=20), min_size=1, max_size=4)
CORPUS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), max_size=2)
SIZES = {
    "num_draft_tokens": st.integers(1, 6),
    "max_match": st.integers(2, 7),
    "min_match": st.integers(1, 2),
    "threshold": st.sampled_from([0.0, 0.1, 0.3, 0.6, 1.0]),
}


@given(texts=TEXTS, filler=st.integers(0, 2), options=st.fixed_dictionaries(SIZES))
@settings(max_examples=300, deadline=None)
def test_agrees_with_the_vote_whatever_lies_behind_the_known_text(texts, filler, options):
    drafter = SuffixLookup(**options)
    draft = _draft(drafter, texts, filler=filler)
    expected = [_expected(text, [], drafter) for text in texts]
    assert _drafts(draft) == [tokens for tokens, _ in expected]
    torch.testing.assert_close(draft.scores, torch.tensor([score for _, score in expected]))


@given(
    texts=TEXTS,
    corpus=CORPUS,
    options=st.fixed_dictionaries(SIZES),
)
@settings(max_examples=300, deadline=None)
def test_a_corpus_wins_where_its_match_is_longer(texts, corpus, options):
    """A corpus in which no bucket is full: all of its places are found."""
    held = Corpus(1024)
    for text in corpus:
        held.add(text)
    drafter = SuffixLookup(**options, corpus=held)
    draft = _draft(drafter, texts)
    expected = [_expected(text, corpus, drafter) for text in texts]
    assert _drafts(draft) == [tokens for tokens, _ in expected]
    torch.testing.assert_close(draft.scores, torch.tensor([score for _, score in expected]))


@given(texts=TEXTS, corpora=st.tuples(CORPUS, CORPUS, CORPUS), options=st.fixed_dictionaries(SIZES))
@settings(max_examples=200, deadline=None)
def test_of_a_corpus_each_tenant_has_the_texts_that_were_added_for_it_and_no_others(texts, corpora, options):
    """Tenants of one corpus, their texts added in turn, their rows side by side: to each it is a corpus of its own."""
    held = Corpus(1024)
    for turn in range(2):
        for tenant, corpus in enumerate(corpora):
            for text in corpus[turn : turn + 1]:
                held.add(text, tenant)
    drafter = SuffixLookup(**options, corpus=held)
    rows = [(text, tenant) for text in texts for tenant in range(len(corpora))]
    draft = _draft(drafter, [text for text, _ in rows], [tenant for _, tenant in rows])
    expected = [_expected(text, corpora[tenant], drafter) for text, tenant in rows]
    assert _drafts(draft) == [tokens for tokens, _ in expected]
    torch.testing.assert_close(draft.scores, torch.tensor([score for _, score in expected]))


def test_the_grade_is_the_source_and_the_power_of_2_that_the_match_reaches():
    held = Corpus(64)
    held.add([9, 8, 7, 6, 5])
    drafter = SuffixLookup(2, max_match=8, corpus=held)
    texts = [[1, 5, 1], [1, 2, 5, 1, 2], [1, 2, 3, 5, 1, 2, 3], [4, 9, 8], [4, 9, 8, 7]]
    grades = _draft(drafter, texts).grades
    assert grades is not None
    assert grades[:, 0].tolist() == [0, 1, 2, 4 + 1, 4 + 2]
    assert drafter.num_grades == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_draft_tokens": 0}, "num_draft_tokens=0"),
        ({"max_match": 2.5}, "max_match=2.5"),
        ({"min_match": 17}, "min_match=17 is out of range; pass at most 16"),
        ({"threshold": 1.5}, "threshold=1.5"),
        ({"corpus": "texts"}, "corpus='texts' is no Corpus"),
    ],
)
def test_refuses_options_that_make_no_sense(options, message):
    with pytest.raises(OptionError, match=f"SuffixLookup {message}"):
        SuffixLookup(**options)


@pytest.fixture(scope="module")
def reference():
    return Reference(Small())


def _decoder(corpus: Corpus | None, backend: str = "eager", **options):
    drafter = SuffixLookup(4, corpus=corpus)
    sizes: dict[str, Any] = {"max_batch": 3, "max_length": 128, "layout": "packed"}
    return emssd_compile.optimize(Small(), drafter, backend=backend, **sizes, **options)


def _steps(decoder, prompts: list[list[int]], **options) -> int:
    decoder.stats.reset()
    decoder.generate(prompts, max_new_tokens=NEW, **options)
    return decoder.stats.num_steps


def test_tokens_are_the_models_own_and_a_repeated_call_takes_fewer_steps(reference):
    decoder = _decoder(Corpus(2048))
    expected = [[*ids, *reference(ids, NEW)] for ids in PROMPTS]
    found, accepted = [], []
    for _ in range(2):
        decoder.stats.reset()
        found.append(decoder.generate(PROMPTS, max_new_tokens=NEW))
        accepted.append(decoder.stats.num_accepted_draft_tokens)
    assert found == [expected] * 2
    assert accepted[1] > 1.5 * accepted[0]


def test_sampled_tokens_are_those_without_drafts():
    sample: dict[str, Any] = {"do_sample": True, "seed": 5, "temperature": 0.7, "max_new_tokens": NEW}
    plain = emssd_compile.optimize(Small(), "none", max_batch=3, max_length=128, backend="eager")
    decoder = _decoder(Corpus(2048))
    expected = plain.generate(PROMPTS, **sample)
    assert [decoder.generate(PROMPTS, **sample) for _ in range(2)] == [expected] * 2
    assert decoder.stats.num_accepted_draft_tokens > 0


def test_tenants_draft_from_texts_of_their_own_only():
    decoder = _decoder(Corpus(2048))
    first = _steps(decoder, PROMPTS)
    assert _steps(decoder, PROMPTS, corpus_id=1) == first, "another tenant knows nothing of it"
    assert _steps(decoder, PROMPTS) < first
    assert _steps(decoder, PROMPTS, corpus_id=1) < first
    assert _steps(decoder, PROMPTS, corpus_id=2) == first


def test_without_a_clock_a_call_depends_on_itself_alone():
    decoder = _decoder(Corpus(2048), deterministic=True)
    assert _steps(decoder, PROMPTS) == _steps(decoder, PROMPTS)
    assert not decoder.drafter.corpus.tensors["pairs"].any()


def test_only_what_ended_is_added_and_prompts_where_they_are_wanted():
    for prompts in (False, True):
        corpus = Corpus(512, prompts=prompts)
        decoder = _decoder(corpus)
        ((*text,),) = decoder.generate([PROMPTS[2]], max_new_tokens=6)
        kept = text if prompts else text[len(PROMPTS[2]) :]
        assert corpus.tensors["texts"][1 : len(kept) + 2].tolist() == [*kept, -1]
        assert (corpus.tensors["texts"][len(kept) + 2 :] == -1).all()


@pytest.mark.long
def test_an_artifact_drafts_from_the_rows_own_text(reference, tmp_path):
    pytest.importorskip("onnxruntime")
    corpus = Corpus(512)
    decoder = _decoder(corpus)
    decoder.generate(PROMPTS, max_new_tokens=NEW)
    decoder.export_onnx(tmp_path / "artifact", check=False)
    loaded = emssd_compile.load(tmp_path / "artifact")
    for _ in range(2):
        loaded.stats.reset()
        assert loaded.generate(PROMPTS, max_new_tokens=NEW, corpus_id=1) == [[*p, *reference(p, NEW)] for p in PROMPTS]
        own = _decoder(None)
        own.generate(PROMPTS, max_new_tokens=NEW)
        assert loaded.stats == own.stats, "the same drafts are made, and the same of them accepted"
