"""The training loop of the demo models: which tokens each step sees, optimizers, schedule, checkpoints."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

CHECKPOINT_EVERY = 50
EVALUATE_EVERY = 200


@dataclass
class Run:
    """What a training run has done so far."""

    step: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    held_out: dict[int, float] = field(default_factory=dict)


def training_windows(tokens: torch.Tensor, step: int, steps: int, block: int, blocks_per_step: int) -> torch.Tensor:
    """Return the windows ``int64[rows, context + 1]`` of one step, a function of the step alone: runs can be resumed.

    Each epoch shuffles blocks of the stream without replacement. The first 80 % of the steps see half a block of
    context, the rest a whole one: attention over short windows is cheaper, and the end is enough to learn the long
    positions.
    """
    steps_per_epoch = (len(tokens) - block - 1) // block // blocks_per_step
    epoch, index = divmod(step, steps_per_epoch)
    generator = torch.Generator().manual_seed(epoch)
    shift = torch.randint(block, (1,), generator=generator)
    order = torch.randperm(steps_per_epoch * blocks_per_step, generator=generator)
    chosen = order[index * blocks_per_step : (index + 1) * blocks_per_step]
    windows = tokens[(shift + block * chosen)[:, None] + torch.arange(block + 1)]
    context = block // 2 if step < 0.8 * steps else block
    return windows.unfold(1, context + 1, context).flatten(0, 1)


def learning_rate_scale(step: int, steps: int) -> float:
    """Warm up over 30 steps, hold, then fall linearly to 0 over the last 40 %."""
    return min((step + 1) / 30, 1.0, (steps - step) / (0.4 * steps))


def make_optimizers(model: torch.nn.Module) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al., 2024) for the weight matrices of the layers, AdamW for embeddings and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers


def save_checkpoint(path: Path, model: torch.nn.Module, optimizers: list[torch.optim.Optimizer], run: Run) -> None:
    """Write a checkpoint so that a run killed meanwhile leaves the former one whole."""
    temporary = path.with_suffix(".tmp")
    optimizer_states = [optimizer.state_dict() for optimizer in optimizers]
    torch.save({"model": model.state_dict(), "optimizers": optimizer_states, "run": asdict(run)}, temporary)
    temporary.replace(path)


def load_checkpoint(path: Path, model: torch.nn.Module, optimizers: list[torch.optim.Optimizer]) -> Run:
    """Load a checkpoint into `model` and `optimizers`, in place, and return how far it had come."""
    state = torch.load(path, weights_only=True)  # noqa: TID251  unpickles tensors and plain values only
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return Run(**state["run"])


def train_step(
    value: torch.Tensor, model: torch.nn.Module, optimizers: list[torch.optim.Optimizer], scale: float
) -> None:
    """Update `model` from the loss `value`, at `scale` times the full learning rate."""
    value.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * scale
        optimizer.step()
        optimizer.zero_grad()


def fit(
    model: torch.nn.Module,
    loss: Callable[[torch.Tensor], torch.Tensor],
    windows: Callable[[int], torch.Tensor],
    evaluate: Callable[[], float],
    steps: int,
    checkpoint: Path,
) -> Run:
    """Train `model` in place for `steps` steps, going on from `checkpoint` if it exists.

    `loss` maps the windows of a step to its mean loss in nats per token; `evaluate` gives the held-out one.
    """
    optimizers = make_optimizers(model)
    run = load_checkpoint(checkpoint, model, optimizers) if checkpoint.exists() else Run()
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), *columns) as progress:
        task = progress.add_task(checkpoint.stem, total=steps, completed=run.step)
        while run.step < steps:
            began = time.perf_counter()
            value = loss(windows(run.step))
            train_step(value, model, optimizers, learning_rate_scale(run.step, steps))
            run.step += 1
            run.losses.append(value.item())
            run.seconds += time.perf_counter() - began
            last = run.step == steps
            if last or run.step % EVALUATE_EVERY == 0:
                run.held_out[run.step] = evaluate()
                progress.console.print(
                    f"{checkpoint.stem}: step {run.step}, held-out loss {run.held_out[run.step]:.3f}"
                )
            if last or run.step % CHECKPOINT_EVERY == 0:
                save_checkpoint(checkpoint, model, optimizers, run)
            progress.update(task, completed=run.step, description=f"{checkpoint.stem} loss {run.losses[-1]:.3f}")
    return run
