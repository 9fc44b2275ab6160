"""`pack`: the tokens of all rows side by side, with nothing between them."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from emssd_compile.step.nodes import Nodes
from emssd_compile.step.pack import Packed, logit_rows, pack, pack_one_each

CAPACITY, MOST, RUBBISH = 40, 5, 9999


def _pack(
    known: list[int],
    lengths: list[int],
    drafts: list[int],
    tokens: int,
    share: int,
    active: list[bool] | None = None,
    row_tokens: int = CAPACITY,
) -> Packed:
    """Pack rows whose token `t` is `100 * row + t`, and whose draft `i` is `-100 * row - i - 1`."""
    history = torch.arange(CAPACITY) + 100 * torch.arange(len(known))[:, None]
    history = torch.where(torch.arange(CAPACITY) < torch.tensor(known)[:, None], history, RUBBISH)
    flags = torch.tensor([True] * len(known) if active is None else active)
    slots, row_range = torch.arange(tokens), torch.arange(row_tokens)
    return pack(history, torch.tensor(known), torch.tensor(lengths), flags, slots, row_range, share, _chains(drafts))


def _chains(lengths: list[int]) -> Nodes:
    index = torch.arange(MOST)
    tokens = -100 * torch.arange(len(lengths))[:, None] - index - 1
    tokens = torch.where(index < torch.tensor(lengths)[:, None], tokens, RUBBISH)
    return Nodes(tokens, torch.tensor(lengths), torch.zeros_like(tokens), None, MOST)


def test_example_of_the_docstring():
    packed = _pack(known=[5, 8, 3], lengths=[4, 7, 0], drafts=[2, 0, 0], tokens=8, share=3)
    assert packed.offsets.tolist() == [0, 3, 4, 7]
    assert packed.positions.tolist()[:7] == [4, 5, 6, 7, 0, 1, 2]
    assert packed.row_ids.tolist() == [0, 0, 0, 1, 2, 2, 2, 3], "the last token is tail"
    assert packed.input_ids.tolist()[:7] == [4, -1, -2, 107, 200, 201, 202]
    assert packed.drafted.tolist() == [2, 0, 0]
    assert packed.roots.tolist() == [0, 3, 6]


def test_ems_sd_worked_example():
    """Two rows predict 5 and 2 tokens and accept 4 and 1, then predict 2 and 5 and accept 2 and 6 (2405.07542).

    "Predicts" counts drafts; "accepts" counts the emitted correction or bonus token too. Padding would have added 3 + 3
    input tokens and 3 + 4 slots of KV cache; here there are none.
    """
    prompts = [7, 9]  # tokens of each row, the newest not yet fed
    step_1 = _pack(known=prompts, lengths=[6, 8], drafts=[5, 2], tokens=9, share=6)
    assert step_1.offsets.tolist() == [0, 6, 9]
    assert step_1.positions.tolist() == [6, 7, 8, 9, 10, 11, 8, 9, 10]
    assert step_1.row_ids.tolist() == [0] * 6 + [1] * 3, "no padding token"

    known = [7 + 4, 9 + 1]
    step_2 = _pack(known, lengths=[k - 1 for k in known], drafts=[2, 5], tokens=9, share=6)
    assert step_2.offsets.tolist() == [0, 3, 9]
    # The KV of each row goes on right behind its own accepted tokens: rows advance by 4 and by 1.
    assert step_2.positions.tolist() == [10, 11, 12, 9, 10, 11, 12, 13, 14]
    assert step_2.row_ids.tolist() == [0] * 3 + [1] * 6, "no padding token"


def test_a_long_prompt_is_read_in_chunks_while_others_decode():
    packed = _pack(known=[30, 6], lengths=[0, 5], drafts=[0, 3], tokens=10, share=4)
    assert packed.fed.tolist() == [6, 4], "the row that decodes gets its share first"
    assert packed.ready.tolist() == [False, True]
    assert packed.drafted.tolist() == [0, 3]


def test_drafts_that_do_not_fit_are_left_out():
    packed = _pack(known=[6, 6], lengths=[5, 5], drafts=[5, 5], tokens=8, share=4)
    assert packed.fed.tolist() == [4, 4]
    assert packed.ready.tolist() == [True, True]
    assert packed.drafted.tolist() == [3, 3]


def test_a_row_takes_no_more_than_one_row_may():
    packed = _pack(known=[30, 6], lengths=[0, 5], drafts=[0, 3], tokens=20, share=4, row_tokens=3)
    assert packed.fed.tolist() == [3, 3]
    assert packed.ready.tolist() == [False, True]
    assert packed.drafted.tolist() == [0, 2]


def test_an_inactive_row_feeds_nothing():
    packed = _pack(known=[6, 6], lengths=[5, 5], drafts=[2, 2], tokens=6, share=3, active=[False, True])
    assert packed.offsets.tolist() == [0, 0, 3]
    assert packed.ready.tolist() == [False, True]


def test_logits_are_needed_at_roots_and_drafts():
    packed = _pack(known=[5, 8, 3], lengths=[4, 7, 0], drafts=[2, 0, 0], tokens=8, share=3)
    rows = logit_rows(packed, torch.tensor([5, 8, 3]), torch.arange(6))
    assert rows.offsets.tolist() == [0, 3, 4, 5]
    assert rows.index.tolist() == [0, 1, 2, 3, 6, 0], "a prompt needs its last token's only; the tail reads token 0"
    assert rows.positions.tolist() == [5, 6, 7, 8, 3, 0]


@st.composite
def _batches(draw: st.DrawFn) -> dict[str, object]:
    rows = draw(st.integers(1, 5))

    def each(strategy: st.SearchStrategy[int]) -> list[int]:
        return draw(st.lists(strategy, min_size=rows, max_size=rows))

    lengths = each(st.integers(0, 15))
    known = [length + pending for length, pending in zip(lengths, each(st.integers(1, 18)), strict=True)]
    active = draw(st.lists(st.booleans(), min_size=rows, max_size=rows))
    drafts = each(st.integers(0, MOST))
    return {
        "known": known,
        "lengths": lengths,
        "drafts": drafts,
        "tokens": draw(st.integers(rows, 40)),
        "share": draw(st.integers(1, 6)),
        "row_tokens": draw(st.integers(1, 24)),
        "active": active,
    }


def _of_row(packed: Packed, row: int) -> Tensor:
    return torch.arange(int(packed.offsets[row]), int(packed.offsets[row + 1]))


@given(_batches())
@settings(max_examples=150)
def test_properties(batch):
    packed = _pack(**batch)
    rows = len(batch["known"])
    wanted = [
        min(known - length + drafts, batch["row_tokens"]) * active
        for known, length, drafts, active in zip(
            batch["known"], batch["lengths"], batch["drafts"], batch["active"], strict=True
        )
    ]
    fed = packed.fed.tolist()
    assert sum(fed) == min(sum(wanted), batch["tokens"]), "no place stays empty while a row has something to feed"
    assert packed.offsets.tolist() == [0, *torch.tensor(fed).cumsum(0).tolist()]
    for row in range(rows):
        own = _of_row(packed, row)
        assert packed.row_ids[own].eq(row).all()
        assert packed.positions[own].tolist() == list(range(batch["lengths"][row], batch["lengths"][row] + fed[row]))
        place, known = packed.positions[own], batch["known"][row]
        draft = known - place - 1 - 100 * row
        assert torch.equal(packed.input_ids[own], torch.where(place < known, 100 * row + place, draft))
        pending = batch["known"][row] - batch["lengths"][row]
        assert bool(packed.ready[row]) == (batch["active"][row] and fed[row] >= pending)
        assert packed.drafted[row] == (fed[row] - pending if packed.ready[row] else 0)
        if packed.ready[row]:
            assert packed.positions[packed.roots[row]] == batch["known"][row] - 1
    tail = torch.arange(sum(fed), batch["tokens"])
    assert packed.row_ids[tail].eq(rows).all(), "tail tokens belong to no row"


@given(_batches())
@settings(max_examples=100)
def test_every_row_gets_its_share_before_any_gets_more(batch):
    packed = _pack(**batch)
    share = batch["share"]
    wanted = torch.tensor(batch["known"]) - torch.tensor(batch["lengths"]) + torch.tensor(batch["drafts"])
    wanted = torch.where(torch.tensor(batch["active"]), wanted, 0).clamp(max=batch["row_tokens"])
    if bool((packed.fed > share).any()):
        assert torch.equal(packed.fed.clamp(max=share), wanted.clamp(max=share))


def test_one_token_of_each_row_that_goes_on():
    going = torch.tensor([False, True, True, False])
    packed, order = pack_one_each(torch.tensor([7, 8, 9, 6]), torch.tensor([1, 2, 3, 4]), going)
    assert packed.input_ids.tolist() == [8, 9, 0, 0]
    assert packed.positions.tolist() == [2, 3, 0, 0]
    assert packed.row_ids.tolist() == [1, 2, 4, 4]
    assert packed.offsets.tolist() == [0, 0, 1, 2, 2]
    assert order.tolist() == packed.roots.tolist() == [0, 0, 1, 0]
