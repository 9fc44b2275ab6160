"""`TargetInitialized`: the tree of Improving MCSD, its first level from the target, cut where no branch is likely."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import emssd_compile
from emssd_compile.drafters import TargetInitialized
from emssd_compile.drafters.tree_shape import TreeShape
from emssd_compile.errors import DrafterError, OptionError
from emssd_compile.step.randomness import gumbels
from tests.drafters.alone import Alone, nodes_of
from tests.exactness.models import Reference, prompt
from tests.passes.graphs import TinyModel, model_with_attention
from tests.zoo import VOCABULARY, toy_model

WIDTH, DEPTH = 3, 4
SEEDS = [5, -6, 7, 8]
PROMPTS = [[3, 1, 4], [9], [2, 6, 5]]


@torch.no_grad()
def _logits(model: nn.Module, text: list[int]) -> Tensor:
    output = model(torch.tensor([text]))
    return getattr(output, "logits", output)[0, -1]


def _likeliest(logits: Tensor, count: int, seed: int | None, position: int) -> list[int]:
    if seed is not None:
        logits = logits + gumbels(torch.tensor(seed), torch.tensor(position), torch.arange(len(logits)))
    return logits.topk(count).indices.tolist()


def _tree(
    model: nn.Module, text: list[int], targets: Tensor, seed: int | None, room: int, threshold: float
) -> list[tuple[int, int, int]]:
    """Token, parent and grade of each draft, level by level: the formula in plain Python.

    Args:
        targets: `[V]`, the target's logits in the place of the text's last token.
        seed: of a row that samples.
        room: how deep the row may draft.
    """
    branches: list[tuple[list[int], float]] = [(text, 1.0)] * WIDTH
    nodes: list[tuple[int, int, int]] = []
    for level in range(room):
        drafted = []
        for branch, (path, likely) in enumerate(branches):
            logits = _logits(model, path)
            if level == 0:
                others = targets[: len(logits)].clone()
                others[text[-1]] = -torch.inf
                token = _likeliest(others, WIDTH, seed, len(text))[branch]
            else:
                token = _likeliest(logits, 1, seed, len(path))[0]
            probability = float(logits.softmax(0)[token])
            drafted.append((token, probability, [*path, token], likely * probability))
        if not any(likely > threshold for *_, likely in drafted):
            break
        for branch, (token, probability, _, _) in enumerate(drafted):
            parent = 0 if level == 0 else WIDTH * (level - 1) + branch + 1
            nodes.append((token, parent, min(int(8 * probability), 7)))
        branches = [(path, likely) for _, _, path, likely in drafted]
    return nodes


@pytest.fixture(scope="module")
def alone() -> Alone[TargetInitialized]:
    """Its model lacks the last id."""
    return Alone(TargetInitialized(toy_model("gpt2", vocab_size=VOCABULARY - 1), WIDTH, DEPTH), rows=4)


@pytest.mark.parametrize("threshold", [0, 0.0005, 0.02, 1])
@pytest.mark.parametrize("samples", [False, True])
def test_the_tree_is_that_of_the_formula(threshold, samples, alone):
    """Of rows of several lengths and rooms, twice; the target likes best an id that the draft model does not have."""
    texts = [prompt(n) for n in (3, 1, 17, 9)]
    alone.drafter.threshold = threshold
    alone.forget()
    targets = 3 * torch.randn(len(texts), VOCABULARY, generator=torch.Generator().manual_seed(2))
    targets[:, -1] = 50
    seen: dict[str, Any] = {"logits": targets, "seeds": torch.tensor(SEEDS)}
    if samples:
        seen["options"] = {"do_sample": torch.tensor([True, False, True, True])}
    lengths = set()
    for room in ([4, 2, 4, 0], [4, 4, 1, 4]):
        for row, text in enumerate(texts):
            targets[row, text[-1]] = 40  # what was chosen there
        draft = alone.draft(texts, room, budget=32, **seen)
        for row, text in enumerate(texts):
            seed = SEEDS[row] if samples and row != 1 else None
            nodes = nodes_of(draft, row)
            assert nodes == _tree(alone.drafter.model, text, targets[row], seed, room[row], threshold)
            lengths.add(len(nodes))
            text += [nodes[0][0] if nodes else 4, 5]
    assert len(lengths) > 1 or threshold == 1, "rows stop at different depths"


def _fast(model: nn.Module, drafter: TargetInitialized) -> emssd_compile.OptimizedModel:
    return emssd_compile.optimize(model, drafter, max_batch=2, max_length=48, backend="eager", layout="packed")


@pytest.fixture(scope="module")
def models() -> tuple[nn.Module, nn.Module]:
    """A target, and a draft model that is right now and then."""
    torch.manual_seed(1)
    target = model_with_attention()
    draft = model_with_attention()
    draft.load_state_dict(target.state_dict())
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return target, draft


def test_a_step_proposes_what_follows_from_the_logits_that_chose_the_root(models, monkeypatch):
    """Step after step: the tree in the state of a row is the formula's, for the target's logits before its root."""
    target, draft = models
    fast = _fast(target, TargetInitialized(draft, WIDTH, 3, threshold=0.002))
    fast.warmup()
    launch, compared = fast._engine.launcher.launch, set()

    def watched(sizes):
        report = launch(sizes)
        state = fast._engine.tensors
        for row in state["active"].nonzero().flatten().tolist():
            known, length = int(state["known"][row]), int(state["draft_lengths"][row])
            room = min(3, int(state["limits"][row]) - known - 1)
            if int(state["lengths"][row]) < known - 1 or room < 3:
                continue  # still reading its prompt, or near its end
            text = state["history"][row, :known].tolist()
            expected = _tree(draft, text, _logits(target, text[:-1]), None, room, 0.002)
            found = [state[f"draft_{name}"][row, :length].tolist() for name in ("tokens", "parents", "grades")]
            assert list(zip(*found, strict=True)) == expected
            compared.add(length)
        return report

    monkeypatch.setattr(fast._engine.launcher, "launch", watched)
    reference = Reference(target)
    assert fast.generate(PROMPTS, max_new_tokens=24) == [[*ids, *reference(ids, 24)] for ids in PROMPTS]
    assert len(compared) > 2, "trees of several depths"
    assert 0 < fast.stats.num_accepted_draft_tokens < fast.stats.num_draft_tokens


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0}, "TargetInitialized width=0 is out of range; pass at least 1"),
        ({"depth": 0}, "TargetInitialized depth=0 is out of range"),
        ({"depth": 2.5}, "TargetInitialized depth=2.5 is not an integer"),
        ({"width": 513}, "TargetInitialized width=513 is out of range; pass at most 512"),
        ({"width": 200, "depth": 3}, "TargetInitialized depth=3 is out of range; pass at most 2"),
        ({"threshold": 1.5}, "TargetInitialized threshold=1.5 is out of range; pass 0 to 1"),
        ({"threshold": -0.1}, "TargetInitialized threshold=-0.1 is out of range"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(OptionError, match=message):
        TargetInitialized(TinyModel(), **options)


def test_more_branches_than_tokens_are_refused(models):
    with pytest.raises(DrafterError, match="TargetInitialized drafts 33 tokens behind one node, and there are only 32"):
        _fast(models[0], TargetInitialized(models[1], 33, 2))


def test_it_is_loaded_with_its_options(tmp_path):
    toy_model("gpt2").save_pretrained(tmp_path)
    drafter = TargetInitialized.from_pretrained(tmp_path, 5, 3, threshold=0.25)
    assert (drafter.tree, drafter.threshold) == (TreeShape((5, 1, 1)), 0.25)
