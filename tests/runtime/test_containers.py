"""Batches as arrays of numpy are taken apart like tensors, and what holds no ids is named."""

import numpy as np
import pytest
import torch

from emssd_compile.errors import InvalidInputError
from emssd_compile.runtime.containers import split_rows

ROWS = [[5, 6, 7], [8, 9, 10]]


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.int16, np.uint8, np.uint16, np.uint32, np.uint64, ">i4"])
def test_an_array_of_any_integer_holds_ids(dtype):
    kind, rows, device = split_rows(np.array(ROWS, dtype=dtype), "inputs")
    assert (kind, device) == ("array", torch.device("cpu"))
    assert [row.tolist() for row in rows] == ROWS
    assert {row.dtype for row in rows} == {torch.int64}
    kind, rows, _ = split_rows([np.array(row, dtype=dtype) for row in ROWS], "inputs")
    assert kind == "arrays"
    assert [row.tolist() for row in rows] == ROWS


def test_an_array_that_is_read_only_or_strided_is_read_and_not_kept():
    array = np.array(ROWS)[:, ::-1]
    array.flags.writeable = False
    _, rows, _ = split_rows(array, "inputs")
    rows[0][0] = 99
    assert array.tolist() == [row[::-1] for row in ROWS]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.array(["a"]), "inputs is an array of <U1"),
        (np.array([[1], [1, 2]], dtype=object), "inputs is an array of object"),
        (np.array([[1j]]), "inputs is an array of complex128"),
        (np.array([5, 6]), "1-D"),
        (np.zeros((0, 3), dtype=int), "empty batch"),
        ([np.array([5]), [6]], "mixes tensors, arrays and lists"),
        ([np.array([5]), torch.tensor([6])], "mixes tensors, arrays and lists"),
        ([np.array([[5]])], "row 0 of inputs has 2 dimensions"),
        ([np.array("a")], "row 0 of inputs is an array of <U1"),
        ([[np.True_, 6]], "row 0 of inputs is not a list of token ids"),
        ([[6, True]], "row 0 of inputs mixes bools and numbers"),
        ([torch.ones(2, dtype=torch.int64, device="meta")], "row 0 of inputs is on the meta device"),
    ],
)
def test_what_holds_no_ids_is_named(value, message):
    with pytest.raises(InvalidInputError, match=message):
        split_rows(value, "inputs")
