"""`DraftModel`: a second causal LM drafts chains or trees, from its own cache, for every row at once."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._inductor.config
from torch import nn

import emssd_compile
from emssd_compile.compiler import compile_model
from emssd_compile.drafters import Draft, DraftContext, DraftModel, PartSizes
from emssd_compile.errors import DrafterError, OptionError
from emssd_compile.step.batch import BatchShape
from emssd_compile.step.proposals import SAMPLED, WITHOUT_REPLACEMENT
from tests.drafters.alone import Alone, nodes_of
from tests.drafters.contexts import context, target_of
from tests.exactness.models import Reference, prompt
from tests.passes.graphs import TinyModel, causal, model_with_attention
from tests.zoo import toy_model

PROMPTS = [[3, 1, 4], [9], [2, 6, 5, 3, 5, 8, 9, 7, 1, 1, 2]]
FEW_TOKENS = [[3, 1, 4], [9], [2, 6], [5, 3, 5]]
"""Prompts shorter than any tree here: steps that read them leave room for one."""
TREE_SHAPES = [(4,), (2, 2), (3, 1, 2)]


def _fast(model, drafter):
    return emssd_compile.optimize(model, drafter, max_batch=2, max_length=48, backend="eager", layout="packed")


def test_the_target_as_its_own_draft_model_has_every_draft_accepted():
    """Also the proof that it catches up when all was accepted: one stale or missing KV would end the agreement."""
    model = model_with_attention()
    fast = _fast(model, DraftModel(model, num_draft_tokens=3))
    plain = _fast(model, "none").generate(PROMPTS, max_new_tokens=20)
    assert fast.generate(PROMPTS, max_new_tokens=20) == plain
    assert fast.stats.num_accepted_draft_tokens == fast.stats.num_draft_tokens > 0


@pytest.mark.parametrize("tree", TREE_SHAPES)
def test_of_trees_of_the_target_itself_each_step_accepts_a_whole_path(tree):
    """Rows end where a step does, so that none is cut short."""
    model, depth = model_with_attention(), len(tree)
    tokens = 1 + 4 * (depth + 1)
    fast = emssd_compile.optimize(
        model, DraftModel(model, tree=tree), max_batch=2, max_length=48, backend="eager", layout="packed"
    )
    reference = Reference(model)
    assert fast.generate(FEW_TOKENS, max_new_tokens=tokens) == [[*ids, *reference(ids, tokens)] for ids in FEW_TOKENS]
    assert fast.stats.acceptance_histogram == [*[0] * depth, 4 * len(FEW_TOKENS)]


@pytest.mark.parametrize("options", [{"num_draft_tokens": 3}, {"tree": (2, 2)}])
def test_another_model_drafts_and_the_tokens_stay_the_targets(options):
    model = model_with_attention()
    torch.manual_seed(7)
    other = TinyModel(attend=causal, kv_heads=1)
    fast = _fast(model, DraftModel(other, **options))
    assert fast.generate(PROMPTS, max_new_tokens=20) == _fast(model, "none").generate(PROMPTS, max_new_tokens=20)
    assert fast.stats.num_accepted_draft_tokens < fast.stats.num_draft_tokens


def _with_vocabulary(size: int) -> TinyModel:
    """The target with another number of tokens; those that both have are the same."""
    model = model_with_attention()
    embed, head = torch.nn.Embedding(size, 16), torch.nn.Linear(16, size, bias=False)
    with torch.no_grad():
        for new, old in ((embed.weight, model.embed.weight), (head.weight, model.lm_head.weight)):
            new.zero_()[: len(old)] = old[:size]
    model.embed, model.lm_head = embed, head
    return model.eval()


def _compiled(vocabulary: int) -> Any:
    """What compiles a model whose vocabulary alone is looked at."""
    return lambda model, **sizes: SimpleNamespace(vocabulary=vocabulary, capacity=48)


@pytest.mark.parametrize(("own", "targets"), [(40, 32), (32, 40), (5000, 4400), (33, 32), (4096, 4096 + 512)])
def test_another_vocabulary_is_refused(own, targets):
    with pytest.raises(
        DrafterError, match=f"predicts {own} tokens and the target {targets}, which differ by more than"
    ):
        DraftModel(model_with_attention()).prepare(target_of(_compiled(own), 2, 48, targets))


@pytest.mark.parametrize(("own", "targets"), [(151936, 152064), (50257, 50304), (32000, 32064), (4100, 4096)])
def test_a_vocabulary_that_is_padded_otherwise_is_taken_and_said(own, targets):
    drafter = DraftModel(model_with_attention())
    drafter.prepare(target_of(_compiled(own), 2, 48, targets))
    assert drafter.notes() == (f"vocabularies of {own} and {targets}: taken for padding",)


@pytest.mark.parametrize(("own", "targets"), [(4096, 4100), (4100, 4096)])
def test_ids_that_only_one_of_the_models_has_do_no_harm(own, targets):
    """Prompts hold the target's last ids, which the smaller draft model cannot read; the larger one drafts its last."""
    torch.manual_seed(0)
    target, draft = _with_vocabulary(targets), _with_vocabulary(own)
    with torch.no_grad():
        target.lm_head.weight.normal_()
        draft.lm_head.weight[: min(own, targets)] = target.lm_head.weight[: min(own, targets)]
        if own > targets:
            draft.lm_head.weight[targets:] = 2 * target.lm_head.weight[: own - targets]
        target.embed.weight.normal_()
        draft.embed.weight[: min(own, targets)] = target.embed.weight[: min(own, targets)]
    prompts = [[targets - 1, 5, targets - 2], [7], [targets - 3] * 4]
    fast = emssd_compile.optimize(
        target, DraftModel(draft, 3), max_batch=2, max_length=32, backend="eager", layout="packed"
    )
    reference = Reference(target)
    assert fast.generate(prompts, max_new_tokens=12) == [[*ids, *reference(ids, 12)] for ids in prompts]
    assert fast.stats.num_draft_tokens > 0
    assert f"vocabularies of {own} and {targets}: taken for padding" in fast.explain().record("fuse_step").notes


