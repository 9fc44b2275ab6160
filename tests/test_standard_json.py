"""What is read can be written again, and read by any program."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emssd_compile.standard_json import read_json

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(VALUES)
def test_json_is_read_as_python_reads_it(value):
    assert read_json(json.dumps(value)) == value


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": NaN}', "JSON has no NaN"),
        ("[Infinity]", "JSON has no Infinity"),
        ("-Infinity", "JSON has no -Infinity"),
        ("[1e999]", "1e999 is more than a float can be"),
        ("-1e999", "-1e999 is more"),
        ("[" * 100_000, "nested too deeply"),
        ("{\n", "^Expecting property name enclosed in double quotes, at column 2$"),
        ('{"a": 1,\n "b"}', "^Expecting ':' delimiter, at line 2, column 5$"),
    ],
)
def test_what_could_not_be_written_again_is_refused(text, said):
    with pytest.raises(ValueError, match=said):
        read_json(text)
