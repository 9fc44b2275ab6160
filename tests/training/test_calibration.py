"""Medusa's tree is chosen by what is measured of its heads."""

from math import prod
from typing import Any

import pytest
import torch

import emssd_compile
from emssd_compile.drafters import Medusa, MLPSpeculator, load_head
from emssd_compile.drafters.medusa_config import MedusaConfig
from emssd_compile.drafters.mlp_speculator import MLPSpeculatorConfig
from emssd_compile.drafters.sparse_tree import calibrated_tree
from emssd_compile.errors import OptionError
from emssd_compile.training.calibration import calibrate, rank_accuracies
from emssd_compile.training.train import Texts, train
from tests.exactness.models import prompt
from tests.training.toys import TEXT, Characters, options, toy_target
from tests.zoo import VOCABULARY

RANKS, NEW = 4, 12
PROMPTS = [prompt(5), prompt(2), prompt(9)]


def head_for(model: Any) -> Medusa:
    torch.manual_seed(1)
    head = Medusa(MedusaConfig(model.config.hidden_size, VOCABULARY, 3))
    with torch.no_grad():  # one that is sometimes right: the target's LM head, and a little noise
        for lm_head in head.lm_heads:
            lm_head.weight.copy_(model.lm_head.weight)  # type: ignore[operator]
        for parameter in head.blocks.parameters():
            parameter.mul_(0.3)
    return head


@torch.no_grad()
def measured_plainly(model: Any, head: Medusa) -> list[list[float]]:
    """Of each head and rank: one continuation, one place and one token at a time."""
    right, number = [[0] * RANKS for _ in range(3)], [0] * 3
    for ids in PROMPTS:
        text = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=NEW, pad_token_id=0)[0].tolist()
        hidden = model.model(torch.tensor([text])).last_hidden_state[0]
        for k in range(3):
            for place in range(len(text) - 2 - k):
                token = place + 2 + k  # the k-th behind the root, which is behind this place
                if token < len(ids):
                    continue
                likeliest = (head.blocks[k](hidden[place]) @ head.lm_heads[k].weight.T).topk(RANKS).indices.tolist()
                number[k] += 1
                for rank in range(RANKS):
                    right[k][rank] += likeliest[rank] == text[token]
    return [[hits / number[k] for hits in right[k]] for k in range(3)]


def test_a_tree_is_measured_on_what_the_model_goes_on_with(tmp_path):
    model: Any = toy_target()
    head = head_for(model)
    plain = measured_plainly(model, head)
    before = head.tree
    found = calibrate(model, head, PROMPTS, max_new_tokens=NEW, num_nodes=6, ranks=RANKS, backend="eager")
    torch.testing.assert_close(found, torch.tensor(plain, dtype=torch.float64))
    assert 0 < found.sum(1).max() < 1
    assert head.tree == calibrated_tree(plain, 6) != before
    head.save_pretrained(tmp_path)
    read = load_head(tmp_path)
    assert isinstance(read, Medusa)
    assert (read.tree, read.num_draft_tokens, read.max_depth) == (head.tree, head.tree.num_nodes, head.tree.depth)
    fast = emssd_compile.optimize(model, read, max_batch=3, max_length=48, backend="eager", layout="packed")
    none = emssd_compile.optimize(model, "none", max_batch=3, max_length=48, backend="eager")
    assert fast.generate(PROMPTS, max_new_tokens=NEW) == none.generate(PROMPTS, max_new_tokens=NEW)


def test_training_chooses_the_tree_by_what_it_has_held_out(model, target, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "emssd_compile.training.report.measure_acceptance", lambda *given: {"mean_acceptance_length": 1.0}
    )
    monkeypatch.setattr("emssd_compile.training.train.FrozenTarget", lambda *given: target)
    given = options(sizes={"num_heads": 2}, epochs=4, learning_rate=1e-3)
    texts = Texts([TEXT], [], Characters())
    head = train(model, Medusa, texts, tmp_path / "free", given)
    assert isinstance(head, Medusa)
    _, held_out = texts.windows(given)
    features, _ = target.read(held_out.tokens)
    accuracies = rank_accuracies(head, [(features, held_out.counts, None)], 10)
    assert head.tree == calibrated_tree(accuracies, 31)
    default = Medusa(MedusaConfig(head.config.hidden_size, VOCABULARY, 2)).tree

    def expected(paths: tuple[tuple[int, ...], ...]) -> float:
        return sum(prod(float(accuracies[depth][rank]) for depth, rank in enumerate(path)) for path in paths)

    assert expected(head.tree.paths) >= expected(default.paths[: head.tree.num_nodes])
    chosen = ((0,), (0, 0))
    given = options(sizes={"num_heads": 2, "tree": chosen}, epochs=1, learning_rate=1e-3)
    assert train(model, Medusa, texts, tmp_path / "chosen", given).config.tree == chosen  # type: ignore[attr-defined]


def test_where_the_head_cannot_say_a_token_no_rank_is_right(target):
    head = Medusa(MedusaConfig(target.as_target().hidden_size, VOCABULARY, 1, draft_vocabulary=1))
    head.prepare(target.as_target())
    tokens = torch.tensor([[5, 6, 7, 0, 5, 0]])  # it knows token 0 only
    features, _ = target.read(tokens)
    counts = torch.ones_like(tokens, dtype=torch.bool)
    assert rank_accuracies(head, [(features, counts, None)], 1).tolist() == [[0.5]]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda size: MLPSpeculator(MLPSpeculatorConfig(size, VOCABULARY)), "a MLPSpeculator drafts no tree of ranks"),
        (lambda size: Medusa(MedusaConfig(size, VOCABULARY)), "num_nodes=0 is out of range"),
    ],
)
def test_what_cannot_be_calibrated_is_refused_before_any_work(make, said, model, monkeypatch):
    monkeypatch.setattr("emssd_compile.training.calibration.optimize", None)
    with pytest.raises(OptionError, match=said):
        calibrate(model, make(model.config.hidden_size), PROMPTS, num_nodes=0)
