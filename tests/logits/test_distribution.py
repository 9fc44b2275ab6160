"""What holds for all filters of sampling."""

import pytest
import torch

from emssd_compile import ops
from emssd_compile.errors import OptionError
from emssd_compile.logits import FILTERS, LogitContext, LogitsProcessor, Processed, make_processors
from emssd_compile.logits.distribution import barred, barred_below, entropy
from tests.logits.filters import applied, rubbish, same_bits

STRICT: dict[str, float] = {
    "temperature": 0.01,
    "top_h": 0.01,
    "top_k": 1,
    "top_p": 0.01,
    "min_p": 1.0,
    "typical_p": 0.01,
    "epsilon_cutoff": 0.9,
    "eta_cutoff": 0.9,
    "renormalize_logits": True,
}


@pytest.fixture(autouse=True, scope="module")
def _kernels():
    assert ops.load_cpu_kernels()


@pytest.mark.parametrize("make", FILTERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_that_ask_for_nothing_keep_their_bits_whatever_others_ask_for(make, dtype):
    """NaN, infinities and -0 among them."""
    processor = make()
    logits = torch.cat([rubbish(), torch.randn(7, 130), rubbish()]).to(dtype)
    options = {
        name: [option.default] * 7 + [STRICT[name]] * 7 + [option.default] * 7
        for name, option in processor.options().items()
    }
    found = applied(processor, logits, options)
    assert same_bits(found[:7], logits[:7])
    assert same_bits(found[14:], logits[14:])
    assert not (found[7:14] == logits[7:14]).all(1).any(), "the others did ask for something"


@pytest.mark.parametrize("make", FILTERS)
def test_a_row_is_filtered_alone(make):
    """With rows of rubbish beside it, it comes out as without them."""
    processor = make()
    logits = torch.randn(3, 130) * 3
    among = torch.cat([rubbish(), logits, rubbish()])
    options = processor.options()
    alone = applied(processor, logits, {name: [STRICT[name]] * 3 for name in options})
    found = applied(processor, among, {name: [STRICT[name]] * 17 for name in options})
    assert same_bits(found[7:10], alone)


@pytest.mark.parametrize("make", FILTERS)
def test_one_token_at_least_is_left(make):
    """Also where a single one was allowed, or all are alike."""
    processor = make()
    logits = torch.full((3, 130), -torch.inf)
    logits[0, 77], logits[1, :2], logits[2] = 5.0, torch.tensor([300.0, -300.0]), 1.0
    found = applied(processor, logits, {name: [STRICT[name]] * 3 for name in processor.options()})
    assert found[:2].argmax(1).tolist() == [77, 0]
    assert (found > -torch.inf).any(1).all()


RANGES: dict[str, tuple[list[float], list[float]]] = {
    "temperature": ([2.0**-100, 1e9], [0, -1.0]),
    "top_h": ([0, 1], [-0.1, 1.1]),
    "top_k": ([0, 1, 10**9], [-1]),
    "top_p": ([0, 1], [-0.1, 1.1]),
    "min_p": ([0, 1], [-0.1, 1.1]),
    "typical_p": ([2.0**-100, 1], [0, 1.1]),
    "epsilon_cutoff": ([0, 0.99], [-0.1, 1]),
    "eta_cutoff": ([0, 0.99], [-0.1, 1]),
}


def test_values_are_in_the_range_of_transformers():
    options = {name: option for make in FILTERS for name, option in make().options().items()}
    assert options.keys() == RANGES.keys() | {"renormalize_logits"}
    for name, (good, bad) in RANGES.items():
        assert options[name].needs == "do_sample"
        for value in good:
            options[name].check(name, value)
        for value in bad:
            with pytest.raises(OptionError, match=f"{name}=.* is out of range; pass at "):
                options[name].check(name, value)


def test_the_entropy_of_what_is_impossible():
    logits = torch.tensor([[0.0, 0.0, -torch.inf, -torch.inf], [9.0, -torch.inf, -torch.inf, -torch.inf]])
    torch.testing.assert_close(entropy(logits.log_softmax(1)), torch.tensor([[2.0], [1.0]]).log())


def test_what_is_barred_and_what_is_not():
    logits, none = torch.tensor([[1.0, 2.0, 2.0]]), torch.tensor([[0.0]])
    assert barred(logits, logits > 1).tolist() == [[1, -torch.inf, -torch.inf]]
    probabilities = logits.softmax(1)
    assert same_bits(barred_below(logits, probabilities, none), logits)
    assert barred_below(logits, probabilities, none + 1).tolist() == [[-torch.inf, 2, 2]]


def test_filters_come_behind_all_other_processors_those_of_users_too():
    class Own(LogitsProcessor):
        def forward(self, context: LogitContext) -> Processed:
            return Processed(context.logits)

    every = make_processors([Own()])
    assert [type(each) for each in every[-len(FILTERS) :]] == [*FILTERS]
    assert [each.is_filter for each in every] == [False] * (len(every) - len(FILTERS)) + [True] * len(FILTERS)
    assert isinstance(every[-len(FILTERS) - 1], Own)
