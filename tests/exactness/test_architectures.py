"""Every architecture with every drafter gives, in fp32, the tokens of its own greedy decoding of each prompt alone."""

import pytest

from tests.exactness.compiled import DRAFTERS, NEW_TOKENS, K, assert_exact, rechunked, target
from tests.exactness.models import ARCHITECTURES, prompt

BATCHES = {
    "one row": (70,),
    "two rows": (1, 70),
    "five rows": (3, 70, 1, 17, 40),
    "eight rows": (1, 70, 2, 33, 64, 5, 19, 48),
    "more prompts than rows": (7, 61, 1, 11, 23, 2, 70, 3, 17, 5, 40),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_text_of_the_model_depends_on_its_context(architecture):
    """Else the other tests here would show nothing."""
    reference = target(architecture).reference
    texts = [reference(prompt(n), NEW_TOKENS) for n in BATCHES["eight rows"]]
    assert len({tuple(text[-5:]) for text in texts}) > len(texts) // 2
    assert len({token for text in texts for token in text}) >= 15


# Drafts that are accepted and refused in one step, with every architecture. A model that drafts, with every kind of
# attention and of positions; each of the others with one architecture. All in turn if --long.
ALWAYS = ("sometimes-wrong", "draft-model")
KINDS = ("gpt2", "llama", "mistral", "bloom", "falcon", "own-positions")
IN_TURN = [name for name in DRAFTERS if name not in ALWAYS]
CASES = [
    pytest.param(
        architecture,
        drafter,
        marks=()
        if drafter == ALWAYS[0] or (drafter in IN_TURN and place < len(IN_TURN)) or architecture in KINDS
        else pytest.mark.long,
    )
    for place, architecture in enumerate(ARCHITECTURES)
    for drafter in (*ALWAYS, IN_TURN[place % len(IN_TURN)])
]


@pytest.mark.parametrize(("architecture", "drafter"), CASES)
def test_the_tokens_are_the_models_own(architecture, drafter):
    compiled = target(architecture)
    reference = compiled.reference
    fast = compiled.optimize(compiled.drafter(drafter))
    assert fast._engine.chunk < 70  # long prompts take several steps

    for lengths in BATCHES.values():
        assert_exact(fast, reference, [prompt(n) for n in lengths], NEW_TOKENS)
    assert fast.stats.num_emitted_tokens == NEW_TOKENS * sum(map(len, BATCHES.values()))
    _check_acceptance(drafter, fast.stats)

    prompts = [prompt(n) for n in BATCHES["five rows"]]
    assert_exact(rechunked(fast, 512), reference, prompts, NEW_TOKENS)

    # The second token after one prompt, the sixth after another, ...: rows end at different times, within drafts.
    eos = [reference(ids, NEW_TOKENS)[place] for ids, place in zip(prompts, (1, 5, 9, 12, 14), strict=True)]
    ended = assert_exact(fast, reference, prompts, NEW_TOKENS, eos_token_id=eos)
    assert len({len(new) for new in ended}) > 1
    if drafter == "sometimes-wrong":  # a form of the step of its own
        assert_exact(fast, reference, prompts, NEW_TOKENS, eos_token_id=eos, min_new_tokens=3)


def _check_acceptance(drafter: str, stats) -> None:
    """The drafter did what its name says, so that what is meant to be tested is tested."""
    drafted, accepted = stats.num_draft_tokens, stats.num_accepted_draft_tokens
    if drafter == "none":
        assert drafted == 0
    elif drafter != "prompt-lookup":  # a text without repetition gives it nothing to look up
        assert drafted > 0
    if drafter == "always-right":
        assert accepted == drafted
        assert stats.acceptance_histogram[K] > 0
    if drafter == "always-wrong":
        assert accepted == 0
    if drafter in ("sometimes-wrong", "draft-model"):
        assert 0 < accepted < drafted
