"""`train`: where data, target, loop and report meet."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from emssd_compile.capture import check_model, check_weights
from emssd_compile.drafters.head import DraftHead
from emssd_compile.errors import OptionError
from emssd_compile.length import declared_sizes, length_limit
from emssd_compile.progress import progress_bar
from emssd_compile.training import report
from emssd_compile.training.continuations import Continuations
from emssd_compile.training.data import Windows, check_disjoint, check_ids, encode
from emssd_compile.training.features import FrozenTarget
from emssd_compile.training.loop import Trainer, learning_rate
from emssd_compile.training.options import TrainingOptions
from emssd_compile.training.processes import Processes
from emssd_compile.training.work import Progress, WorkFolder

_WITHOUT_EFFECT = ("checkpoint_every", "backend")
"""Options that change no number of a run: they may differ when it goes on."""


@dataclass(frozen=True)
class Texts:
    """What a run is given to read.

    Attributes:
        data: to learn from.
        held_out: never to learn from; without any, a share of the windows of the data.
        tokenizer: of the target, as in transformers.
    """

    data: Sequence[str]
    held_out: Sequence[str]
    tokenizer: Any

    def windows(self, options: TrainingOptions) -> tuple[Windows, Windows]:
        """Those to learn from, and those held out.

        Raises:
            InvalidInputError: one of them has no window, or holds a text of the other.
        """
        check_disjoint(self.data, self.held_out)
        windows = Windows.cut(encode(self.data, self.tokenizer, options.tokens), options.window)
        if not self.held_out:
            return windows.split(options.held_out_share, options.seed)
        return windows, Windows.cut(encode(self.held_out, self.tokenizer, options.tokens), options.window)


def train(
    model: nn.Module,
    head_class: type[DraftHead],
    texts: Texts,
    out: Path,
    options: TrainingOptions,
    *,
    processes: Processes | None = None,
    note: Callable[[str], None] = lambda text: None,
    shows_progress: bool = False,
    tensorboard: bool = False,
) -> DraftHead:
    """Train a head for a model, which stays as it is; write the head, its curve and a summary to a folder.

    Where the folder holds an unfinished run of the same arguments, that one goes on, and ends in the same numbers, bit
    for bit on the same machine with as many threads, as if it had never been interrupted.

    Args:
        model: the target, in eval mode. In half precision, the head computes in that, too (autocast), with weights in
            float32.
        head_class: the kind of head.
        texts: what to learn from.
        out: where the head is written.
        options: all else.
        processes: who share the work.
        note: told of what has been reached.
        shows_progress: whether to show bars.
        tensorboard: whether to write event files, too.

    Raises:
        OptionError: an option is out of range, or the folder is that of another run.
        InvalidInputError: the texts are too short, or the same text is learnt from and held out.
        UnsupportedModelError: as `optimize`.
        CheckpointError: what was left of a run is damaged.
        DrafterError: the head does not fit, or training diverges.
    """
    processes = processes or Processes()
    limit = length_limit(model)
    if limit is not None and options.window > limit:
        raise OptionError(
            f"window={options.window} is more than the {limit} positions the model was made for; pass {limit} or less"
        )
    check_model(model)
    if (sizes := declared_sizes(model, options.batch, options.window)) is not None:
        with torch.device("meta"):
            head_class.for_target(sizes, **options.sizes).check(sizes)
    check_weights(model)
    tell = report.open_tensorboard(out) if tensorboard and processes.is_first else lambda progress: None
    windows, held_out = texts.windows(options)
    target = FrozenTarget(model, options.batch, options.window)
    for each in (windows, held_out):
        check_ids(each.tokens, target.vocabulary)
    texts_held_out = held_out
    torch.manual_seed(options.seed)
    head = head_class.for_target(target.as_target(), **options.sizes)
    target.tap(head.taps)
    head.prepare(target.as_target())
    work = WorkFolder(out)
    processes.wait()  # all have looked, before one writes
    work.begin(_command(model, head_class, windows, held_out, options, processes), writes=processes.is_first)

    shows_progress = shows_progress and processes.is_first
    if options.distil:
        made = Continuations(model, work.continuations, options, processes, shows=shows_progress)
        windows, held_out = made.of(windows, "training"), made.of(held_out, "held-out")

    head.begin(torch.bincount(windows.tokens[windows.counts], minlength=target.vocabulary)[: head.config.vocabulary])
    own = next((p.dtype for p in model.parameters()), torch.float32)
    autocast = own if own in (torch.bfloat16, torch.float16) else None
    trainer = Trainer(head, target, windows, held_out, options, processes, work, autocast)
    note(f"{len(windows)} windows of {options.window} tokens, {len(held_out)} held out; {trainer.steps} steps")
    with progress_bar(shows_progress, trainer.steps, "steps") as advance:
        shown = 0

        def told(progress: Progress) -> None:
            nonlocal shown
            advance(progress.steps - shown)
            shown = progress.steps
            tell(progress)
            if row := progress.held_out.get(progress.steps):
                point = report.Point.of(row)
                accuracy = ", ".join(f"{one:.1%}" for one in point.accuracy[1])
                note(f"step {progress.steps}: held-out loss {point.loss:.4f}, top-1 of each draft {accuracy}")

        progress = trainer.run(told)
    if processes.is_first:
        _finish(model, head, trainer, texts_held_out, progress, out, note)
    processes.wait()
    return head


def _finish(
    model: nn.Module,
    head: DraftHead,
    trainer: Trainer,
    texts: Windows,
    progress: Progress,
    out: Path,
    note: Callable[[str], None],
) -> None:
    """Write the head and the reports."""
    options = trainer.options
    head.save_pretrained(out)
    report.write_curve(out, progress, lambda step: learning_rate(step, trainer.steps, options.learning_rate))
    if not report.plot(out, progress, f"{head.kind} head, {trainer.steps} steps"):
        note(f'no {report.PICTURE}: matplotlib is not installed; pip install "emssd_compile[train]"')
    acceptance = report.measure_acceptance(model, head, texts, options)
    last = report.Point.of(progress.held_out[trainer.steps])
    report.write_summary(
        out,
        {
            "kind": head.kind,
            "config": asdict(head.config),  # type: ignore[call-overload]  # `config_class` is a dataclass
            "options": asdict(options),
            "steps": trainer.steps,
            "windows": len(trainer.windows),
            "windows_held_out": len(trainer.held_out),
            "tokens_seen": trainer.steps * trainer.windows_per_step * options.window,
            "held_out": {"loss": last.loss, **{f"top{top}": each for top, each in last.accuracy.items()}},
            "acceptance": acceptance,
        },
    )
    note(f"acceptance length on held-out prompts: {acceptance['mean_acceptance_length']:.2f} tokens a step")


def _command(
    model: nn.Module,
    head_class: type[DraftHead],
    windows: Windows,
    held_out: Windows,
    options: TrainingOptions,
    processes: Processes,
) -> dict[str, Any]:
    """All that the numbers of a run depend on."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return {
        **{name: value for name, value in asdict(options).items() if name not in _WITHOUT_EFFECT},
        "kind": head_class.kind,
        "model": digest.hexdigest(),
        "data": windows.digest(),
        "held_out": held_out.digest(),
        "processes": processes.count,
    }
