"""The three ways into transformers' continuous batching, on sessions."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from emssd_compile.batching_manager import BatchingManager
from emssd_compile.progress import progress_bar as progress_bar_of


class ContinuousBatching:
    """Mixed into what has sessions."""

    def init_continuous_batching(
        self, generation_config: Any = None, continuous_batching_config: Any = None, workload_hints: object = None
    ) -> BatchingManager:
        """A manager that is not started. `workload_hints` have no meaning here."""
        decoder: Any = self
        return BatchingManager(decoder, generation_config, continuous_batching_config)

    @contextlib.contextmanager
    def continuous_batching_context_manager(
        self,
        generation_config: Any = None,
        block: bool = True,
        timeout: float | None = None,
        continuous_batching_config: Any = None,
        persistent_manager: bool = False,
        warmup: bool = True,
        workload_hints: object = None,
    ) -> Iterator[BatchingManager]:
        """A manager that runs; on leaving it stops as `BatchingManager.stop` says. An exception cancels all requests.

        `persistent_manager` and `warmup` have no meaning here: what was compiled is kept with the model.
        """
        manager = self.init_continuous_batching(generation_config, continuous_batching_config)
        manager.start()
        try:
            yield manager
        except BaseException:
            manager.destroy()
            raise
        manager.stop(block, timeout)

    def generate_batch(
        self,
        inputs: Sequence[Sequence[int]],
        generation_config: Any = None,
        continuous_batching_config: Any = None,
        record_timestamps: bool = False,
        progress_bar: bool = False,
        persistent_manager: bool = False,
        warmup: bool = True,
        **options: Any,
    ) -> dict[str, Any]:
        """Continue each prompt, as transformers' `generate_batch`: by names, in order, a `GenerationOutput` for each.

        Args:
            inputs: lists of token ids.
            generation_config, **options: as of `generate`.
            continuous_batching_config, record_timestamps: as of `BatchingManager`.
            progress_bar: show one.
            persistent_manager, warmup: without a meaning here.

        Raises:
            Exception: as `generate`, before any result.
        """
        results: dict[str, Any] = {}
        if not inputs:
            return results
        with (
            self.continuous_batching_context_manager(
                generation_config, continuous_batching_config=continuous_batching_config
            ) as manager,
            progress_bar_of(progress_bar, len(inputs), "requests") as advance,
        ):
            names = manager.add_requests(inputs, record_timestamps=record_timestamps, **options)
            for result in manager:
                results[result.request_id] = result
                advance(1)
        return {name: results[name] for name in names}
