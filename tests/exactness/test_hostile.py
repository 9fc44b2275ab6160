"""What looks plain in a short text: it decodes the model's own tokens however long the text, or it is refused."""

import pytest
import torch

import emssd_compile
from emssd_compile.errors import UnsupportedModelError
from emssd_compile.ops import ragged_attention
from tests.exactness import hostile
from tests.exactness.models import Reference, prompt
from tests.zoo import VOCABULARY


def _optimize(model, longest):
    return emssd_compile.optimize(model, max_batch=3, max_length=longest, backend="eager", prefill_chunk=64)


REFUSED = {
    "rows that turn by the longest row's length": (hostile.RopeByLongestRow, "positions of one row changed"),
    "a scale by the longest row's length": (hostile.ScaleByLongestRow, "positions of one row changed"),
    "experts that drop tokens over 32": (hostile.DroppingExperts, "tokens of other rows changed the outputs of a row"),
    "experts that take a share of the tokens": (hostile.CapacityByLength, "tokens are mixed outside attention"),
    "a window, and first tokens kept": (hostile.SinkTokens, "neither causal nor a sliding window"),
    "the mean of the tokens so far": (hostile.RunningMean, "tokens are mixed outside attention"),
    "token shift": (hostile.TokenShift, "tokens are mixed outside attention"),
    "statistics over tokens": (hostile.TokenNorm, "tokens are mixed outside attention"),
    "positions counted from the end": (hostile.LastRowsOfATable, "tokens are mixed outside attention"),
    "a table of 48 positions": (hostile.ShortTable, "the table positions_weight holds 48 positions"),
}


@pytest.mark.parametrize(("model", "reason"), REFUSED.values(), ids=REFUSED)
def test_is_refused_with_the_reason(model, reason):
    with pytest.raises(UnsupportedModelError, match=reason) as caught:
        _optimize(model(128), 128)
    assert caught.value.node is not None


@pytest.mark.parametrize("model", [hostile.RopeByLongestRow, hostile.ScaleByLongestRow, hostile.DroppingExperts])
def test_rows_that_influence_one_another_are_refused_in_half_precision(model):
    with pytest.raises(UnsupportedModelError, match="tokens are mixed outside attention"):
        _optimize(model(128).bfloat16(), 128)


EXACT = {
    "plain": hostile.Plain,
    "a table of positions that stops counting": hostile.TableOfClampedPositions,
    "slopes that end at a fractional distance": hostile.FloatWindowWithSlopes,
    "chunks": hostile.Chunks,
    "chunks longer than any row": hostile.LongChunks,
    "a scale by each token's own position": hostile.ScaleByPosition,
    "a table that begins again": hostile.LateTable,
}


@pytest.mark.parametrize("model", EXACT.values(), ids=EXACT)
def test_decodes_the_models_own_tokens(model):
    built = model(128)
    reference, fast = Reference(built), _optimize(built, 128)
    prompts = [prompt(n) for n in (110, 3, 45, 60, 1)]
    assert fast.generate(prompts, max_new_tokens=14) == [[*ids, *reference(ids, 14)] for ids in prompts]


def test_a_window_is_found_in_the_elements_of_a_buffer():
    built = hostile.WindowInABuffer(2048)
    fast = _optimize(built, 2048)
    assert _windows(fast) == {1100}
    text = torch.randint(VOCABULARY, (1300,), generator=torch.Generator().manual_seed(0)).tolist()
    prompts = [text, text[:1090], text[:5]]
    reference = Reference(built)
    assert fast.generate(prompts, max_new_tokens=12) == [[*ids, *reference(ids, 12)] for ids in prompts]


def test_a_fractional_window_is_found_in_half_precision():
    """By rounding alone the model would pass for one without a window."""
    assert _windows(_optimize(hostile.FloatWindowWithSlopes(128).bfloat16(), 128)) == {61}


def _windows(fast) -> set[int]:
    return {n.kwargs["window"] for n in fast.graph_module.graph.nodes if n.target == ragged_attention}


def test_a_table_of_positions_says_how_long_rows_may_be():
    with pytest.raises(UnsupportedModelError) as caught:
        _optimize(hostile.ShortTable(128), 128)
    assert caught.value.remedy == "pass max_length=48 or less"
    built = hostile.ShortTable(128)
    reference, fast = Reference(built), _optimize(built, 48)
    assert fast.generate([prompt(40)], max_new_tokens=8) == [[*prompt(40), *reference(prompt(40), 8)]]


def test_a_token_beyond_the_embedding_is_barred():
    """The model's own decoding would end with an IndexError behind it."""
    built = hostile.WiderHead(128)
    with torch.no_grad():
        built.head.bias[VOCABULARY:] += 1e4  # the head's choice, always
    fast = _optimize(built, 128)
    new = fast.generate([prompt(9)], max_new_tokens=8)[0][9:]
    with torch.no_grad():
        built.head.bias[VOCABULARY:] -= 1e6
    assert new == Reference(built)(prompt(9), 8)
    assert fast.explain().record("bar_unreadable").notes == (
        f"barred: tokens {VOCABULARY} to {VOCABULARY + 31}, which the embedding cannot take, are never emitted",
    )


def test_explain_says_what_was_proved_and_what_was_tested_and_up_to_where():
    explanation = _optimize(hostile.Plain(128), 128).explain()
    notes = {r.name: r.notes for r in explanation.records}
    assert notes["raise_attention"] == ("tested: masks among positions up to 128 (all)",)
    assert notes["lift_positions"] == ("tested: positions up to 128",)
    assert notes["prove_token_pointwise"] == ("proved: nothing but attention mixes tokens",)
    (note,) = notes["selfcheck"]
    assert note.startswith("tested: logits of rows of (1, 6, 19, 128) tokens side by side, in float32:")
    assert "(1, 6, 19, 128) tokens" in str(explanation)
