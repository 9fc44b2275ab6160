"""Requests that come and go while others decode."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from emssd_compile.ambient import neutral
from emssd_compile.calls import read_call
from emssd_compile.errors import OptionError
from emssd_compile.numeric import integer, seconds
from emssd_compile.session_thread import SessionThread
from emssd_compile.step.probe import ReadingSpec
from emssd_compile.stream import Stream, Ticket

if TYPE_CHECKING:
    from emssd_compile.decoder import Decoder
    from emssd_compile.grammar import Grammar
    from emssd_compile.lowering.halves import LogitsHook


class Session:
    """Takes requests from any number of threads and event loops while others decode. Made by `fast.session()`.

    One thread decodes. It starts requests in free rows between two steps, first come, first served. Each gets the
    tokens that `generate` gives for its prompt alone, whatever runs beside it, if `fast.stats.guarantee` is "tokens".
    Where its options ask for a form of the step that must be compiled first, all wait for that (`fast.warmup(...)` does
    it beforehand). A request that sets an option which acts on its EOS, such as `min_new_tokens`, or a `logits_hook`,
    waits until those with another `eos_token_id` have ended, and they wait for it.

    Leaving the `with` waits for all requests; leaving it by an exception cancels them. So does dropping the session and
    all of its streams.
    """

    def __init__(self, decoder: Decoder, *, max_queue: int, options: Mapping[str, Any]) -> None:
        most = integer("max_queue", max_queue, least=0)
        self._scheduler = SessionThread(decoder, most, decoder._used_by(options))
        self._scheduler.open()
        self._close_when_dropped = weakref.finalize(self, self._scheduler.stop)

    def submit(
        self,
        prompt: object,
        generation_config: object | None = None,
        *,
        deadline: float | None = None,
        timeout: float | None = 0,
        logits_hook: LogitsHook | None = None,
        grammar: Grammar | None = None,
        seed: int | None = None,
        cache_salt: str | None = None,
        **options: Any,
    ) -> Stream:
        """Have one prompt continued; everything is checked before this returns.

        Stopping criteria, streamers and Python that changes logits are called by the session's thread, and see the
        request alone. What they raise ends that request, and is raised to its readers.

        Args:
            prompt: token ids: a list, or a 1-D tensor or array of numpy.
            generation_config, logits_hook, grammar, seed, cache_salt, **options: as of `generate`, for this prompt.
                `max_time` counts from when it starts.
            deadline: seconds from now after which it is ended with what it has, waiting or running.
            timeout: seconds to wait for room in a full queue; None for as long as it takes.

        Raises:
            QueueFullError: `max_queue` requests wait for a row.
            SessionError: the session is closed.
            ReentryError: the session's own thread would wait for room.
            Exception: what `generate` raises before any work: of the prompt, its size and its options.
        """
        limit = None if deadline is None else seconds("deadline", deadline)
        patience = math.inf if timeout is None else seconds("timeout", timeout)
        with neutral(None):
            call = read_call(
                self._scheduler.terms,
                [prompt],
                generation_config,
                options,
                logits_hook=logits_hook,
                grammar=grammar,
                seed=seed,
                cache_salt=cache_salt,
            )
        if len(call.requests) > 1:
            raise OptionError(
                f"num_return_sequences={len(call.requests)}: a stream is one text; submit the prompt as often"
            )
        ticket = Ticket(call, limit)
        self._scheduler.put(ticket, None if math.isinf(patience) else patience)
        return Stream(ticket, self)

    def close(self, wait: bool = False) -> None:
        """Take no more requests, and end: cancel those that wait or run, or let them finish.

        Args:
            wait: let them finish; and raise the exception of a step that has closed the session, if one did.
        """
        self._scheduler.close(wait)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(wait=kind is None)

    @property
    def closed(self) -> bool:
        """Whether it takes no more requests."""
        return self._scheduler.is_closing

    @property
    def failure(self) -> BaseException | None:
        """The exception of a step, if one has closed it."""
        return self._scheduler.failure

    @property
    def num_requests(self) -> tuple[int, int]:
        """How many requests have a row, and how many wait for one."""
        return self._scheduler.num_requests()

    @property
    def num_rows(self) -> int:
        """How many requests can have a row at a time."""
        return self._scheduler.num_rows

    @property
    def capacity(self) -> int:
        """How many tokens a row can hold, prompt and new ones together."""
        return self._scheduler.capacity

    @property
    def readings(self) -> Mapping[str, ReadingSpec]:
        """What probes may tell of each token, by the names of results."""
        return self._scheduler.terms.readings

    def wake(self) -> None:
        """Have the thread look at what has changed; `Stream.cancel` does."""
        self._scheduler.wake()

    def is_inside(self) -> bool:
        """Whether the session's own thread asks."""
        return self._scheduler.is_inside()
