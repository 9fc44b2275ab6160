"""`Corpus`: a ring of texts and the tables that find places in it, against a search of all that the ring holds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from emssd_compile.drafters import Corpus
from emssd_compile.drafters.corpus import GRAMS, SLOTS, buckets, keys
from emssd_compile.errors import CheckpointError, OptionError

TEXT = st.lists(st.integers(0, 3), max_size=12)


def _found(corpus: Corpus, name: str, gram: list[int], corpus_id: int = 0) -> list[int]:
    """Where a table says that an n-gram goes on, the newest first; of those, the places where it does."""
    wanted = keys(torch.tensor(gram), torch.tensor(corpus_id))
    table, texts = corpus.tensors[name], corpus.tensors["texts"]
    places = [place - 1 for place in table[buckets(wanted, len(table))].tolist() if place]
    size = len(texts)
    return [p for p in places if [int(texts[(p - n) % size]) for n in range(len(gram), 0, -1)] == wanted.tolist()]


@given(texts=st.lists(TEXT, max_size=5))
@settings(max_examples=200, deadline=None)
def test_tables_find_the_newest_places_of_each_gram(texts):
    corpus, ring = Corpus(2048), [-1]  # few n-grams in many buckets: hardly any two share one
    for text in texts:
        corpus.add(text)
        ring += [*text, -1] if text else []
    assert corpus.tensors["texts"][: len(ring)].tolist() == ring
    for name, size in GRAMS.items():
        grams = {tuple(ring[p - size : p]) for p in range(size, len(ring)) if -1 not in ring[p - size : p + 1]}
        for gram in grams:
            places = [p for p in range(len(ring) - 1, size - 1, -1) if tuple(ring[p - size : p]) == gram]
            places = [p for p in places if ring[p] != -1]
            found = _found(corpus, name, list(gram))
            assert found == places[: len(found)]
            assert len(found) == min(len(places), SLOTS)


@given(texts=st.lists(st.lists(st.integers(0, 9), max_size=30), max_size=8), capacity=st.integers(16, 40))
@settings(max_examples=200, deadline=None)
def test_the_ring_holds_the_newest_texts_and_what_is_found_there_is_there(texts, capacity):
    corpus, ring = Corpus(capacity), []
    for text in texts:
        corpus.add(text)
        ring += [*text[-(capacity - 1) :], -1] if text else []
    held = corpus.tensors["texts"].roll(-corpus._next).tolist()
    newest = ring[-capacity:]
    assert held[capacity - len(newest) :] == newest
    for name in GRAMS:
        assert 0 <= corpus.tensors[name].min() <= corpus.tensors[name].max() <= capacity


@given(mine=TEXT, others=TEXT, ids=st.tuples(st.integers(0, (1 << 31) - 1), st.integers(0, (1 << 31) - 1)))
@settings(max_examples=200, deadline=None)
def test_no_gram_of_a_tenant_is_found_by_another(mine, others, ids):
    if ids[0] == ids[1]:
        return
    corpus = Corpus(256)
    corpus.add(mine, ids[0])
    before = corpus.tensors["texts"].clone()
    corpus.add(others, ids[1])
    for place in range(2, len(mine)):
        of_mine = _found(corpus, "pairs", mine[place - 2 : place], ids[0])
        assert all(before[p] != -1 for p in of_mine)
        assert all(before[p] == -1 for p in _found(corpus, "pairs", mine[place - 2 : place], ids[1]))


def test_of_a_text_that_fills_a_bucket_the_last_places_are_kept():
    corpus = Corpus(64)
    corpus.add([5] * 20)
    assert _found(corpus, "pairs", [5, 5]) == list(range(20, 20 - SLOTS, -1))


def test_a_cleared_corpus_is_as_a_new_one():
    corpus = Corpus(32)
    corpus.add([1, 2, 3, 4, 5, 6])
    corpus.clear()
    assert all(torch.equal(value, Corpus(32).tensors[name]) for name, value in corpus.tensors.items())
    corpus.add([7, 8, 9])
    assert corpus.tensors["texts"][:5].tolist() == [-1, 7, 8, 9, -1]


def test_what_is_loaded_goes_on_as_what_was_saved(tmp_path):
    corpus = Corpus(40, prompts=True)
    corpus.add(torch.arange(30), corpus_id=3)
    corpus.save(tmp_path / "corpus.safetensors")
    loaded = Corpus.load(tmp_path / "corpus.safetensors")
    assert loaded.prompts
    for each in (corpus, loaded):
        each.add([1, 2, 3, 4, 5, 6, 1, 2, 3] * 2)
    assert all(torch.equal(value, loaded.tensors[name]) for name, value in corpus.tensors.items())
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.safetensors"]


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_a_file_that_is_cut_off_is_refused(size, tmp_path):
    file = tmp_path / "corpus.safetensors"
    Corpus(32).save(file)
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"corpus\.safetensors cannot be read.*cut off or damaged"):
        Corpus.load(file)


GOOD = {"format": "emssd_compile.corpus", "version": "1", "next": "1", "prompts": "False"}


@pytest.mark.parametrize(
    ("metadata", "change", "message"),
    [
        ({"format": "pt"}, {}, "is no corpus"),
        ({"version": "2"}, {}, "of version '2', this package reads 1"),
        ({"next": "-1"}, {}, "lacks its texts or their order"),
        ({"next": "32"}, {}, "holds .*, expected"),
        ({"prompts": "1"}, {}, "lacks its texts or their order"),
        ({}, {"texts": torch.zeros(8, dtype=torch.int64)}, "lacks its texts"),
        ({}, {"texts": torch.zeros(32)}, "holds .*, expected"),
        ({}, {"pairs": torch.zeros((3, 8), dtype=torch.int32)}, "holds .*, expected"),
        ({}, {"more": torch.zeros(1)}, "holds .*, expected"),
        ({}, {"quads": torch.full((8, 8), 33, dtype=torch.int32)}, "quads holds numbers out of range"),
        ({}, {"texts": torch.full((32,), -2)}, "texts holds numbers out of range"),
    ],
)
def test_a_file_that_is_no_corpus_is_refused(metadata, change, message, tmp_path):
    file = tmp_path / "corpus.safetensors"
    Corpus(32).save(file)
    save_file(load_file(file) | change, file, metadata=GOOD | metadata)
    with pytest.raises(CheckpointError, match=message):
        Corpus.load(file)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        Corpus.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: Corpus(15), "Corpus capacity_tokens=15"),
        (lambda: Corpus(prompts=1), "Corpus prompts=1"),  # type: ignore[arg-type]
        (lambda: Corpus(32).add([1, -1]), "a token is below 0"),
        (lambda: Corpus(32).add([1 << 31]), "beyond int32"),
        (lambda: Corpus(32).add(torch.ones(3)), "tokens of torch.float32 are no ids"),
        (lambda: Corpus(32).add([1], -1), "corpus_id=-1"),
    ],
)
def test_what_makes_no_sense_is_refused(act, message):
    with pytest.raises(OptionError, match=message):
        act()
