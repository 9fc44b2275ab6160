"""A matcher walks over a row's drafts and comes back, whatever it meets there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("llguidance", reason="grammars are carried out by llguidance")

import llguidance

from emssd_compile.errors import GrammarError
from emssd_compile.grammar import Grammar, regex
from emssd_compile.grammar_text import GrammarText, Node
from emssd_compile.runtime.requests import Request

EOS, A, B, AB = range(4)


class _Words:
    """Three words and an end; nothing spells q or r."""

    eos_token_id, bos_token_id, special_token_ids = EOS, None, (EOS,)
    tokens = (b"<eos>", b"a", b"b", b"ab")

    def __call__(self, text: bytes) -> list[int]:
        return [A if letter == ord("a") else B for letter in text]


WORDS = llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Words()))


def text_of(grammar: Grammar) -> GrammarText:
    return GrammarText(Request(0, torch.tensor([A]), 9, group=0), grammar, [EOS], [EOS])


def allowed(matcher: Any) -> set[int]:
    """What may follow, but for an end."""
    bits = int.from_bytes(matcher.compute_bitmask(), "little")
    return {token for token in (A, B, AB) if bits >> token & 1}


def met(text: GrammarText, nodes: list[Node]) -> dict[int, tuple[set[int], bool]]:
    """Of each node that is stood behind: what may follow, and whether the text may end."""
    return {stop.place: (allowed(text.matcher), stop.may_end) for stop in text.walk(nodes)}


def test_each_node_of_a_tree_has_the_mask_of_its_own_text():
    text = text_of(regex("(ab|b)(a|bb)", WORDS))
    tree: list[Node] = [((), 0), ((B,), 1), ((A,), 2), ((A, B), 3), ((AB,), 4), ((B, A), 5), ((A, A), 6), ((B,), 7)]
    behind_first: tuple[set[int], bool] = ({A, B}, False)
    expected = {
        0: ({A, B, AB}, False),
        **dict.fromkeys((1, 3, 4, 7), behind_first),
        2: ({B}, False),
        5: (set[int](), True),
    }
    for _ in range(2):  # and it is back afterwards
        assert met(text, tree) == expected


@pytest.mark.parametrize("path", [(EOS,), (-1,), (4,), (10**9,), (B, B)])
def test_no_node_is_stood_behind_that_no_text_reaches(path):
    text = text_of(regex("a?", WORDS))
    assert met(text, [((), 0), (path, 1)]).keys() == {0}


def test_a_dead_end_among_the_drafts_is_come_back_from():
    """Behind an a only q or r could come, which llguidance finds out when it is asked for the mask."""
    text = text_of(regex("bba[qr]|bbb{3}", WORDS))
    text.follow(2, [B, B])
    nodes: list[Node] = [((), 0), ((A,), 1), ((A,), 2), ((B,), 3), ((B, B), 4)]
    for _ in range(2):
        found = met(text, nodes)
        assert not found[1][0]
        assert not found[1][1]
        assert found[2][1] is False
        assert found[3] == found[4] == ({B}, False)


def test_a_text_that_went_where_nothing_follows_is_an_error():
    text = text_of(regex("aab", WORDS))
    text.bar((A,), "no way on")
    text.follow(1, [A])
    text.follow(3, [A, A, B])  # what was behind drafts of a step before means nothing now
    text = text_of(regex("aab", WORDS))
    text.follow(1, [A])
    text.bar((A,), "no way on")
    with pytest.raises(GrammarError, match="prompt 0, behind 2 new tokens: no way on"):
        text.follow(3, [A, A, B])


def test_a_token_that_the_grammar_forbids_is_an_error():
    with pytest.raises(GrammarError, match="behind 1 new tokens: token 1 was chosen, which the grammar does not allow"):
        text_of(regex("ab", WORDS)).follow(2, [A, A])
    text = text_of(regex("ab", WORDS))
    text.request.output += [A, EOS]
    with pytest.raises(GrammarError, match="behind 1 new tokens: token 0 was chosen"):
        text.settle()
