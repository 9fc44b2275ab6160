"""What `generate` tells beside the tokens is what transformers' `generate` tells, whoever drafts."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, RepetitionPenaltyLogitsProcessor

import emssd_compile
from emssd_compile import OptimizedModel
from emssd_compile.drafters import Drafter
from emssd_compile.errors import OptionError, ProbeError
from emssd_compile.probes import LogProbs
from tests.exactness.drafters import Oracle, OracleTree
from tests.exactness.parts import Margin

V, NEW, ROWS, CAPACITY, K = 61, 14, 2, 48, 3
LENGTHS = (5, 9, 2)
PENALTY = {"repetition_penalty": 1.3}
BESIDE: dict[str, Any] = {"output_scores": True, "output_logits": True, "return_dict_in_generate": True}
TOLERANCE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


@functools.cache
def _model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=V, num_key_value_heads=1, initializer_range=0.4, **sizes)).eval()


PROMPTS = [torch.arange(n) * 7 % V for n in LENGTHS]


@functools.cache
def _expected(eos: int | None = None) -> list[Any]:
    """What transformers says of each prompt alone."""
    end: dict[str, Any] = {"eos_token_id": eos, "pad_token_id": 0}
    options = {"max_new_tokens": NEW, "do_sample": False, **PENALTY, **BESIDE, **end}
    return [_model().generate(ids[None], attention_mask=torch.ones_like(ids[None]), **options) for ids in PROMPTS]


def _oracle() -> Oracle:
    texts = [out.sequences[0].tolist() for out in _expected()]
    return Oracle(texts, CAPACITY, K, wrong_of_seven=2)


DRAFTERS: dict[str, Any] = {
    "none": lambda: "none",
    "chain": _oracle,
    "tree": lambda: OracleTree(_oracle(), 7),
    "draft-model": _model,
}


@functools.cache
def _fast(drafter: str) -> OptimizedModel:
    chosen: str | Drafter = DRAFTERS[drafter]()
    return emssd_compile.optimize(
        _model(), chosen, max_batch=ROWS, max_length=CAPACITY, backend="eager", layout="packed"
    )


def _decode(fast: OptimizedModel, **options: Any) -> Any:
    chosen = {"max_new_tokens": NEW, "eos_token_id": None, **PENALTY, **BESIDE, **options}
    return fast.generate([ids.tolist() for ids in PROMPTS], **chosen)


def _of_row(steps: tuple[Tensor, ...], row: int) -> Tensor:
    return torch.stack(steps)[:, row]


@pytest.mark.parametrize(("drafter", "lag"), [("none", 1), ("chain", 0), ("tree", 1), ("draft-model", 0)])
def test_scores_logits_and_log_probabilities_are_those_of_transformers(drafter, lag):
    fast = _fast(drafter)
    fast._engine.lag = lag
    fast.stats.reset()
    found = _decode(fast, logprobs=True, top_logprobs=4)
    assert (fast.stats.num_accepted_draft_tokens > NEW // 2) is (drafter != "none")
    assert list(found) == ["sequences", "scores", "logits", "logprobs", "top_logprobs", "top_logprob_ids"]
    for row, (expected, ids) in enumerate(zip(_expected(), PROMPTS, strict=True)):
        assert found.sequences[row] == expected.sequences[0].tolist()
        for name in ("scores", "logits"):
            torch.testing.assert_close(_of_row(found[name], row), _of_row(expected[name], 0), **TOLERANCE)
        chosen = _model().compute_transition_scores(expected.sequences, expected.scores, normalize_logits=True)[0]
        torch.testing.assert_close(found.logprobs[row], chosen, **TOLERANCE)
        top = _of_row(expected.scores, 0).log_softmax(-1).topk(4, -1)
        torch.testing.assert_close(found.top_logprobs[row], top.values, **TOLERANCE)
        assert torch.equal(found.top_logprob_ids[row][:, 0], torch.tensor(found.sequences[row][len(ids) :]))
        assert torch.equal(found.top_logprob_ids[row], top.indices)


@pytest.mark.parametrize("drafter", ["none", "tree"])
def test_a_row_that_ends_early_is_told_of_no_token_behind_its_end(drafter):
    texts = [out.sequences[0, len(ids) :].tolist() for out, ids in zip(_expected(), PROMPTS, strict=True)]
    eos = texts[0][NEW // 2]
    found = _decode(_fast(drafter), eos_token_id=eos, pad_token_id=0, logprobs=True)
    lengths = [len(row) - len(ids) for row, ids in zip(found.sequences, PROMPTS, strict=True)]
    assert lengths[0] <= NEW // 2 + 1 < max(lengths) == len(found.scores)
    for row, (length, expected) in enumerate(zip(lengths, _expected(eos), strict=True)):
        assert len(found.logprobs[row]) == length == len(expected.scores)
        scores = _of_row(found.scores, row)
        torch.testing.assert_close(scores[:length], _of_row(expected.scores, 0), **TOLERANCE)
        assert not scores[length:].any()


def test_a_stopping_criterion_cuts_what_is_told_too():
    stop = lambda ids, scores: ids.shape[1] >= 12  # noqa: E731  (transformers' criteria: ids are padded on the left)
    found = _decode(_fast("tree"), stopping_criteria=[stop], logprobs=True)
    new = [len(row) - len(ids) for row, ids in zip(found.sequences, PROMPTS, strict=True)]
    assert [len(line) for line in found.logprobs] == new == [3] * len(PROMPTS)
    assert len(found.scores) == 3


def test_drawn_tokens_are_told_of_in_the_distribution_that_they_were_drawn_from():
    found = _decode(
        _fast("draft-model"), do_sample=True, temperature=0.7, top_k=5, seed=3, logprobs=True, top_logprobs=9
    )
    for row, ids in enumerate(PROMPTS):
        scores, new = _of_row(found.scores, row), torch.tensor(found.sequences[row][len(ids) :])
        assert (scores.isfinite().sum(-1) == 5).all(), "what top-k cuts has -inf"
        law = scores.log_softmax(-1)
        torch.testing.assert_close(found.logprobs[row], law.gather(1, new[:, None])[:, 0], **TOLERANCE)
        assert (found.top_logprobs[row][:, :5].exp().sum(-1) - 1).abs().max() < 1e-6
        assert (found.top_logprobs[row][:, 5:] == -torch.inf).all()
        model = _model()(torch.tensor(found.sequences[row])[None]).logits[0, len(ids) - 1 : -1]
        torch.testing.assert_close(_of_row(found.logits, row), model, **TOLERANCE)


def test_behind_python_of_the_users_own_scores_are_what_it_made_of_them():
    processors = [RepetitionPenaltyLogitsProcessor(PENALTY["repetition_penalty"])]
    found = _decode(_fast("tree"), repetition_penalty=1.0, logits_processor=processors)
    for row, expected in enumerate(_expected()):
        assert found.sequences[row] == expected.sequences[0].tolist()
        for name in ("scores", "logits"):
            torch.testing.assert_close(_of_row(found[name], row), _of_row(expected[name], 0), **TOLERANCE)


def test_rows_that_ask_and_rows_that_do_not():
    both = _decode(_fast("tree"), logprobs=True, top_logprobs=3)
    found = _decode(
        _fast("tree"), logprobs=[True, False, True], output_scores=[False, True, False], top_logprobs=[0, 2, 1]
    )
    assert found.sequences == both.sequences
    assert found.logprobs[1] is None
    assert torch.equal(found.logprobs[2], both.logprobs[2])
    assert found.top_logprobs[0] is None
    assert [found.top_logprobs[row].shape for row in (1, 2)] == [(NEW, 2), (NEW, 1)]
    assert torch.equal(_of_row(found.scores, 1), _of_row(both.scores, 1))
    assert not _of_row(found.scores, 0).any()


def test_nothing_is_told_that_nobody_asked_for():
    fast = _fast("chain")
    out = _decode(fast, output_scores=False, output_logits=False)
    assert list(out) == ["sequences"]
    assert out.scores is None
    assert out.logits is None
    assert not fast._engine.variant.signature.readings, "nor compiled in"
    assert isinstance(_decode(fast, output_scores=False, output_logits=None, return_dict_in_generate=False), list)


def test_an_output_is_read_as_transformers_own():
    out = _decode(_fast("chain"))
    assert out[0] is out["sequences"] is out.sequences
    assert out[1] is out.scores
    assert out[:2] == (out.sequences, out.scores)
    assert out.to_tuple() == (out.sequences, out.scores, out.logits)
    assert (out.attentions, out.hidden_states, out.past_key_values) == (None, None, None)
    assert [*dict(out)] == ["sequences", "scores", "logits"]


@pytest.mark.parametrize(
    ("probes", "message"), [([Margin(), Margin()], "'margin'"), ([LogProbs()], "two probes tell of 'logprobs'")]
)
def test_probes_that_tell_of_the_same_are_refused_by_optimize(probes, message):
    with pytest.raises(ProbeError, match=message):
        emssd_compile.optimize(_model(), "none", max_batch=1, max_length=16, backend="eager", probes=probes)


def test_several_sequences_of_a_prompt_are_told_of_each():
    found = _decode(_fast("draft-model"), do_sample=True, top_k=0, seed=1, num_return_sequences=2, logprobs=True)
    assert len(found.logprobs) == len(found.sequences) == 2 * len(PROMPTS)
    assert found.scores[0].shape == (2 * len(PROMPTS), V)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"logprobs": True, "return_dict_in_generate": False},
            "logprobs: the sequences alone.*return_dict_in_generate",
        ),
        ({"top_logprobs": 21}, "top_logprobs=21 is out of range; pass at most 20"),
        ({"logprobs": 3}, "logprobs=3"),
        ({"output_scores": "yes"}, "output_scores='yes'"),
        ({"logprobs": [True]}, "logprobs has 1 values for 3 prompts"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_any_work(options, message):
    fast = _fast("none")
    fast.stats.reset()
    with pytest.raises(OptionError, match=message):
        _decode(fast, **{"output_scores": False, "output_logits": False, **options})
    assert fast.stats.num_steps == 0
