"""`TypicalAcceptance` does what Medusa does, says that it is lossy, and is taken by its name only."""

import math

import pytest
import torch

import emssd_compile
from emssd_compile.acceptance import TypicalAcceptance, make_rule
from emssd_compile.acceptance.sampling import Odds
from emssd_compile.errors import OptionError
from emssd_compile.step.proposals import DETERMINISTIC
from tests.acceptance.draws import FALSE_ALARM, Tiny, decoded_by
from tests.acceptance.laws import TREES, Shape, World, chain


def _longest(world: World, shape: Shape, texts: list[int], tokens: list[int], rule: TypicalAcceptance) -> list[int]:
    """The first of the longest paths whose drafts pass, by a walk."""
    found: list[int] = [0]
    paths = {0: [0]}
    for draft, parent in enumerate(shape.parents):
        p = world.p[texts[parent]]
        entropy = -sum(float(x) * math.log(float(x)) for x in p if x > 0)
        if parent in paths and float(p[tokens[draft]]) > min(rule.epsilon, rule.delta * math.exp(-entropy)):
            paths[draft + 1] = [*paths[parent], draft + 1]
            if len(paths[draft + 1]) > len(found):
                found = paths[draft + 1]
    return found


@pytest.mark.parametrize("name", ["a chain", *TREES])
def test_the_longest_path_of_drafts_that_are_no_surprise_is_kept(name):
    shape = chain(3) if name == "a chain" else TREES[name]
    world, rule = World.of("zeros", 4, shape.depth, 3), TypicalAcceptance(epsilon=0.4, delta=0.9)
    tokens = torch.randint(4, (200, len(shape.parents)), generator=torch.Generator().manual_seed(0))
    texts = world.texts(shape, tokens)
    weights = world.p[texts].flatten(0, 1)
    offsets = torch.arange(201) * texts.shape[1]
    decision = rule.decide(Odds(shape.nodes(tokens), weights, offsets, torch.zeros(tokens.shape), DETERMINISTIC))
    seen = set()
    for row in range(200):
        path = _longest(world, shape, texts[row].tolist(), tokens[row].tolist(), rule)
        assert int(decision.node[row]) == path[-1]
        assert torch.equal(decision.weights[row], world.p[texts[row, path[-1]]]), "the next token is drawn from p"
        seen.add(len(path))
    assert len(seen) > 1


def test_decoding_with_it_says_that_it_is_lossy_and_is():
    likely, stats = decoded_by("typical", rows=1024, num_draft_tokens=3)
    assert likely < FALSE_ALARM
    assert (stats.guarantee, stats.lossless) == ("lossy", False)


def test_it_is_taken_by_its_name_only():
    assert isinstance(make_rule("typical"), TypicalAcceptance)
    with pytest.raises(OptionError, match=r"TypicalAcceptance is lossy.*taken only by a name"):
        make_rule(TypicalAcceptance())


def test_who_does_not_sample_is_given_the_models_own_tokens():
    model = Tiny(0)
    plain, fast = (
        emssd_compile.optimize(model, max_batch=2, max_length=24, backend="eager", layout="packed", acceptance=rule)
        for rule in ("greedy", "typical")
    )
    assert fast.generate([[3, 1, 3, 1]], max_new_tokens=12) == plain.generate([[3, 1, 3, 1]], max_new_tokens=12)
    assert "TypicalAcceptance is lossy" in str(fast.explain())


@pytest.mark.parametrize("options", [{"epsilon": 0}, {"epsilon": 1.5}, {"delta": -1}, {"delta": True}])
def test_thresholds_that_make_no_sense_are_refused(options):
    with pytest.raises(OptionError, match=f"TypicalAcceptance {next(iter(options))}=.* must be a number above 0"):
        TypicalAcceptance(**options)
