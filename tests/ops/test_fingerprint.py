"""`emssd::fingerprint`: it changes with every bit, in all of its forms."""

import pytest
import torch

from emssd_compile.ops import fingerprint, load_cpu_kernels
from emssd_compile.ops._fingerprint import on_device, reference

FORMS = {"C++": fingerprint, "reference": reference, "on device": on_device}


@pytest.fixture(autouse=True)
def _kernels():
    assert load_cpu_kernels()


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64])
def test_any_element_counts(form, dtype):
    tensor = torch.zeros(3, 67, dtype=dtype)
    seen = {form(tensor)}
    for index in range(tensor.numel()):
        tensor.view(-1)[index] = 1
        seen.add(form(tensor))
    assert len(seen) == tensor.numel() + 1


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_changes_that_a_sum_would_miss_are_seen(form):
    tensor = torch.randn(64, 64)
    before = form(tensor)
    for change in (
        lambda t: t[:, 1].neg_(),
        lambda t: t.neg_(),
        lambda t: t.copy_(t.flip(0)),
        lambda t: t.copy_(t.roll(16, 1)),
    ):
        copy = tensor.clone()
        change(copy)
        assert form(copy) != before
    assert form(tensor.clone()) == before


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_only_the_values_count(form):
    tensor = torch.randn(300, 400)  # longer than one chunk of the C++ form
    assert form(tensor.T.contiguous().T) == form(tensor)
    assert form(torch.empty(0)) == form(torch.empty(0))
