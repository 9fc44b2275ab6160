"""`emssd::packed_linear`: the C++ form against the plain product."""

import pytest
import torch
import torch.nn.functional as F

from emssd_compile import ops
from emssd_compile.ops import follow_packed, load_cpu_kernels


@pytest.fixture(autouse=True)
def _kernels():
    assert load_cpu_kernels()


def packed_linear(x, weights, biases):
    return ops.packed_linear(x, [*weights, *biases], len(weights))


@pytest.mark.parametrize("tokens", [1, 7, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_is_the_linear_layer(tokens, dtype, bias):
    layer = torch.nn.Linear(48, 80, bias=bias, dtype=dtype).requires_grad_(False)
    x = torch.randn(1, tokens, 48, dtype=dtype)
    result = packed_linear(x, [layer.weight], [layer.bias] if bias else [])
    assert (result.shape, result.dtype) == ((1, tokens, 80), dtype)
    torch.testing.assert_close(result, F.linear(x, layer.weight, layer.bias))


def test_sees_a_weight_changed_in_place():
    x, weight = torch.randn(3, 16), torch.randn(8, 16)
    before = packed_linear(x, [weight], [])
    weight.mul_(2)
    assert torch.equal(packed_linear(x, [weight], []), 2 * before)


@pytest.mark.parametrize("bias", [True, False])
def test_layers_of_one_input_are_one_product(bias):
    layers = [torch.nn.Linear(16, n, bias=bias).requires_grad_(False) for n in (8, 4, 3)]
    x = torch.randn(2, 5, 16)
    expected = torch.cat([layer(x) for layer in layers], -1)
    result = packed_linear(x, [layer.weight for layer in layers], [layer.bias for layer in layers if bias])
    torch.testing.assert_close(result, expected)


def test_a_change_that_no_version_counter_shows_is_seen_when_asked_for():
    x, weights = torch.randn(3, 16), [torch.randn(8, 16), torch.randn(4, 16)]
    before = packed_linear(x, weights, [])
    assert not follow_packed(weights)
    weights[1].data.mul_(2)
    assert follow_packed(weights)
    assert not follow_packed(weights)
    result = packed_linear(x, weights, [])
    assert torch.equal(result[:, :8], before[:, :8])
    assert torch.equal(result[:, 8:], 2 * before[:, 8:])


def test_weights_that_share_storage_are_told_apart():
    both = torch.randn(16, 32)
    x = torch.randn(3, 32)
    for weight in (both[:8], both[8:], both):
        torch.testing.assert_close(packed_linear(x, [weight], []), x @ weight.T)
    torch.testing.assert_close(packed_linear(x[:, :16], [both.T], []), x[:, :16] @ both)


def test_a_weight_that_takes_the_place_of_a_dead_one_is_packed_anew():
    x = torch.randn(2, 64)
    for _ in range(20):  # the allocator soon gives the same address again
        weight = torch.randn(64, 64)
        torch.testing.assert_close(packed_linear(x, [weight], []), x @ weight.T)
        del weight


def test_works_under_inference_mode():
    with torch.inference_mode():
        x, weight = torch.randn(3, 16), torch.randn(8, 16)
        torch.testing.assert_close(packed_linear(x, [weight], []), x @ weight.T)


def test_refuses_what_does_not_fit():
    with pytest.raises(RuntimeError, match="does not fit weight"):
        packed_linear(torch.randn(3, 15), [torch.randn(8, 16)], [])
    for number in (0, 2):
        with pytest.raises(RuntimeError, match=f"{number} weights among 1 parameters"):
            ops.packed_linear(torch.randn(3, 16), [torch.randn(8, 16)], number)
