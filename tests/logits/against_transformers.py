"""Processors beside the classes of transformers that they stand for: random rows, chains and trees, values by row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from emssd_compile.logits import LogitContext, LogitsProcessor
from emssd_compile.step.options import RowOption
from tests.logits.contexts import CAPACITY, Line, context

VOCABULARY, MOST, EOS = 12, 4, [1, 3]


@dataclass
class Subject:
    """Some rows and the logits behind each of their nodes.

    Attributes:
        rows: text and drafts of each.
        seen: what a processor sees of them, without options.
    """

    rows: list[Line]
    seen: LogitContext

    def texts(self) -> list[tuple[int, list[int]]]:
        """The row of each logit, and its text."""
        nodes = [(b, node) for b, row in enumerate(self.rows) for node in range(len(row.drafts) + 1)]
        return [(b, [*self.rows[b].text, *self.rows[b].path(node)]) for b, node in nodes]


@st.composite
def subjects(draw: st.DrawFn) -> Subject:
    """Texts of few tokens, which so repeat themselves; logits of both signs."""
    trees, token = draw(st.booleans()), st.integers(0, draw(st.integers(1, VOCABULARY - 1)))
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        text = draw(st.lists(token, min_size=1, max_size=CAPACITY - MOST))
        drafts = draw(st.lists(token, max_size=MOST))
        parents = [draw(st.integers(0, i)) if trees else i for i in range(len(drafts))]
        rows.append(Line(text, drafts, parents))
    seen = context(rows, MOST, trees=trees, tail=draw(st.integers(0, 2)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    logits = torch.randn(len(seen.row_ids), VOCABULARY, generator=generator) * 3
    logits[:, draw(st.integers(0, VOCABULARY - 1))] = 0.0
    prompts = [draw(st.integers(1, len(row.text))) for row in rows]
    limits = [draw(st.integers(len(row.text) + 1, len(row.text) + MOST + 1)) for row in rows]
    seen = replace(
        seen,
        logits=logits,
        prompt_lengths=torch.tensor(prompts),
        limits=torch.tensor(limits),
        is_eos=torch.tensor([token in EOS for token in range(VOCABULARY)]),
    )
    return Subject(rows, seen)


def lines(option: RowOption, values: Sequence[object]) -> Tensor:
    """`[B, *shape]`: what the engine writes for requests that set these values; None is the default."""
    return option.lines([option.default if v is None else option.read("x", v, VOCABULARY) for v in values])


def processed(processor: LogitsProcessor, subject: Subject, **values: Sequence[object]) -> Tensor:
    """The logits behind it; for each option a value for each row."""
    known = processor.options()
    options = {name: lines(option, values.get(name, [None] * len(subject.rows))) for name, option in known.items()}
    before = subject.seen.logits.clone()
    logits = processor(replace(subject.seen, options=options)).logits
    assert torch.equal(bits(subject.seen.logits), bits(before))
    assert logits.dtype == before.dtype
    return logits


Theirs = Callable[[int], Callable[[Tensor, Tensor], Tensor] | None]
"""What transformers does to the logits of a row: (ids [1, n], scores [1, V]) -> scores; None for nothing."""


def expected(subject: Subject, theirs: Theirs) -> list[Tensor]:
    """The logits of each node by transformers' classes, one at a time."""
    found = []
    for entry, (row, text) in enumerate(subject.texts()):
        scores, change = subject.seen.logits[entry : entry + 1].clone(), theirs(row)
        found.append((change(torch.tensor([text]), scores) if change is not None else scores)[0])
    return found


def assert_like_transformers(
    processor: LogitsProcessor, subject: Subject, theirs: Theirs, *, tolerance: float = 1e-6, **values: Any
) -> None:
    """Compare; and each row's bits with what they are if no other row sets anything."""
    logits = processed(processor, subject, **values)
    wanted = expected(subject, theirs)
    torch.testing.assert_close(logits[: len(wanted)], torch.stack(wanted), rtol=tolerance, atol=tolerance)
    rows = range(len(subject.rows))
    for row in rows:
        alone = {name: [v if b == row else None for b, v in enumerate(each)] for name, each in values.items()}
        is_own = subject.seen.row_ids == row
        found = processed(processor, subject, **alone)
        assert torch.equal(found[is_own], logits[is_own]), "what other rows set changes nothing"
        assert torch.equal(bits(found[~is_own]), bits(subject.seen.logits[~is_own])), "what is not set does nothing"


def bits(logits: Tensor) -> Tensor:
    """Floats as they lie in memory: NaN equals NaN, and 0 not -0."""
    return logits.view(torch.int32)
