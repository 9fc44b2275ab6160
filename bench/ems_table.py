"""The table of EMS-SD (arXiv 2405.07542): speed-up over greedy decoding by batch size, with and without padding.

    python -m bench.ems_table --device cuda --json ems_table.json
    python -m bench.ems_table --shape demo --batches 1 4 --prompt-tokens 200

OPT-6.7b's shape with random weights, in fp16 on CUDA; prompts of 1919 random tokens, 128 new ones, no EOS; reading the
prompts is not timed. Candidates take turns; figures are medians, ratios are taken within a repeat.

*Drafts are replayed.* Random weights say nothing that could be looked up, so the drafter knows the model's own greedy
continuation, decoded beforehand; how many drafts a step has and how many of them are right is drawn from a profile.
Verification is real: the model rejects the wrong ones, and the tokens are its own. Two profiles are replayed: prompt
lookup (K = 7) on the demo model's held-out prompts, and one that is right as often as the paper's batch 1 implies, with
as many drafts as lookup had.

*Ablation.* Inputs are packed, or padded to K + 1 tokens a row (`layout="padded"`); the KV cache never is, here. What a
shared write index would leave in it is emulated: the gaps that the replayed acceptances would open in each row,
averaged over the row's steps, are put before its prompt as more tokens. Attention reads them, as it would the gaps.

*The paper's column* is its speed-up over greedy decoding in the same engine: compare it with "× ours, none".
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import torch
from rich.console import Console
from rich.table import Table

from bench import profiles, shapes
from bench.baselines import hf_generate
from bench.command import (
    argument_parser,
    at_least,
    describe,
    hardware,
    make_console,
    make_progress,
    parse,
    save,
    versions,
)
from bench.ems_subjects import Subjects
from bench.ems_ways import Row, measure
from bench.profiles import Profile
from bench.replay import draw, foretell, gap_lengths

LOOKUP_TOKENS, LOOKUP_NGRAM, LOOKUP_NEW_TOKENS = 7, 3, 128


def main(arguments: Sequence[str] | None = None) -> None:
    """Compile, time, print, save."""
    options = parse_arguments(arguments)
    console = make_console()
    replayed = given_profile(options) or default_profiles(console, options)
    extra = {
        (name, batch): gap_lengths([foretell(draws, profile, options.new_tokens) for draws in _draws(options)[:batch]])
        for (name, profile), batch in itertools.product(replayed.items(), options.batches)
    }
    room = max(map(max, extra.values())) if options.ablation else 0
    subjects = Subjects.compile(console, options, len(next(iter(replayed.values())).right), room)
    rows: list[Row] = []
    with make_progress(console) as progress:
        for batch in progress.track(options.batches, description="timing batches"):
            rows += measure(subjects, batch, replayed, {name: extra[name, batch] for name in replayed}, options)
            if options.json:
                _save(options, rows, replayed, subjects)
    for name, profile in replayed.items():
        console.print(table(rows, name, profile, subjects, options))


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argument_parser(__doc__)
    parser.add_argument("--shape", choices=shapes.NAMES, help="model (default: opt-6.7b on cuda, demo on cpu)")
    batches = sorted(profiles.PAPER_TOKENS_PER_SECOND["greedy"])
    parser.add_argument("--batches", type=at_least(1), nargs="+", default=batches, help="rows (default: the paper's)")
    parser.add_argument("--prompt-tokens", type=at_least(2), default=1919, help="of each prompt (default: %(default)s)")
    parser.add_argument("--new-tokens", type=at_least(2), default=128, help="of each row (default: %(default)s)")
    parser.add_argument(
        "--profile",
        type=_probability,
        nargs="+",
        metavar="P",
        help="probability of draft i being right if those before it were; K, how many there are, are always drafted",
    )
    parser.add_argument(
        "--ablation", action=argparse.BooleanOptionalAction, default=True, help="also with gaps in the KV cache"
    )
    parser.add_argument("--backend", choices=("inductor", "eager"), default="inductor")
    options = parse(parser, arguments)
    options.shape = options.shape or ("opt-6.7b" if options.device.type == "cuda" else "demo")
    return options


def _probability(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a probability is needed")
    return value


def given_profile(options: argparse.Namespace) -> dict[str, Profile]:
    """That of `--profile`, if it is there."""
    if not options.profile:
        return {}
    return {"given": Profile(tuple(options.profile), (1.0,) * len(options.profile))}


def default_profiles(console: Console, options: argparse.Namespace) -> dict[str, Profile]:
    """Measured on real text, and implied by the paper, which does not say how many drafts there were."""
    prompts = shapes.demo_prompts()
    with console.status("measuring the acceptance of prompt lookup on the demo model"):
        model = shapes.build("demo", options.device)
        texts = hf_generate.run(model, prompts, max_new_tokens=LOOKUP_NEW_TOKENS).tokens
    steps = [
        step
        for prompt, text in zip(prompts, texts, strict=True)
        for step in profiles.lookup_steps(prompt, text, LOOKUP_TOKENS, LOOKUP_NGRAM)
    ]
    measured = Profile.measured(steps, LOOKUP_TOKENS)
    implied = Profile(profiles.paper_acceptance(LOOKUP_TOKENS), measured.drafted)
    return {"demo model, prompt lookup": measured, "paper's batch 1": implied}


def _draws(options: argparse.Namespace) -> torch.Tensor:
    return draw(max(options.batches), options.new_tokens)


def _save(options: argparse.Namespace, rows: list[Row], replayed: Mapping[str, Profile], subjects: Subjects) -> None:
    save(
        options.json,
        "bench.ems_table",
        [{"title": "EMS-SD", "rows": [asdict(row) for row in rows]}],
        shape=options.shape,
        dtype=str(options.dtype),
        prompt_tokens=len(subjects.prompts[0]),
        new_tokens=options.new_tokens,
        profiles={name: asdict(profile) for name, profile in replayed.items()},
        paper_tokens_per_second=profiles.PAPER_TOKENS_PER_SECOND,
        how=(__doc__ or "").partition("*Drafts")[2],
    )


def table(rows: Sequence[Row], name: str, profile: Profile, subjects: Subjects, options: argparse.Namespace) -> Table:
    """For `rich`: the rows of one profile, and those without drafts."""
    numbers = " ".join(f"{p:.2f}" for p in profile.right)
    shown = Table(
        title=f"{options.shape}, {options.dtype}, prompts of {len(subjects.prompts[0])} tokens, {options.new_tokens} "
        f"new, reading not timed\nreplayed drafts, verified by the model: {name}, right with {numbers}; a row and step "
        f"drafts {profile.expected_drafts:.2f} and emits {profile.expected_emitted:.2f} tokens",
        caption="gaps in KV: emulated by as many more tokens of context; paper: OPT-6.7b on its GPU, over its greedy "
        f"decoding\n{describe(hardware())}\n{describe(versions())}",
    )
    shown.add_column("batch", justify="right")
    shown.add_column("candidate")
    headings = ("tokens/s", "× Hugging Face", "× ours, none", "paper ×", "emitted", "fed", "same tokens")
    for heading in headings:
        shown.add_column(heading, justify="right")
    for row in sorted((r for r in rows if r.profile in (None, name)), key=lambda r: r.batch):
        shown.add_row(
            str(row.batch),
            row.candidate,
            f"{row.tokens_per_second:.1f}",
            f"{row.over_hugging_face:.2f}",
            f"{row.over_plain:.2f}",
            f"{row.paper_over_greedy:.2f}" if row.paper_over_greedy else "",
            f"{row.emitted:.2f}",
            f"{row.fed:.2f}",
            f"{row.identical_rows}/{row.batch} rows",
        )
    return shown


if __name__ == "__main__":
    main()
