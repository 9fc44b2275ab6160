"""`Throughput` against a search through all draft lengths, and what it does as drafts prove right or wrong."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emssd_compile.policies import AllDrafts, Throughput
from emssd_compile.policies.throughput import GRADE_PRIOR_WEIGHT, PRIOR, ROW_PRIOR_WEIGHT, TIE
from emssd_compile.step.nodes import select
from tests.policies.contexts import chains, chosen, context, lengths, zeros

POLICY = Throughput()
ROWS, LIMIT, GRADES = 3, 3, 2
SHARE = st.floats(0, 1)
TRIED = st.floats(0, 30)


@st.composite
def evidence(draw, *shape: int):
    """Tensors of how many drafts were accepted, and how many tried."""
    count = torch.Size(shape).numel()
    tried = torch.tensor(draw(st.lists(TRIED, min_size=count, max_size=count))).view(shape)
    return tried * torch.tensor(draw(st.lists(SHARE, min_size=count, max_size=count))).view(shape), tried


@st.composite
def times(draw, most: int):
    """Seconds of a step of 0 to `most` tokens, never less for more; smooth, or level between few steps."""
    grows = st.floats(0, 2) if draw(st.booleans()) else st.sampled_from([0.0, 0.0, 0.0, 5.0])
    added = draw(st.lists(grows, min_size=most + 1, max_size=most + 1))
    return torch.tensor(list(itertools.accumulate(added, initial=draw(st.floats(0.1, 10)))))[: most + 1]


def _survival(state, grades) -> list[list[float]]:
    """s_j of each row, from the definition."""
    row = (state["row_accepted"] + PRIOR * ROW_PRIOR_WEIGHT) / (state["row_tried"] + ROW_PRIOR_WEIGHT)
    grade = (state["grade_accepted"] + PRIOR * GRADE_PRIOR_WEIGHT) / (state["grade_tried"] + GRADE_PRIOR_WEIGHT)
    survivals = []
    for b in range(len(grades)):
        rates = [float(row[b] * grade[grades[b][j], j]) ** 0.5 for j in range(LIMIT)]
        survivals.append(list(itertools.accumulate(rates, float.__mul__)))
    return survivals


@settings(max_examples=150)
@given(data=st.data())
def test_no_other_lengths_promise_more_tokens_per_second_and_as_good_as_the_best_none_are_longer(data):
    proposed = data.draw(st.lists(st.integers(0, LIMIT), min_size=ROWS, max_size=ROWS), label="proposed")
    grade = st.integers(0, GRADES - 1)
    grades = data.draw(st.lists(st.lists(grade, min_size=LIMIT, max_size=LIMIT), min_size=ROWS, max_size=ROWS))
    state = zeros(POLICY, ROWS, LIMIT, GRADES)
    state["row_accepted"], state["row_tried"] = data.draw(evidence(ROWS), label="rows")
    state["grade_accepted"], state["grade_tried"] = data.draw(evidence(GRADES, LIMIT), label="grades")
    seconds = data.draw(times(ROWS * (LIMIT + 1)), label="seconds")
    seen = context(proposed, LIMIT, state, grades=torch.tensor(grades), seconds=seconds)

    ranking = POLICY(seen)
    chosen = lengths(ranking, seen)

    survival = _survival(ranking.state, grades)  # what the step's own evidence, here none, leaves of the old

    def speed(choice) -> float:
        gain = ROWS + sum(sum(survival[b][:length]) for b, length in enumerate(choice))
        return gain / float(seconds[ROWS + sum(choice)])

    choices = list(itertools.product(*(range(length + 1) for length in proposed)))
    good = (1 - TIE) * max(map(speed, choices))
    assert all(length <= most for length, most in zip(chosen, proposed, strict=True))
    assert sum(chosen) == int(ranking.wanted)
    assert speed(chosen) >= good * (1 - 1e-5)
    assert speed(chosen) == pytest.approx(max(speed(c) for c in choices if sum(c) == sum(chosen)), rel=1e-5)
    assert all(speed(choice) < good * (1 + 1e-5) for choice in choices if sum(choice) > sum(chosen))


@pytest.mark.parametrize(("loss", "expected"), [(0.9 * TIE, 1), (1.1 * TIE, 0)])
def test_of_speeds_that_nearly_tie_the_one_with_more_drafts_is_chosen(loss, expected):
    seconds = torch.tensor([1, 1, (1 + PRIOR) / (1 - loss)])  # with a draft, the speed is 1 - loss of that without
    seen = context([1], 1, zeros(POLICY, 1, 1), seconds=seconds)
    assert lengths(POLICY(seen), seen) == [expected]


@pytest.mark.parametrize(("price", "expected"), [(0.0, [4, 2, 0]), (10.0, [0, 0, 0])])
def test_all_drafts_where_they_are_free_and_none_where_they_are_dear(price, expected):
    seconds = 1 + price * torch.arange(3 * 5 + 1)
    seen = context([4, 2, 0], 4, zeros(POLICY, 3, 4), seconds=seconds)
    assert lengths(POLICY(seen), seen) == expected


@pytest.mark.parametrize("budget", [0, 1, 3, 5])
def test_where_room_is_short_the_likeliest_drafts_get_it(budget):
    state = zeros(POLICY, 2, 4)
    state["row_accepted"], state["row_tried"] = torch.tensor([9.0, 0.0]), torch.tensor([9.0, 9.0])
    seen = context([4, 4], 4, state)
    chosen = lengths(POLICY(seen), seen, budget)
    assert sum(chosen) == budget
    assert chosen[0] == min(budget, 4)


def test_a_step_larger_than_any_that_was_measured_costs_what_the_table_suggests():
    """Prompts are read in the same step: a draft costs what a token costs there."""
    dear = context([4], 4, zeros(POLICY, 1, 4), num_tokens=torch.tensor(100), seconds=torch.arange(1.0, 7.0))
    free = context([4], 4, zeros(POLICY, 1, 4), num_tokens=torch.tensor(100))
    odd = context([4], 4, zeros(POLICY, 1, 4), num_tokens=torch.tensor(100), seconds=torch.arange(6.0, 0.0, -1.0))
    assert lengths(POLICY(dear), dear) == [4], "a hundredth more time for more than a hundredth more tokens"
    assert lengths(POLICY(free), free) == [4]
    assert lengths(POLICY(odd), odd) == [4]


def test_without_drafts_nothing_is_wanted():
    seen = context([0, 0], 0, zeros(POLICY, 2, 0))
    ranking = POLICY(seen)
    assert lengths(ranking, seen) == [0, 0]
    assert int(ranking.wanted) == 0


class _Rows:
    """Rows step after step; a draft takes a fifth of the time of a step without any, per row."""

    def __init__(self, rows: int, limit: int, num_grades: int = 1) -> None:
        self.limit, self.verified = limit, chains([0] * rows, limit)
        self.state = zeros(POLICY, rows, limit, num_grades)
        self.seconds = 1 + 0.2 * torch.arange(rows * (limit + 1) + 1.0)

    @property
    def drafted(self) -> list[int]:
        """What the next step verifies."""
        return self.verified.lengths.tolist()

    def step(self, right: list[int], grades: list[int] | None = None) -> list[int]:
        """Verify the drafts, of which the first `right` of each row are accepted; what is drafted next."""
        accepted = [min(n, most) for n, most in zip(self.drafted, right, strict=True)]
        grade = torch.tensor(grades or [0] * len(right))[:, None].expand(-1, self.limit)
        seen = context(
            [self.limit] * len(right),
            self.limit,
            self.state,
            verified=self.verified,
            accepted=accepted,
            grades=grade,
            seconds=self.seconds,
        )
        ranking = POLICY(seen)
        self.state, self.verified = ranking.state, select(seen.draft, chosen(ranking, seen))
        return self.drafted


def test_a_row_whose_drafts_are_wrong_is_silenced_and_tried_again():
    rows = _Rows(1, 3)
    rows.seconds = 1 + 0.35 * torch.arange(5.0)
    history = [rows.step([0])[0] for _ in range(60)]
    assert history[0] > 0
    silent = history.index(0)
    again = next(index for index in range(silent, 60) if history[index] > 0)
    assert silent < 10
    assert again - silent < 40
    assert sum(history) < 30, "it drafts seldom"


def test_a_row_that_was_silenced_is_heard_when_its_drafts_are_right():
    rows = _Rows(2, 3)
    for _ in range(8):
        rows.step([3, 0])
    wrong = rows.drafted
    for _ in range(40):
        rows.step([3, 3])
    assert wrong[0] == 3 > wrong[1]
    assert rows.drafted == [3, 3]


def test_what_one_row_shows_is_not_held_against_another_row():
    rows = _Rows(3, 3)
    for _ in range(5):
        rows.step([3, 0, 0])
    accepted, tried = rows.state["row_accepted"], rows.state["row_tried"]
    assert accepted[0] == tried[0] > 0
    assert accepted[1:].tolist() == [0, 0]
    rate = (accepted + PRIOR * ROW_PRIOR_WEIGHT) / (tried + ROW_PRIOR_WEIGHT)
    assert rate[0] > PRIOR > rate[1]
    assert rate[1] == rate[2]


def test_only_the_draft_that_was_refused_counts_against_it_not_those_behind():
    state = zeros(POLICY, 1, 4)
    seen = context([0], 4, state, verified=chains([4], 4), accepted=[1])
    learnt = POLICY(seen).state
    assert learnt["grade_tried"].tolist() == [[1, 1, 0, 0]]
    assert learnt["grade_accepted"].tolist() == [[1, 0, 0, 0]]
    assert (float(learnt["row_tried"]), float(learnt["row_accepted"])) == (2, 1)


def test_what_a_grade_is_worth_is_learnt_and_goes_over_to_other_rows():
    """Grade 1 is right, grade 0 wrong, and each row's drafts are of either, turn by turn."""
    rows = _Rows(2, 3, num_grades=2)
    grades = [0, 1]
    for _ in range(30):
        right = [3 * grade for grade in grades]  # of the drafts that were graded in the step before
        grades = grades[::-1]
        rows.step(right, grades)
    good = grades.index(1)
    assert rows.drafted[good] == 3
    assert rows.drafted[1 - good] < 2


