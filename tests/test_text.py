"""Pieces of text: whole characters, nothing of a stop text, and together what the whole is."""

import functools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from emssd_compile.cli.prompts import Prompt
from emssd_compile.text import Detokenizer, StopTexts, text_behind
from tests.serve.servers import ids_of, text_of, tokenizer

TOKENS = st.lists(st.integers(1, len(tokenizer()) - 1), max_size=30)
PLAIN = st.text(st.sampled_from("ab🙂"), max_size=12)


def pieces_of(tokens: list[int], prompt: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer(), prompt)
    return [*map(detokenizer.push, tokens), detokenizer.end()]


@given(TOKENS)
def test_pieces_of_any_tokens_make_up_the_whole_text(tokens):
    assert "".join(pieces_of(tokens, [])) == text_of(tokens)


@given(st.text(min_size=1), st.text(max_size=5))
def test_a_piece_of_a_text_holds_whole_characters_and_comes_as_early_as_it_can(text, before):
    tokens = ids_of(text)
    pieces = pieces_of(tokens, ids_of(before))
    assert "".join(pieces) == text
    for count in range(1, len(tokens) + 1):
        so_far = text_of(tokens[:count])
        assert "".join(pieces[:count]) == so_far or so_far.endswith("\ufffd")


def test_a_prompt_may_end_within_a_character():
    first, *rest = ids_of("🙂")
    assert rest, "it takes several tokens"
    assert "".join(pieces_of([*rest, *ids_of("a")], [*ids_of("x"), first])) == "🙂a"
    assert pieces_of([], [first]) == [""]


@functools.cache
def byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama 2's: letters, and bytes for all others; a run of bytes that is no text is no text as a whole."""
    tokens = [*(f"<0x{byte:02X}>" for byte in range(256)), "a", "b"]
    made = Tokenizer(models.WordLevel({token: number for number, token in enumerate(tokens)}, unk_token="a"))
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=made)


def as_bytes(text: str) -> list[int]:
    """The tokens of `byte_fallback`."""
    return [256 + "ab".index(each) if each in "ab" else byte for each in text for byte in each.encode()]


def echoed(model: Any, prompt: list[int], tokens: list[int]) -> str:
    """The text of the prompt and then the pieces of the tokens."""
    detokenizer = Detokenizer(model, prompt)
    pieces = [*map(detokenizer.push, tokens), detokenizer.end()]
    return detokenizer.prompt_before(model.decode(prompt)) + "".join(pieces)


@given(TOKENS, TOKENS)
def test_behind_any_prompt_pieces_make_up_the_whole_text(prompt, tokens):
    assert echoed(tokenizer(), prompt, tokens) == text_of(prompt + tokens)


@given(st.text(st.sampled_from("ab🙂é漢\ufffd"), max_size=9), st.integers(0, 30))
def test_a_text_may_be_cut_anywhere_into_prompt_and_pieces(text, place):
    tokens = as_bytes(text)
    assert echoed(byte_fallback(), tokens[:place], tokens[place:]) == text


def test_what_no_token_completes_stays_in_the_prompt():
    begun, end = [*ids_of("x"), *ids_of("🙂")[:-1]], ids_of("🙂")[-1:]
    for prompt, tokens, piece in [(ids_of("x\ufffd"), ids_of("a"), "a"), (begun, ids_of("a"), "a"), (begun, end, "🙂")]:
        assert "".join(pieces_of(tokens, prompt)) == piece


def test_the_first_space_is_kept_that_a_text_alone_would_lose():
    words = {"▁the": 0, "▁cat": 1, "s": 2}
    made = Tokenizer(models.WordLevel(words, unk_token="s"))
    made.decoder = decoders.Metaspace()
    sentencepiece = PreTrainedTokenizerFast(tokenizer_object=made)
    assert sentencepiece.decode([1, 2]) == "cats"
    assert text_behind(sentencepiece, [0], [1, 2]) == " cats"
    assert Prompt("the").completed([0], [1, 2], sentencepiece)["completion"] == " cats"
    detokenizer = Detokenizer(sentencepiece, [0])
    assert [detokenizer.push(1), detokenizer.push(2), detokenizer.end()] == [" cat", "s", ""]


def first_stop_cut(text: str, stops: list[str]) -> str | None:
    """The text before the stop text that ends first, the longest of them; None if there is none."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))]
    return None


@given(PLAIN, st.lists(st.text(st.sampled_from("ab🙂"), min_size=1, max_size=4), max_size=3), st.data())
def test_no_part_of_a_stop_text_is_let_through(text, stops, data):
    finder, pieces, left = StopTexts(stops), [], text
    while left and not finder.found:
        size = data.draw(st.integers(1, 3))
        pieces.append(finder.push(left[:size]))
        left = left[size:]
    read = text[: len(text) - len(left)]
    shown = first_stop_cut(read, stops)
    assert finder.found == (shown is not None)
    assert "".join(pieces) + finder.end() == (read if shown is None else shown)
    for count in range(1, len(pieces) + 1):
        shown = "".join(pieces[:count])
        assert not any(stop in shown for stop in stops)


@pytest.mark.parametrize(
    ("stops", "pieces", "shown"),
    [
        (["stop"], ["a st", "o", "p b"], ["a ", "", ""]),
        (["stop"], ["a st", "o", "re"], ["a ", "", "store"]),
        (["aab"], ["aa", "a", "b"], ["", "a", ""]),
        (["xyz", "y"], ["x", "y"], ["", "x"]),
        (["xyz", "y"], ["xyz"], ["x"]),
        (["ab", "abc"], ["abc"], [""]),
        (["bc", "abc"], ["a", "bc"], ["", ""]),
        (["abc", "bcd"], ["abcd"], [""]),
    ],
)
def test_what_may_be_the_beginning_of_a_stop_text_waits(stops, pieces, shown):
    finder = StopTexts(stops)
    assert [finder.push(piece) for piece in pieces] == shown
