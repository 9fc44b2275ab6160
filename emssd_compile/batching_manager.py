"""transformers' manager of continuous batching, on a session: requests by name, and results as they come."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from emssd_compile.batching_results import Results
from emssd_compile.errors import SessionError
from emssd_compile.generation import nth_seed
from emssd_compile.session import Session
from emssd_compile.stream import Stream

if TYPE_CHECKING:
    from emssd_compile.decoder import Decoder

_NO_LIMIT = 1 << 30


class BatchingManager:
    """What transformers' `ContinuousBatchingManager` is to code that uses one. Made by `init_continuous_batching`.

    Requests run in a session, which is open from `start` to `stop`. Results are transformers' `GenerationOutput`, with
    all new tokens so far: one for each token of a request that streams, and one when a request has ended. Requests that
    cannot be decoded are refused by `add_request`. Threads may start and stop it at once.

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
        self._results = Results()
        self._run: _Run | None = None
        self._changed = threading.Condition()  # guards it

    def start(self) -> None:
        """Open the session, once what a `stop` has left to end has ended. Raises what `Decoder.session` does."""
        with self._changed:
            self._changed.wait_for(lambda: self._run is None or not self._run.is_stopping)
            if self.is_running():
                return
            if self._run is not None:  # a step of it failed
                self._end()
            self._run = _Run(self._decoder.session(max_queue=self._max_queue))

    def is_running(self) -> bool:
        """Whether its session is open."""
        run = self._run
        return run is not None and not run.session.closed

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
        with self._changed:
            run = self._run
            if run is None:
                return
            run.is_stopping = True
        if block:
            self._finish(run, timeout, hard_stop)
        else:
            threading.Thread(target=self._finish, args=(run, timeout, hard_stop), daemon=True).start()

    def _finish(self, run: _Run, timeout: float | None, hard_stop: bool) -> None:
        """Let what runs end, or cancel it; of several that do, the first closes the session."""
        try:
            run.session.close(wait=not hard_stop and self._results.wait(timeout))
        finally:
            with self._changed:
                if self._run is run:
                    self._end()

    def _end(self) -> None:
        assert self._run is not None
        self._results.wait()
        self._results.drop_handlers()
        self._run.end()
        self._run = None
        self._changed.notify_all()

    @property
    def background_thread_status(self) -> SimpleNamespace:
        """`fatal_error`: the exception of a step that has ended all requests; None if there was none."""
        run = self._run
        return SimpleNamespace(fatal_error=run.session.failure if run else None)

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
        run = self._run
        if run is None or run.is_stopping:
            raise SessionError("add_request: the manager does not run; call start() first")
        if max_new_tokens is not None:
            options["max_new_tokens"] = max_new_tokens
        if eos_token_id is not None:
            options["eos_token_id"] = None if eos_token_id == -1 else eos_token_id
        if self._tells:
            options |= {"logprobs": True, "return_dict_in_generate": True}
        number, name = self._results.begin(request_id)
        own = None if self._seed is None else self._seed + number
        seed = options.pop("seed", own)
        try:
            stream = run.session.submit([*input_ids], self._config, seed=seed, timeout=None, **options)
        except BaseException:
            self._results.refuse(name)
            raise
        self._results.follow(name, stream)
        output = self._kinds.GenerationOutput(request_id=name, prompt_ids=[*input_ids])
        output.timestamps = [] if record_timestamps else None
        run.have_done(self._read(stream, output, streaming))
        return name

    def add_requests(self, inputs: Sequence[Sequence[int]], **options: Any) -> list[str]:
        """`add_request` of each; returns their names in order. A `seed` gives each its own, as in `generate`."""
        if (seed := options.pop("seed", None)) is None:
            return [self.add_request(ids, **options) for ids in inputs]
        return [self.add_request(ids, seed=nth_seed(seed, number), **options) for number, ids in enumerate(inputs)]

    def cancel_request(self, request_id: str) -> None:
        """End a request with what it has; without effect if it has ended."""
        self._results.cancel(request_id)

    def get_result(self, request_id: str | None = None, timeout: float | None = None) -> Any:
        """The next result, or the next of one request; None if none comes within `timeout` seconds, or ever.

        Results of requests with a handler are not among them.
        """
        return self._results.get(request_id, timeout)

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
        self._results.handle(request_id, callback, asyncio.get_running_loop())

    async def _read(self, stream: Stream, output: Any, streaming: bool) -> None:
        """Tell what becomes of a request."""
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
        self._results.put(result)


class _Run:
    """From a `start` to its `stop`: a session, and an event loop in a thread of its own, which reads the streams.

    Attributes:
        is_stopping: whether it takes no more requests.
    """

    def __init__(self, session: Session) -> None:
        self.session, self.is_stopping = session, False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="emssd_compile.results", daemon=True)
        self._thread.start()

    def have_done(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something in the event loop."""
        asyncio.run_coroutine_threadsafe(work, self._loop)

    def end(self) -> None:
        """End the event loop; the session is closed, and all its requests have been read."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
