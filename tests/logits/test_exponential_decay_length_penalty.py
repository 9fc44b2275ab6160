"""`ExponentialDecayLengthPenalty`: what transformers does, but for an EOS that is barred."""

import math
from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import ExponentialDecayLengthPenalty as Theirs

from emssd_compile.logits import ExponentialDecayLengthPenalty
from tests.logits.against_transformers import EOS, Subject, assert_like_transformers, processed, subjects
from tests.logits.contexts import Line, context

PAIR = st.tuples(st.integers(0, 4), st.sampled_from([0.5, 1.01, 1.6, 20.0]))


@given(subject=subjects(), data=st.data())
def test_it_is_that_of_transformers(subject: Subject, data: st.DataObject):
    values = [data.draw(st.none() | PAIR) for _ in subject.rows]

    def theirs(row: int):
        prompt = int(subject.seen.prompt_lengths[row])
        return None if values[row] is None else Theirs(values[row], EOS, prompt)

    option = {"exponential_decay_length_penalty": values}
    assert_like_transformers(ExponentialDecayLengthPenalty(), subject, theirs, tolerance=2e-6, **option)


def test_growth_beyond_all_numbers_makes_no_nan_and_no_end_that_is_barred():
    line = Line([5] * 9, [], [])
    seen = context([line], 0, trees=False)
    logits = torch.tensor([[7.0, 0.0, 2.0, -math.inf, 1.0]])
    seen = replace(seen, logits=logits, is_eos=torch.tensor([False, True, True, True, False]))
    found = processed(
        ExponentialDecayLengthPenalty(), Subject([line], seen), exponential_decay_length_penalty=[(0, 1e30)]
    )
    assert found.tolist() == [[7.0, 0.0, math.inf, -math.inf, 1.0]]
