"""Decoding on Ray Data: actors hold a compiled model each, on this machine or on those of a cluster.

`Generate` is what `Dataset.map_batches` takes for a data set of your own; `continued` is what the command `batch` does.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from emssd_compile.batch.lines import Line, Read, parse_line
from emssd_compile.batch.local import Continuation, continuation
from emssd_compile.decoder import Decoder
from emssd_compile.errors import InvalidInputError, OptionError
from emssd_compile.generation import nth_seed

try:
    import ray
    import ray.data
except ImportError as error:
    raise OptionError('decoding on Ray needs it: pip install "emssd_compile[ray]"') from error

_MOST_QUEUED = 1 << 31  # no limit: a batch is at most what waits
_LINES_OF_A_FILE = 4096


class Generate:
    """An actor of `map_batches` with a compiled model. Prompts of a batch go through a session, few or many at a time.

    It takes batches with a column `"input_ids"`, token ids of a prompt each, and adds `"completion_ids"`, the new
    tokens, and `"finish_reason"`: "eos", "length", "stop" or "error". A `"seed"` is that of its prompt.

    A batch ends with its longest request, so let it have several prompts for each row of the model.

    Args:
        make: makes the model, such as a function that calls `optimize`; called once, in the actor.
        options: of `submit`, for all prompts.

    Raises:
        InvalidInputError: a batch has no `"input_ids"`.
        Exception: what `submit` raises of a prompt or an option.
    """

    def __init__(self, make: Callable[[], Decoder], **options: Any) -> None:
        self._options = options
        self._session = make().session(max_queue=_MOST_QUEUED)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Add what the prompts are continued with."""
        if "input_ids" not in batch:
            raise InvalidInputError(f'a batch has the columns {", ".join(batch)}; it needs "input_ids"')
        prompts = [[int(token) for token in ids] for ids in batch["input_ids"]]
        seeds = [int(seed) for seed in batch["seed"]] if "seed" in batch else None
        found = self.continuations(prompts, seeds)
        return {
            **batch,
            "completion_ids": [each.tokens for each in found],
            "finish_reason": [each.finish_reason for each in found],
        }

    def continuations(self, prompts: Sequence[list[int]], seeds: Sequence[int | None] | None) -> list[Continuation]:
        """What becomes of each prompt, in order."""
        own = seeds or [None] * len(prompts)
        streams = [
            self._session.submit(ids, seed=seed, **self._options) for ids, seed in zip(prompts, own, strict=True)
        ]
        return [continuation(self._session, stream) for stream in streams]


class _Lines(Generate):
    """The same for lines of a batch, as `_write` writes them."""

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        lines = [json.loads(text) for text in batch["text"]]
        found = self.continuations([line["tokens"] for line in lines], [line["seed"] for line in lines])
        results = zip(lines, found, strict=True)
        return {"result": [json.dumps([line["line"], vars(each)]) for line, each in results]}


def continued(
    lines: Iterable[Line],
    read: Read,
    make: Callable[[], Decoder],
    folder: Path,
    *,
    workers: int,
    cpus: int = 1,
    address: str | None = None,
    at_a_time: int,
    seed: int | None,
    **options: Any,
) -> Iterator[tuple[Line, Continuation]]:
    """Continue each line, and give it back when its batch has ended. Where an actor dies, Ray does its batches again.

    Args:
        lines: as `batch.lines.read_lines` gives them.
        read: as it was given to that.
        make: makes the model, in each actor.
        folder: is made, and removed at the end: all lines, where actors on other machines can read them.
        workers: how many actors.
        cpus: of each, and so threads.
        address: of a cluster, as `ray.init` takes it; None for this machine.
        at_a_time: lines of a batch.
        seed: what `generate` would be given with all prompts; None where nothing is drawn.
        options: of `submit`.
    """
    if folder.exists() and not all(re.fullmatch(r"[0-9]{6,}[.]txt", each.name) for each in folder.iterdir()):
        raise OptionError(f"{folder} exists, and no batch has made it; pass another --output, or move it away")
    with _started(address, workers * cpus + 1):
        try:
            yield from _write(lines, folder, seed)
            if not any(folder.iterdir()):
                return
            texts = ray.data.read_text(str(folder.resolve())).repartition(target_num_rows_per_block=at_a_time)
            results = texts.map_batches(
                _Lines,
                fn_constructor_args=[make],
                fn_constructor_kwargs=options,
                compute=ray.data.ActorPoolStrategy(size=workers),
                batch_size=at_a_time,
                num_cpus=cpus,
            )
            for row in results.iter_rows():
                (number, index, text), found = json.loads(row["result"])
                yield parse_line(text.encode(), number, index, read), Continuation(**found)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _write(lines: Iterable[Line], folder: Path, seed: int | None) -> Iterator[tuple[Line, Continuation]]:
    """Write what is to be done to files of some lines each, and give back what is bad."""
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was broken off
    folder.mkdir(parents=True)
    waiting, count = iter(lines), 0
    while some := list(islice(waiting, _LINES_OF_A_FILE)):
        yield from ((line, Continuation([], "error", line.error)) for line in some if line.error)
        texts = [
            json.dumps(
                {
                    "line": [line.number, line.index, line.text],
                    "tokens": line.tokens,
                    "seed": None if seed is None else nth_seed(seed, line.index),
                }
            )
            for line in some
            if not line.error
        ]
        if texts:
            (folder / f"{count:06}.txt").write_text("\n".join(texts))
        count += 1


@contextmanager
def _started(address: str | None, cpus: int) -> Iterator[None]:
    """Ray, unless it runs already; quiet, since the caller shows what is done."""
    context = ray.data.DataContext.get_current()
    shows, context.enable_progress_bars = context.enable_progress_bars, False
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.WARNING)
    is_ours = not ray.is_initialized()
    try:
        if is_ours:
            own: dict[str, Any] = {"address": address}
            if address is None:  # counted, not measured: actors must leave one for those who read
                own = {"address": "local", "num_cpus": max(os.cpu_count() or 1, cpus), "include_dashboard": False}
            ray.init(**own, logging_level=logging.ERROR, log_to_driver=False)
        yield
    finally:
        context.enable_progress_bars = shows
        logger.setLevel(level)
        if is_ours:
            ray.shutdown()
