from hypothesis import given
from transformers.generation.logits_process import LogitNormalization

from emssd_compile.logits import Renormalize
from tests.logits.filters import applied, dtypes, rows, same_bits


@given(row=rows, dtype=dtypes)
def test_logits_are_those_of_transformers(row, dtype):
    logits = row.logits(dtype).repeat(2, 1)
    found = applied(Renormalize(), logits, {"renormalize_logits": [True, False]})
    assert same_bits(found[0], LogitNormalization()(None, logits.float())[0].to(dtype))
    assert same_bits(found[1], logits[1])
