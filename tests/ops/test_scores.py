"""The attributes of attention: one list of them, from which the schemas of the ops are made."""

from dataclasses import MISSING, fields

import pytest
import torch

from emssd_compile import ops
from emssd_compile.ops._scores import AttentionAttributes, in_use, reach


@pytest.mark.parametrize("op", [ops.attention, ops.ragged_attention], ids=str)
def test_the_ops_have_these_attributes_with_these_defaults(op):
    keywords = {argument.name: argument for argument in op._schema.arguments if argument.kwarg_only}
    for name in ("ancestors", "block_table"):  # what rows hold, not how scores are made
        keywords.pop(name, None)
    assert list(keywords) == [field.name for field in fields(AttentionAttributes)]
    for field in fields(AttentionAttributes):
        argument = keywords[field.name]
        assert argument.has_default_value() == (field.default is not MISSING)
        if argument.has_default_value():
            assert argument.default_value == field.default


def test_what_makes_no_difference_is_not_in_use():
    nothing = {"scale": 1.0, "window": 0, "chunk": 0, "softcap": 0.0, "alibi_slopes": None, "sinks": None}
    assert in_use(nothing) == in_use({"scale": 1.0, "ancestors": torch.ones(1)}) == {"scale"}
    assert in_use({**nothing, "chunk": 3, "sinks": torch.zeros(2)}) == {"scale", "chunk", "sinks"}


@pytest.mark.parametrize(("window", "chunk"), [(0, 0), (3, 0), (0, 4), (3, 4), (9, 4)])
def test_a_query_reaches_back_to_its_window_and_its_chunk(window, chunk):
    tokens = torch.arange(12)
    reached = AttentionAttributes(1.0, window=window, chunk=chunk).reaches(tokens[:, None], tokens)
    for query in range(12):
        for key in range(query + 1):
            near = window == 0 or key > query - window
            together = chunk == 0 or key // chunk == query // chunk
            assert reached[query, key] == (near and together)


@pytest.mark.parametrize(("window", "chunk"), [(0, 0), (3, 0), (0, 4), (3, 4), (9, 4)])
def test_how_far_is_the_most_that_any_query_sees(window, chunk):
    tokens = torch.arange(40)
    reached = AttentionAttributes(1.0, window=window, chunk=chunk).reaches(tokens[:, None], tokens)
    most = int((reached & (tokens <= tokens[:, None])).sum(1).max())
    found = reach({"scale": 1.0, "window": window, "chunk": chunk, "sinks": torch.ones(2)})
    assert most == (40 if found is None else found)
