"""What `bench.ems_table` times: greedy decoding twice, and replayed speculation with and without padding."""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from transformers import PreTrainedModel

from bench import profiles
from bench.baselines import hf_generate
from bench.ems_subjects import Compiled, Prompts, Subjects
from bench.measure import resume
from bench.profiles import Profile
from bench.timing import alternate, median_ratio
from emssd_compile.layouts import LAYOUTS

HUGGING_FACE, PLAIN = "hf_generate", "ours, none"


@dataclass(frozen=True)
class Way:
    """One way to speculate.

    Attributes:
        layout: of the inputs, as `optimize` takes it.
        gaps: whether the KV cache has the gaps of a shared write index, emulated.
        paper: the way of the paper's table that it corresponds to.
    """

    layout: str
    gaps: bool
    paper: str | None = None

    @property
    def name(self) -> str:
        """For the table."""
        return f"{self.layout} inputs, {'gaps in' if self.gaps else 'unpadded'} KV"


WAYS = (Way("packed", False, "unpadded"), Way("padded", False), Way("packed", True), Way("padded", True, "padded"))


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        batch: B.
        candidate: its name.
        profile: name of the replayed profile; `None` without drafts.
        seconds: of each repeat.
        tokens_per_second: in decoding, all rows together.
        over_hugging_face: speed-up over `hf_generate`, greedy.
        over_plain: speed-up over our compiled greedy decoding.
        paper_over_greedy: the paper's speed-up.
        emitted: tokens of a row and step, measured.
        fed: tokens of a row and step that went through the model, its share of padding included.
        identical_rows: rows whose tokens are those of our greedy decoding.
    """

    batch: int
    candidate: str
    profile: str | None
    seconds: tuple[float, ...]
    tokens_per_second: float
    over_hugging_face: float
    over_plain: float
    paper_over_greedy: float | None
    emitted: float
    fed: float
    identical_rows: int


def measure(
    subjects: Subjects,
    batch: int,
    replayed: Mapping[str, Profile],
    gaps: Mapping[str, Sequence[int]],
    options: argparse.Namespace,
) -> list[Row]:
    """Every candidate at one batch size, alternating."""
    new_tokens, plain = options.new_tokens, subjects.plain
    prompts = subjects.prompts[:batch]
    shifted = {
        name: [subjects.prompts[-1][:gap] + prompt for gap, prompt in zip(gaps[name], prompts, strict=True)]
        for name in (replayed if options.ablation else ())
    }
    shifted_continuations = {name: _continuations(plain, texts, new_tokens) for name, texts in shifted.items()}
    continuations = _continuations(plain, prompts, new_tokens)
    candidates: dict[tuple[str, str | None], Candidate] = {
        (HUGGING_FACE, None): Candidate(partial(_hugging_face, subjects.model, prompts, new_tokens), continuations),
        (PLAIN, None): Candidate(partial(_decode, plain, prompts, new_tokens), continuations),
    }
    for way, (name, profile) in itertools.product(WAYS, replayed.items()):
        if way.gaps and not options.ablation:
            continue
        own, wanted = (shifted[name], shifted_continuations[name]) if way.gaps else (prompts, continuations)
        load = partial(subjects.replay.load, own, wanted, profile)
        run = partial(_replay, subjects.replayed, own, new_tokens, way.layout, load)
        paper = profiles.paper_speedup(way.paper, batch) if way.paper else None
        candidates[way.name, name] = Candidate(run, wanted, paper)
    return _time(candidates, batch, new_tokens, options.repeats)


@dataclass(frozen=True)
class Candidate:
    """One way to decode a batch.

    Attributes:
        run: decodes once.
        expected: the model's own tokens of each row.
        paper: the paper's speed-up.
    """

    run: Callable[[], Decoding]
    expected: Prompts
    paper: float | None = None


@dataclass(frozen=True)
class Decoding:
    """What a candidate decoded.

    Attributes:
        tokens: of each row.
        seconds: without reading the prompts.
        emitted: tokens of a row and step.
        fed: tokens of a row and step that went through the model, its share of padding included.
    """

    tokens: Prompts
    seconds: float
    emitted: float
    fed: float


def _hugging_face(model: PreTrainedModel, prompts: Prompts, new_tokens: int) -> Decoding:
    result = hf_generate.run(model, prompts, max_new_tokens=new_tokens)
    return Decoding(result.tokens, result.seconds - (result.prefill_seconds or 0.0), 1.0, 1.0)


def _replay(compiled: Compiled, prompts: Prompts, new_tokens: int, layout: str, load: Callable[[], None]) -> Decoding:
    """`_decode` in `layout`. One compiled step serves all layouts, which differ in the sizes they ask of it."""
    compiled.fast._engine.planner.layout = LAYOUTS[layout]
    load()
    return _decode(compiled, prompts, new_tokens)


def _decode(compiled: Compiled, prompts: Prompts, new_tokens: int) -> Decoding:
    """Decode over prompts that were read before; the step that gives the first token is subtracted."""
    compiled.read(prompts)
    first, whole = (resume(compiled.fast, prompts, most) for most in (1, new_tokens))
    steps = whole.num_row_steps - first.num_row_steps
    return Decoding(
        whole.tokens,
        whole.seconds - first.seconds,
        emitted=len(prompts) * (new_tokens - 1) / steps,
        fed=(whole.num_tokens - first.num_tokens) / steps,
    )


def _continuations(plain: Compiled, prompts: Prompts, new_tokens: int) -> Prompts:
    """The model's own greedy tokens."""
    plain.read(prompts)
    return resume(plain.fast, prompts, new_tokens).tokens


def _time(
    candidates: Mapping[tuple[str, str | None], Candidate],
    batch: int,
    new_tokens: int,
    repeats: int,
) -> list[Row]:
    runs = alternate({key: candidate.run for key, candidate in candidates.items()}, repeats)
    times = {key: tuple(decoding.seconds for decoding in decodings[1:]) for key, decodings in runs.items()}
    rows = []
    for (name, profile), candidate in candidates.items():
        seconds, last = times[name, profile], runs[name, profile][-1]
        rows.append(
            Row(
                batch,
                name,
                profile,
                seconds,
                tokens_per_second=batch * (new_tokens - 1) / statistics.median(seconds),
                over_hugging_face=median_ratio(times[HUGGING_FACE, None], seconds),
                over_plain=median_ratio(times[PLAIN, None], seconds),
                paper_over_greedy=candidate.paper,
                emitted=last.emitted,
                fed=last.fed,
                identical_rows=sum(a == b for a, b in zip(last.tokens, candidate.expected, strict=True)),
            )
        )
    return rows
