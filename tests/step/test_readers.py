"""`readers`: lists and dicts become lines of tables; what makes no sense is refused by the name of the option."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from emssd_compile.errors import OptionError
from emssd_compile.step.options import RowOption
from emssd_compile.step.readers import READERS, can_read

VOCABULARY = 50
TOKEN = RowOption(-1, reader="token_id")
TOKENS = RowOption(-1, shape=(3,), reader="token_ids")
SEQUENCES = RowOption(-1, shape=(2, 3), reader="token_sequences")
BIASES = RowOption(-1, torch.float32, shape=(2, 4), reader="biased_sequences")
TOKEN_BIASES = RowOption(-1, torch.float32, shape=(2, 2), reader="biased_tokens")
DECAY = RowOption(1.0, torch.float32, shape=(2,), reader="start_and_factor")

GOOD: list[tuple[RowOption, Any, Any]] = [
    (TOKEN, 0, 0),
    (TOKEN, np.int64(49), 49),
    (TOKENS, 7, [-1, -1, 7]),
    (TOKENS, [], [-1, -1, -1]),
    (TOKENS, (4, 4, 2, 4), [-1, 4, 2]),
    (TOKENS, torch.tensor([1, 2, 3]), [1, 2, 3]),
    (TOKENS, {5}, [-1, -1, 5]),
    (SEQUENCES, [[1], (2, 3)], [[-1, -1, 1], [-1, 2, 3]]),
    (SEQUENCES, [[1, 2, 3], [1, 2, 3], [1, 2, 3]], [[1, 2, 3], [-1, -1, -1]]),
    (SEQUENCES, [], [[-1, -1, -1], [-1, -1, -1]]),
    (BIASES, {(1, 2): -0.5}, [[-1, 1, 2, -0.5], [-1, -1, -1, -1]]),
    (BIASES, [[[0], 1], [[1, 2, 3], -math.inf]], [[-1, -1, 0, 1], [1, 2, 3, -math.inf]]),
    (TOKEN_BIASES, {5: 2.5, 6: -100}, [[5, 2.5], [6, -100]]),
    (TOKEN_BIASES, [[5, 2.5]], [[5, 2.5], [-1, -1]]),
    (DECAY, (3, 1.5), [3, 1.5]),
    (DECAY, [0, 2], [0, 2]),
]


@pytest.mark.parametrize(("option", "value", "expected"), GOOD)
def test_a_value_that_makes_sense_is_a_number_or_a_line_of_the_options_shape(option, value, expected):
    found = option.read("x", value, VOCABULARY)
    if not option.is_table:
        assert (found, type(found)) == (expected, int)
        return
    assert (found.dtype, found.shape) == (option.dtype, option.shape)
    assert found.tolist() == expected
    assert option.is_default(found) == (value == [])


BAD: list[tuple[RowOption, Any, str]] = [
    (TOKEN, -1, "x: -1 is no id of the vocabulary; pass ids from 0 to 49"),
    (TOKEN, 50, "x: 50 is no id"),
    (TOKEN, True, "x=True is a bool"),
    (TOKEN, [3], r"x=\[3\] is not an integer"),
    (TOKENS, [1, 2, 3, 4], "x has 4 ids; a row has room for 3"),
    (TOKENS, [1, 50], "x: 50 is no id"),
    (TOKENS, [1.0], r"x=1\.0 is not an integer"),
    (TOKENS, "12", "x='12' is not an integer"),
    (TOKENS, [[1]], r"x=\[1\] is not an integer"),
    (TOKENS, torch.empty(2, device="meta"), "x=tensor.* is not an integer"),
    (SEQUENCES, 3, "x=3 is no list of lists"),
    (SEQUENCES, [3], "x: 3 is no sequence of token ids"),
    (SEQUENCES, [[]], r"x: \[\] is no sequence of token ids; pass at least one"),
    (SEQUENCES, [[1, 2, 3, 4]], "x: a sequence has 4 ids; pass at most 3"),
    (SEQUENCES, [[1], [2], [3]], "x has 3 sequences; a row has room for 2"),
    (SEQUENCES, [[1, -1]], "x: -1 is no id"),
    (BIASES, [1, 2], r"x=\[1, 2\] is no dict and no list of pairs; pass \{\(5, 7\): -1\.5\}"),
    (BIASES, {1: 0.5}, "x: 1 is no sequence of token ids"),
    (BIASES, {(): 0.5}, r"x: \(\) is no sequence"),
    (BIASES, {(1,): "much"}, "x='much' is not a number"),
    (BIASES, {(1,): math.nan}, "x=nan is not a number"),
    (BIASES, {(1,): 1.0, (2,): 1.0, (3,): 1.0}, "x has 3 sequences"),
    (TOKEN_BIASES, {(1,): 0.5}, r"x=\(1,\) is not an integer"),
    (TOKEN_BIASES, {"1": 0.5}, "x='1' is not an integer"),
    (TOKEN_BIASES, {1: True}, "x=True is not a number"),
    (TOKEN_BIASES, {1: 1.0, 2: 1.0, 3: 1.0}, "x has 3 ids; a row has room for 2"),
    (DECAY, 3, r"x=3 is no pair; pass \(start, factor\)"),
    (DECAY, (1, 2, 3), "x=.* is no pair"),
    (DECAY, (-1, 2.0), "x=-1 is out of range"),
    (DECAY, (1.5, 2.0), r"x=1\.5 is not an integer"),
    (DECAY, (1, 0.0), r"x: the factor 0\.0 is out of range"),
    (DECAY, (1, math.inf), "x: the factor inf is out of range"),
]


@pytest.mark.parametrize(("option", "value", "message"), BAD)
def test_a_value_that_makes_none_is_refused(option, value, message):
    with pytest.raises(OptionError, match=f"^{message}"):
        option.read("x", value, VOCABULARY)


def test_ids_that_float32_cannot_hold_are_refused():
    with pytest.raises(OptionError, match="x: ids of a vocabulary of 16777217 are not exact"):
        BIASES.read("x", {(1,): 1.0}, (1 << 24) + 1)


def test_a_reader_reads_lines_of_its_number_of_dimensions_and_a_number_needs_none():
    assert can_read("", ())
    assert not can_read("", (3,))
    assert all(can_read(name, (2,) * reader.dims) for name, reader in READERS.items())
    assert not can_read("token_ids", ())
    assert not can_read("nobody", ())
    assert not can_read([], ())


def test_what_requests_set_and_the_default_stand_side_by_side():
    read = TOKENS.read("x", [4], VOCABULARY)
    assert TOKENS.lines([read, TOKENS.default]).tolist() == [[-1, -1, 4], [-1, -1, -1]]
    share = RowOption(0.5, torch.float32)
    lines = share.lines([share.read("x", 1, VOCABULARY), share.default])
    assert (lines.dtype, lines.tolist()) == (torch.float32, [1.0, 0.5])
