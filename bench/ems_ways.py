"""What `bench.ems_table` times: greedy decoding twice, and replayed speculation with and without padding."""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from rich.console import Console
from transformers import PreTrainedModel

import emssd_compile
from bench import profiles, shapes
from bench.baselines import hf_generate
from bench.measure import resume
from bench.replay import ReplayDrafter, plant_continuation
from bench.timing import alternate
from emssd_compile import OptimizedModel

Prompts = list[list[int]]
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


WAYS = (Way("packed", False, "unpadded"), Way("packed", True), Way("padded", False), Way("padded", True, "padded"))


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        batch: B.
        candidate: its name.
        profile: name of the replayed profile; `None` without drafts.
        tokens_per_second: in decoding, all rows together.
        over_hugging_face: speed-up over `hf_generate`, greedy.
        over_plain: speed-up over our compiled greedy decoding.
        paper_over_greedy: the paper's speed-up.
        emitted: tokens of a row and step, measured.
        identical_rows: rows whose tokens are those of our greedy decoding.
        seconds: of each repeat.
        why_not: why there are no figures.
    """

    batch: int
    candidate: str
    profile: str | None = None
    tokens_per_second: float | None = None
    over_hugging_face: float | None = None
    over_plain: float | None = None
    paper_over_greedy: float | None = None
    emitted: float | None = None
    identical_rows: int | None = None
    seconds: tuple[float, ...] = ()
    why_not: str | None = None


@dataclass
class Subjects:
    """What is timed: a model, and what was compiled of it.

    Attributes:
        model: the target.
        prompts: as many as the largest batch.
        replay: the drafter of all layouts.
        compiled: by layout, `PLAIN` for greedy decoding; or why a layout could not be compiled.
    """

    model: PreTrainedModel
    prompts: Prompts
    replay: ReplayDrafter
    compiled: dict[str, OptimizedModel | str]

    @staticmethod
    def compile(console: Console, options: argparse.Namespace, num_draft_tokens: int, room: int) -> Subjects:
        """Build and compile; prompts are cut if a trained model is too short for them, `room` and the new tokens."""
        rows = max(options.batches)
        beside = room + options.new_tokens + num_draft_tokens
        with console.status(f"building {options.shape}"):
            model = _build(options, options.prompt_tokens + beside)
        length = min(options.prompt_tokens, model.config.max_position_embeddings - beside)
        if length < 2:
            raise SystemExit(f"{options.shape} has no room for a prompt and {beside} more tokens: pass --no-ablation")
        generator = torch.Generator().manual_seed(0)
        prompts = torch.randint(model.config.vocab_size, (rows, length), generator=generator).tolist()
        replay = ReplayDrafter(num_draft_tokens, rows, options.new_tokens, device=options.device)
        compiled: dict[str, OptimizedModel | str] = {}
        drafters: dict[str, str | ReplayDrafter] = {PLAIN: "none", "packed": replay, "padded": replay}
        for name, drafter in drafters.items():
            with console.status(f"compiling {options.shape}, {name}"):
                layout = "packed" if name == PLAIN else name
                compiled[name] = _compile(model, drafter, layout, rows, length + beside, options.backend)
        return Subjects(model, prompts, replay, compiled)


def _build(options: argparse.Namespace, positions: int) -> PreTrainedModel:
    if options.shape in shapes.SHIPPED:
        return shapes.build(options.shape, options.device, options.dtype)
    model = shapes.build(options.shape, options.device, options.dtype, positions=positions)
    plant_continuation(model)
    return model


def _compile(
    model: PreTrainedModel, drafter: str | ReplayDrafter, layout: str, rows: int, length: int, backend: str
) -> OptimizedModel | str:
    """All prompts are read in one step, as Hugging Face does, so that all rows begin to decode together."""
    try:
        fast = emssd_compile.optimize(
            model,
            drafter,
            max_batch=rows,
            max_length=length,
            layout=layout,
            backend=backend,
            prefill_chunk=rows * length,
        )
        fast.warmup()
    except NotImplementedError as error:
        return str(error)
    return fast


def measure(
    subjects: Subjects,
    batch: int,
    replayed: Mapping[str, Sequence[float]],
    gaps: Mapping[str, Sequence[int]],
    options: argparse.Namespace,
) -> list[Row]:
    """Every candidate at one batch size, alternating."""
    new_tokens = options.new_tokens
    prompts = subjects.prompts[:batch]
    plain = subjects.compiled[PLAIN]
    assert isinstance(plain, OptimizedModel)
    continuations = _continuations(plain, prompts, new_tokens)
    candidates: dict[tuple[str, str | None], Candidate] = {
        (HUGGING_FACE, None): Candidate(partial(_hugging_face, subjects.model, prompts, new_tokens), continuations),
        (PLAIN, None): Candidate(partial(_decode, plain, prompts, new_tokens, lambda: None), continuations),
    }
    rows: list[Row] = []
    for (profile, probabilities), way in itertools.product(replayed.items(), WAYS):
        if way.gaps and not options.ablation:
            continue
        fast = subjects.compiled[way.layout]
        if isinstance(fast, str):
            rows.append(Row(batch, way.name, profile, why_not=fast))
            continue
        own, wanted = prompts, continuations
        if way.gaps:
            own = [subjects.prompts[-1][:gap] + prompt for gap, prompt in zip(gaps[profile], prompts, strict=True)]
            wanted = _continuations(plain, own, new_tokens)
        load = partial(subjects.replay.load, own, wanted, probabilities)
        paper = profiles.paper_speedup(way.paper, batch) if way.paper else None
        candidates[way.name, profile] = Candidate(partial(_decode, fast, own, new_tokens, load), wanted, paper)
    return rows + _time(candidates, batch, new_tokens, options.repeats)


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
    """

    tokens: Prompts
    seconds: float
    emitted: float


def _hugging_face(model: PreTrainedModel, prompts: Prompts, new_tokens: int) -> Decoding:
    result = hf_generate.run(model, prompts, max_new_tokens=new_tokens)
    return Decoding(result.tokens, result.seconds - (result.prefill_seconds or 0.0), 1.0)


def _decode(fast: OptimizedModel, prompts: Prompts, new_tokens: int, load: Callable[[], None]) -> Decoding:
    """Read the prompts, then decode over what was read; the step that gives the first token is subtracted."""
    load()
    fast.generate(prompts, max_new_tokens=1, eos_token_id=None)
    first, whole = (resume(fast, prompts, most) for most in (1, new_tokens))
    steps = whole.num_row_steps - first.num_row_steps
    return Decoding(whole.tokens, whole.seconds - first.seconds, len(prompts) * (new_tokens - 1) / steps)


def _continuations(plain: OptimizedModel, prompts: Prompts, new_tokens: int) -> Prompts:
    """The model's own greedy tokens."""
    texts = plain.generate(prompts, max_new_tokens=new_tokens, eos_token_id=None)
    return [list(text[len(prompt) :]) for text, prompt in zip(texts, prompts, strict=True)]


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
                tokens_per_second=batch * (new_tokens - 1) / statistics.median(seconds),
                over_hugging_face=_ratio(times[HUGGING_FACE, None], seconds),
                over_plain=_ratio(times[PLAIN, None], seconds),
                paper_over_greedy=candidate.paper,
                emitted=last.emitted,
                identical_rows=sum(a == b for a, b in zip(last.tokens, candidate.expected, strict=True)),
                seconds=seconds,
            )
        )
    return rows


def _ratio(base: Sequence[float], other: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(base, other, strict=True))
