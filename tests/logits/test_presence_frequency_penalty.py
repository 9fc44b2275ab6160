"""`PresenceFrequencyPenalty`: OpenAI's formula, on what a row has generated, drafts of its path included."""

from collections import Counter
from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from emssd_compile.logits import PresenceFrequencyPenalty
from tests.logits.against_transformers import Subject, assert_like_transformers, subjects
from tests.logits.contexts import Line, context


@given(subject=subjects(), data=st.data())
def test_it_is_the_formula_of_the_interface(subject: Subject, data: st.DataObject):
    penalty = st.sampled_from([None, -2.0, -0.5, 0.25, 2.0])
    presence, frequency = ([data.draw(penalty) for _ in subject.rows] for _ in range(2))

    def theirs(row: int):
        def change(ids: Tensor, scores: Tensor) -> Tensor:
            """mu[j] -> mu[j] - c[j] * alpha_frequency - float(c[j] > 0) * alpha_presence"""
            counts = Counter(ids[0, int(subject.seen.prompt_lengths[row]) :].tolist())
            for token, count in counts.items():
                scores[0, token] -= count * (frequency[row] or 0.0) + (presence[row] or 0.0)
            return scores

        return change

    values = {"presence_penalty": presence, "frequency_penalty": frequency}
    assert_like_transformers(PresenceFrequencyPenalty(), subject, theirs, tolerance=2e-6, **values)


def test_what_is_in_half_precision_stays_in_it():
    seen = context([Line([2, 4, 4], [], [])], 0, trees=False)
    penalties = {"presence_penalty": torch.tensor([0.5]), "frequency_penalty": torch.tensor([1.0])}
    seen = replace(seen, logits=torch.zeros(1, 5, dtype=torch.bfloat16), options=penalties)
    logits = PresenceFrequencyPenalty()(seen).logits
    assert (logits.dtype, logits.tolist()) == (torch.bfloat16, [[0.0, 0.0, 0.0, 0.0, -2.5]])
