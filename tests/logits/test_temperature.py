import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation.logits_process import TemperatureLogitsWarper

from emssd_compile.logits import Temperature, tempered
from tests.logits.filters import applied, rows, same_bits

temperatures = st.one_of(st.sampled_from([1e-6, 0.01, 1.0, 1e6]), st.floats(0.05, 5))


@given(batch=st.lists(st.tuples(rows, temperatures), min_size=1, max_size=4))
def test_logits_are_those_of_transformers(batch):
    logits = torch.stack([row.logits(torch.float32) for row, _ in batch])
    found = applied(Temperature(), logits, {"temperature": [value for _, value in batch]})
    for line, given_logits, (_, value) in zip(found, logits, batch, strict=True):
        torch.testing.assert_close(line, TemperatureLogitsWarper(value)(None, given_logits), rtol=1e-6, atol=0)


@given(row=rows, value=temperatures)
def test_half_precision_is_divided_in_float32(row, value):
    logits = row.logits(torch.bfloat16)
    found = tempered(logits[None], torch.tensor([value]))[0]
    assert same_bits(found, (logits.float() / torch.tensor(value)).bfloat16())


def test_nothing_overflows_at_the_lowest_temperature_there_is():
    least = Temperature().options()["temperature"].least
    found = tempered(torch.tensor([[1e6, 1.0, 0.0, -1e6, -torch.inf]]), torch.tensor([least]))
    assert found.isfinite().tolist() == [[True] * 4 + [False]]
    assert found.diff().lt(0).all()