def _with_positions(positions: int) -> TinyModel:
    model = TinyModel(lambda m, x, ids: x + m.table[: x.shape[1]], attend=causal, kv_heads=2)
    model.table = model.table[:positions].clone()
    return model


SHORT = {
    "gpt2": lambda: toy_model("gpt2", n_positions=32, vocab_size=160),
    "opt": lambda: toy_model("opt", max_position_embeddings=32, vocab_size=160),
}


@pytest.mark.parametrize(
    ("name", "options"), [*((n, {"num_draft_tokens": 4}) for n in SHORT), ("opt", {"tree": (2, 2)})]
)
def test_a_draft_model_of_fewer_positions_drafts_as_far_as_they_go(name, options):
    """Rows pass position 32 while they decode, begin just before it, and have prompts longer than that."""
    target = toy_model(name, vocab_size=160)
    prompts = [prompt(n) for n in (3, 25, 29, 31, 32, 33, 50)]
    drafter = DraftModel(SHORT[name](), **options)
    fast = emssd_compile.optimize(target, drafter, max_batch=3, max_length=96, backend="eager")
    reference = Reference(target)
    assert fast.generate(prompts, max_new_tokens=24) == [[*ids, *reference(ids, 24)] for ids in prompts]
    beside = 3 if drafter.tree else 0  # the root and the first level of a tree
    assert fast._engine.tensors["drafter_k_cache_0"].shape[1] == 32 + beside, "it holds no more than it can read"
    assert fast.explain().record("fuse_step").notes == ("the draft model drafts up to position 32",)


@pytest.mark.parametrize(
    ("options", "drafts"), [({"num_draft_tokens": 3}, (0, 1, 2, 3)), ({"tree": (2, 1, 2)}, (0, 2, 4, 8))]
)
def test_drafts_are_right_up_to_the_last_position_and_none_come_after_it(monkeypatch, options, drafts):
    """The same model with fewer positions is always right while it drafts: of 20 tokens 1 to 16 are drafted, no more.

    With the root at position 15, the last there is, one token can still be drafted: that at position 16. `drafts`: of
    how many depths there are how many drafts.
    """
    torch.manual_seed(0)
    target = _with_positions(64)
    torch.manual_seed(0)
    short = _with_positions(64)
    short.table = target.table[:16].clone()
    short.load_state_dict({**target.state_dict(), "table": short.table})
    seen: list[tuple[int, int]] = []

    fast = emssd_compile.optimize(
        target, DraftModel(short, **options), max_batch=1, max_length=48, backend="eager", layout="packed"
    )
    reference = Reference(target)
    launch = fast._engine.launcher.launch

    def watched(sizes):
        report = launch(sizes)
        tensors = fast._engine.tensors
        seen.append((int(tensors["known"][0]), int(tensors["draft_lengths"][0])))
        return report

    fast.warmup()
    monkeypatch.setattr(fast._engine.launcher, "launch", watched)
    assert fast.generate([[3]], max_new_tokens=30) == [[3, *reference([3], 30)]]
    depths = [max(0, min(3, 17 - k)) for k, _ in seen[:-1]]
    assert [count for _, count in seen[:-1]] == [drafts[depth] for depth in depths]
    assert [k + depth + 1 for (k, _), depth in zip(seen[:-2], depths, strict=False)] == [k for k, _ in seen[1:-1]]


