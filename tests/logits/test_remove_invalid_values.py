"""`RemoveInvalidValues`: what transformers does."""

import math
from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import InfNanRemoveLogitsProcessor

from emssd_compile.logits import RemoveInvalidValues
from tests.logits.against_transformers import Subject, bits, expected, processed, subjects


@given(subject=subjects(), data=st.data())
def test_it_is_that_of_transformers_and_other_rows_keep_what_they_have(subject: Subject, data: st.DataObject):
    logits = subject.seen.logits.clone()
    logits[:, 2], logits[:, 4], logits[::2, 7] = math.nan, math.inf, -math.inf
    subject = Subject(subject.rows, replace(subject.seen, logits=logits))
    values = [data.draw(st.booleans()) for _ in subject.rows]

    def theirs(row: int):
        return InfNanRemoveLogitsProcessor() if values[row] else None

    found = processed(RemoveInvalidValues(), subject, remove_invalid_values=values)
    wanted = torch.stack(expected(subject, theirs))
    assert torch.equal(bits(found[: len(wanted)]), bits(wanted))
