"""What a drafter sees of the target, of every token once, is what the model itself computes for it."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import emssd_compile
from emssd_compile import OptimizedModel
from emssd_compile.drafters import Draft, DraftContext, Drafter, PartSizes, TensorSpec
from emssd_compile.ops import append_kv
from emssd_compile.runtime.requests import Request
from tests.exactness.compiled import CAPACITY, target
from tests.exactness.models import prompt
from tests.exactness.parts import BANNED, Ban, banned
from tests.zoo import VOCABULARY

ROWS, NEW, HIDDEN = 3, 12, 64
PROMPTS = [prompt(n) for n in (5, 64, 1)]


class Probe(Drafter):
    """Drafts what another drafter drafts, and writes down what it sees: by row, and by position in the text."""

    taps = (0, -1)
    reads_logits = True

    def __init__(self, inner: Drafter) -> None:
        super().__init__()
        self.inner = inner
        self.num_draft_tokens, self.max_depth = inner.num_draft_tokens, inner.max_depth

    def tensors(self, sizes: PartSizes) -> dict[str, TensorSpec]:
        places = (sizes.rows, sizes.capacity)
        floats = {"first": HIDDEN, "last": HIDDEN, "hidden": HIDDEN, "root_hidden": HIDDEN, "root_logits": VOCABULARY}
        ints = {name: TensorSpec(places, torch.int64) for name in ("tokens", "times", "roots")}
        rows = {name: TensorSpec(places[:1], torch.int64) for name in ("seeds", "groups")}
        return {name: TensorSpec((*places, size), torch.float32) for name, size in floats.items()} | ints | rows

    def forward(self, context: DraftContext) -> Draft:
        read, state, can_draft = context.read, context.state, context.can_draft
        rows, capacity = context.history.shape
        place = torch.where(read.row_ids < rows, read.row_ids * capacity + read.positions, rows * capacity)  # [T]
        root = torch.where(can_draft, torch.arange(rows) * capacity + context.known - 1, rows * capacity)  # [B]

        def noted(name: str, where: Tensor, values: Tensor) -> Tensor:
            flat = state[name].flatten(0, 1)
            return torch.cat([flat, flat[:1]]).index_copy(0, where, values)[:-1].view(state[name].shape)

        times = state["times"].flatten()
        times = torch.cat([times, times[:1]]).index_add(0, place, torch.ones_like(place))[:-1].view(rows, capacity)
        assert context.logits is not None
        seen = {
            "first": noted("first", place, context.taps[0][context.source]),
            "last": noted("last", place, context.taps[-1][context.source]),
            "hidden": noted("hidden", place, context.taps["hidden"][context.source]),
            "tokens": noted("tokens", place, read.input_ids),
            "times": times,
            "root_hidden": noted("root_hidden", root, context.hidden),
            "root_logits": noted("root_logits", root, context.logits),
            "roots": noted("roots", root, torch.ones_like(root)),
            "seeds": context.seeds,
            "groups": context.groups,
        }
        return replace(self.inner(replace(context, state={})), state=seen)


def _optimize(drafter: str) -> OptimizedModel:
    compiled = target("llama", ROWS)
    return emssd_compile.optimize(
        compiled.model,
        Probe(compiled.drafter(drafter)),
        processors=[Ban()],
        max_batch=ROWS,
        max_length=CAPACITY,
        backend="eager",
        layout="packed",
        prefill_chunk=40,
    )


def _seen(fast: OptimizedModel) -> dict[str, Tensor]:
    prefix = "drafter_"
    return {n.removeprefix(prefix): t for n, t in fast._engine.tensors.items() if n.startswith(prefix)}


def _assert_seen(fast: OptimizedModel, texts: list[list[int]], *, is_banned: bool) -> None:
    model: Any = copy.deepcopy(fast.model)  # asked for hidden states, it installs hooks of its own in itself
    seen = _seen(fast)
    for row, text in enumerate(texts):
        with torch.no_grad():
            output = model(torch.tensor([text]), output_hidden_states=True)
        layers, logits = [states[0] for states in output.hidden_states], output.logits[0]
        read = len(text) - 1  # the newest token has been emitted, and not read
        assert seen["tokens"][row, :read].tolist() == text[:-1]
        assert seen["times"][row].tolist() == [1] * read + [0] * (CAPACITY - read), "every token is read once"
        torch.testing.assert_close(seen["first"][row, :read], layers[1][:-1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(seen["hidden"][row, :read], layers[-1][:-1], rtol=1e-4, atol=1e-4)
        normed = model.model.norm(seen["last"][row, :read]).detach()
        torch.testing.assert_close(normed, layers[-1][:-1], rtol=1e-4, atol=1e-4)
        roots = seen["roots"][row].nonzero().flatten().tolist()
        assert roots[0] == len(PROMPTS[row])
        for place in roots:
            expected = logits[place - 1].clone()
            if is_banned:
                expected[text[max(place - BANNED, 0) : place]] = -torch.inf
            torch.testing.assert_close(seen["root_logits"][row, place], expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(seen["root_hidden"][row, place], layers[-1][place - 1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("drafter", ["none", "sometimes-wrong", "always-right-tree", "random-tree"])
def test_a_drafter_sees_every_token_of_the_text_once_as_the_model_computes_it(drafter):
    fast = _optimize(drafter)
    reference = target("llama", ROWS).reference
    for _ in range(2):  # what the first requests left in the rows is gone
        texts = fast.generate(PROMPTS, max_new_tokens=NEW)
        assert texts == [[*ids, *reference(ids, NEW)] for ids in PROMPTS]
        _assert_seen(fast, texts, is_banned=False)
    texts = fast.generate(PROMPTS, max_new_tokens=NEW, ban=True)
    assert texts == [banned(fast.model, ids, NEW) for ids in PROMPTS]
    _assert_seen(fast, texts, is_banned=True)


def test_a_drafter_sees_seeds_and_groups_of_its_requests():
    fast = _optimize("sometimes-wrong")
    seeds, groups = [7, -(1 << 63), (1 << 63) - 1], [4, None, 4]
    requests = [
        Request(index, torch.tensor(ids), NEW, seed=seed, group=group)
        for index, (ids, seed, group) in enumerate(zip(PROMPTS, seeds, groups, strict=True))
    ]
    for _ in fast._engine.run(requests):
        pass
    assert _seen(fast)["seeds"].tolist() == seeds
    assert _seen(fast)["groups"].tolist() == [4, 1, 4]


class Cached(Probe):
    """Writes each token that it sees to a cache of its own, in the slot of its position."""

    def tensors(self, sizes: PartSizes) -> dict[str, TensorSpec]:
        slots = (sizes.rows, sizes.capacity, 1, 1)
        return {name: TensorSpec(slots, torch.float32, kept="forever", in_place=True) for name in ("keys", "values")}

    def forward(self, context: DraftContext) -> Draft:
        keys, values, read = context.state["keys"], context.state["values"], context.read
        tokens = read.input_ids.float()[:, None, None]  # [T, 1, 1]
        append_kv(keys, values, tokens, -tokens, read.row_ids, read.positions)
        return self.inner(replace(context, state={}))


def test_what_a_drafter_wrote_of_a_prompt_is_there_for_all_rows_that_share_it():
    compiled = target("llama", ROWS)
    drafter = Cached(compiled.drafter("sometimes-wrong"))
    fast = emssd_compile.optimize(compiled.model, drafter, max_batch=ROWS, max_length=CAPACITY, backend="eager")
    fast.generate(PROMPTS, max_new_tokens=NEW)  # leaves something in the rows
    texts = fast.generate(PROMPTS[1:2], do_sample=True, max_new_tokens=NEW, num_return_sequences=ROWS, seed=3)
    assert len({tuple(text) for text in texts}) == ROWS
    written = _seen(fast)
    found = [written["keys"][row, : len(texts[0]) - 1].flatten().long().tolist() for row in range(ROWS)]
    assert sorted(found) == sorted(text[:-1] for text in texts)
    assert written["values"].equal(-written["keys"])
