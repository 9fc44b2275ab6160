"""`precision`: a finer dtype for a while, and the module as it was afterwards."""

import copy

import torch

from emssd_compile.precision import Precision, coarsest
from tests.zoo import toy_model


def test_half_precision_weights_compute_as_float32_ones():
    model = toy_model("llama").bfloat16()
    before = {name: (p, p._version, p.dtype) for name, p in model.named_parameters()}
    ids, float32 = torch.arange(3, 20)[None], copy.deepcopy(model).float()
    with torch.no_grad(), Precision(torch.float32):
        logits = model(ids).logits
    assert logits.dtype == torch.float32
    assert {name: (p, p._version, p.dtype) for name, p in model.named_parameters()} == before
    with torch.inference_mode():
        torch.testing.assert_close(logits, float32(ids).logits, rtol=1e-5, atol=1e-5)
        assert model(ids).logits.dtype == torch.bfloat16


def test_finer_dtypes_stay():
    with Precision(torch.float32):
        assert (torch.ones(2, dtype=torch.float64) + 1).dtype == torch.float64
        assert (torch.ones(2, dtype=torch.int64) + 1).dtype == torch.int64
        assert torch.zeros(2, dtype=torch.float16).dtype == torch.float32


def test_the_coarsest_rounds_most():
    assert coarsest([torch.float32, torch.bfloat16, torch.float16]) == torch.bfloat16
    assert coarsest([torch.float64, torch.int64]) == torch.float64
    assert coarsest([torch.int64]) == torch.float32
