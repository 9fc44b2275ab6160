"""What a run leaves behind for people: the curve as CSV and picture, and a summary."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from emssd_compile.drafters.head import DraftHead
from emssd_compile.errors import OptionError
from emssd_compile.files import write_whole
from emssd_compile.optimized_model import optimize
from emssd_compile.training.data import Windows
from emssd_compile.training.loss import TOP
from emssd_compile.training.options import TrainingOptions
from emssd_compile.training.work import Progress

CURVE, PICTURE, SUMMARY, TENSORBOARD = "curve.csv", "curve.png", "training.json", "tensorboard"
MOST_PROMPTS, MOST_NEW_TOKENS = 16, 64
"""What the acceptance length is measured on: prompts of texts held out, and tokens that follow each."""


@dataclass(frozen=True)
class Point:
    """One row of a curve, by name.

    Attributes:
        loss: in nats, of all draft positions together.
        accuracy: `accuracy[n][k]` is how often the (k + 1)-th draft is right, where the n likeliest count.
    """

    loss: float
    accuracy: dict[int, list[float]]

    @classmethod
    def of(cls, row: list[float]) -> Point:
        """Of a row of `Progress`."""
        depth = (len(row) - 1) // len(TOP)
        return cls(row[0], {top: row[1 + n * depth : 1 + (n + 1) * depth] for n, top in enumerate(TOP)})

    def named(self) -> dict[str, float]:
        """`loss`, and `top1_1` for the first draft, ..., `top5_1`, ..."""
        of_drafts = {f"top{top}_{k}": one for top, each in self.accuracy.items() for k, one in enumerate(each, start=1)}
        return {"loss": self.loss, **of_drafts}


def write_curve(folder: Path, progress: Progress, rate: Callable[[int], float]) -> None:
    """Write `curve.csv`: a line for each step, and one for each look at the windows held out.

    Args:
        folder: where.
        progress: what there is to tell.
        rate: the learning rate of a step, counted from 0.
    """
    points = [(step, "train", Point.of(row)) for step, row in enumerate(progress.curve, start=1)]
    points += [(steps, "held out", Point.of(row)) for steps, row in progress.held_out.items()]
    lines = [
        {"step": step, "windows": which, "learning_rate": rate(step - 1), **point.named()}
        for step, which, point in sorted(points, key=lambda each: each[0])
    ]
    text = io.StringIO()
    table = csv.DictWriter(text, lines[0], lineterminator="\n")
    table.writeheader()
    table.writerows(lines)
    write_whole(folder / CURVE, text.getvalue().encode())


def plot(folder: Path, progress: Progress, title: str) -> bool:
    """Write `curve.png`: the loss, and the accuracy of each draft position; False if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(12, 4), layout="constrained")
    loss, *accuracies = figure.subplots(1, 1 + len(TOP))
    train = [Point.of(row) for row in progress.curve]
    seen = {steps: Point.of(row) for steps, row in progress.held_out.items()}
    loss.plot(range(1, len(train) + 1), [point.loss for point in train], linewidth=0.8, label="training")
    loss.plot([*seen], [point.loss for point in seen.values()], marker="o", label="held out")
    loss.set(xlabel="steps", ylabel="nats", title="loss")
    for axes, top in zip(accuracies, TOP, strict=True):
        for k, values in enumerate(zip(*(point.accuracy[top] for point in seen.values()), strict=True), start=1):
            axes.plot([*seen], values, marker="o", label=f"draft {k}")
        axes.set(xlabel="steps", ylim=(0, 1), title=f"top-{top} accuracy, held out")
    for axes in (loss, *accuracies):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    write_whole(folder / PICTURE, image.getvalue())
    return True


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write `training.json`."""
    write_whole(folder / SUMMARY, (json.dumps(summary, indent=2) + "\n").encode())


def measure_acceptance(model: nn.Module, head: DraftHead, texts: Windows, options: TrainingOptions) -> dict[str, Any]:
    """How many tokens a step gives with the head, where all its drafts are verified.

    Args:
        model: the target.
        head: what drafts.
        texts: held out; the first tokens of each are a prompt.
        options: of the run.
    """
    prompts = texts.tokens[:MOST_PROMPTS, : options.prompt_tokens].tolist()
    new_tokens = min(MOST_NEW_TOKENS, options.window - options.prompt_tokens)
    fast = optimize(
        model, head, max_batch=len(prompts), max_length=options.window, backend=options.backend, layout="packed"
    )
    fast.generate(prompts, max_new_tokens=new_tokens, do_sample=False)
    return {
        "prompts": len(prompts),
        "new_tokens": new_tokens,
        "mean_acceptance_length": fast.stats.mean_acceptance_length,
        "draft_acceptance_rate": fast.stats.draft_acceptance_rate,
    }


def open_tensorboard(folder: Path) -> Callable[[Progress], None]:
    """What writes each new step to event files in `DIR/tensorboard`.

    Raises:
        OptionError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise OptionError(
            "--tensorboard: TensorBoard is not installed; pip install tensorboard, or leave the option out"
        ) from error
    writer: Any = None

    def tell(progress: Progress) -> None:
        nonlocal writer
        if writer is None:  # what was written behind the checkpoint that a run goes on from is written again
            writer = SummaryWriter(str(folder / TENSORBOARD), purge_step=progress.steps)
        rows = {"training": progress.curve[-1], "held out": progress.held_out.get(progress.steps)}
        for which, row in rows.items():
            for name, value in Point.of(row).named().items() if row else ():
                writer.add_scalar(f"{name}/{which}", value, progress.steps)
        writer.flush()

    return tell
