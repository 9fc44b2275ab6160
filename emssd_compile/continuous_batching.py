"""transformers' interface of continuous batching, on a session: requests by name, and results as they come."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from emssd_compile.errors import OptionError, SessionError
from emssd_compile.generation import nth_seed
from emssd_compile.numeric import shown
from emssd_compile.progress import progress_bar as progress_bar_of
from emssd_compile.session import Session
from emssd_compile.stream import Stream

if TYPE_CHECKING:
    from emssd_compile.decoder import Decoder

_NO_LIMIT = 1 << 30


class BatchingManager:
    """What transformers' `ContinuousBatchingManager` is to code that uses one. Made by `init_continuous_batching`.

    Requests run in a session, which is open from `start` to `stop`. Results are transformers' `GenerationOutput`, with
    all new tokens so far: one for each token of a request that streams, and one when a request has ended. Requests that
    cannot be decoded are refused by `add_request`.

    Args:
        decoder: what decodes.
        generation_config: defaults of all requests.
        batching: transformers' `ContinuousBatchingConfig`, of which `max_queue_size`, `return_logprobs` and `seed` are
            read: the others are about its own caches and kernels.
    """

    def __init__(self, decoder: Decoder, generation_config: Any = None, batching: Any = None) -> None:
        from transformers.generation.continuous_batching import requests

        self._kinds = requests
        self._decoder, self._config = decoder, generation_config
        self._max_queue = getattr(batching, "max_queue_size", 0) or _NO_LIMIT
        self._tells = bool(getattr(batching, "return_logprobs", False))
        self._seed: int | None = getattr(batching, "seed", None)
        self._session: Session | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None  # runs it
        self._open: set[str] = set()  # names of requests that have not ended
        self._streams: dict[str, Stream] = {}  # theirs
        self._results: deque[Any] = deque()
        self._handlers: dict[str, tuple[Callable[[Any], None], asyncio.AbstractEventLoop]] = {}
        self._changed = threading.Condition()  # guards what is above
        self._num_requests = 0
        self._stopping = False

    def start(self) -> None:
        """Open the session. Raises what `Decoder.session` does."""
        if self.is_running():
            return
        self._session, self._stopping = self._decoder.session(max_queue=self._max_queue), False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="emssd_compile.results", daemon=True)
        self._thread.start()

    def is_running(self) -> bool:
        """Whether requests are taken."""
        return self._session is not None and not self._session.closed

    def stop(
        self,
        block: bool = True,
        timeout: float | None = None,
        keep_for_next_session: bool = False,
        hard_stop: bool = False,
    ) -> None:
        """Take no more requests, let those that run end, or cancel them with `hard_stop`; all results can be had then.

        Args:
            block: return when all have ended; else they go on, and end in the background.
            timeout: seconds to wait for them; then they are cancelled. None for as long as it takes.
            keep_for_next_session: without a meaning here: what was compiled is kept with the model.
            hard_stop: cancel what has not ended.
        """
        if self._thread is None:
            return
        self._stopping = True
        if not block:
            threading.Thread(target=self.stop, args=(True, timeout, False, hard_stop), daemon=True).start()
            return
        with self._changed:
            if not hard_stop:
                hard_stop = not self._changed.wait_for(lambda: not self._open, timeout)
            session, self._session = self._session, None
        if session is None:  # another stop was first, and has not come to its end perhaps
            self._thread.join(timeout)
            return
        assert self._loop is not None
        try:
            session.close(wait=not hard_stop)
            with self._changed:
                self._changed.wait_for(lambda: not self._open)
                self._handlers.clear()
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    @property
    def background_thread_status(self) -> SimpleNamespace:
        """`fatal_error`: the exception of a step that has ended all requests; None if there was none."""
        return SimpleNamespace(fatal_error=self._session.failure if self._session else None)

    def destroy(self) -> None:
        """Cancel what has not ended, and stop."""
        self.stop(hard_stop=True)

    def add_request(
        self,
        input_ids: Sequence[int],
        request_id: str | None = None,
        max_new_tokens: int | None = None,
        streaming: bool = False,
        record_timestamps: bool = False,
        eos_token_id: int | Sequence[int] | None = None,
        **options: Any,
    ) -> str:
        """Have a prompt continued; returns the request's name. Waits for room if the queue is full.

        Args:
            input_ids: token ids.
            request_id: its name; None for one that is made up.
            max_new_tokens, eos_token_id, **options: as of `generate`; by default those of the config. An
                `eos_token_id` of -1 is none.
            streaming: give a result for each token, too.
            record_timestamps: note when each token came, seconds of `time.perf_counter`.

        Raises:
            SessionError: the manager does not run.
            OptionError: a request of that name has not ended yet.
            Exception: as `Session.submit`.
        """
        session = self._session
        if session is None or self._stopping:
            raise SessionError("add_request: the manager does not run; call start() first")
        if max_new_tokens is not None:
            options["max_new_tokens"] = max_new_tokens
        if eos_token_id is not None:
            options["eos_token_id"] = None if eos_token_id == -1 else eos_token_id
        if self._tells:
            options |= {"logprobs": True, "return_dict_in_generate": True}
        with self._changed:
            number, self._num_requests = self._num_requests, self._num_requests + 1
            name = f"req_{number}" if request_id is None else request_id
            if name in self._open:
                raise OptionError(f"request_id={shown(name)}: a request of that name has not ended yet")
            self._open.add(name)
        own = None if self._seed is None else self._seed + number
        seed = options.pop("seed", own)
        try:
            stream = session.submit([*input_ids], self._config, seed=seed, timeout=None, **options)
        except BaseException:
            with self._changed:
                self._open.discard(name)
                self._handlers.pop(name, None)  # nothing comes that it could be told
                self._changed.notify_all()
            raise
        with self._changed:
            self._streams[name] = stream
        output = self._kinds.GenerationOutput(request_id=name, prompt_ids=[*input_ids])
        output.timestamps = [] if record_timestamps else None
        assert self._loop is not None
        asyncio.run_coroutine_threadsafe(self._follow(stream, output, streaming), self._loop)
        return name

    def add_requests(self, inputs: Sequence[Sequence[int]], **options: Any) -> list[str]:
        """`add_request` of each; returns their names in order. A `seed` gives each its own, as in `generate`."""
        if (seed := options.pop("seed", None)) is None:
            return [self.add_request(ids, **options) for ids in inputs]
        return [self.add_request(ids, seed=nth_seed(seed, number), **options) for number, ids in enumerate(inputs)]

    def cancel_request(self, request_id: str) -> None:
        """End a request with what it has; without effect if it has ended."""
        with self._changed:
            stream = self._streams.get(request_id)
        if stream is not None:
            stream.cancel()

    def get_result(self, request_id: str | None = None, timeout: float | None = None) -> Any:
        """The next result, or the next of one request; None if none comes within `timeout` seconds, or ever.

        Results of requests with a handler are not among them.
        """

        def found() -> Any:
            return next((each for each in self._results if request_id in (None, each.request_id)), None)

        def is_over() -> bool:
            return not self._open if request_id is None else request_id not in self._open

        with self._changed:
            self._changed.wait_for(lambda: found() is not None or is_over(), timeout)
            result = found()
            if result is not None:
                self._results.remove(result)
            return result

    def request_id_iter(self, request_id: str) -> Iterator[Any]:
        """The results of one request, up to its last."""
        while (result := self.get_result(request_id)) is not None:
            yield result
            if result.is_finished():
                return

    def __iter__(self) -> Iterator[Any]:
        """Results as they come, until no request is left."""
        while (result := self.get_result()) is not None:
            yield result

    def register_result_handler(self, request_id: str, callback: Callable[[Any], None]) -> None:
        """Have results of a request handed to a function, in the event loop that runs here; also those that wait."""
        loop = asyncio.get_running_loop()
        with self._changed:
            self._handlers[request_id] = callback, loop
            early = [each for each in self._results if each.request_id == request_id]
            for result in early:
                self._results.remove(result)
                self._deliver(result)

    async def _follow(self, stream: Stream, output: Any, streaming: bool) -> None:
        """Deliver what becomes of a request; in the manager's own event loop."""
        status = self._kinds.RequestStatus
        try:
            async for token in stream:
                output.generated_tokens.append(token)
                if output.timestamps is not None:
                    output.timestamps.append(time.perf_counter())
                if streaming:
                    self._put(output, status.DECODING)
            if self._tells and output.generated_tokens:
                output.logprobs = stream.result().logprobs[0].tolist()
        except Exception as error:
            output.error = str(error)
        self._put(output, status.FINISHED if output.error is None else status.FAILED)

    def _put(self, output: Any, status: Any) -> None:
        result = self._kinds.GenerationOutput(**vars(output) | {"status": status})
        result.generated_tokens = [*output.generated_tokens]
        result.timestamps = None if output.timestamps is None else [*output.timestamps]
        with self._changed:
            if result.is_finished():
                del self._streams[result.request_id]
                self._open.discard(result.request_id)
            self._deliver(result)
            self._changed.notify_all()

    def _deliver(self, result: Any) -> None:
        if result.request_id not in self._handlers:
            self._results.append(result)
            return
        callback, loop = self._handlers[result.request_id]
        if result.is_finished():
            del self._handlers[result.request_id]
        with contextlib.suppress(RuntimeError):  # its loop is closed, and nobody is there to hear of it
            loop.call_soon_threadsafe(callback, result)


class ContinuousBatching:
    """The three ways into transformers' continuous batching, of what has sessions."""

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
