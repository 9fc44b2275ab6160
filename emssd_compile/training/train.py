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
from emssd_compile.training.calibration import rank_accuracies
from emssd_compile.training.continuations import Continuations
from emssd_compile.training.data import Windows, check_disjoint, check_ids, encode
from emssd_compile.training.features import FrozenTarget
from emssd_compile.training.loop import Trainer
from emssd_compile.training.options import TrainingOptions
from emssd_compile.training.processes import Accelerator, accelerator
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
    processes: Accelerator | None = None,
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
        processes: who share the work; None for this one, or those that it was launched with.
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
    processes = processes or accelerator(cpu=all(p.device.type == "cpu" for p in model.parameters()))
    limit = length_limit(model)
    if limit is not None and options.window > limit:
        raise OptionError(
            f"window={options.window} is more than the {limit} positions the model was made for; pass {limit} or less"
        )
    check_model(model)
    if (sizes := declared_sizes(model, options.batch, options.window)) is not None:
        with torch.device("meta"):
            to_be = head_class.for_target(sizes, **options.sizes)
            to_be.check(sizes)
            _check_loss(to_be, options)
    check_weights(model)
    tell = report.open_tensorboard(out) if tensorboard and processes.is_main_process else lambda progress: None
    windows, held_out = read = texts.windows(options)
    target = FrozenTarget(model, options.batch, options.window)
    for each in read:
        check_ids(each.tokens, target.vocabulary)
    torch.manual_seed(options.seed)
    head = head_class.for_target(target.as_target(), **options.sizes)
    _check_loss(head, options)
    target.tap(head.taps)
    head.prepare(target.as_target())
    work = WorkFolder(out)
    processes.wait_for_everyone()  # all have looked, before one writes
    work.begin(_command(model, head_class, windows, held_out, options, processes), writes=processes.is_main_process)

    shows_progress = shows_progress and processes.is_main_process
    learnt, continued = read, None
    if options.distil or options.continued_epochs:
        made = Continuations(model, work.continuations, options, processes, shows=shows_progress)
        own_words = made.of(windows, "training"), made.of(held_out, "held-out")
        learnt, continued = (own_words, None) if options.distil else (read, own_words)

    said = learnt[0].tokens[learnt[0].counts]
    head.begin(torch.bincount(said, minlength=target.vocabulary)[: head.config.vocabulary])
    own = next((p.dtype for p in model.parameters()), torch.float32)
    autocast = own if own in (torch.bfloat16, torch.float16) else None
    trainer = Trainer(head, target, learnt, options, processes, work, autocast, continued)
    numbers = " + ".join(f"{len(stage.windows)}" for stage in trainer.stages)
    note(f"{numbers} windows of {options.window} tokens, {len(learnt[1])} held out; {trainer.steps} steps")
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
    if head.open_ranks:
        accuracies = rank_accuracies(head, trainer.readings(), head.open_ranks)
        if accuracies[0].any():  # else there is nothing to choose by
            head.calibrate(accuracies)
    if processes.is_main_process:
        _finish(model, head, trainer, held_out, progress, out, note)
    processes.wait_for_everyone()
    return head


def _check_loss(head: DraftHead, options: TrainingOptions) -> None:
    if head.needs_teacher and options.loss == "tokens":
        raise OptionError(
            f"loss='tokens' does not teach a {type(head).__name__} how sure to be of a draft, and has_confidence asks "
            "for that; pass loss='acceptance' or 'distribution'"
        )


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
    report.write_curve(out, progress, trainer.rate)
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
            "windows": sum(len(stage.windows) for stage in trainer.stages),
            "windows_held_out": sum(len(stage.held_out) for stage in trainer.stages),
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
    processes: Accelerator,
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
        "processes": processes.num_processes,
    }
