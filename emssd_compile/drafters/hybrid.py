"""Two drafters in one: row by row the one that is expected to get more accepted."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from emssd_compile.drafters.no_drafter import Silent
from emssd_compile.errors import DrafterError, OptionError
from emssd_compile.numeric import number, shown
from emssd_compile.step.drafting import Draft, DraftContext, Drafter, Target, TargetSizes, check_drafter
from emssd_compile.step.options import RowOption
from emssd_compile.step.parts import PartSizes, gather_tensors, merge_options, tensors_of
from emssd_compile.step.proposals import DETERMINISTIC
from emssd_compile.step.tensor_spec import TensorSpec

_MEMORY = 0.99
"""What was accepted counts for so much, the next time that something is."""


class Hybrid(Drafter):
    """The first drafter where it scores more than the second is expected to get accepted, row by row; else the second.

    Made for a lookup before a draft model or a head (2411.04975): where a text repeats something the
    lookup drafts long and for free, elsewhere the model drafts. Both run in every step.

    The score of the first is its `Draft.scores`, or how many tokens it drafts if it gives none. What the second gets
    accepted is `threshold`, or without one the mean of what was accepted of its drafts so far, in any row, where newer
    ones count more. A row for which one of them drafts nothing takes the other. Where drafts are drawn, and must not be
    chosen by what they are, a row takes the first wherever it drafts anything.

    Rows that take the first draft nothing in the second, which only reads along. So the second may have a cache of its
    own; the first must not rely on its drafts being verified: a `DraftModel` of chains goes second. Drafts are trees if
    those of one are; a chain in them is a tree without branches. The grades of the two are kept apart.

    Args:
        first, second: the drafters.
        threshold: drafts, at least 0, that the second is taken to get accepted in each step.

    Raises:
        OptionError: one is no drafter, both together can draw no drafts, the first is a draft model of chains, or the
            threshold is out of range.
        DrafterError: an attribute of one makes no sense, or they declare different options of one name.
    """

    def __init__(self, first: Drafter, second: Drafter, threshold: float | None = None) -> None:
        super().__init__()
        for name, drafter in (("first", first), ("second", second)):
            if not isinstance(drafter, Drafter):
                raise OptionError(f"Hybrid {name}={shown(drafter)} is no Drafter; pass an instance of one")
            check_drafter(drafter)
        if first.reads_ahead and first.max_depth is None:
            raise OptionError(
                f"Hybrid first={type(first).__name__} reads its own chains as it drafts them, and would take them for "
                "the row's text where the second is chosen; pass it as second"
            )
        self.first, self.second = first, second
        self.threshold = None if threshold is None else float(number("Hybrid threshold", threshold))
        if self.threshold is not None and self.threshold < 0:
            raise OptionError(f"Hybrid threshold={self.threshold} is out of range; pass at least 0, or None")
        both = (first, second)
        self.num_draft_tokens = max(drafter.num_draft_tokens for drafter in both)
        self.max_depth = max(map(_depth, both)) if any(drafter.max_depth is not None for drafter in both) else None
        self.num_grades = sum(drafter.num_grades for drafter in both)
        self.taps = tuple(dict.fromkeys((*first.taps, *second.taps)))
        self.reads_logits = any(drafter.reads_logits for drafter in both)
        self.writes_kv = any(drafter.writes_kv for drafter in both)
        self.reads_ahead = any(drafter.reads_ahead for drafter in both)
        self.any_rows = all(drafter.any_rows for drafter in both)
        self.is_costly = any(drafter.is_costly for drafter in both)
        self.remembers_features = any(drafter.remembers_features for drafter in both)
        self.reads_options = tuple(dict.fromkeys((*first.reads_options, *second.reads_options)))
        self.proposes = tuple(way for way in first.proposes if way in second.proposes)
        if not self.proposes:
            raise OptionError(
                f"Hybrid: {type(first).__name__} proposes {list(first.proposes)}, {type(second).__name__} "
                f"{list(second.proposes)}; choose drafters that share a way"
            )
        merge_options(both, DrafterError)

    def check(self, sizes: TargetSizes) -> None:
        """Check both. Raises DrafterError or OptionError if one of them does not fit the target."""
        self.first.check(sizes)
        self.second.check(sizes)

    def prepare(self, target: Target) -> None:
        """Prepare both. Raises DrafterError if one of them does not fit the target."""
        self.first.prepare(target)
        self.second.prepare(target)

    def notes(self) -> tuple[str, ...]:
        """What both say."""
        return (*self.first.notes(), *self.second.notes())

    def options(self) -> dict[str, RowOption]:
        """Those of both."""
        return {**self.first.options(), **self.second.options()}

    def suited(self, used: Collection[str]) -> Self:
        """Both, suited."""
        first, second = self.first.suited(used), self.second.suited(used)
        if first is self.first and second is self.second:
            return self
        return type(self)(first, second, self.threshold)

    @property
    def costly_grades(self) -> tuple[range, ...]:
        """Those of both, in its own numbers."""
        behind = self.first.num_grades
        of_second = (range(grades.start + behind, grades.stop + behind) for grades in self.second.costly_grades)
        return (*self.first.costly_grades, *of_second)

    def cheaper(self) -> Self | None:
        """What is left of each of them, if anything is left of one."""
        if not self.is_costly:
            return self
        first, second = self.first.cheaper(), self.second.cheaper()
        if first is None and second is None:
            return None
        return type(self)(first or Silent(self.first), second or Silent(self.second), self.threshold)

    def tensors(self, sizes: PartSizes) -> dict[str, TensorSpec]:
        """Those of both, and without a threshold what is accepted of the drafts of the second.

        `own__known` int64 `[B]`, the tokens that a row had when the second drafted for it, 0 when it did not, and
        `own__accepted` float32 `[2]`: how many of its drafts were accepted, in how many steps.
        """
        own = (
            {}
            if self.threshold is not None
            else {
                "known": TensorSpec((sizes.rows,), torch.int64),
                "accepted": TensorSpec((2,), torch.float32, kept="forever"),
            }
        )
        return gather_tensors(
            {
                "first": self.first.tensors(_of(self.first, sizes)),
                "second": self.second.tensors(_of(self.second, sizes)),
                "own": own,
            }
        )

    def host_tensors(self) -> Mapping[str, Tensor]:
        """Those of both."""
        return gather_tensors({"first": self.first.host_tensors(), "second": self.second.host_tensors()})

    def ended(self, tokens: Tensor, prompt_length: int, options: Mapping[str, float | Tensor]) -> None:
        """Tell both."""
        self.first.ended(tokens, prompt_length, options)
        self.second.ended(tokens, prompt_length, options)

    def forward(self, context: DraftContext) -> Draft:
        """Ask the first, then the second for the other rows: tokens and grades `[B, K]`, lengths and scores `[B]`."""
        own = tensors_of("own", context.state)
        expected, accepted = self._expected(context, own)  # [], [2]
        first = self._ask(self.first, "first", context)
        score = first.lengths.float() if first.scores is None else first.scores  # [B]
        prefers = first.lengths > 0
        if context.drawn == DETERMINISTIC:
            prefers = prefers & (score > expected)
        others = context.can_draft & ~prefers
        max_drafts = torch.where(others, context.max_drafts, 0)
        second = self._ask(self.second, "second", replace(context, can_draft=others, max_drafts=max_drafts))
        takes_first = prefers | (second.lengths <= 0)
        state = {}
        if own:
            seen = torch.where(context.known > own["known"], 0, own["known"])  # what was drafted there is verified
            known = torch.where(others & ~takes_first, context.known, seen)
            state = {"known": known, "accepted": accepted}
        drafts = {"first": first, "second": second}
        chosen = self._chosen(takes_first, first, second)
        rest = expected.expand(score.shape) if second.scores is None else second.scores
        return replace(
            chosen,
            scores=torch.where(takes_first, score, rest),
            state=gather_tensors({**{name: draft.state for name, draft in drafts.items()}, "own": state}),
        )

    def _expected(self, context: DraftContext, own: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What the second is expected to get accepted in a row, float32 `[]`; and the new `own__accepted`.

        Before anything is known one draft is.
        """
        if self.threshold is not None:
            expected = torch.full((), self.threshold, dtype=torch.float32, device=context.known.device)
            return expected, expected
        known, accepted = own["known"], own["accepted"]
        is_verified = (known > 0) & (context.known > known)  # [B]
        gained = torch.where(is_verified, context.known - known - 1, 0).clamp(max=_depth(self.second))
        news = torch.stack([gained.sum(), is_verified.sum()]).float()
        accepted = accepted * torch.where(news[1] > 0, _MEMORY, 1.0) + news
        return (accepted[0] + 1) / (accepted[1] + 1), accepted

    def _ask(self, drafter: Drafter, name: str, context: DraftContext) -> Draft:
        """What one of them drafts, given what it would be given alone."""
        honoured = {*drafter.options(), *drafter.reads_options}
        reading = context.draft_range
        if drafter.reads_ahead and self.max_depth is None:  # it has not read what the other one drafted
            more = context.known.shape[0] * (self.num_draft_tokens - 1)
            reading = torch.arange(reading.shape[0] + more, device=reading.device)
        draft: Draft = drafter(
            replace(
                context,
                max_drafts=context.max_drafts.clamp(max=_depth(drafter)),
                draft_range=reading,
                caches=context.caches if drafter.writes_kv else {},
                options={option: value for option, value in context.options.items() if option in honoured},
                state=tensors_of(name, context.state),
            )
        )
        return draft

    def _chosen(self, takes_first: Tensor, first: Draft, second: Draft) -> Draft:
        """The drafts of the first in some rows, bool `[B]`, and those of the second in the others."""
        graded = [_graded(draft, drafter) for draft, drafter in ((first, self.first), (second, self.second))]
        parents = None
        if self.max_depth is not None:
            parents = self._either(takes_first, _parents(first), _parents(second))
        proposal = None
        if first.proposal is not None and second.proposal is not None:
            q, other = self._padded(first.proposal, 1), self._padded(second.proposal, 1)
            proposal = torch.where(takes_first[:, None, None], q, other)  # [B, K + 1, V]
        return Draft(
            self._either(takes_first, first.tokens, second.tokens),
            torch.where(takes_first, first.lengths, second.lengths),
            grades=self._either(takes_first, graded[0], graded[1] + self.first.num_grades),
            parents=parents,
            proposal=proposal,
        )

    def _either(self, takes_first: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """Values of drafts, `[B, K]`, of the first or the second."""
        return torch.where(takes_first[:, None], self._padded(first), self._padded(second))

    def _padded(self, value: Tensor, more: int = 0) -> Tensor:
        """`[B, k, ...]` with zeros behind, `[B, K + more, ...]`."""
        missing = self.num_draft_tokens + more - value.shape[1]
        return F.pad(value, (*[0] * (2 * (value.dim() - 2)), 0, missing))


def _depth(drafter: Drafter) -> int:
    """D, most drafts on a path."""
    return drafter.num_draft_tokens if drafter.max_depth is None else drafter.max_depth


def _of(drafter: Drafter, sizes: PartSizes) -> PartSizes:
    """The sizes of a step with this drafter alone."""
    return replace(
        sizes,
        num_draft_tokens=drafter.num_draft_tokens,
        num_grades=drafter.num_grades,
        max_depth=drafter.max_depth,
    )


def _graded(draft: Draft, drafter: Drafter) -> Tensor:
    """The grades of its drafts, each in its range, `[B, K]`."""
    if draft.grades is None:
        return torch.zeros_like(draft.tokens)
    return draft.grades.clamp(0, drafter.num_grades - 1)


def _parents(draft: Draft) -> Tensor:
    """The node that each draft follows, `[B, K]`: of a chain, the one before it."""
    if draft.parents is not None:
        return draft.parents
    return torch.arange(draft.tokens.shape[1], device=draft.tokens.device).expand_as(draft.tokens)
