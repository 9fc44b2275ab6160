"""`RowOption`: what a request may set, of which type and from where to where; what is refused says why."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from emssd_compile.errors import OptionError, PartError, PolicyError
from emssd_compile.step.options import RowOption
from emssd_compile.step.parts import Part, check_options, merge_options

COUNT = RowOption(0, least=0, most=9)
SHARE = RowOption(1.0, torch.float32, least=0.0)
SWITCH = RowOption(False, torch.bool)

GOOD: list[tuple[RowOption, Any, float]] = [
    (COUNT, 0, 0),
    (COUNT, 9, 9),
    (COUNT, np.int32(3), 3),
    (COUNT, torch.tensor(3), 3),
    (RowOption(0), -(1 << 63), -(1 << 63)),
    (SHARE, 2, 2),
    (SHARE, 0.25, 0.25),
    (SHARE, float("inf"), float("inf")),
    (SWITCH, True, True),
    (SWITCH, np.True_, True),
]


@pytest.mark.parametrize(("option", "value", "expected"), GOOD)
def test_a_value_in_range_is_taken_as_what_python_has_for_it(option, value, expected):
    found = option.check("x", value)
    assert found == expected
    assert type(found) is type(expected)


BAD: list[tuple[RowOption, Any, str]] = [
    (COUNT, -1, "x=-1 is out of range; pass at least 0"),
    (COUNT, 10, "x=10 is out of range; pass at most 9"),
    (COUNT, 1.0, r"x=1\.0 is not an integer"),
    (COUNT, True, "x=True is a bool"),
    (COUNT, None, "x=None is not an integer"),
    (COUNT, "3", "x='3' is not an integer"),
    (COUNT, [1], r"x=\[1\] is not an integer"),
    (COUNT, torch.tensor([1, 2]), "x=tensor.* is not an integer"),
    (RowOption(0), 1 << 63, "x=.* is out of range"),
    (SHARE, -0.5, r"x=-0\.5 is out of range; pass at least 0\.0"),
    (SHARE, float("nan"), "x=nan is not a number"),
    (SHARE, False, "x=False is not a number"),
    (SHARE, "much", "x='much' is not a number"),
    (SHARE, 10**400, "x=.* is out of range"),
    (SWITCH, 1, "x=1 is not True or False"),
    (SWITCH, None, "x=None is not True or False"),
]


@pytest.mark.parametrize(("option", "value", "message"), BAD)
def test_a_value_that_may_not_be_set_is_refused(option, value, message):
    with pytest.raises(OptionError, match=f"^{message}"):
        option.check("x", value)


DECLARED: dict[str, tuple[Any, str]] = {
    "a list": ([COUNT], "returned a list; return a dict of RowOptions by name"),
    "None": (None, "returned a NoneType"),
    "no keyword": ({"a b": COUNT}, "declares 'a b'; an option is named as a keyword argument is"),
    "no string": ({3: COUNT}, "declares 3; an option is named"),
    "no RowOption": ({"x": 0}, "declares 'x': a int is no RowOption"),
    "a dtype": ({"x": RowOption(0, torch.int32)}, r"declares 'x' of torch\.int32; options are of \(torch\.int64,"),
    "a default out of range": ({"x": RowOption(0, least=1)}, "declares 'x' as RowOption.*default=0 is out of range"),
    "a default of another type": ({"x": RowOption(0.5)}, r"declares 'x' as RowOption.*default=0\.5 is not an integer"),
    "no shape": ({"x": RowOption(0, shape=(0,))}, r"declares 'x': shape \(0,\) is no tuple of integers of at least 1"),
    "a table without a reader": ({"x": RowOption(0, shape=(2,))}, "declares 'x': reader='' reads no shape of 1 sizes"),
    "no reader": (
        {"x": RowOption(0, reader="me")},
        "declares 'x': reader='me' reads no shape of 0 sizes; .*'token_id'",
    ),
    "a reader of others": (
        {"x": RowOption(0, shape=(2,), reader="token_sequences")},
        "declares 'x': reader='token_sequences' reads no shape of 1 sizes",
    ),
    "nothing in range": ({"x": RowOption(3, least=3, most=2)}, "declares .* default=3 is out of range; pass at most 2"),
}


@pytest.mark.parametrize("name", DECLARED)
def test_a_declaration_that_makes_no_sense_is_refused(name):
    declared, message = DECLARED[name]
    with pytest.raises(PolicyError, match=rf"^Part\.options {message}"):
        check_options(Part(), declared, PolicyError)


class _First(Part):
    def options(self) -> dict[str, RowOption]:
        return {"x": COUNT, "y": SHARE}


class _Second(Part):
    def __init__(self, option: RowOption) -> None:
        super().__init__()
        self.option = option

    def options(self) -> dict[str, RowOption]:
        return {"y": self.option}


def test_parts_share_an_option_that_they_declare_alike():
    assert merge_options([_First(), _Second(SHARE)], PartError) == {"x": COUNT, "y": SHARE}


def test_an_option_that_means_two_things_is_refused():
    with pytest.raises(PartError, match=r"^_Second declares the option 'y' as RowOption.*another part as RowOption"):
        merge_options([_First(), _Second(RowOption(1.0, torch.float32, least=0.5))], PartError)
