"""What the target itself goes on with, decoded by the fast path."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from emssd_compile.errors import CheckpointError
from emssd_compile.files import write_whole
from emssd_compile.optimized_model import OptimizedModel, optimize
from emssd_compile.progress import progress_bar
from emssd_compile.training.data import Windows, mixed
from emssd_compile.training.options import TrainingOptions
from emssd_compile.training.processes import Accelerator

_SHARD = 64
"""Prompts whose continuations are one file: what is lost if the run is killed."""


class Continuations:
    """Makes continuations, and keeps them in a folder: those that are there are not made again.

    Args:
        model: the target.
        folder: where they are kept, one file of safetensors for each 64 prompts.
        options: of the run.
        processes: who share the work.
        shows: whether to show a progress bar.
    """

    def __init__(
        self, model: nn.Module, folder: Path, options: TrainingOptions, processes: Accelerator, *, shows: bool
    ) -> None:
        self._model, self._folder, self._options = model, folder, options
        self._processes, self._shows = processes, shows
        self._fast: OptimizedModel | None = None

    def of(self, windows: Windows, what: str) -> Windows:
        """The first tokens of each window as a prompt, and what the target goes on with, up to a window's length.

        All of them, end to end, are cut into windows anew; the tokens of prompts do not count.
        """
        prompts = windows.tokens[:, : self._options.prompt_tokens]  # [N, P]
        starts = range(0, len(prompts), _SHARD)
        own = [
            start
            for number, start in enumerate(starts)
            if number % self._processes.num_processes == self._processes.process_index
        ]
        with progress_bar(self._shows, len(own), f"continuations, {what}, in {_SHARD}s") as advance:
            for start in own:
                file = self._file(what, start)
                if not file.exists():
                    write_whole(file, save(self._decode(prompts[start : start + _SHARD], what, start)))
                advance(1)
        self._processes.wait_for_everyone()
        parts = [_read(self._file(what, start)) for start in starts]
        tokens, counts = (torch.cat(each) for each in zip(*parts, strict=True))
        return Windows.cut(tokens, self._options.window, counts)

    def _file(self, what: str, start: int) -> Path:
        return self._folder / f"{what}-{start:09d}.safetensors"

    def _decode(self, prompts: Tensor, what: str, start: int) -> dict[str, Tensor]:
        """The rows of a shard, end to end: tokens int64 `[T]`, and counts bool `[T]`."""
        options = self._options
        if self._fast is None:
            rows = min(_SHARD, 4 * options.batch)
            self._fast = optimize(self._model, max_batch=rows, max_length=options.window, backend=options.backend)
        # each prompt has a seed of its own, so that it does not matter which of them are decoded together
        which = int.from_bytes(hashlib.sha256(what.encode()).digest()[:4], "little")
        seeds = [mixed(options.seed, which, start + place) for place in range(len(prompts))]
        sampling = {"do_sample": True, "temperature": options.temperature, "top_k": 0, "top_p": 1.0, "seed": seeds}
        rows_out: list[list[int]] = self._fast.generate(
            prompts.tolist(),
            max_new_tokens=options.window - options.prompt_tokens,
            **(sampling if options.temperature else {"do_sample": False}),
        )
        counts = [torch.arange(len(row)) >= options.prompt_tokens for row in rows_out]
        return {"tokens": torch.tensor([token for row in rows_out for token in row]), "counts": torch.cat(counts)}


def _read(file: Path) -> tuple[Tensor, Tensor]:
    try:
        with safe_open(file, framework="pt") as opened:
            return opened.get_tensor("tokens"), opened.get_tensor("counts")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}; remove it, and it is made again") from error
