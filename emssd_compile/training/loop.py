"""The training loop."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from emssd_compile.drafters.head import DraftHead
from emssd_compile.errors import DrafterError
from emssd_compile.training.data import Order, Windows, mixed
from emssd_compile.training.features import FrozenTarget
from emssd_compile.training.loss import PositionScore, position_scores
from emssd_compile.training.options import TrainingOptions
from emssd_compile.training.processes import Processes
from emssd_compile.training.work import Progress, WorkFolder, trained

WARM_UP = 0.05
"""Part of the steps in which the learning rate rises."""
LONGEST_GRADIENT = 1.0
"""Gradients are cut to this norm."""
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


@dataclass
class Trainer:
    """Trains a head. What is random in a step depends on the seed and the number of the step alone.

    Attributes:
        head: prepared for the target, in float32.
        target: what it learns from.
        windows: to learn from.
        held_out: to look at only.
        options: of the run.
        processes: who share each step.
        work: where checkpoints are.
        autocast: what the head computes in where that is not float32.
    """

    head: DraftHead
    target: FrozenTarget
    windows: Windows
    held_out: Windows
    options: TrainingOptions
    processes: Processes
    work: WorkFolder
    autocast: torch.dtype | None = None

    @property
    def steps(self) -> int:
        """Steps of the optimizer in the whole run."""
        return math.ceil(self.options.epochs * len(self.windows) / self.windows_per_step)

    @property
    def windows_per_step(self) -> int:
        """Of all processes."""
        return self.options.batch * self.options.accumulate * self.processes.count

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
        self.processes.wait()  # or one might read what another already writes
        progress = self.work.load(self.head, optimizer)
        order = Order(len(self.windows), self.options.seed)
        every = max(1, self.steps // EVALUATIONS)
        while progress.steps < self.steps:
            progress.curve.append(self._step(progress.steps, order, optimizer))
            is_last = progress.steps == self.steps
            if is_last or progress.steps % every == 0:
                progress.held_out[progress.steps] = self.evaluate()
            if self.processes.is_first and (is_last or progress.steps % self.options.checkpoint_every == 0):
                self.work.save(self.head, optimizer, progress)
            told(progress)
        self.head.eval()
        return progress

    def _step(self, number: int, order: Order, optimizer: torch.optim.Optimizer) -> list[float]:
        """One step of the optimizer; loss and accuracies, as in `Progress.curve`."""
        options, rank, count = self.options, self.processes.rank, self.processes.count
        torch.manual_seed(mixed(options.seed, number, rank))  # for dropout
        self.head.train()
        optimizer.zero_grad()
        parts: list[Tensor] = []
        for part in range(options.accumulate):
            first = ((number * options.accumulate + part) * count + rank) * options.batch
            scores: list[PositionScore] = []
            for score in self._scores(self.windows[order.take(first, options.batch)]):
                weight = self.head.recipe.decay ** len(scores) / (options.accumulate * count)
                # the next position is made of what this one was made of
                (weight * score.loss).backward(retain_graph=True)
                scores.append(PositionScore(score.loss.detach(), score.accuracy))
            parts.append(self._row(scores))
        row = torch.stack(parts).mean(0)
        parameters = [parameter for _, parameter in trained(self.head)]
        self.processes.sum_(row, *(parameter.grad for parameter in parameters if parameter.grad is not None))
        nn.utils.clip_grad_norm_(parameters, LONGEST_GRADIENT)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(number, self.steps, options.learning_rate)
        optimizer.step()
        values: list[float] = (row / count).tolist()
        if not math.isfinite(values[0]):
            raise DrafterError(
                f"the loss of step {number + 1} is {values[0]}: training diverged; begin with a lower learning rate"
            )
        return values

    @torch.no_grad()
    def evaluate(self) -> list[float]:
        """Loss and accuracies, as in `Progress.curve`, over the windows held out."""
        self.head.eval()
        rows = []
        for first in range(0, len(self.held_out), self.options.batch):
            windows = self.held_out[slice(first, first + self.options.batch)]
            rows.append(self._row(list(self._scores(windows))) * len(windows))
        means: list[float] = (torch.stack(rows).sum(0) / len(self.held_out)).tolist()
        return means

    def _scores(self, windows: Windows) -> Iterator[PositionScore]:
        """Of each draft position, one at a time."""
        learns_distribution = self.options.loss == "distribution"
        features, teacher = self.target.read(windows.tokens, with_logits=learns_distribution)
        scores = position_scores(self.head, features, windows.counts.to(self.target.device), teacher)
        while True:
            with self._casting():  # not around the yield: a backward pass is not to run in it
                score = next(scores, None)
            if score is None:
                return
            yield score

    def _casting(self) -> contextlib.AbstractContextManager[object]:
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.target.device.type, self.autocast)

    def _row(self, scores: list[PositionScore]) -> Tensor:
        """float64 `[1 + 2 D]`."""
        if not scores:
            raise DrafterError(f"the rollout of {type(self.head).__name__} yields nothing to learn from")
        losses = torch.stack([self.head.recipe.decay**k * score.loss.double() for k, score in enumerate(scores)])  # [D]
        accuracy = torch.stack([score.accuracy.double() for score in scores], 1)  # [2, D]
        return torch.cat([losses.sum()[None], accuracy.flatten()])