def _speed_on_paper(policy, rates: list[float], price: float, *, limit: int = 4, num_steps: int = 100) -> float:
    """Tokens by the time of a step that feeds none; a token adds `price` of it. Drafts are right at these rates."""
    rows = len(rates)
    draws = torch.rand(num_steps, rows, limit, generator=torch.Generator().manual_seed(0))
    right = (draws < torch.tensor(rates)[:, None]).cumprod(2).sum(2)
    table = 1 + price * torch.arange(rows * (limit + 1) + 1.0)
    state, drafted = zeros(policy, rows, limit), [0] * rows
    tokens = seconds = 0.0
    for step in range(num_steps):
        accepted = [min(n, most) for n, most in zip(right[step].tolist(), drafted, strict=True)]
        tokens += rows + sum(accepted)
        seconds += float(table[rows + sum(drafted)])
        verified = chains(drafted, limit)
        seen = context([limit] * rows, limit, state, verified=verified, accepted=accepted, seconds=table)
        ranking = policy(seen)
        state, drafted = ranking.state, lengths(ranking, seen)
    return tokens / seconds


@pytest.mark.parametrize("price", [0.001, 0.01, 0.05, 0.2, 1.0], ids=lambda price: f"price {price}")
@pytest.mark.parametrize("rates", [[0.9], [0.3], [0.9, 0.5], [0.2, 0.3], [0.95, 0.7, 0.5, 0.3] * 2], ids=str)
def test_it_is_hardly_slower_than_without_drafts_or_with_all(rates, price):
    """Learning what drafts are worth included."""
    without, with_all = len(rates) / (1 + price * len(rates)), _speed_on_paper(AllDrafts(), rates, price)
    assert _speed_on_paper(POLICY, rates, price) > 0.96 * max(without, with_all)
