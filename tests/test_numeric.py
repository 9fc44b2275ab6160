"""Numbers of every kind are read as Python's, and what is none is named."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emssd_compile.errors import OptionError
from emssd_compile.numeric import INT64_MAX, INT64_MIN, flag, integer, number, seconds


@given(st.integers(INT64_MIN, INT64_MAX))
def test_every_integer_of_int64_is_read_as_pythons(number):
    for value in (number, np.int64(number), np.array(number), torch.tensor(number), torch.tensor([number])):
        read = integer("n", value)
        assert read == number
        assert type(read) is int


@given(st.integers(min_value=INT64_MAX + 1) | st.integers(max_value=INT64_MIN - 1))
def test_no_integer_beyond_int64_is(number):
    with pytest.raises(OptionError, match=r"n=.* is out of range; pass at"):
        integer("n", number)


def test_bounds_are_said():
    assert integer("n", 3, least=3, most=3) == 3
    with pytest.raises(OptionError, match="n=2 is out of range; pass at least 3"):
        integer("n", 2, least=3)
    with pytest.raises(OptionError, match="n=4 is out of range; pass at most 3"):
        integer("n", 4, most=3)
    with pytest.raises(OptionError, match=r"n=\(an integer of 16610 bits\) is out of range"):
        integer("n", 10**5000)


@pytest.mark.parametrize(
    "value", [None, 2.0, math.nan, "2", [2], torch.ones(2).long(), np.arange(2), torch.tensor(2.0)]
)
def test_what_is_no_integer_is_named(value):
    with pytest.raises(OptionError, match=r"^n=.* is not an integer$"):
        integer("n", value)


@pytest.mark.parametrize("value", [True, np.True_, torch.tensor(True), np.array(True)])
def test_a_bool_is_no_number_but_a_flag(value):
    with pytest.raises(OptionError, match="n=True is a bool"):
        integer("n", value)
    with pytest.raises(OptionError, match="not a number of seconds"):
        seconds("n", value)
    assert flag("n", value) is True


@pytest.mark.parametrize("value", [1, 0, None, "no", 1.0, torch.tensor(1)])
def test_no_other_value_is_a_flag(value):
    with pytest.raises(OptionError, match="is not True or False"):
        flag("n", value)


def test_seconds_are_real_and_not_negative():
    assert [seconds("n", value) for value in (0, 1.5, Fraction(1, 2), math.inf)] == [0.0, 1.5, 0.5, math.inf]
    for value in (math.nan, -1, -math.inf, np.float32("nan"), torch.tensor(math.nan)):
        with pytest.raises(OptionError, match="out of range"):
            seconds("n", value)


def test_a_number_is_real_and_may_be_infinite():
    given = (3, -1.5, Fraction(1, 2), math.inf, np.float32(0.5), torch.tensor(2))
    assert [number("n", value) for value in given] == [3, -1.5, 0.5, math.inf, 0.5, 2]
    assert type(number("n", np.int64(3))) is int
    for value in (math.nan, torch.tensor(math.nan), True, None, "1", [1.0], 1j):
        with pytest.raises(OptionError, match=r"^n=.* is not a number$"):
            number("n", value)
