"""`emssd::grouped_linear`: both forms against the product in float64, and what a token's bits may depend on."""

from typing import Any

import pytest
import torch
from torch import Tensor

from emssd_compile import ops
from emssd_compile.ops import load_cpu_kernels
from emssd_compile.ops._grouped_linear import reference

FORMS: dict[str, Any] = {"C++": ops.grouped_linear, "reference": reference}
FEW = 64  # tokens that the kernel multiplies itself
DTYPES = [torch.float32, torch.bfloat16]
KINDS = [*((dtype, dtype) for dtype in DTYPES), *((dtype, torch.int8) for dtype in DTYPES)]
"""Of x and of weights."""


@pytest.fixture(autouse=True)
def _kernels():
    assert load_cpu_kernels()


def randoms(*size: int, dtype: torch.dtype) -> Tensor:
    """Integers are all that there are."""
    return torch.randn(size, dtype=dtype) if dtype.is_floating_point else torch.randint(-128, 128, size, dtype=dtype)


def grouped_linear(x, weights, biases=(), form="C++"):
    return FORMS[form](x, [*weights, *biases], len(weights))


def assert_is_product(result: Tensor, x: Tensor, weights, biases=()):
    """Sums over K in float32 are off by a few eps of what is summed; then they are rounded to the dtype."""
    exact = x.double() @ torch.cat(list(weights)).double().T
    summed = x.double().abs() @ torch.cat(list(weights)).double().abs().T
    if biases:
        exact = exact + torch.cat(list(biases)).double()
    bound = 4 * torch.finfo(torch.float32).eps * summed + torch.finfo(x.dtype).eps * exact.abs() + 1e-30
    assert result.dtype == x.dtype
    assert result.shape == exact.shape
    assert result.is_contiguous()
    assert bool(((result.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("dtype", "kind"), KINDS)
@pytest.mark.parametrize("depth", [1, 15, 48, 577])
def test_is_the_product(form, dtype, kind, depth):
    weights = [randoms(n, depth, dtype=kind) for n in (1, 80, 7)]
    biases = [torch.randn(len(w), dtype=dtype) for w in weights]
    for tokens in [*range(1, 18), FEW, FEW + 1]:
        x = torch.randn(1, tokens, depth, dtype=dtype)
        assert_is_product(grouped_linear(x, weights, biases, form), x, weights, biases)
        assert_is_product(grouped_linear(x, weights[1:], form=form), x, weights[1:])


@pytest.mark.parametrize(("dtype", "kind"), KINDS)
def test_a_token_has_the_same_bits_in_any_company_and_on_any_number_of_threads(dtype, kind):
    weights = [randoms(n, 203, dtype=kind) for n in (500, 31)]
    biases = [torch.randn(len(w), dtype=dtype) for w in weights]
    x = torch.randn(FEW, 203, dtype=dtype)
    alone = torch.cat([grouped_linear(token, weights, biases) for token in x.split(1)])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for tokens in (1, 2, 3, 5, 8, 9, 13, 24, FEW):
                assert torch.equal(grouped_linear(x[-tokens:], weights, biases), alone[-tokens:])
    finally:
        torch.set_num_threads(before)


def test_a_token_that_is_not_finite_stays_by_itself():
    x, weight = torch.randn(3, 33), torch.randn(9, 33)
    expected = grouped_linear(x, [weight])
    x[1] = torch.nan
    result = grouped_linear(x, [weight])
    assert bool(result[1].isnan().all())
    assert torch.equal(result[::2], expected[::2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [3, FEW + 1])
def test_biases_may_lie_in_any_way(dtype, tokens):
    x, weight = torch.randn(tokens, 7, dtype=dtype), torch.randn(8, 7, dtype=dtype)
    for bias in (torch.randn(16, dtype=dtype)[::2], torch.randn(1, dtype=dtype).expand(8)):
        assert_is_product(grouped_linear(x, [weight], [bias]), x, [weight], [bias])


@pytest.mark.parametrize(("dtype", "kind"), KINDS)
@pytest.mark.parametrize("tokens", [3, FEW + 1])
def test_weights_and_tokens_may_lie_in_any_way(dtype, kind, tokens):
    both, x = randoms(40, 64, dtype=kind), torch.randn(64, tokens, dtype=dtype).T
    weights = [both[:8, :40], both[::2, 3:43], both[:, :30].T, both[:1, :40].expand(5, 40), both[:6, ::2]]
    for weight in weights:
        part = x[:, : weight.shape[1]]
        assert_is_product(grouped_linear(part, [weight]), part, [weight])


def test_there_may_be_no_tokens_and_no_columns():
    weight = torch.randn(4, 6)
    assert grouped_linear(torch.empty(2, 0, 6), [weight, weight]).shape == (2, 0, 8)
    assert grouped_linear(torch.randn(2, 6), [weight[:0]]).shape == (2, 0)
    assert torch.equal(grouped_linear(torch.empty(2, 0), [weight[:, :0]]), torch.zeros(2, 4))


@pytest.mark.parametrize("tokens", [3, FEW + 1])
def test_weights_are_read_as_they_are_now(tokens):
    x, weight = torch.randn(tokens, 16), torch.nn.Parameter(torch.randn(8, 16))
    before = grouped_linear(x, [weight])
    weight.data.mul_(2)
    after = grouped_linear(x, [weight])
    assert torch.equal(after, 2 * before)


@pytest.mark.parametrize("tokens", [3, FEW + 1])
def test_works_under_inference_mode(tokens):
    with torch.inference_mode():
        x, weight = torch.randn(tokens, 16), torch.randn(8, 16)
        assert_is_product(grouped_linear(x, [weight]), x, [weight])


def test_other_dtypes_are_left_to_torch():
    x, weight, bias = torch.randn(3, 16).double(), torch.randn(8, 16).double(), torch.randn(8).double()
    torch.testing.assert_close(grouped_linear(x, [weight], [bias]), x @ weight.T + bias)


def test_refuses_what_does_not_fit():
    with pytest.raises(RuntimeError, match="does not fit weight"):
        grouped_linear(torch.randn(3, 15), [torch.randn(8, 16)])
    with pytest.raises(RuntimeError, match=r"bias \[7\] does not fit weight"):
        grouped_linear(torch.randn(3, 16), [torch.randn(8, 16)], [torch.randn(7)])
    for number in (0, 2):
        with pytest.raises(RuntimeError, match=f"{number} weights among 1 parameters"):
            ops.grouped_linear(torch.randn(3, 16), [torch.randn(8, 16)], number)