@pytest.mark.parametrize("target", ["onnx", pytest.param("aot", marks=pytest.mark.long)])
def test_artifacts_carry_a_draft_model_of_fewer_positions_and_a_smaller_vocabulary(target, tmp_path):
    if target == "onnx":
        pytest.importorskip("onnxruntime")
    model, draft = toy_model("gpt2", vocab_size=160), toy_model("gpt2", n_positions=32, vocab_size=159)
    fast = emssd_compile.optimize(
        model, DraftModel(draft, 2), max_batch=2, max_length=64, backend="eager", layout="packed"
    )
    with torch._inductor.config.patch({"aot_inductor.compile_wrapper_opt_level": "O0"}):  # to be quick
        getattr(fast, f"export_{target}")(tmp_path / "artifact")
    loaded = emssd_compile.load(tmp_path / "artifact")
    prompts = [[159, 159, 3], *(prompt(n) for n in (29, 31, 33, 50))]
    assert loaded.generate(prompts, max_new_tokens=12) == fast.generate(prompts, max_new_tokens=12)
    assert loaded.stats == fast.stats
    assert loaded.stats.num_draft_tokens > 0


@pytest.mark.parametrize(
    ("options", "targets", "drawn"),
    [
        ({"num_draft_tokens": 2}, 159, SAMPLED),
        ({"tree": (2, 2)}, 161, WITHOUT_REPLACEMENT),
        ({"tree": (2, 2)}, 161, SAMPLED),
    ],
)
def test_what_it_says_that_drafts_were_drawn_from_is_what_its_model_says_behind_their_path(options, targets, drawn):
    """Of two steps of rows that keep no draft; the target has a token less or more.

    Siblings are different tokens where they are drawn without replacement, and for rows that do not sample the same one
    where they are drawn independently.
    """
    model, rows = toy_model("llama"), 3
    drafter = DraftModel(model, **options)
    sized = lambda m, *, tree_nodes=0: compile_model(m, BatchShape(rows, 64, tree_nodes))  # noqa: E731
    drafter.prepare(target_of(sized, rows, 64, targets))
    sizes = PartSizes(rows, 64, targets, drafter.num_draft_tokens, 8, drafter.max_depth)
    state = {n: torch.zeros(spec.shape, dtype=spec.dtype) for n, spec in drafter.tensors(sizes).items()}
    texts = [prompt(n) for n in (3, 1, 9)]
    samples = torch.tensor([True, True, False])
    for _ in range(2):
        seen = replace(context(texts, 2, 64), drawn=drawn, vocabulary=targets)
        seen = replace(seen, draft_range=torch.arange(16), row_range=torch.arange(16), seeds=torch.tensor([5, 6, 7]))
        with torch.no_grad():
            draft = drafter(replace(seen, state=state, options={"do_sample": samples}))
        state |= draft.state
        assert draft.proposal is not None
        assert draft.proposal.shape == (rows, drafter.num_draft_tokens + 1, targets)
        parents = torch.arange(drafter.num_draft_tokens).expand(rows, -1) if draft.parents is None else draft.parents
        for row, text in enumerate(texts):
            paths = [text]
            for token, parent in zip(draft.tokens[row].tolist(), parents[row].tolist(), strict=True):
                paths.append([*paths[parent], token])
                with torch.no_grad():
                    q = model(torch.tensor([paths[parent]])).logits[0, -1, :targets].softmax(0)
                expected = torch.cat([q, torch.zeros(targets - len(q))])
                torch.testing.assert_close(draft.proposal[row, parent], expected)
                if row == 2 and drawn == SAMPLED:
                    assert token == int(q.argmax())
            if drawn == WITHOUT_REPLACEMENT:
                children = list(zip(parents[row].tolist(), draft.tokens[row].tolist(), strict=True))
                assert len(set(children)) == len(children)
            text.append(int(draft.tokens[row, 0] + 1) % 160)


