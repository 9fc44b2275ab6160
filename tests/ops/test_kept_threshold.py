"""`emssd::kept_threshold`: both forms agree with the definition, written to be obvious, whatever the keys are."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from emssd_compile import ops
from emssd_compile.ops._kept_threshold import reference

FORMS = {"C++": ops.kept_threshold, "reference": reference}
TINY, HUGE = 2.0**-149, 2.0**127  # the smallest denormal, and near the largest

keys = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, TINY, -TINY, HUGE, -HUGE, 1 + 2.0**-23]),
    st.floats(width=32, allow_nan=False),
)
# Sums of these are exact in float64 in any order, so every form has to find the same border.
weights = st.sampled_from([0.0, 0.0, 2.0**-20, 0.125, 0.5, 1.0, 3.0])
rows = st.lists(st.tuples(keys, weights), min_size=1, max_size=9)
limits = st.tuples(
    st.sampled_from([-3, 0, 1, 2, 3, 5, 8, 9, 100, 2**62]), st.sampled_from([0.0, 2.0**-22, 0.25, 0.5, 0.75, 1.0])
)


def expected(row: list[tuple[float, float]], most: int, share: float) -> float:
    """By the definition: a key is kept or not by what is larger than it."""
    kept = [(k, w) for k, w in row if most <= 0 or sum(other > k for other, _ in row) < most]
    if share < 1:
        limit = Fraction(share) * sum(Fraction(w) for _, w in kept)
        largest = max(k for k, _ in kept)
        kept = [(k, w) for k, w in kept if k == largest or sum(Fraction(v) for o, v in kept if o > k) < limit]
    return min(k for k, _ in kept)


def tensors(
    several: list[list[tuple[float, float]]], asked: list[tuple[int, float]]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    both = torch.tensor(several)
    most, share = zip(*asked, strict=True)
    return both[:, :, 0], both[:, :, 1], torch.tensor(most), torch.tensor(share)


@given(row=rows, asked=st.lists(limits, min_size=1, max_size=4))
@example(row=[(0.0, 1.0), (-0.0, 1.0), (-1.0, 1.0)], asked=[(1, 1.0), (0, 0.25)])
@example(row=[(2.0, 0.0), (1.0, 0.0)], asked=[(0, 0.5), (0, 0.0), (0, 1.0), (1, 0.5)])
@example(row=[(2.0, 1.0), (1.0, 1.0), (0.0, 0.0)], asked=[(0, 1.0), (0, 0.75), (0, 0.5), (2, 0.75)])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_any_small_row(cpu_kernels, form, row, asked):
    found = form(*tensors([row] * len(asked), asked))
    assert found.dtype == torch.float32
    assert found.tolist() == [expected(row, *one) for one in asked]


def test_the_example_of_the_docstring(kernels):
    row = [(3.0, 8.0), (2.0, 4.0), (2.0, 4.0), (1.0, 1.0)]
    given = tensors([row] * 3, [(2, 1.0), (0, 0.5), (2, 0.5)])
    assert ops.kept_threshold(*given).tolist() == [2, 2, 3]


def _logits(kind: str, size: int) -> Tensor:
    logits = torch.randn(6, size) * 3
    if kind == "bfloat16":
        return logits.bfloat16().float()
    if kind == "nearly the same":
        return 1 + torch.randint(0, 40, (6, size)) * 2.0**-23
    if kind == "mostly barred":
        return logits.masked_fill(torch.rand(6, size) < 0.99, -torch.inf)
    if kind == "ascending":
        return logits.sort().values
    return logits


@pytest.mark.parametrize("kind", ["normal", "bfloat16", "nearly the same", "mostly barred", "ascending"])
@pytest.mark.parametrize("size", [1, 63, 64, 65, 4999])
def test_both_forms_agree_on_a_vocabulary(cpu_kernels, kind, size):
    logits = _logits(kind, size)
    weights = logits.exp()
    for most in (0, 1, 50, 78, 79, 80, 2000, size - 1, size, size + 1):
        for share in (0.0, 0.1, 0.9, 0.999, 1.0):
            given = logits, weights, torch.full((6,), most), torch.full((6,), share)
            assert torch.equal(ops.kept_threshold(*given), reference(*given)), (most, share)


@pytest.mark.parametrize("nan", [math.nan, -math.nan])
def test_a_row_with_nan_has_no_threshold_and_no_effect_on_others(kernels, nan):
    keys = torch.arange(200.0).repeat(3, 1)
    keys[1, 77] = nan
    weights = torch.ones(3, 200)
    weights[2] = math.nan
    found = ops.kept_threshold(keys, weights, torch.tensor([3, 3, 3]), torch.tensor([0.5, 0.5, 1.0]))
    assert found.isnan().tolist() == [False, True, False]
    assert found[[0, 2]].tolist() == [198, 197]


def test_no_rows(kernels):
    empty = torch.empty(0)
    assert ops.kept_threshold(torch.empty(0, 5), torch.empty(0, 5), empty.long(), empty).shape == (0,)


def test_a_row_does_not_depend_on_others_nor_on_threads(cpu_kernels):
    keys = torch.randn(9, 5000)
    given = keys, keys.exp(), torch.arange(9) * 40, torch.linspace(0.1, 1, 9)
    alone = torch.cat([ops.kept_threshold(*(each[r : r + 1] for each in given)) for r in range(9)])
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(ops.kept_threshold(*given), alone)
    finally:
        torch.set_num_threads(threads)


def test_any_strides(kernels):
    keys = torch.randn(100, 4).t()
    both = torch.tensor([[3, 1], [0, 1], [7, 1], [2, 1]])
    given = keys, keys.contiguous().exp(), both[:, 0], torch.full((1,), 0.5).expand(4)
    assert torch.equal(ops.kept_threshold(*given), reference(*(each.contiguous() for each in given)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(2, 0)}, r"keys must be \[R, V\], got \[2, 0\]"),
        ({1: torch.zeros(2, 3)}, r"weights must be \[2, 4\] as keys, got \[2, 3\]"),
        ({2: torch.zeros(1).long()}, r"most and share must be \[2\], got \[1\] and \[2\]"),
        ({3: torch.zeros(3)}, r"most and share must be \[2\], got \[2\] and \[3\]"),
        ({0: torch.zeros(2, 4).double()}, "expected scalar type Float but found Double"),
    ],
)
def test_cpp_form_refuses_what_does_not_fit(cpu_kernels, change, message):
    given = {0: torch.zeros(2, 4), 1: torch.zeros(2, 4), 2: torch.zeros(2).long(), 3: torch.zeros(2)} | change
    with pytest.raises(RuntimeError, match=message):
        ops.kept_threshold(*given.values())


def test_opcheck(kernels):
    keys = torch.randn(3, 70)
    torch.library.opcheck(ops.kept_threshold, (keys, keys.exp(), torch.tensor([0, 5, 99]), torch.tensor([1.0, 0.5, 0])))
