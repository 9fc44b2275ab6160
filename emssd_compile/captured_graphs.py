"""Forwards that were captured before on this machine, so that a later start need not capture them.

To capture 30 layers takes longer than all passes; to read the graph takes a tenth of that. A graph is kept if all is
known that it follows from, passes took it, and its logits are the model's. One that is read goes the same way: through
all passes, with their proofs, and beside the model.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
import zlib
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, fx, nn

from emssd_compile import graph_text, identity
from emssd_compile.capture import capture, check_model, device_of
from emssd_compile.files import cache_folder, write_whole
from emssd_compile.ops import begin_kernels

_logger = logging.getLogger(__name__)
_MOST = 256
"""Graphs that are kept; the one that was not used for longest goes first."""


class CapturedGraph:
    """The forward of a model for rows of up to so many tokens, from the cache folder or captured now.

    Args:
        model: as `capture` takes it.
        longest: tokens of a row.
        fresh: capture it, whatever is kept.

    Attributes:
        code: `identity.code_of(model)`, told before anything was done; None if it cannot be told.
        graph_module: level L0.
        was_kept: whether it was read.
        seconds: that it took.

    Raises:
        InvalidInputError, UnsupportedModelError: as `capture`.
    """

    def __init__(self, model: nn.Module, longest: int, *, fresh: bool = False) -> None:
        start = time.perf_counter()
        check_model(model)
        self._text = ""
        self.code = identity.if_known(identity.code_of, model)
        self._path = _path(model, longest, self.code)
        begin_kernels(device_of(model).type)
        tensors = dict(chain(model.named_parameters(), model.named_buffers()))
        known = None if fresh or self._path is None else _read(self._path, tensors)
        self.was_kept = known is not None
        self.graph_module = capture(model, longest) if known is None else known
        if known is None and self._path is not None:
            self._prepare(tensors)
        self.seconds = time.perf_counter() - start

    def _prepare(self, tensors: dict[str, Tensor]) -> None:
        """Write the graph, and go on with what is read: a later start then compiles the very same."""
        try:
            text = graph_text.write(self.graph_module, {id(tensor): path for path, tensor in tensors.items()})
        except graph_text.UnwritableError:
            return
        again = graph_text.read(text, tensors)
        if graph_text.same(self.graph_module, again):
            self.graph_module, self._text = again, text

    def keep(self) -> None:
        """Keep it for later starts, if it can be written; where nothing can be kept it is captured again."""
        if self._path is None or not self._text:
            return
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._path, zlib.compress(self._text.encode()))
            kept = sorted(self._path.parent.iterdir(), key=_last_use, reverse=True)
            for path in kept[_MOST:]:
                path.unlink(missing_ok=True)


def _path(model: nn.Module, longest: int, code: identity.Told | None) -> Path | None:
    """Where the graph is kept: a name that is another one if anything changes that it follows from.

    None if that cannot be told (`identity`).
    """
    held = identity.if_known(identity.held_by, model)
    if code is None or held is None:
        return None
    surroundings = identity.own_sources(), *identity.machine([device_of(model)]), torch.get_default_dtype(), longest
    return cache_folder() / "captured_graphs" / identity.digest_of((*surroundings, *code, *held)).hexdigest()


def _read(path: Path, tensors: dict[str, Tensor]) -> fx.GraphModule | None:
    """The graph that is kept there, if there is one that can be read."""
    try:
        graph_module = graph_text.read(zlib.decompress(path.read_bytes()).decode(), tensors)
    except FileNotFoundError:
        return None
    except Exception as error:  # whatever somebody has put there
        _logger.warning("%s cannot be read (%s), so the model is captured anew", path, error)
        return None
    with contextlib.suppress(OSError):  # a folder that is only read
        os.utime(path)
    return graph_module


def _last_use(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # another process took it away
        return 0.0
