"""The training loop."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from emssd_compile.drafters.head import DraftHead, Features
from emssd_compile.errors import DrafterError
from emssd_compile.training.data import Order, Windows, mixed
from emssd_compile.training.features import FrozenTarget
from emssd_compile.training.loss import position_scores
from emssd_compile.training.options import TrainingOptions
from emssd_compile.training.processes import Accelerator
from emssd_compile.training.work import Progress, WorkFolder, trained

WARM_UP = 0.05
"""Part of the steps in which the learning rate rises."""
LONGEST_GRADIENT = 1.0
"""Gradients are cut to this norm."""
CONTINUED_RATE = 0.1
"""Of the learning rate, what is left where the target's own continuations are learnt after the text."""
EVALUATIONS = 10
"""How often in a run the windows held out are looked at."""


def learning_rate(step: int, steps: int, highest: float) -> float:
    """That of a step, counted from 0: a linear rise to the highest one, then half a cosine down to 0."""
    rising = max(1, round(WARM_UP * steps))
    if step < rising:
        return highest * (step + 1) / rising
    return highest * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


@contextlib.contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """Within it, a GPU sums in the same order each time; a CPU does so always, with the same number of threads."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if device.type == "cuda":
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


class Lesson(nn.Module):
    """What a head is to make small, in one forward: what several processes share the gradients of.

    Args:
        head: that learns.
        loss: one of `LOSSES`.
        autocast: what it computes in where that is not float32.
    """

    def __init__(self, head: DraftHead, loss: str, autocast: torch.dtype | None) -> None:
        super().__init__()
        self.head, self._loss, self._autocast = head, loss, autocast

    def forward(self, features: Features, counts: Tensor, teacher: Tensor | None) -> tuple[Tensor, Tensor]:
        """The loss `[]`, and with it the accuracies, float64 `[1 + 2 D]`, as in `Progress.curve`.

        Args:
            features: of the windows `[B, S]`.
            counts: bool `[B, S]`, which tokens are to be learnt.
            teacher: the target's logits `[B, S, V]`, if they are to be learnt.

        Raises:
            DrafterError: the head drafts nothing.
            OptionError: windows are too short for it.
        """
        with self._casting(features.tokens.device):
            scores = list(position_scores(self.head, features, counts, teacher, self._loss))
        if not scores:
            raise DrafterError(f"the rollout of {type(self.head).__name__} yields nothing to learn from")
        weights = [self.head.recipe.decay**k for k in range(len(scores))]
        loss = torch.stack([weight * score.loss for weight, score in zip(weights, scores, strict=True)]).sum()
        accuracy = torch.stack([score.accuracy.double() for score in scores], 1)  # [2, D]
        return loss, torch.cat([loss.detach().double()[None], accuracy.flatten()])

    def _casting(self, device: torch.device) -> contextlib.AbstractContextManager[object]:
        if self._autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(device.type, self._autocast)


@dataclass(frozen=True)
class Stage:
    """A part of a run, with texts of its own.

    Attributes:
        windows: to learn from.
        held_out: to look at only.
        order: in which the windows are gone through.
        steps: of the optimizer.
        highest: the highest learning rate.
    """

    windows: Windows
    held_out: Windows
    order: Order
    steps: int
    highest: float

    def rate(self, step: int) -> float:
        """The learning rate of a step of it, counted from 0."""
        return learning_rate(step, self.steps, self.highest)


@dataclass
class Trainer:
    """Trains a head. What is random in a step depends on the seed and the number of the step alone.

    Attributes:
        head: prepared for the target, in float32.
        target: what it learns from.
        texts: to learn from, and held out.
        options: of the run.
        accelerator: the processes that share each step.
        work: where checkpoints are.
        autocast: what the head computes in where that is not float32.
        continued: what the target goes on with, and held out of that, if it is learnt from after the texts.
    """

    head: DraftHead
    target: FrozenTarget
    texts: tuple[Windows, Windows]
    options: TrainingOptions
    accelerator: Accelerator
    work: WorkFolder
    autocast: torch.dtype | None = None
    continued: tuple[Windows, Windows] | None = None

    @cached_property
    def stages(self) -> list[Stage]:
        """The parts of the run, in order."""
        options = self.options
        stages = [self._stage(self.texts, options.epochs, options.learning_rate)]
        if self.continued is not None:
            rate = CONTINUED_RATE * options.learning_rate
            stages.append(self._stage(self.continued, options.continued_epochs, rate))
        return stages

    def _stage(self, windows: tuple[Windows, Windows], epochs: int, highest: float) -> Stage:
        number = len(windows[0])
        steps = math.ceil(epochs * number / self.windows_per_step)
        return Stage(*windows, Order(number, self.options.seed), steps, highest)

    def stage_of(self, step: int) -> tuple[Stage, int]:
        """The stage that a step of the run, counted from 0, is in, and its number there."""
        for stage in self.stages:
            if step < stage.steps:
                return stage, step
            step -= stage.steps
        raise IndexError("there is no such step")

    def rate(self, step: int) -> float:
        """The learning rate of a step of the run, counted from 0."""
        stage, within = self.stage_of(step)
        return stage.rate(within)

    @property
    def steps(self) -> int:
        """Steps of the optimizer in the whole run."""
        return sum(stage.steps for stage in self.stages)

    @property
    def windows_per_step(self) -> int:
        """Of all processes."""
        count: int = self.accelerator.num_processes
        return self.options.batch * self.options.accumulate * count

    def run(self, told: Callable[[Progress], None] = lambda progress: None) -> Progress:
        """Train from the newest checkpoint on to the end; `told` is called with the progress after each step.

        Raises:
            CheckpointError: the checkpoint cannot be used.
            DrafterError: the loss is no number any more, or the head drafts nothing.
            OptionError: windows are too short for the head.
        """
        with repeatable(self.target.device):
            return self._run(told)

    def _run(self, told: Callable[[Progress], None]) -> Progress:
        parameters = [parameter for _, parameter in trained(self.head)]
        optimizer = torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)
        self.accelerator.wait_for_everyone()  # or one might read what another already writes
        progress = self.work.load(self.head, optimizer)
        self.accelerator.gradient_accumulation_steps = self.options.accumulate
        lesson, optimizer = self.accelerator.prepare(Lesson(self.head, self.options.loss, self.autocast), optimizer)
        every = max(1, self.steps // EVALUATIONS)
        while progress.steps < self.steps:
            progress.curve.append(self._step(progress.steps, lesson, optimizer))
            is_last = progress.steps == self.steps
            if is_last or progress.steps % every == 0:
                stage, _ = self.stage_of(progress.steps - 1)
                progress.held_out[progress.steps] = self.evaluate(stage.held_out)
            if self.accelerator.is_main_process and (is_last or progress.steps % self.options.checkpoint_every == 0):
                self.work.save(self.head, optimizer, progress)
            told(progress)
        self.head.eval()
        return progress

    def _step(self, number: int, lesson: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
        """One step of the optimizer; loss and accuracies, as in `Progress.curve`."""
        stage, within = self.stage_of(number)
        options, rank, count = self.options, self.accelerator.process_index, self.accelerator.num_processes
        torch.manual_seed(mixed(options.seed, number, rank))  # for dropout
        self.head.train()
        self.head.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] = stage.rate(within)
        rows: list[Tensor] = []
        for part in range(options.accumulate):
            first = ((within * options.accumulate + part) * count + rank) * options.batch
            which = stage.order.take(first, options.batch)
            with self.accelerator.accumulate(lesson):
                loss, row = lesson(*self.read(stage.windows[which]))
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.head.parameters(), LONGEST_GRADIENT)
                optimizer.step()  # once all parts are there
            rows.append(row)
        values: list[float] = self.accelerator.reduce(torch.stack(rows).mean(0), "mean").tolist()
        if not math.isfinite(values[0]):
            raise DrafterError(
                f"the loss of step {number + 1} is {values[0]}: training diverged; begin with a lower learning rate"
            )
        return values

    @torch.no_grad()
    def evaluate(self, held_out: Windows) -> list[float]:
        """Loss and accuracies, as in `Progress.curve`, over windows held out; each process looks at some."""
        self.head.eval()
        lesson, count = Lesson(self.head, self.options.loss, self.autocast), self.accelerator.num_processes
        firsts = range(0, len(held_out), self.options.batch)
        total = torch.zeros((), dtype=torch.float64, device=self.target.device)
        for turn in range(0, len(firsts), count):
            place = turn + self.accelerator.process_index
            first = firsts[min(place, len(firsts) - 1)]
            windows = held_out[slice(first, first + self.options.batch)]
            row = lesson(*self.read(windows))[1] * len(windows)
            total = total + row * (place < len(firsts))  # what another has looked at, too, counts once
        means: list[float] = (self.accelerator.reduce(total, "sum") / len(held_out)).tolist()
        return means

    def readings(self) -> Iterator[tuple[Features, Tensor, Tensor | None]]:
        """What there is to learn from the windows that the last stage holds out; see `Lesson.forward`."""
        held_out = self.stages[-1].held_out
        for first in range(0, len(held_out), self.options.batch):
            yield self.read(held_out[slice(first, first + self.options.batch)])

    def read(self, windows: Windows) -> tuple[Features, Tensor, Tensor | None]:
        """What the head learns from: see `Lesson.forward`."""
        features, teacher = self.target.read(windows.tokens, with_logits=self.options.loss != "tokens")
        return features, windows.counts.to(self.target.device), teacher
