"""What `bench.heads` compares, by name: what needs no weights, what is given, and one of each other kind of head."""

from __future__ import annotations

import argparse
import hashlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel

from bench import shapes
from emssd_compile.checkpoints import read_names
from emssd_compile.drafters import (
    HEADS,
    Drafter,
    DraftHead,
    DraftModel,
    EarlyExit,
    Hybrid,
    ParallelDraftModel,
    SuffixLookup,
    head_kind,
    load_head,
)
from emssd_compile.files import cache_folder
from emssd_compile.length import length_limit
from emssd_compile.training.data import read_documents
from emssd_compile.training.features import FrozenTarget
from emssd_compile.training.options import TrainingOptions

TREE = (3, 2, 1)
MASK = 0
"""What stands for a mask token with a draft model that never saw one."""
UNTRAINED = "untrained"


@dataclass(frozen=True)
class Subject:
    """A drafter.

    Attributes:
        make: a new one.
        weights: where its weights come from.
    """

    make: Callable[[], str | Drafter]
    weights: str = "-"


def subjects(model: PreTrainedModel, options: argparse.Namespace) -> dict[str, Subject]:
    """What drafts, by name; without drafts first."""
    exit_layer = options.exit or max(1, model.config.num_hidden_layers // 2)
    small, weights = _draft_model(model, exit_layer, options)
    made = {
        "none": Subject(lambda: "none"),
        "lookup": Subject(lambda: "prompt-lookup"),
        "suffix": Subject(lambda: "suffix"),
        f"exit {exit_layer}": Subject(partial(EarlyExit, exit_layer, 4), "the target's"),
        "draft model": Subject(lambda: DraftModel(small(), 4), weights),
        f"draft model {TREE}": Subject(lambda: DraftModel(small(), tree=TREE), weights),
        "parallel model": Subject(lambda: ParallelDraftModel(small(), MASK, 4), f"{weights}, {UNTRAINED} for it"),
    }
    for folder in options.heads:
        made[folder.name] = Subject(partial(load_head, folder), "given")
        made[f"suffix or {folder.name}"] = Subject(partial(_with_suffix, folder), "given")
        for length in _chains(folder, options.draft_tokens):
            made[f"{folder.name} K={length}"] = Subject(partial(load_head, folder, num_draft_tokens=length), "given")
    checkpoints = [read_names(folder) for folder in options.heads]
    missing = [kind for kind in HEADS if not any(kind.layout_of(*checkpoint) for checkpoint in checkpoints)]
    made |= {kind.kind: _fresh(kind, model, options) for kind in missing}
    if unknown := [name for name in options.only or () if name not in made]:
        raise SystemExit(f"--only {unknown[0]!r}: there is no such drafter here; there are {', '.join(made)}")
    return {name: subject for name, subject in made.items() if not options.only or name in {"none", *options.only}}


def _draft_model(
    model: PreTrainedModel, layers: int, options: argparse.Namespace
) -> tuple[Callable[[], PreTrainedModel], str]:
    """What makes a draft model, and where its weights come from."""
    if options.draft is not None:
        return partial(shapes.pretrained, options.draft, options.device, options.dtype), "given"
    if options.model is None:
        return partial(shapes.build, "demo-draft", options.device, options.dtype), "given"
    return partial(shapes.first_layers, model, layers), f"the target's first {layers} layers"


def _chains(folder: Path, lengths: Sequence[int]) -> Sequence[int]:
    """Those of these lengths that a head is to draft: all, or none of a head without chains."""
    kind = head_kind(folder)
    return lengths if kind is not None and "num_draft_tokens" in inspect.signature(kind).parameters else ()


def _with_suffix(folder: Path) -> Drafter:
    return Hybrid(SuffixLookup(), load_head(folder))


def _fresh(kind: type[DraftHead], model: PreTrainedModel, options: argparse.Namespace) -> Subject:
    """A head of a kind that none is given of."""
    if not options.train_on:
        return Subject(partial(_untrained, kind, model), UNTRAINED)
    return Subject(partial(_trained, kind, model, options), f"{options.train_tokens} tokens")


def _untrained(kind: type[DraftHead], model: PreTrainedModel) -> DraftHead:
    """As training begins."""
    target = FrozenTarget(model, 1, 8).as_target()
    torch.manual_seed(0)
    head = kind.for_target(target)
    head.prepare(target)
    head.begin(torch.ones(target.vocabulary, dtype=torch.int64))
    return head


def _trained(kind: type[DraftHead], model: PreTrainedModel, options: argparse.Namespace) -> DraftHead:
    """Trained on some text for an epoch, by its recipe but for that; what was trained once is kept."""
    from emssd_compile.training.train import Texts, train

    folder = options.model or shapes.DEMO_MODEL / "target"
    named = "\0".join([str(folder.resolve()), str(options.train_tokens), *map(str, options.train_on)])
    out = cache_folder() / "bench_heads" / hashlib.sha256(named.encode()).hexdigest()[:16] / kind.kind
    window = min(256, length_limit(model) or 256)
    given = {"epochs": 1, "distil": False, "tokens": options.train_tokens, "window": window, "backend": options.backend}
    texts = Texts(read_documents(options.train_on), [], AutoTokenizer.from_pretrained(folder))
    train(model, kind, texts, out, TrainingOptions.of(kind.recipe, **given))
    return load_head(out)
