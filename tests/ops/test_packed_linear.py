"""`emssd::packed_linear`: the C++ form against the plain product."""

import pytest
import torch
import torch.nn.functional as F

from emssd_compile.ops import load_cpu_kernels, packed_linear


@pytest.fixture(autouse=True)
def _kernels():
    assert load_cpu_kernels()


@pytest.mark.parametrize("tokens", [1, 7, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_is_the_linear_layer(tokens, dtype, bias):
    layer = torch.nn.Linear(48, 80, bias=bias, dtype=dtype).requires_grad_(False)
    x = torch.randn(1, tokens, 48, dtype=dtype)
    result = packed_linear(x, layer.weight, layer.bias)
    assert (result.shape, result.dtype) == ((1, tokens, 80), dtype)
    torch.testing.assert_close(result, F.linear(x, layer.weight, layer.bias))


def test_sees_a_weight_changed_in_place():
    x, weight = torch.randn(3, 16), torch.randn(8, 16)
    before = packed_linear(x, weight)
    weight.mul_(2)
    assert torch.equal(packed_linear(x, weight), 2 * before)


def test_weights_that_share_storage_are_told_apart():
    both = torch.randn(16, 32)
    x = torch.randn(3, 32)
    for weight in (both[:8], both[8:], both):
        torch.testing.assert_close(packed_linear(x, weight), x @ weight.T)
    torch.testing.assert_close(packed_linear(x[:, :16], both.T), x[:, :16] @ both)


def test_a_weight_that_takes_the_place_of_a_dead_one_is_packed_anew():
    x = torch.randn(2, 64)
    for _ in range(20):  # the allocator soon gives the same address again
        weight = torch.randn(64, 64)
        torch.testing.assert_close(packed_linear(x, weight), x @ weight.T)
        del weight


def test_works_under_inference_mode():
    with torch.inference_mode():
        x, weight = torch.randn(3, 16), torch.randn(8, 16)
        torch.testing.assert_close(packed_linear(x, weight), x @ weight.T)


def test_refuses_what_does_not_fit():
    with pytest.raises(RuntimeError, match="does not fit weight"):
        packed_linear(torch.randn(3, 15), torch.randn(8, 16))
