"""`NoDrafter` drafts nothing, and drafters have names."""

import pytest
from torch import nn

from emssd_compile.drafters import DRAFTERS, DraftModel, NoDrafter, PromptLookup, SuffixLookup, make_drafter
from emssd_compile.errors import OptionError
from tests.drafters.contexts import context


def test_drafts_nothing():
    draft = NoDrafter()(context([[1, 1], [2]], limit=0))
    assert draft.tokens.shape == (2, 0)
    assert draft.lengths.tolist() == [0, 0]
    assert draft.state == {}


def test_drafters_by_name():
    found = {name: type(make_drafter(name)) for name in DRAFTERS}
    assert found == {"none": NoDrafter, "prompt-lookup": PromptLookup, "suffix": SuffixLookup}


def test_a_drafter_is_taken_as_it_is_and_a_module_drafts_as_a_model():
    drafter, model = PromptLookup(2), nn.Linear(1, 1)
    assert make_drafter(drafter) is drafter
    wrapped = make_drafter(model)
    assert isinstance(wrapped, DraftModel)
    assert wrapped.model is model


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(OptionError, match=r"unknown drafter 'lookup'.*none.*prompt-lookup"):
        make_drafter("lookup")