class _Graded(DraftModel):
    """Drafts only what it gives one grade."""

    def __init__(self, model, wanted: int) -> None:
        super().__init__(model, num_draft_tokens=3)
        self.wanted = wanted

    def forward(self, context: DraftContext) -> Draft:
        draft = super().forward(context)
        assert draft.grades is not None
        return replace(draft, lengths=draft.lengths * (draft.grades == self.wanted).all(1))


def test_the_grade_is_the_probability_in_eighths():
    """The same probability for every token is grade 0 of a vocabulary of 32; all on one token is the last grade."""
    flat, sure = model_with_attention(), model_with_attention()
    with torch.no_grad():
        flat.lm_head.weight.zero_()
        sure.lm_head.weight.mul_(1e4)
    for model, grade in ((flat, 0), (sure, 7)):
        fast = _fast(model, _Graded(model, grade))
        fast.generate(PROMPTS, max_new_tokens=8)
        assert fast.stats.num_draft_tokens > 0


@pytest.mark.parametrize("size", [0, -1, 1.5])
def test_a_size_that_makes_no_sense_is_refused(size):
    with pytest.raises(OptionError, match=f"DraftModel num_draft_tokens={size}"):
        DraftModel(TinyModel(), size)


@pytest.mark.parametrize("tree", [5, (), (2, 0)])
def test_a_tree_that_makes_no_sense_is_refused(tree):
    with pytest.raises(OptionError, match="DraftModel tree"):
        DraftModel(TinyModel(), tree=tree)


def test_a_chain_and_a_tree_exclude_one_another():
    with pytest.raises(OptionError, match=r"num_draft_tokens=4 is for chains, and tree=\(2, 2\) says .*; pass one"):
        DraftModel(TinyModel(), 4, tree=(2, 2))


def test_a_draft_model_is_loaded_with_its_tree(tmp_path):
    toy_model("gpt2").save_pretrained(tmp_path)
    drafter = DraftModel.from_pretrained(tmp_path, tree=(4, 2, 2))
    assert (drafter.num_draft_tokens, drafter.max_depth) == (4 + 8 + 16, 3)
    assert DraftModel.from_pretrained(tmp_path).num_draft_tokens == 4


@torch.no_grad()
def _expected(model: nn.Module, text: list[int], widths: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """Token, parent and grade of each draft behind a text, for a tree of those widths."""
    nodes: list[tuple[int, int, int]] = []
    level = [(0, text)]  # number of each node, and the text up to it
    for width in widths:
        below = []
        for parent, path in level:
            probabilities = model(torch.tensor([path])).logits[0, -1].softmax(0)
            for probability, token in zip(*map(torch.Tensor.tolist, probabilities.topk(width)), strict=True):
                nodes.append((token, parent, min(int(8 * probability), 7)))
                below.append((len(nodes), [*path, token]))
        level = below
    return nodes


@pytest.mark.parametrize("tree", [*TREE_SHAPES, (4, 2, 2)])
def test_each_node_has_the_likeliest_tokens_behind_its_own_path(tree):
    """Step after step, for rows of several lengths of which paths of all lengths are accepted, then another token.

    After the prompts a row has D + 1 tokens to read at most, and the budget is no more.
    """
    depth, texts = len(tree), [prompt(n) for n in (3, 1, 17, 9)]
    model = toy_model("llama")
    alone = Alone(DraftModel(model, tree=tree), len(texts))
    budget = sum(map(len, texts))
    for step in range(depth + 3):
        max_drafts = [(row + step) % (depth + 1) if row == 1 else depth for row in range(len(texts))]
        draft = alone.draft(texts, max_drafts, budget)
        budget = len(texts) * (depth + 1)
        for row, text in enumerate(texts):
            nodes = nodes_of(draft, row)
            assert nodes == _expected(model, text, tree[: max_drafts[row]])
            node, path = 0, []
            for _ in range((row + step) % (depth + 1)):  # the last child of each node
                children = [i for i, (_, parent, _) in enumerate(nodes, 1) if parent == node]
                if not children:
                    break
                node = children[-1]
                path.append(nodes[node - 1][0])
            text += [*path, 5 + step]
